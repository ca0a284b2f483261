"""Time of W6A8 layers beside those of torch's libraries, on one GPU.

Two timings, for different questions. ``chain``: a CUDA graph calls the layer with one
weight after the other, together more than 200 MB, so that nothing is found in a cache;
this is what decoding does. ``cold``: one call after the cache was overwritten, with all
the fixed cost of a call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from exactness import Checks
from torch import Tensor

from compress.runtime.w6a8 import cuda
from compress.runtime.w6a8.abi import Kernels

SHAPES = ((4096, 4096), (28672, 4096), (4096, 14336), (8192, 8192))
TOKENS = (1, 4, 8, 16, 32, 64, 128, 512, 2048)
ROTATED_BYTES = 200e6
REPLAYS, ROUNDS, COLD_CALLS = 20, 3, 50


@dataclass(frozen=True)
class Contender:
    """A way to compute the layer.

    Attributes:
        name: In the table.
        weight_bytes: Of one copy, scales included.
        prepare: Makes a copy of the weight and returns the call.
    """

    name: str
    weight_bytes: int
    prepare: Callable[[], Callable[[], Tensor]]


def contenders(
    kernels: Kernels, tokens: int, rows: int, columns: int
) -> list[Contender]:
    """Return what is compared; libraries' 8-bit products get inputs in 8 bits."""
    device = torch.device("cuda", torch.cuda.current_device())
    make = Checks(kernels, device)
    x = make.noise(tokens, columns).bfloat16()

    def w6a8(
        group: int | None = 128, on_hopper: bool | None = None
    ) -> Callable[[], Tensor]:
        weight = make.weight(rows, columns, group)
        return lambda: cuda.linear(
            kernels, x, weight, None, group=None, on_hopper=on_hopper
        )

    def inputs_alone() -> Callable[[], Tensor]:
        return lambda: cuda.quantize(kernels, x, None)[0]

    def bf16() -> Callable[[], Tensor]:
        weight = make.noise(rows, columns).bfloat16()
        return lambda: F.linear(x, weight)

    def int8() -> Callable[[], Tensor]:
        filled = max(tokens, 32)  # it wants more than 16 rows
        qa, qw = make.codes(filled, rows, columns, "random")
        sa, sw = make.noise(filled, 1), make.noise(rows)
        return lambda: (torch._int_mm(qa, qw.t()) * sa * sw).bfloat16()[:tokens]

    def fp8() -> Callable[[], Tensor]:
        filled = -(-tokens // 16) * 16
        a = make.noise(filled, columns).to(torch.float8_e4m3fn)
        w = make.noise(rows, columns).to(torch.float8_e4m3fn)
        sa, sw = make.noise(filled, 1).abs(), make.noise(1, rows).abs()
        return lambda: torch._scaled_mm(
            a, w.t(), scale_a=sa, scale_b=sw, out_dtype=torch.bfloat16
        )[:tokens]

    count = rows * columns
    coded = count * 6 // 8 + count // 128 * 2
    return [
        Contender("bf16", 2 * count, bf16),
        Contender("int8 mm, no quantizing", count + 4 * rows, int8),
        Contender("fp8 mm, no quantizing", count + 4 * rows, fp8),
        Contender("w6a8 with quantizing", coded, w6a8),
        Contender("w6a8 with quantizing, portable", coded, lambda: w6a8(128, False)),
        Contender("w6a8 with quantizing, one scale", coded, lambda: w6a8(None)),
        Contender("quantizing alone", 2 * tokens * columns, inputs_alone),
    ]


def chain_seconds(contender: Contender) -> list[float]:
    """Return the time of a call in a graph over rotating weights, for each round."""
    copies = min(200, max(8, int(-(-ROTATED_BYTES // contender.weight_bytes))))
    calls = [contender.prepare() for _ in range(copies)]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        calls[0]()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    rounds = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        rounds.append(start.elapsed_time(end) / 1e3 / REPLAYS / copies)
    return rounds


def cold_seconds(contender: Contender, flush: Tensor) -> float:
    """Return the median time of a call after the cache was overwritten."""
    call, times = contender.prepare(), []
    call()
    for _ in range(COLD_CALLS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return median(times)


def copy_bandwidth() -> float:
    """Return bytes a second of a large copy, read and written bytes together."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        best = max(best, 2 * source.numel() / (start.elapsed_time(end) / 1e3))
    return best


def measure(kernels: Kernels) -> list[dict[str, object]]:
    """Return a row for each shape, number of tokens and contender; print them too."""
    bandwidth = copy_bandwidth()
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s (read and written together)")
    print(f"{'N x K':>13} {'M':>4} {'us':>8} {'GB/s':>6} {'of copy':>7} {'x bf16':>6}")
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    table: list[dict[str, object]] = []
    for rows, columns in SHAPES:
        for tokens in TOKENS:
            base = None
            for contender in contenders(kernels, tokens, rows, columns):
                row: dict[str, object] = {"rows": rows, "columns": columns}
                row |= {"tokens": tokens, "name": contender.name}
                try:
                    rounds = chain_seconds(contender)
                    if tokens in (1, 16):
                        row["cold_seconds"] = cold_seconds(contender, flush)
                except (RuntimeError, ValueError) as error:  # a library refuses
                    row["error"] = str(error).splitlines()[0]
                    table.append(row)
                    print(f"{contender.name}: {row['error']}")
                    continue
                seconds = median(rounds)
                base = base or seconds  # bf16 is the first
                moved = contender.weight_bytes + 2 * tokens * (rows + columns)
                row |= {"chain_seconds": rounds, "bytes": moved}
                table.append(row)
                cold = row.get("cold_seconds")
                tail = f", cold {float(str(cold)) * 1e6:.1f} us" if cold else ""
                print(
                    f"{rows:>6} x{columns:>5} {tokens:>4} {seconds * 1e6:>8.2f} "
                    f"{moved / seconds / 1e9:>6.0f} "
                    f"{moved / seconds / bandwidth:>7.0%} "
                    f"{base / seconds:>6.2f} {contender.name} "
                    f"(+-{(max(rounds) - min(rounds)) / seconds / 2:.0%}{tail})",
                    flush=True,
                )
            torch.cuda.empty_cache()
    return table
