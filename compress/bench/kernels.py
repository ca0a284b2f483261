"""``compress bench kernels``: linear layers of real models, in 16, 8 and 6 bits.

Protocol: random weights; the shapes below; inputs in bfloat16. For each number of
tokens all ways take turns, three rounds, and the median counts. Bytes are those of
weight, scales, inputs and outputs; a layer cannot be faster than the larger of bytes
over the bandwidth and operations over the peak, both measured in the same run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

from compress.bench.contenders import Contender, contenders, engine_in_words
from compress.bench.gpu_timing import (
    Chain,
    clocks,
    cold_seconds,
    copies_of,
    flush_buffer,
    matmul_peak,
    read_bandwidth,
)
from compress.core.errors import KernelError
from compress.progress import progress_bar
from compress.provenance import hardware, versions

_LOG = logging.getLogger(__name__)
Ways = Callable[[int, int, torch.device], list[Contender]]
SHAPES = (
    *((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)),  # Llama-2-7B
    *((15360, 5120), (5120, 5120), (27648, 5120), (5120, 13824)),  # 13B
    *((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)),  # 70B
    *((6144, 4096), (28672, 4096), (4096, 14336)),  # Llama-3-8B
)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
QUICK_SHAPES = ((4096, 4096), (28672, 4096), (8192, 8192))
QUICK_TOKENS = (1, 16, 64, 256, 2048)


@dataclass(frozen=True)
class KernelSettings:
    """What is measured.

    Attributes:
        shapes: Rows and columns of weights.
        tokens: Rows of inputs.
        rounds: Turns that every way takes.
        cold_calls: Single calls after a flush.
        seed: Of the random numbers.
    """

    shapes: Sequence[tuple[int, int]] = SHAPES
    tokens: Sequence[int] = TOKENS
    rounds: int = 3
    cold_calls: int = 100
    seed: int = 0

    @classmethod
    def quick(cls) -> KernelSettings:
        """Return settings for a look of a minute or two."""
        return cls(QUICK_SHAPES, QUICK_TOKENS, cold_calls=20)


@dataclass(frozen=True)
class Limits:
    """What the device can do at most, as measured.

    Attributes:
        bytes_per_second: Of reading memory.
        operations_per_second: Of the library's products, by kind.
    """

    bytes_per_second: float
    operations_per_second: dict[str, float]

    def seconds(self, bytes_: float, operations: float, kind: str) -> float:
        """Return the least time of a call."""
        peak = self.operations_per_second.get(kind)
        computing = operations / peak if peak else 0.0
        return max(bytes_ / self.bytes_per_second, computing)


def check_device() -> None:
    """Raise unless there is a CUDA device.

    Raises:
        KernelError: With what can be done instead.
    """
    if not torch.cuda.is_available():
        raise KernelError(
            "compress bench kernels times CUDA kernels, and torch "
            f"{torch.__version__} sees no CUDA device; run it on a machine with an "
            "NVIDIA GPU, or time a whole model on this one: compress bench model FOLDER"
        )


def bench_kernels(
    settings: KernelSettings,
    *,
    ways: Ways = contenders,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Return times of all ways, shapes and numbers of tokens on the current GPU.

    Args:
        settings: What is measured.
        ways: Gives what is compared, for rows, columns and a device; bf16 first.
        say: Is told of each shape when it is done.

    Raises:
        KernelError: There is no CUDA device.
    """
    check_device()
    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(settings.seed)
    before = clocks()
    limits = measured_limits()
    flushed = flush_buffer()
    rows: list[dict[str, Any]] = []
    for shape in progress_bar(settings.shapes, desc="shapes", unit="shape"):
        rows += shape_rows(shape, settings, limits, flushed, ways)
        say(f"{shape[0]} x {shape[1]} is done")
    return {
        "kind": "kernels",
        "device": torch.cuda.get_device_name(),
        "engine": engine_in_words(device),
        "limits": asdict(limits),
        "clocks": [before, clocks()],
        "protocol": {**asdict(settings), "dtype": "bfloat16", "timing": "chain"},
        "versions": {**versions(), "cuda": torch.version.cuda},
        "hardware": hardware(torch.cuda.get_device_name()),
        "rows": rows,
    }


def measured_limits() -> Limits:
    """Return bandwidth and peaks of the current GPU."""
    peaks = {"bf16": matmul_peak(torch.bfloat16)}
    try:
        peaks["int8"] = matmul_peak(torch.int8)
    except RuntimeError as error:
        _LOG.warning("no peak of int8 products, limits are of bandwidth: %s", error)
    return Limits(read_bandwidth(), peaks)


def figures(
    contender: Contender,
    tokens: int,
    shape: tuple[int, int],
    seconds: Sequence[float],
    limits: Limits,
) -> dict[str, Any]:
    """Return what follows from the time of a call.

    Args:
        contender: The way.
        tokens: Rows of the input.
        shape: Of the weight.
        seconds: Of each round.
        limits: Of the device.
    """
    middle = median(seconds)
    bytes_ = contender.weight_bytes + 2 * tokens * sum(shape)
    operations = 2.0 * tokens * shape[0] * shape[1]
    return {
        "seconds": middle,
        "spread": (max(seconds) - min(seconds)) / middle / 2,
        "gb_per_second": bytes_ / middle / 1e9,
        "tops": operations / middle / 1e12,
        "of_limit": limits.seconds(bytes_, operations, contender.kind) / middle,
    }


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows with how many times faster each is than the first way, bf16."""
    base = {
        (row["rows"], row["columns"], row["tokens"]): row["seconds"]
        for row in rows
        if row["name"] == "bf16" and "seconds" in row
    }
    found = []
    for row in rows:
        known = base.get((row["rows"], row["columns"], row["tokens"]))
        ratio = known / row["seconds"] if known and "seconds" in row else None
        found.append({**row, "times_bf16": ratio})
    return found


def shape_rows(
    shape: tuple[int, int],
    settings: KernelSettings,
    limits: Limits,
    flushed: torch.Tensor,
    compared: Ways = contenders,
) -> list[dict[str, Any]]:
    """Return the rows of one shape, for all ways and numbers of tokens.

    Args:
        shape: Of the weight.
        settings: What is measured.
        limits: Of the device.
        flushed: Memory larger than its cache.
        compared: See :func:`bench_kernels`.
    """
    ways = compared(*shape, flushed.device)
    weights: dict[str, Any] = {}
    errors: dict[str, str] = {}
    for way in ways:
        copies = copies_of(way.weight_bytes, contenders=len(ways) - len(weights))
        try:
            weights[way.name] = [way.weight() for _ in range(copies)]
        except (RuntimeError, ValueError) as error:
            errors[way.name] = _first_line(error)
    rows: list[dict[str, Any]] = []
    for tokens in settings.tokens:
        x = torch.randn(tokens, shape[1], device=flushed.device).bfloat16()
        rows += _token_rows(x, shape, ways, weights, errors, settings, limits, flushed)
    weights.clear()  # before the next shape's are made
    if flushed.is_cuda:
        torch.cuda.empty_cache()
    return with_ratios(rows)


def _token_rows(
    x: torch.Tensor,
    shape: tuple[int, int],
    ways: Sequence[Contender],
    weights: dict[str, Any],
    errors: dict[str, str],
    settings: KernelSettings,
    limits: Limits,
    flushed: torch.Tensor,
) -> list[dict[str, Any]]:
    chains: dict[str, Chain] = {}
    cold: dict[str, float] = {}
    failed = dict(errors)
    for way in ways:
        if way.name in failed:
            continue
        try:
            given = way.inputs(x)
            calls = [
                lambda w=w, way=way, given=given: way.call(w, given)
                for w in weights[way.name]
            ]
            chains[way.name] = Chain(calls)
            cold[way.name] = cold_seconds(calls[0], flushed, calls=settings.cold_calls)
        except (RuntimeError, ValueError, KernelError) as error:
            failed[way.name] = _first_line(error)  # a library refuses, or memory ends
            chains.pop(way.name, None)
    seconds: dict[str, list[float]] = {name: [] for name in chains}
    for _ in range(settings.rounds):
        for name, chain in chains.items():
            seconds[name].append(chain.seconds())
    rows = []
    for way in ways:
        row: dict[str, Any] = {"rows": shape[0], "columns": shape[1]}
        row |= {"tokens": len(x), "name": way.name, "weight_bytes": way.weight_bytes}
        if way.name in failed:
            rows.append({**row, "error": failed[way.name]})
            continue
        row |= figures(way, len(x), shape, seconds[way.name], limits)
        row |= {"rounds": seconds[way.name], "copies": len(weights[way.name])}
        rows.append({**row, "cold_seconds": cold[way.name]})
    return rows


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
