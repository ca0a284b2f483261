"""Time of a run, from operations and from speeds measured on the spot.

Four things are timed, each for a fraction of a second: a matrix product, a pass over a
large tensor, the second moments of one window at each width, and each method of the
plan on a small matrix of its own. Everything else is counted in products and passes.
Disks are not timed: a dry run writes nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch

from compress.calibration.collect import Moments
from compress.core.contracts import Quantizer
from compress.core.plan import LayerPlan
from compress.core.scheme import Scheme
from compress.core.statistics import LayerStatistics
from compress.planning.device import batches
from compress.planning.shapes import Shapes, Work, stacked_shape, weights_of

_START_SECONDS = 3.0  # tokenizer, checkpoint headers, the module tree
_START_SECONDS_ON_GPU = 8.0  # those, CUDA's start, and the timings of this module
DISK_BYTES_A_SECOND = 200e6  # an ordinary SSD, with each file flushed
_PROBE_COLUMNS, _PROBE_ROWS = 256, 2048
_LONG_PROBE = 0.3  # seconds; error feedback takes a tenth of one
# Passes over each weight beside the method: read, checked, decoded, compared, stored.
_PASSES_TO_ROUND = 14
_PASSES_TO_EXPORT = 4  # read, packed, written
# Beyond what running it takes: decoded by us, by the consumer, and compared.
_PASSES_TO_VERIFY = 30
_PASSES_TO_VERIFY_WHOLE = 3  # transformers' modules decode as fast as ours
_PASSES_OF_BATCHES = 2.4  # of a block like that of Llama 2, run again to each input
_PASSES_TO_RUN = 6  # a model's weights read and decoded for one sweep
# Passes over the states of a block beside its products: norms, rotation, attention.
_PASSES_OF_BLOCK = 25
_PASSES_OF_LOGITS = 9
# Products of a layer [R, C] in units of R C^2: lazy updates 1, losses of each row
# before and after 4, the relative error for the report 4; the correction for drift 6.
_LAYER_PRODUCTS, _DRIFT_PRODUCTS = 9, 6
# A factorization and a triangular inverse of [C, C], at half the speed of a product.
_SQUARE_PRODUCTS = 3
GRAM_SHARE = 0.65  # of X^T X that is computed; the rest is mirrored
_VERIFY_TOKENS = 1024
# Of moments that are timed: columns, and tokens times columns^2, a third of a second.
_PROBE_WIDTH, _PROBE_MOMENTS = 4096, 1 << 33


def seconds(
    shapes: Shapes,
    work: Work,
    *,
    method_seconds: Callable[[LayerPlan], float],
    dtype: torch.dtype,
    device: str = "cpu",
) -> float:
    """Return the prediction for the whole run.

    Args:
        shapes: Of model and plan.
        work: What the run does.
        method_seconds: Time that a layer's method takes for one weight.
        dtype: Arithmetic of the blocks while statistics are taken.
        device: Where blocks run and layers are solved.
    """
    speeds, exact_speeds = speeds_of(dtype, device), speeds_of(torch.float32, device)
    a_pass, on_gpu = speeds.host_pass, device != "cpu"
    planned = weights_of(*shapes.planned)
    coding = planned * _PASSES_TO_ROUND * speeds.device_pass
    coding += sum(
        count * weights_of(layer) * method_seconds(layer)
        for layer, count in _coded(shapes, on_gpu=on_gpu)
    )
    if work.calibration:
        windows, length = work.calibration
        passes = _passes(shapes, work, dtype=dtype, on_gpu=on_gpu)
        coding += passes * sweep(shapes, windows * length, speeds)
        a_window = sum(
            share
            * moments_seconds(
                columns, length, drift=work.drift, dtype=dtype, device=device
            )
            for columns, share in shapes.inputs
        )
        solving = _solvers(shapes, drift=work.drift) / speeds.exact
        coding += shapes.blocks * (windows * a_window + solving)
    stored = planned / DISK_BYTES_A_SECOND
    # Codes of a block are stored while a GPU is at the next one.
    total = _START_SECONDS_ON_GPU if on_gpu else _START_SECONDS
    total += max(coding, stored) if on_gpu else coding + stored
    total += work.written / DISK_BYTES_A_SECOND
    evaluated = work.evaluation[0] * work.evaluation[1]
    if evaluated:
        total += 2 * _scored(shapes, evaluated, exact_speeds)
    total += 2 * work.generated * shapes.parameters * a_pass
    for passes, files in (
        (_PASSES_TO_EXPORT, work.exports),
        (_PASSES_TO_VERIFY, work.verified - work.loads_whole),
        (_PASSES_TO_VERIFY_WHOLE, work.loads_whole),
    ):
        total += files * shapes.parameters * passes * a_pass
    total += work.verified * 2 * _scored(shapes, _VERIFY_TOKENS, exact_speeds)
    return total


def _coded(shapes: Shapes, *, on_gpu: bool) -> list[tuple[LayerPlan, int]]:
    """Return what is coded, and how often.

    On a GPU it matters what is coded as one matrix: a loop over columns takes about as
    long for the rows of one layer as for those of three.
    """
    if not on_gpu:
        return [(layer, 1) for layer in shapes.planned]
    stacked = [replace(x[0], shape=stacked_shape(x)) for x in shapes.inside]
    return [*((x, shapes.blocks) for x in stacked), *((x, 1) for x in shapes.outside)]


def _passes(shapes: Shapes, work: Work, *, dtype: torch.dtype, on_gpu: bool) -> float:
    """Return how often all windows go through all blocks, see ``calibration/walk``."""
    if work.order == "block":
        return 2 + work.drift
    several = on_gpu and batches(shapes, work, dtype=dtype) > 1
    return (1 + work.drift) * (_PASSES_OF_BATCHES if several else 1)


@dataclass(frozen=True)
class Speeds:
    """How fast a machine is.

    Attributes:
        blocks: Operations a second of products in the arithmetic of the blocks.
        exact: The same in float32.
        double: In float64.
        device_pass: Seconds an element of a pass over a large tensor, on the device.
        host_pass: The same in memory of the host.
    """

    blocks: float
    exact: float
    double: float
    device_pass: float
    host_pass: float


def speeds_of(dtype: torch.dtype, device: str = "cpu") -> Speeds:
    """Measure a device, each speed once in a process.

    Args:
        dtype: Arithmetic of the blocks.
        device: Where they run.
    """
    return Speeds(
        matmul_speed(dtype, device),
        matmul_speed(torch.float32, device),
        matmul_speed(torch.float64, device),
        pass_time(device),
        pass_time(),
    )


def sweep(shapes: Shapes, tokens: int, speeds: Speeds) -> float:
    """Return the seconds of all blocks on some tokens."""
    products = 2 * tokens * shapes.active * shapes.blocks
    passes = _PASSES_OF_BLOCK * tokens * shapes.hidden * shapes.blocks
    return products / speeds.blocks + passes * speeds.device_pass


def _scored(shapes: Shapes, tokens: int, speeds: Speeds) -> float:
    """All blocks and the head on some tokens, and passes over the logits.

    Weights are read and decoded on the host.
    """
    head = 2 * tokens * shapes.vocabulary * shapes.hidden / speeds.blocks
    scoring = _PASSES_OF_LOGITS * tokens * shapes.vocabulary * speeds.device_pass
    reading = _PASSES_TO_RUN * shapes.parameters * speeds.host_pass
    return sweep(shapes, tokens, speeds) + head + scoring + reading


def _solvers(shapes: Shapes, *, drift: bool) -> float:
    """Operations of a block's solvers beyond what a small matrix shows."""
    products = _LAYER_PRODUCTS + drift * _DRIFT_PRODUCTS
    return sum(
        products * rows * columns**2 + _SQUARE_PRODUCTS * columns**3
        for rows, columns in map(stacked_shape, shapes.inside)
    )


@lru_cache
def matmul_speed(dtype: torch.dtype, device: str = "cpu") -> float:
    """Return the operations a second of a matrix product in ``dtype``."""
    size = 1024 if device == "cpu" else 4096
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    return 2 * size**3 / timed(lambda: a @ b, device=device)


@lru_cache
def pass_time(device: str = "cpu") -> float:
    """Return the seconds an element of a pass that makes a new large tensor."""
    x = torch.ones(3 << 22, device=device)  # 48 MiB: too large for an allocator to keep
    return timed(lambda: x * x, device=device) / x.numel()


@lru_cache
def moments_seconds(
    columns: int, tokens: int, *, drift: bool, dtype: torch.dtype, device: str = "cpu"
) -> float:
    """Return the seconds that second moments of one window take.

    They are products of tall matrices, which are slower than square ones, and float64
    sums, which wait for memory. A wide input is timed by one with fewer columns.

    Args:
        columns: Width of the input.
        tokens: Of a window.
        drift: Whether those with the dense model's inputs are taken, too.
        dtype: Of the inputs.
        device: Where they are.
    """
    fewer = min(columns, _PROBE_WIDTH)
    if device == "cpu":
        fewer = min(fewer, math.isqrt(_PROBE_MOMENTS // tokens))
    x = torch.ones(1, tokens, fewer, dtype=dtype, device=device)
    moments, dense = Moments(), x if drift else None
    taken = timed(lambda: moments.add(x, dense), times=2, device=device)
    return taken * (columns / fewer) ** 2


@lru_cache
def method_seconds(
    quantizer: Quantizer,
    scheme: Scheme,
    rows: int,
    columns: int = _PROBE_COLUMNS,
    device: str = "cpu",
) -> float:
    """Return the seconds that a method takes for one weight of a layer.

    It quantizes a random matrix of that many rows, and of few columns: what grows with
    the square of the columns is counted in products. On a GPU two of them with all
    rows, since what starts a method is not little beside what it does for each column
    there; unless the method is busy with a small matrix for long, and so with weights.

    Args:
        quantizer: The method.
        scheme: What it makes.
        rows: Of the layer.
        columns: Of the layer.
        device: Where it is solved.
    """
    fewer = min(rows, _PROBE_ROWS)
    few, taken = _method(quantizer, scheme, fewer, _PROBE_COLUMNS, device)
    if device == "cpu" or taken > _LONG_PROBE:
        return taken / (fewer * few)
    few, first = _method(quantizer, scheme, rows, _PROBE_COLUMNS, device)
    many, second = _method(quantizer, scheme, rows, 3 * _PROBE_COLUMNS, device)
    a_column = max(0.0, second - first) / (many - few)
    return (first + (columns - few) * a_column) / (rows * columns)


def _method(
    quantizer: Quantizer, scheme: Scheme, rows: int, columns: int, device: str
) -> tuple[int, float]:
    """Return the columns of a random matrix and the seconds that it takes."""
    generator = torch.Generator().manual_seed(0)
    group = scheme.group_size or columns
    if scheme.codebook is not None:
        group = scheme.codebook.vector
    columns = group * max(1, columns // group)
    weight = torch.randn(rows, columns, generator=generator).to(device)
    statistics = None
    if quantizer.needs_statistics:
        x = torch.randn(2 * columns, columns, generator=generator).to(device)
        hessian = 2 * x.T @ x
        drift = 0.01 * hessian if quantizer.needs_drift else None
        statistics = LayerStatistics(hessian, len(x), drift)
    work = partial(quantizer.quantize, weight, scheme, statistics)
    return columns, timed(work, times=2, device=device)


def timed(work: Callable[[], object], *, times: int = 5, device: str = "cpu") -> float:
    """Return the seconds of the fastest of some calls, after one that warms up."""
    waits = device.startswith("cuda")
    found = []
    for _ in range(times + 1):
        if waits:
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        work()
        if waits:
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - started)
    return min(found[1:])
