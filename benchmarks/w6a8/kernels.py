"""The W6A8 kernels beside torch's libraries and Humming, on one GPU, in one process.

    python benchmarks/w6a8/kernels.py
    python benchmarks/w6a8/kernels.py --prepare     only builds Humming's kernels
    python benchmarks/w6a8/kernels.py --tokens 12 16 --name w6a8_kernels_16

Inputs are bfloat16, and rounding them belongs to every row but "fp8 product alone".
Times are of a CUDA graph over rotating weights, which no cache holds. Humming
(``pip install humming-kernels cuda-bindings jinja2``) is left out where it is missing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from math import exp, log
from pathlib import Path
from statistics import mean
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from results import PACKAGES, write_result

from compress.bench import contenders as known
from compress.bench.contenders import Contender
from compress.bench.kernels import KernelSettings, bench_kernels

SHAPES = (
    *((4096, 4096), (12288, 4096), (22016, 4096), (4096, 11008)),  # Llama-2-7B
    *((27648, 5120), (28672, 4096)),  # 13B and Llama-3-8B
    *((8192, 8192), (57344, 8192)),  # 70B
)
TOKENS = (1, 4, 8, 16, 64, 128, 256, 1024, 4096)
PUBLISHED = {
    "FlexQ (arXiv 2508.04405), linear layers of Llama 70B, W6A6 beside ABQ-LLM": 1.39,
    "FlexQ, whole model, tokens/s beside SmoothQuant W8A8": 1.33,
    "FlexQ, whole model, memory of SmoothQuant W8A8 over its own": 1.21,
}
KEPT = ("bf16", "int8", "fp8", "fp8 product alone", "w6a8-g128", "w6a8")
HUMMING = {"humming-g128": 128, "humming": 0}


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument(
        "--shapes", type=int, default=len(SHAPES), help="the first so many"
    )
    parser.add_argument("--alone", action="store_true", help="without Humming")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--name", default="w6a8_kernels", help="of the result")
    options = parser.parse_args()
    shapes = SHAPES[: options.shapes]
    if options.prepare:
        prepare(shapes)
        return
    settings = KernelSettings(
        shapes=shapes, tokens=tuple(options.tokens), cold_calls=20
    )
    found = bench_kernels(
        settings,
        ways=usual if options.alone else ways,
        say=lambda text: print(text, flush=True),
    )
    tables = {
        f"{shape[0]} x {shape[1]}, microseconds": lines(
            found["rows"], shape, options.tokens
        )
        for shape in shapes
    }
    print(
        write_result(
            options.name,
            claim="Linear layers with bfloat16 inputs on one GPU: microseconds of a "
            "call, rounding of inputs included unless said otherwise, over rotating "
            "weights. Ratios are times of the peer over ours with the same scales "
            "(w6a8-g128 for bf16 and fp8).",
            figures=tables
            | {
                "Means over shapes (geometric)": means(found["rows"], options.tokens),
                "Published, beside the columns with int8": [
                    {"what": what, "ratio": ratio} for what, ratio in PUBLISHED.items()
                ],
                "device": found["device"],
                "read bandwidth TB/s": found["limits"]["bytes_per_second"] / 1e12,
                "clocks before and after": " | ".join(map(str, found["clocks"])),
            },
            versions=(*PACKAGES, "humming-kernels"),
            raw=found["rows"],
        )
    )


def usual(rows: int, columns: int, device: torch.device) -> list[Contender]:
    """Return what needs nothing but torch."""
    return [way for way in known.contenders(rows, columns, device) if way.name in KEPT]


def ways(rows: int, columns: int, device: torch.device) -> list[Contender]:
    """Return what is compared."""
    return [*usual(rows, columns, device), *peers((rows, columns), device)]


def peers(shape: tuple[int, int], device: torch.device) -> list[Contender]:
    """Return Humming's 6-bit weights with 8-bit inputs, if it is installed."""
    try:
        from humming.layer import HummingLayer
    except ImportError as error:
        print(f"no Humming: {error}")
        return []

    def layer(group: int) -> Any:
        made = HummingLayer(
            shape_n=shape[0],
            shape_k=shape[1],
            weight_config={"dtype": "int6", "group_size": group},
            input_config={"dtype": "int8"},
            torch_dtype=torch.bfloat16,
        ).to(device)
        weight = torch.randn(shape, device=device, dtype=torch.bfloat16) * 0.02
        made.load_from_unquantized(weight)
        made.transform()
        return made

    bits = shape[0] * shape[1] * 6 // 8
    return [
        Contender(
            name,
            bits + 2 * shape[0] * (shape[1] // (group or shape[1])),
            "int8",
            lambda group=group: layer(group),
            lambda x: x,
            lambda weight, x: weight(x),
        )
        for name, group in HUMMING.items()
    ]


def prepare(shapes: Any) -> None:
    """Call each of Humming's layers once, which builds its kernels into its cache."""
    device = torch.device("cuda")
    for shape in shapes:
        for peer in peers(shape, device):
            weight = peer.weight()
            for tokens in TOKENS:
                x = torch.randn(tokens, shape[1], device=device).bfloat16()
                peer.call(weight, x)
            torch.cuda.synchronize()
            print(shape, peer.name, flush=True)


def lines(
    rows: list[dict[str, Any]], shape: tuple[int, int], counts: Sequence[int]
) -> list[dict[str, Any]]:
    """Return a line for each number of tokens."""
    found = []
    for tokens in counts:
        times = times_of(rows, shape, tokens)
        line: dict[str, Any] = {"tokens": tokens}
        line |= {name: round(1e6 * seconds, 1) for name, seconds in times.items()}
        ours = times.get("w6a8-g128")
        if ours:
            line["TOPS g128"] = round(2e-12 * tokens * shape[0] * shape[1] / ours)
        found.append(line | ratios(times))
    return found


def times_of(
    rows: list[dict[str, Any]], shape: tuple[int, int], tokens: int
) -> dict[str, float]:
    """Return seconds by name."""
    return {
        row["name"]: row["seconds"]
        for row in rows
        if (row["rows"], row["columns"]) == shape
        and row["tokens"] == tokens
        and "seconds" in row
    }


def ratios(times: dict[str, float]) -> dict[str, float]:
    """Return how many times slower peers are than ours."""
    pairs = {
        "bf16 / g128": ("bf16", "w6a8-g128"),
        "int8 / g128": ("int8", "w6a8-g128"),
        "fp8 alone / g128": ("fp8 product alone", "w6a8-g128"),
        "humming / g128": ("humming-g128", "w6a8-g128"),
        "humming / one scale": ("humming", "w6a8"),
    }
    return {
        name: round(times[peer] / times[own], 2)
        for name, (peer, own) in pairs.items()
        if peer in times and own in times
    }


def means(rows: list[dict[str, Any]], counts: Sequence[int]) -> list[dict[str, Any]]:
    """Return geometric means over shapes of the ratios, for each number of tokens."""
    shapes = sorted({(row["rows"], row["columns"]) for row in rows})
    found = []
    for tokens in counts:
        each = [ratios(times_of(rows, shape, tokens)) for shape in shapes]
        names = list(dict.fromkeys(name for ratio in each for name in ratio))
        line: dict[str, Any] = {"tokens": tokens}
        for name in names:
            logs = [log(ratio[name]) for ratio in each if name in ratio]
            line[name] = round(exp(mean(logs)), 2)
        found.append(line)
    return found


if __name__ == "__main__":
    main()
