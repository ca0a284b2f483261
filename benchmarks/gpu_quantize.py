"""Time and memory of quantizing a 7B checkpoint on one GPU, read from disk.

    python benchmarks/gpu_quantize.py [--work runs/benchmarks] [--tiny]

A random checkpoint of the shape of Llama 2 7B (bf16, 13 GB) is written in shards, then
quantized by round to nearest to FP8, and by GPTQ on 128 x 2048 tokens, drift correction
on, to Q4_K with refitted scales in a GGUF file and to INT4 in groups of 128. Each run
is a process of its own, export included, without evaluation and without reopening the
files. ``--only REGEX`` selects runs; ``--blocks N`` gives the model fewer blocks than
32, which the result's name says. ``--tiny`` is a model of two small blocks on whatever
device is there, to try the script.

Peak GPU memory is what torch reserved; peak host memory is the largest resident size
that the operating system saw, pinned memory included. The operations counted are those
of the matrix products that the method cannot do without: one pass of each of the two
models, the Gram and drift products, and the factorizations.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from memory import CASES, write_checkpoint
from results import write_result

SHAPE = CASES["rtn-7b"].shape
TINY = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
# What a run is, the format of its files, and the seconds that it should take at most.
RUNS = {
    "FP8 (rtn)": ({"method": "rtn", "scheme": "fp8"}, "safetensors", 40),
    "Q4_K GGUF (gptq)": ({"method": "gptq", "scheme": "q4_k"}, "gguf", 300),
    "INT4 g128 (gptq)": ({"method": "gptq", "scheme": "int4-g128"}, "safetensors", 240),
}
SAMPLES, LENGTH = 128, 2048


def run_here(config: dict[str, Any]) -> None:
    """Run one config in this process and leave what it took beside the report."""
    import resource

    import compress

    started = time.perf_counter()
    compress.run(config)
    taken = time.perf_counter() - started
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    cuda = torch.cuda.is_available()
    figures = {
        "seconds": round(taken, 1),
        "peak GPU bytes": torch.cuda.max_memory_reserved() if cuda else 0,
        "of these allocated": torch.cuda.max_memory_allocated() if cuda else 0,
        "peak host bytes": host,
    }
    (Path(config["run"]["workdir"]) / "cost.json").write_text(json.dumps(figures))


def fastest_product(device: str, size: int = 8192) -> float:
    """Return operations a second of a bfloat16 matrix product, the card's ceiling."""
    size = size if device == "cuda" else 256
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    for _ in range(3):
        a @ a
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(20):
        a @ a
    if device == "cuda":
        torch.cuda.synchronize()
    return 20 * 2 * size**3 / (time.perf_counter() - started)


def operations(shape: dict[str, int], tokens: int) -> dict[str, float]:
    """Return floating-point operations of GPTQ with drift, by kind."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    blocks = shape["num_hidden_layers"]
    weights = 4 * hidden**2 + 3 * hidden * inner
    squares = 3 * hidden**2 + inner**2
    cubes = 3 * hidden**3 + inner**3
    return {
        "two forward passes": 2 * 2 * tokens * weights * blocks,
        "Gram and drift": 2 * tokens * squares * (0.625 + 1) * blocks,
        # Two factorizations of n^3 / 3, an inverse of 2 n^3 / 3, the drift's solve.
        "Cholesky": cubes * 4 / 3 * blocks,
        "error feedback": 2 * blocks * (4 * hidden**3 + 3 * hidden**2 * inner),
    }


def run_apart(
    script: str,
    model: Path,
    work: Path,
    *,
    quantize: dict[str, str],
    kind: str,
    windows: tuple[int, int],
    flags: tuple[str, ...] = (),
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run one config in a process of ``script``; return its report, and what it took.

    Args:
        script: Calls :func:`run_here` when it is given ``--config``.
        model: Folder of the checkpoint.
        work: Gets the work directory ``run``, made anew.
        quantize: Section of the config.
        kind: Format of the export.
        windows: Of calibration: how many, and tokens of each.
        flags: More arguments of the script.
    """
    workdir = work / "run"
    shutil.rmtree(workdir, ignore_errors=True)
    samples, length = windows
    config = {
        "model": {"path": str(model)},
        "calibration": {"data": "mix", "samples": samples, "sequence_length": length},
        "quantize": quantize,
        "export": [{"format": kind}],
        "run": {"workdir": str(workdir), "verify": False},
    }
    command = [sys.executable, script, "--config", json.dumps(config), *flags]
    # As the command line sets it.
    settings = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ}
    started = time.perf_counter()
    subprocess.run(command, check=True, env=settings)
    wall = time.perf_counter() - started
    report = json.loads((workdir / "report.json").read_text())
    cost = json.loads((workdir / "cost.json").read_text())
    stages = {f"{stage} s": round(s, 1) for stage, s in report["seconds"].items()}
    codes = round(sum(layer["seconds"] for layer in report["layers"]), 1)
    stages["of quantize, codes s"] = codes
    return report, {"wall s": round(wall, 1), **cost, **stages}


def measure(
    label: str,
    quantize: dict[str, str],
    kind: str,
    model: Path,
    work: Path,
    tiny: bool,
) -> dict[str, Any]:
    """Return what one run took."""
    windows = (4, 64) if tiny else (SAMPLES, LENGTH)
    report, taken = run_apart(
        __file__, model, work, quantize=quantize, kind=kind, windows=windows
    )
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    moved = size + report["size_bytes"][kind]
    return {
        "run": label,
        **taken,
        "checkpoint bytes": size,
        "export bytes": report["size_bytes"][kind],
        "read and written GB/s": round(moved / taken["wall s"] / 1e9, 2),
    }


def main() -> None:
    """Write the checkpoint, run both cases, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", default="", help="runs that match")
    parser.add_argument("--blocks", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--config", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.config:
        run_here(json.loads(arguments.config))
        return
    work = arguments.work / "gpu_quantize"
    shutil.rmtree(work, ignore_errors=True)
    whole = SHAPE["num_hidden_layers"]
    shape = TINY if arguments.tiny else SHAPE | {"num_hidden_layers": arguments.blocks}
    started = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    write_checkpoint(work / "model", shape, device=device)
    print(f"checkpoint: {time.perf_counter() - started:.0f} s", flush=True)
    rows = []
    for label, (quantize, kind, limit) in RUNS.items():
        if not re.search(arguments.only, label):
            continue
        row = measure(label, quantize, kind, work / "model", work, arguments.tiny)
        if arguments.blocks == whole:
            row["limit s"] = limit
        rows.append(row)
        print(json.dumps(rows[-1]), flush=True)
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    peak = fastest_product(device)
    counted = operations(shape, SAMPLES * LENGTH)
    taken = rows[-1].get("quantize s") or 1.0
    part = "" if arguments.blocks == whole else f"_{arguments.blocks}_blocks"
    path = write_result(
        f"gpu_quantize{'_tiny' if arguments.tiny else part}",
        claim="Llama 2 7B shape, random weights, one GPU, disk to disk: FP8 in 40 s, "
        "GPTQ on 128 x 2048 tokens to INT4 within 240 s and to Q4_K within 300 s, at "
        "most 10 GB on the GPU and 8 GB in the host.",
        figures={
            "GPU": card,
            "processors": os.cpu_count(),
            "blocks": shape["num_hidden_layers"],
            "TFLOP/s of a bfloat16 product of 8192": peak / 1e12,
            "share of that in two forward passes, Gram and drift": sum(
                list(counted.values())[:2]
            )
            / taken
            / peak,
            "Runs": rows,
            "Operations of GPTQ": [
                {
                    "what": what,
                    "TFLOP": count / 1e12,
                    "TFLOP/s if it took all the time": count / 1e12 / taken,
                }
                for what, count in counted.items()
            ],
        },
    )
    print(path)


if __name__ == "__main__":
    main()
