"""Memory and time of pruning a 7B checkpoint in one calibration pass, disk to disk.

    python benchmarks/pruning_memory.py [--work runs/benchmarks] [--tiny]

A random checkpoint of the shape of Llama 2 7B (bf16, 13 GB, needs 25 GB of disk in all)
is written in shards, then 20 % of its MLP neurons go by CFSP on 128 x 1024 tokens of
the bundled mix (the method's own default), with and without repair. Each run is a
process of its own on the GPU, or on the processor if there is none; ``--tiny`` is a
model of two small blocks, to try the script.

Peak resident memory is the largest that the operating system saw; it counts the pages
of libraries and of mapped checkpoint files, which cost nothing under pressure. So the
largest anonymous part, sampled every 20 ms, stands beside it, and what both were once
torch and the device were ready and no model was read.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from gpu_quantize import SHAPE, TINY
from memory import LIMIT_BYTES, write_checkpoint
from results import write_result

SAMPLES, LENGTH = 128, 1024
LIMIT_SECONDS = 180
REPAIRS = {"no repair": "none", "least squares": "least_squares"}


class AnonymousPeak(threading.Thread):
    """Watches the anonymous memory of this process until :meth:`stop`."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.first = self.bytes = anonymous_bytes()
        self._stopped = threading.Event()

    def run(self) -> None:
        """Sample every 20 ms."""
        while not self._stopped.wait(0.02):
            self.bytes = max(self.bytes, anonymous_bytes())

    def stop(self) -> int:
        """Return the peak in bytes."""
        self._stopped.set()
        self.join()
        return self.bytes


def anonymous_bytes() -> int:
    """Return resident memory of this process that no file backs (Linux)."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert found, "the kernel does not tell RssAnon"
    return int(found[1]) * 1024


def resident_bytes() -> int:
    """Return the largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_here(config: dict[str, Any]) -> None:
    """Run one config in this process and leave what it took in the working folder."""
    import compress

    cuda = torch.cuda.is_available()
    if cuda:
        torch.zeros(1, device="cuda")
        torch.cuda.reset_peak_memory_stats()
    before, watch = resident_bytes(), AnonymousPeak()
    watch.start()
    started = time.perf_counter()
    compress.run(config)
    figures = {
        "seconds": round(time.perf_counter() - started, 1),
        "peak host bytes": resident_bytes(),
        "of these before": before,
        "peak anonymous bytes": watch.stop(),
        "anonymous before": watch.first,
        "peak GPU bytes": torch.cuda.max_memory_reserved() if cuda else None,
        "of these allocated": torch.cuda.max_memory_allocated() if cuda else None,
    }
    (Path(config["run"]["workdir"]) / "cost.json").write_text(json.dumps(figures))


def measure(repair: str, model: Path, workdir: Path, tiny: bool) -> dict[str, Any]:
    """Return what one run took."""
    shutil.rmtree(workdir, ignore_errors=True)
    samples, length = (4, 64) if tiny else (SAMPLES, LENGTH)
    config = {
        "model": {"path": str(model)},
        "calibration": {"data": "mix", "samples": samples, "sequence_length": length},
        "prune": {
            "method": "cfsp",
            "sparsity": 0.2,
            "shape": "per-layer",
            "repair": repair,
        },
        "run": {"workdir": str(workdir), "verify": False},
    }
    command = [sys.executable, __file__, "--config", json.dumps(config)]
    # As the command line sets it.
    settings = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ}
    subprocess.run(command, check=True, env=settings)
    report = json.loads((workdir / "report.json").read_text())
    stages = {f"{stage} s": round(s, 1) for stage, s in report["seconds"].items()}
    cost: dict[str, Any] = json.loads((workdir / "cost.json").read_text())
    return cost | stages


def main() -> None:
    """Write the checkpoint, prune it in both ways, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--config", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.config:
        run_here(json.loads(arguments.config))
        return
    work = arguments.work / "pruning_memory"
    shutil.rmtree(work, ignore_errors=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = TINY if arguments.tiny else SHAPE
    parameters = write_checkpoint(work / "model", shape, device=device)
    rows = []
    for label, repair in REPAIRS.items():
        found = measure(repair, work / "model", work / "run", arguments.tiny)
        limits = {"limit host bytes": LIMIT_BYTES, "limit s": LIMIT_SECONDS}
        rows.append({"repair": label, **found, **limits})
        print(json.dumps(rows[-1]), flush=True)
    path = write_result(
        "pruning_memory_tiny" if arguments.tiny else "pruning_memory",
        claim="Llama 2 7B shape, random weights, 20 % of the MLP neurons by CFSP on "
        f"{SAMPLES} x {LENGTH} tokens, disk to disk: at most 3 GiB in the host and "
        "180 s on a GPU.",
        figures={
            "on": torch.cuda.get_device_name() if device == "cuda" else "processor",
            "parameters": parameters,
            "Runs": rows,
        },
    )
    print(path)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
