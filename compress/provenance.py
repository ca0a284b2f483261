"""What a result came from: versions, hardware, and digests of models and configs."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.core.artifact import ModelDescription, TensorSource

if TYPE_CHECKING:
    from compress.calibration.data import CalibrationTokens
    from compress.config.schema import Config
    from compress.pipeline import Run

_LIBRARIES = (
    "torch",
    "transformers",
    "safetensors",
    "gguf",
    "compressed-tensors",
    "llama-cpp-python",
)
_SAMPLE_BYTES = 1 << 16
_SAMPLES = 16


def versions() -> dict[str, str]:
    """Return versions of Python, of the toolkit and of the libraries that matter."""
    from compress import __version__

    found = {"compress": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware(device: str) -> dict[str, Any]:
    """Return processor, cores, memory and device in words and numbers."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    return {
        "cpu": cpu,
        "cores": cores or os.cpu_count(),
        "memory_bytes": pages,
        "device": device,
    }


def peak_memory_bytes() -> int:
    """Return the largest resident size this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_peak_bytes(device: str) -> int:
    """Return the most bytes in use: of a GPU, or of the process on a CPU."""
    import torch

    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(device))
    return peak_memory_bytes()


def process(rank: int, device: str) -> dict[str, Any]:
    """Return where a process of a run works, and the most memory that it took."""
    found = {
        "rank": rank,
        "host": platform.node(),
        "device": device,
        "peak_memory_bytes": peak_memory_bytes(),
    }
    if device.startswith("cuda"):
        found["device_peak_bytes"] = device_peak_bytes(device)
    return found


def weights_digest(source: TensorSource) -> str:
    """Return the SHA-256 of names, types and bytes of all tensors."""
    import torch

    digest = hashlib.sha256()
    for name in source.tensors():
        tensor = source.read(name).contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest_of(data: Any) -> str:
    """Return the SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a small file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def model_digest(model: ModelDescription, path: Path) -> str:
    """Return a digest of a checkpoint: config, names and shapes, sizes, and samples.

    Files are sampled, sixteen runs of 64 KiB each, since reading gigabytes twice is not
    worth it: two checkpoints that differ only between the samples look alike.
    """
    digest = hashlib.sha256(json.dumps(dict(model.config), default=str).encode())
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as handle:
            for i in range(_SAMPLES):
                handle.seek(max(0, (size - _SAMPLE_BYTES) * i // (_SAMPLES - 1)))
                digest.update(handle.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def subject_digest(run: Run) -> str:
    """Return a digest of the weights that a run compresses, pruned or not."""
    from compress.model.loading import locate

    path = locate(run.config.model.path)
    if run.pruned is not None and run.pruning is not None:
        path = run.pruning.root / str(run.pruned["folder"])
    return model_digest(run.subject.description, path)


def reshaping_fingerprint(config: Config) -> dict[str, str]:
    """Return digests of what is told to pruning and recovery, known at the start."""
    recover = config.recover
    if recover is not None and not recover.trains_weights:
        recover = None  # a prompt comes after the codes
    sections = {"prune": config.prune, "recover": recover}
    return {
        name: digest_of(section.model_dump(mode="json") if section else None)
        for name, section in sections.items()
    }


def fingerprint(run: Run, tokens: CalibrationTokens | None) -> dict[str, str]:
    """Return a digest of each thing that decides the codes of a run, by name."""
    from compress.model.loading import locate

    quantize = run.config.quantize
    methods = quantize.model_dump(mode="json") if quantize else {}
    methods.pop("scale_dtype", None)  # the plan has the one that was resolved
    methods.pop("upgrade_inputs", None)  # comes after the codes
    imatrix = run.config.calibration.imatrix
    plan: Any = run.plan.to_json() if run.search is None else run.search.identity
    tune = run.config.tune
    known = {"calibration.imatrix": file_digest(Path(imatrix))} if imatrix else {}
    if tune is not None:
        known["tune"] = digest_of(tune.model_dump(mode="json"))
    return {
        **known,
        "model": model_digest(run.base, locate(run.config.model.path)),
        **reshaping_fingerprint(run.config),
        "calibration": tokens.digest if tokens else "none",
        "calibration.dtype": str(run.runner.dtype) if tokens else "none",
        "transforms": digest_of(run.chain.identity()),
        "quantize": digest_of(methods),
        "plan": digest_of(plan),
        "run.seed": str(run.config.run.seed),
        "compress version": versions()["compress"],
    }
