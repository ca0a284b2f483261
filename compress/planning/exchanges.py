"""Time and memory of what pruning does with the whole model: exchanges, and text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.planning import duration
from compress.planning.duration import Speeds
from compress.planning.shapes import Shapes
from compress.pruning.exchange import AT_ONCE, TOKENS
from compress.recovery.generate import CACHE_BYTES

if TYPE_CHECKING:
    from compress.planning.pruning import PruneWork

GENERATED_AT_ONCE = 256
_FLOAT, _DOUBLE = 4, 8
# Of a round that is not undone, in passes of a whole model and in products with its
# head: a divergence and drawn labels with gradients, for which blocks run again, and a
# divergence without.
_PASSES = (1 + 3) + 3 + 2
_HEADS = 3 + 3 + 2
_LOGITS_PASSES = 12
_DOUBLE_SQUARES = 4  # an inverse, its factor, what is not predicted, a copy


def seconds(shapes: Shapes, work: PruneWork, speeds: Speeds) -> float:
    """Return how long rounds of exchanges, and text of the model's own, take.

    Args:
        shapes: Of the dense model.
        work: What is done.
        speeds: Of the device.
    """
    return _rounds(shapes, work, speeds) + _writing(shapes, work, speeds)


def held(shapes: Shapes, work: PruneWork, width: int, graph: int) -> tuple[int, int]:
    """Return bytes that both hold on the host, and where the model runs.

    Args:
        shapes: Of the dense model.
        work: What is done.
        width: Bytes of a number.
        graph: Numbers that a token leaves for the backward pass of a block.
    """
    if not work.exchanges:
        return 0, width * shapes.parameters + CACHE_BYTES
    tokens = max(AT_ONCE, work.length)
    square = shapes.inner**2
    stands = shapes.blocks * (square + 2 * shapes.inner * shapes.hidden)
    states = tokens * shapes.hidden * (shapes.blocks + 2)
    numbers = shapes.parameters + stands + states + tokens * graph
    logits = 6 * _FLOAT * 1024 * shapes.vocabulary
    there = width * numbers + logits + _DOUBLE_SQUARES * _DOUBLE * square
    return _FLOAT * shapes.blocks * square, there


def _rounds(shapes: Shapes, work: PruneWork, speeds: Speeds) -> float:
    each = min(work.tokens, TOKENS)
    products = 2 * each * shapes.vocabulary * shapes.hidden / speeds.blocks
    logits = _LOGITS_PASSES * each * shapes.vocabulary * speeds.device_pass
    seen = 2 * 2 * each * shapes.blocks * shapes.inner**2 / speeds.blocks
    solving = shapes.blocks * 3 * shapes.inner**3 / speeds.double
    once = _PASSES * duration.sweep(shapes, each, speeds) + _HEADS * products
    return work.exchanges * (once + 3 * logits + seen + solving)


def _writing(shapes: Shapes, work: PruneWork, speeds: Speeds) -> float:
    batches = -(-work.generated // GENERATED_AT_ONCE)
    reading = batches * work.length * shapes.parameters * speeds.device_pass
    return duration.sweep(shapes, work.generated * work.length, speeds) + reading
