"""One run on 1 and more GPUs or processes: time, memory of each, and the same codes.

    python benchmarks/scaling.py [--processes 1 2] [--orders layer block]
        [--blocks 32] [--small] [--work runs/benchmarks]

A random checkpoint of the shape of Llama 2 7B (bf16, 13 GB) is quantized by GPTQ to
INT4 in groups of 128 on 128 x 2048 tokens, drift correction on, by ``torchrun
--nproc-per-node N -m compress run``, export included. ``--small`` is a model of four
blocks on 32 x 256 tokens, for a CPU, where each process has one thread.

Each order of ``quantize.order`` is run. Speedup is the time of one process over that
of ``N``, efficiency is speedup over ``N``; ``same codes`` is the share of codes that
are those of one process.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from memory import CASES, write_checkpoint
from results import write_result
from safetensors import safe_open

SMALL = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}


def run(
    model: Path, workdir: Path, processes: int, *, order: str, small: bool
) -> dict[str, Any]:
    """Return the report of a run, and the seconds that its processes lived."""
    shutil.rmtree(workdir, ignore_errors=True)
    samples, length = (32, 256) if small else (128, 2048)
    config = {
        "model": {"path": str(model)},
        "calibration": {"data": "mix", "samples": samples, "sequence_length": length},
        "quantize": {"method": "gptq", "scheme": "int4-g128", "order": order},
        "export": [{"format": "safetensors"}],
        "run": {"workdir": str(workdir), "verify": False},
    }
    threads = max(1, (os.cpu_count() or 1) // processes)
    if small:
        config["run"]["threads"] = threads = 1
    path = workdir.with_suffix(".yaml")
    path.write_text(json.dumps(config))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command = [sys.executable, *launcher, str(processes), "-m", "compress", "run"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    started = time.perf_counter()
    subprocess.run([*command, str(path)], check=True, env=environment)
    wall = time.perf_counter() - started
    report: dict[str, Any] = json.loads((workdir / "report.json").read_text())
    return {**report, "wall": wall}


def same_codes(one: Path, many: Path) -> float:
    """Return the share of codes of one run that another one has too."""
    same = total = 0
    for path in sorted((one / "blocks").glob("*.safetensors")):
        other = many / "blocks" / path.name
        with safe_open(path, "pt") as a, safe_open(other, "pt") as b:
            for name in (n for n in a.keys() if n.endswith(".codes")):
                left, right = a.get_tensor(name), b.get_tensor(name)
                same += int((left == right).sum())
                total += left.numel()
    return same / total


def row_of(report: dict[str, Any], order: str, processes: int) -> dict[str, Any]:
    """Return the figures of one run."""
    members = report["processes"]
    seconds = report["seconds"]
    row = {
        "order": order,
        "processes": processes,
        "wall s": round(report["wall"], 1),
        "run s": round(sum(seconds.values()), 1),
        "quantize s": round(seconds["quantize"], 1),
        "of these, all codes s": round(sum(x["seconds"] for x in report["layers"]), 1),
        "peak host bytes of each": [m["peak_memory_bytes"] for m in members],
    }
    if "device_peak_bytes" in members[0]:
        row["peak GPU bytes of each"] = [m["device_peak_bytes"] for m in members]
    return row


def main() -> None:
    """Write the checkpoint, run it by each number of processes, write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--orders", nargs="+", default=["layer", "block"])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--blocks", type=int, default=32, help="of the 7B shape")
    arguments = parser.parse_args()
    work, small = arguments.work / "scaling", arguments.small
    shutil.rmtree(work, ignore_errors=True)
    load = os.getloadavg()[0]
    cuda = torch.cuda.is_available()
    large = {**CASES["rtn-7b"].shape, "num_hidden_layers": arguments.blocks}
    shape = SMALL if small else large
    write_checkpoint(work / "model", shape, device="cuda" if cuda else "cpu")
    rows: list[dict[str, Any]] = []
    cases = [(o, n) for o in arguments.orders for n in arguments.processes]
    for order, count in cases:
        workdir = work / f"{order}-of-{count}"
        report = run(work / "model", workdir, count, order=order, small=small)
        row = row_of(report, order, count)
        first = next((r for r in rows if r["order"] == order), row)
        speedup = first["quantize s"] * first["processes"] / row["quantize s"]
        row["speedup of quantize"] = round(speedup, 2)
        row["efficiency"] = round(speedup / count, 2)
        origin = work / f"{order}-of-{first['processes']}"
        row["same codes"] = same_codes(origin, workdir)
        rows.append(row)
        print(json.dumps(row), flush=True)
    size = "a small Llama" if small else f"{arguments.blocks} blocks of a Llama 2 7B"
    card = torch.cuda.get_device_name() if cuda else "none; one thread a process"
    where = f"GPUs ({card})" if cuda else "processes of one thread each"
    path = write_result(
        "scaling_small" if small else f"scaling_{arguments.blocks}_blocks",
        claim=f"GPTQ INT4 of {size}, random weights, on "
        f"{' and '.join(map(str, arguments.processes))} {where}: the codes are those "
        "of one.",
        command=" ".join(
            ["python benchmarks/scaling.py", *(["--small"] if small else [])]
            + ["--processes", *map(str, arguments.processes)]
            + ["--orders", *arguments.orders]
            + ([] if small else ["--blocks", str(arguments.blocks)])
        ),
        figures={
            "GPU": card,
            "cores of the host": os.cpu_count(),
            "other work there (load average before)": round(load, 1),
            "Runs": rows,
        },
    )
    print(path)


if __name__ == "__main__":
    main()
