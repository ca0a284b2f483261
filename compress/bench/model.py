"""``compress bench model``: tokens a second, memory and energy of a folder's model.

Ways to run it, each in a process of its own: dense, with decoded weights (or the
original, if it is given); those rounded to 8 bits, by torch's own integer product; and
as it is served, with codes. Random prompts of fixed
length, a fixed number of generated tokens, greedy and without stopping, so that both do
the same work; on a GPU each step is one CUDA graph. Medians and quartiles of whole
requests after some that do not count.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from compress.bench.efficiency import compression_rate
from compress.core.errors import (
    CheckpointError,
    ConfigError,
    ExportError,
    MissingDependencyError,
)
from compress.progress import progress_bar
from compress.provenance import hardware, versions

_LOG = logging.getLogger(__name__)
DENSE, INT8, SERVED = "dense", "int8", "served"
WAYS = (DENSE, INT8, SERVED)


_CPU: dict[str, Any] = {
    **{"ways": (DENSE, SERVED), "batches": (1, 4), "prefill_tokens": 256},
    **{"context_tokens": 64, "new_tokens": 16, "runs": 5, "warm_up": 3},
    **{"idle_seconds": 30.0, "windows": 2},
}
_LLAMACPP: dict[str, Any] = {
    **{"batches": (1, 8), "context_tokens": 128, "new_tokens": 64},
}
_QUICK_CPU: dict[str, Any] = {
    **{"batches": (1,), "prefill_tokens": 32, "context_tokens": 16, "new_tokens": 4},
    **{"runs": 2, "warm_up": 1, "idle_seconds": 0.5, "windows": 1},
}
_QUICK_GPU: dict[str, Any] = {
    **{"batches": (1, 8), "new_tokens": 32, "runs": 3, "warm_up": 1},
    **{"idle_seconds": 3.0, "windows": 2},
}


@dataclass(frozen=True)
class ModelSettings:
    """What is measured.

    Attributes:
        folder: A checkpoint; one with 6-bit layers is also run as it is served. A GGUF
            file is served by llama.cpp on the CPU. Or a known shape with random
            weights, ``random:llama-2-7b``.
        original: The model it was made from; ``None`` runs the decoded one, or of a
            GGUF file nothing.
        device: Of torch.
        ways: How to run it, of :data:`WAYS`.
        batches: Sequences at a time.
        prefill_tokens: Length of the prompt whose reading is timed alone.
        context_tokens: Length of the prompts that are continued.
        new_tokens: Generated tokens of each sequence.
        runs: Requests that count.
        warm_up: Requests before them.
        idle_seconds: How long the idle device's power is read before.
        windows: Windows of text for perplexity, only with an original; 0 is none.
        compiled: Run the models through ``torch.compile`` first.
        seed: Of the prompts.
    """

    folder: Path
    original: Path | None = None
    device: str = "cpu"
    ways: Sequence[str] = WAYS
    batches: Sequence[int] = (1, 8, 32)
    prefill_tokens: int = 2048
    context_tokens: int = 128
    new_tokens: int = 128
    runs: int = 5
    warm_up: int = 3
    idle_seconds: float = 30.0
    windows: int = 10
    compiled: bool = False
    seed: int = 0

    @classmethod
    def for_device(
        cls, folder: Path, device: str, *, quick: bool = False
    ) -> ModelSettings:
        """Return settings that suit a device; a CPU gets smaller ones."""
        if device.startswith("cuda"):
            whole = cls(folder, device=device)
            return replace(whole, **_QUICK_GPU) if quick else whole
        small = cls(folder, device=device, **_CPU)
        if folder.suffix == ".gguf":
            small = replace(small, **_LLAMACPP)
        return replace(small, **_QUICK_CPU) if quick else small


def bench_model(
    settings: ModelSettings,
    *,
    apart: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Return figures of a model, run in one way after the other.

    Args:
        settings: What is measured.
        apart: Run each way in a process of its own, as the protocol asks for.
        say: Is told what is being measured.

    Raises:
        CheckpointError: A folder is not there, or no way of running it works.
        ConfigError: A number of the settings makes no sense.
    """
    check_settings(settings)
    ways: list[dict[str, Any]] = []
    errors: dict[str, str] = {}
    for way in progress_bar(_ways(settings), desc="ways", unit="way"):
        say(f"measuring {way} on {settings.device}")
        try:
            ways.append(_apart(settings, way) if apart else _here(settings, way))
        except (CheckpointError, ExportError, BrokenProcessPool) as error:
            errors[way] = str(error)
            _LOG.warning("%s was not measured: %s", way, error)
    if not ways:
        raise CheckpointError("; ".join(errors.values()))
    quality = _quality(settings)
    dense = settings.original or settings.folder
    return {
        "kind": "model",
        "model": str(settings.folder),
        "original": None if settings.original is None else str(settings.original),
        "artefact_bytes": artefact_bytes(settings.folder) or None,
        "dense_bytes": artefact_bytes(dense) if settings.original else None,
        "ways": ways,
        "errors": errors,
        "quality": quality,
        **_ratios(ways, settings, quality),
        "protocol": _protocol(settings, apart=apart),
        "versions": versions(),
        "hardware": hardware(settings.device),
    }


def _ways(settings: ModelSettings) -> list[str]:
    """Return the ways to run; a GGUF file alone is served, and nothing else."""
    is_alone = settings.folder.suffix == ".gguf" and settings.original is None
    return [way for way in settings.ways if way == SERVED or not is_alone]


def check_settings(settings: ModelSettings) -> None:
    """Raise unless a measurement with these settings can begin.

    Raises:
        CheckpointError: A folder is not there.
        ConfigError: A number makes no sense, or the device is not there.
    """
    import torch

    from compress.bench.random_models import is_random, shape_named

    checked = [settings.folder, settings.original]
    if is_random(str(settings.folder)):
        shape_named(str(settings.folder))
        if settings.original is not None:
            raise ConfigError("a random model has no original; leave out --original")
        checked = []
    for folder in checked:
        if folder is not None and folder.suffix == ".gguf":
            _check_gguf(folder, settings)
        elif folder is not None and not (folder / "config.json").is_file():
            raise CheckpointError(
                f"{folder}: no config.json there; give a folder that transformers or "
                "compress.load opens"
            )
    if settings.device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"device {settings.device}: torch {torch.__version__} sees no CUDA device; "
            "use --device cpu"
        )
    unknown = [way for way in settings.ways if way not in WAYS]
    if unknown or not settings.ways:
        raise ConfigError(f"ways are {', '.join(WAYS)}, not {', '.join(unknown)}")
    if not _ways(settings):
        raise ConfigError(
            f"{settings.folder}: llama.cpp runs the file as it is served; leave out "
            "--way, or give --original"
        )
    numbers = {
        "batches": min(settings.batches, default=0),
        "prefill_tokens": settings.prefill_tokens,
        "context_tokens": settings.context_tokens,
        "new_tokens": settings.new_tokens,
        "runs": settings.runs,
    }
    for name, value in numbers.items():
        if value < 1:
            raise ConfigError(f"{name} must be one or more, not {value}")


def _check_gguf(file: Path, settings: ModelSettings) -> None:
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file")
    if settings.device.startswith("cuda"):
        raise ConfigError(
            f"{file}: llama.cpp is timed on the CPU; use --device cpu, or for the GPU "
            "a folder of safetensors"
        )
    if find_spec("llama_cpp") is None:
        raise MissingDependencyError(
            "llama-cpp-python", extra="verify", purpose="timing a GGUF file"
        )


def artefact_bytes(folder: Path) -> int:
    """Return the size of the weights on disk."""
    if folder.suffix == ".gguf":
        return folder.stat().st_size
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _apart(settings: ModelSettings, way: str) -> dict[str, Any]:
    context = get_context("spawn")  # a CUDA context does not survive a fork
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_here, settings, way).result()


def _here(settings: ModelSettings, way: str) -> dict[str, Any]:
    from compress.bench.running import measure

    return measure(settings, way)


def _quality(settings: ModelSettings) -> dict[str, Any] | None:
    """Return perplexities of the original and of the folder, if there are both."""
    if settings.original is None or settings.windows < 1:
        return None
    from compress.scoring import evaluate

    found = evaluate(
        settings.folder,
        base=settings.original,
        windows=settings.windows,
        sequence_length=512,
    )
    return {
        name: {
            "original": found["base_texts"][name]["perplexity"],
            "compressed": figures["perplexity"],
        }
        for name, figures in found["texts"].items()
    }


def _ratios(
    ways: Sequence[dict[str, Any]],
    settings: ModelSettings,
    quality: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return MCR, and how the other ways compare with the dense one."""
    by_name = {way["way"]: way for way in ways}
    dense = by_name.pop(DENSE, None)
    size = None
    if settings.original is not None:
        size = artefact_bytes(settings.original), artefact_bytes(settings.folder)
    performance = None
    if quality:  # the inverse of perplexity, on the first text
        first = next(iter(quality.values()))
        performance = 1 / first["original"], 1 / first["compressed"]
    found: dict[str, Any] = {
        "mcr": compression_rate(size, performance) if size else None,
        "mcr_size_factor": size[0] / size[1] if size and size[1] else None,
        "mcr_performance_factor": (
            performance[1] / performance[0] if performance else None
        ),
    }
    if dense is not None:
        compared = {name: _over_dense(way, dense) for name, way in by_name.items()}
        found["over_dense"] = compared
    return found


def _over_dense(way: dict[str, Any], dense: dict[str, Any]) -> dict[str, Any]:
    pairs = [
        (a, b)
        for a in dense["requests"]
        for b in way["requests"]
        if a["batch"] == b["batch"] and "error" not in a and "error" not in b
    ]
    return {
        "weights_bytes": way["weights_bytes"] / dense["weights_bytes"],
        "prefill_tok_s": _over(way["prefill"], dense["prefill"], "tok_s"),
        "it_tok_s": {str(a["batch"]): b["it_tok_s"] / a["it_tok_s"] for a, b in pairs},
    }


def _over(a: dict[str, Any], b: dict[str, Any], key: str) -> float | None:
    if key not in a or key not in b:
        return None
    return float(a[key] / b[key])


def _protocol(settings: ModelSettings, *, apart: bool) -> dict[str, Any]:
    import torch

    described = {k: v for k, v in asdict(settings).items() if "folder" not in k}
    described.pop("original")
    return {
        **described,
        "batches": list(settings.batches),
        "decoding": "greedy, fixed number of tokens, no stopping",
        "cache": "static",
        "threads": torch.get_num_threads(),
        "one_process_each": apart,
    }
