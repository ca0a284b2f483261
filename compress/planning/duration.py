"""Time of a run, from operations and from speeds measured on the spot.

Three things are timed, each for a fraction of a second: a matrix product, a pass over a
large tensor, and each method of the plan on a small matrix of its own. Everything else
is counted in products and passes. Disks are not timed: a dry run writes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from compress.core.contracts import Quantizer
from compress.core.plan import LayerPlan
from compress.core.scheme import Scheme
from compress.core.statistics import LayerStatistics
from compress.planning.shapes import Shapes, Work, stacked_shape, weights_of

_START_SECONDS = 3.0  # tokenizer, checkpoint headers, the module tree
DISK_BYTES_A_SECOND = 200e6  # an ordinary SSD, with each file flushed
_PROBE_COLUMNS, _PROBE_ROWS = 256, 2048
# Passes over each weight beside the method: read, checked, decoded, compared, stored.
_PASSES_TO_ROUND = 14
_PASSES_TO_EXPORT = 16  # read, packed, written
_PASSES_TO_VERIFY = 30  # decoded by us and by the consumer, and compared
_PASSES_TO_RUN = 6  # a model's weights read and decoded for one sweep
# Passes over the states of a block beside its products: norms, rotation, attention.
_PASSES_OF_BLOCK = 25
_PASSES_OF_LOGITS = 12
# Products of a layer [R, C] in units of R C^2: drift 6, lazy updates 1, its error 4.
_LAYER_PRODUCTS = 11
# A factorization and a triangular inverse of [C, C], at half the speed of a product.
_SQUARE_PRODUCTS = 3
GRAM_SHARE = 0.65  # of X^T X that is computed; the rest is mirrored
_VERIFY_TOKENS = 1024


def seconds(
    shapes: Shapes,
    work: Work,
    *,
    method_seconds: Callable[[LayerPlan], float],
    dtype: torch.dtype,
) -> float:
    """Return the prediction for the whole run.

    Args:
        shapes: Of model and plan.
        work: What the run does.
        method_seconds: Time that a layer's method takes for one weight.
        dtype: Arithmetic of the blocks while statistics are taken.
    """
    speeds, exact_speeds = speeds_of(dtype), speeds_of(torch.float32)
    exact, a_pass = speeds.exact, speeds.host_pass
    planned = weights_of(*shapes.planned)
    total = _START_SECONDS + planned * _PASSES_TO_ROUND * a_pass
    total += sum(weights_of(x) * method_seconds(x) for x in shapes.planned)
    total += planned / DISK_BYTES_A_SECOND
    if work.calibration:
        tokens, streams = work.calibration[0] * work.calibration[1], 1 + work.drift
        total += streams * sweep(shapes, tokens, speeds)
        # Tall products gain little from bfloat16: 220 GFLOP/s where square ones reach
        # 1000, and 140 in float32.
        operations = _grams(shapes, tokens, drift=work.drift) + _solvers(shapes)
        total += shapes.blocks * operations / exact
    evaluated = work.evaluation[0] * work.evaluation[1]
    if evaluated:
        total += 2 * _scored(shapes, evaluated, exact_speeds)
    total += 2 * work.generated * shapes.parameters * a_pass
    for passes, files in (
        (_PASSES_TO_EXPORT, work.exports),
        (_PASSES_TO_VERIFY, work.verified),
    ):
        total += files * shapes.parameters * passes * a_pass
    total += work.verified * 2 * _scored(shapes, _VERIFY_TOKENS, exact_speeds)
    return total


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
    """All blocks and the head on some tokens, and what is done with the logits."""
    head = 2 * tokens * shapes.vocabulary * shapes.hidden / speeds.blocks
    passes = _PASSES_OF_LOGITS * tokens * shapes.vocabulary
    passes += _PASSES_TO_RUN * shapes.parameters
    return sweep(shapes, tokens, speeds) + head + passes * speeds.device_pass


def _grams(shapes: Shapes, tokens: int, *, drift: bool) -> float:
    """Operations of the statistics of a block."""
    return sum(
        2 * tokens * share * columns**2 * (GRAM_SHARE + drift)
        for columns, share in shapes.inputs
    )


def _solvers(shapes: Shapes) -> float:
    """Operations of a block's solvers beyond what a small matrix shows."""
    return sum(
        _LAYER_PRODUCTS * rows * columns**2 + _SQUARE_PRODUCTS * columns**3
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
def method_seconds(quantizer: Quantizer, scheme: Scheme, rows: int) -> float:
    """Return the seconds that a method takes for one weight of a layer.

    It quantizes a random matrix of that many rows, and of few columns: what grows with
    the square of the columns is counted in products.
    """
    generator = torch.Generator().manual_seed(0)
    group = scheme.group_size or _PROBE_COLUMNS
    if scheme.codebook is not None:
        group = scheme.codebook.vector
    columns = group * max(1, _PROBE_COLUMNS // group)
    weight = torch.randn(min(rows, _PROBE_ROWS), columns, generator=generator)
    statistics = None
    if quantizer.needs_statistics:
        x = torch.randn(2 * columns, columns, generator=generator)
        hessian = 2 * x.T @ x
        drift = 0.01 * hessian if quantizer.needs_drift else None
        statistics = LayerStatistics(hessian, len(x), drift)
    taken = timed(lambda: quantizer.quantize(weight, scheme, statistics), times=2)
    return taken / weight.numel()


def timed(work: Callable[[], object], *, times: int = 4, device: str = "cpu") -> float:
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
