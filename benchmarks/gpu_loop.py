"""Seconds of GPTQ on one matrix of a 7B shape, with its loop over columns recorded.

    python benchmarks/gpu_loop.py [--device cuda]

Random weights and inputs; matrices stacked as a run stacks them (q, k and v; gate and
up). "Plain" starts each operation of the loop from Python, "recorded" replays a CUDA
graph of 128 columns; both take the same codes, which is checked. Each is the least of
two runs after one that warms up, in turns, scale search and factor included. The last
rows are experts side by side.
"""

from __future__ import annotations

import argparse
import time
from typing import Any
from unittest import mock

import torch
from results import hardware, write_result

from compress.core import replay
from compress.core.scheme import Scheme
from compress.core.statistics import LayerStatistics
from compress.core.tensors import QuantizedTensor
from compress.quantizers.gptq import GPTQ

# Rows, columns, matrices side by side.
SHAPES = [(12288, 4096, 1), (22016, 4096, 1), (4096, 11008, 1), (1536, 2048, 32)]
SCHEMES = ("int4-g128", "q4_k")


def statistics_of(columns: int, device: str) -> LayerStatistics:
    """Return the second moment of random inputs."""
    inputs = torch.randn(2 * columns, columns, device=device)
    return LayerStatistics(2 * inputs.T @ inputs, 2 * columns)


def timed(
    weights: list[torch.Tensor], scheme: str, known: list[LayerStatistics]
) -> tuple[list[QuantizedTensor], float]:
    """Return codes, and the seconds that they took."""
    if weights[0].is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    found = GPTQ().quantize_alike(
        weights, Scheme.parse(scheme).with_scales("bfloat16"), known
    )
    if weights[0].is_cuda:
        torch.cuda.synchronize()
    return found, time.perf_counter() - started


def row_of(shape: tuple[int, int, int], scheme: str, device: str) -> dict[str, Any]:
    """Return the figures of one shape."""
    rows, columns, count = shape
    weights = [torch.randn(rows, columns, device=device) for _ in range(count)]
    known = [statistics_of(columns, device)] * count
    seconds: dict[str, list[float]] = {"plain": [], "recorded": []}
    codes: dict[str, list[QuantizedTensor]] = {}
    plain = mock.patch.object(replay, "run", lambda step, about, x: step(about, *x))
    for _ in range(3):
        codes["recorded"], taken = timed(weights, scheme, known)
        seconds["recorded"].append(taken)
        with plain:
            codes["plain"], taken = timed(weights, scheme, known)
        seconds["plain"].append(taken)
    least = {name: min(times[1:]) for name, times in seconds.items()}
    pairs = zip(codes["plain"], codes["recorded"], strict=True)
    return {
        "rows": rows,
        "columns": columns,
        "matrices": count,
        "scheme": scheme,
        **{f"{name} s": round(taken, 3) for name, taken in least.items()},
        "recorded over plain": round(least["recorded"] / least["plain"], 3),
        "same codes": all(torch.equal(a.codes, b.codes) for a, b in pairs),
    }


def main() -> None:
    """Time all shapes, and write the result after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    torch.manual_seed(0)
    where = torch.cuda.get_device_name() if device == "cuda" else hardware()
    rows = []
    for scheme in SCHEMES:
        for shape in SHAPES if device == "cuda" else [(64, 512, 2)]:
            rows.append(row_of(shape, scheme, device))
            print(rows[-1], flush=True)
            write_result(
                "gpu_loop" if device == "cuda" else "gpu_loop_cpu",
                claim="The loop over columns of GPTQ as a CUDA graph: the same codes "
                "in less time.",
                figures={"on": where, "GPTQ": rows},
            )


if __name__ == "__main__":
    main()
