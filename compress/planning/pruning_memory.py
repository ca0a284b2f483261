"""Memory of pruning: what is held at the busiest moment of each stage.

On a CPU all windows go through a block together; on a GPU a batch of them, while states
wait in memory of the host if they are large. What CUDA itself takes is not counted.
"""

from __future__ import annotations

import torch

from compress.model.states import HELD_BYTES
from compress.planning import exchanges, memory
from compress.planning.pruning import PruneWork, candidates
from compress.planning.shapes import Shapes
from compress.pruning import depth, gates, gradients
from compress.pruning.dealing import GRADIENT_WINDOWS

_FLOAT, _DOUBLE = 4, 8
# Matrices [I, I] of doubles: the moments of what stays twice and a factor, in a repair;
# beside them inverse and correlations, and a copy while columns go, in a choice.
_REPAIR_SQUARES, _CHOICE_SQUARES = 3, 6
# Kept by autograd in a block, per token: of the width of the states, and of the MLP.
GRAPH = (14, 5)
_BATCH_BYTES = 1 << 30  # of temporary tensors on a GPU (model/states.py)


def prune_bytes(
    shapes: Shapes, work: PruneWork, *, dtype: torch.dtype, on_gpu: bool
) -> tuple[int, int]:
    """Return the peaks in memory of the host, beside the process, and of a GPU.

    Args:
        shapes: Of the dense model.
        work: What is done.
        dtype: Arithmetic of the blocks.
        on_gpu: Whether blocks run on a GPU; if not, the second number is 0.
    """
    width = dtype.itemsize
    copying = 2 * shapes.stored_bytes * max(shapes.largest, shapes.block)
    if work.windows is None:
        return copying, 0
    states, block = width * work.tokens * shapes.hidden, width * shapes.block
    pinned = on_gpu and states > HELD_BYTES
    stages = [(states, block + _forward(shapes, work.tokens, width, on_gpu))]
    if work.removals:
        stages.append(_depth_bytes(shapes, work, width, on_gpu))
    if work.gradients:
        stages.append(_gradient_bytes(shapes, work, width))
    if work.budgets == "learned":
        stages.append(_gate_bytes(shapes, work, width))
    if work.exchanges or work.generated:
        stages.append(exchanges.held(shapes, work, width, _graph(shapes)))
    if work.measures or work.budgets in ("measured", "standardised"):
        streams = states * (1 + work.corrects)
        forward = _between(shapes, work, width, on_gpu)
        solving = memory.total(_solving(shapes, work))
        stages.append((streams, block + max(forward, solving)))
    ahead = shapes.stored_bytes * shapes.block  # the next block is being read
    if not on_gpu:
        kept = int(memory.KEPT * memory.small(_solving(shapes, work)))
        return ahead + kept + max(copying, *(sum(stage) for stage in stages)), 0
    host = max(kept for kept, _ in stages) if pinned else 0
    device = max(used + (0 if pinned else kept) for kept, used in stages)
    return ahead + max(copying, host), ahead + device


def _forward(shapes: Shapes, tokens: int, width: int, on_gpu: bool) -> int:
    """Tensors inside a block: three as wide as the states, three as the MLP."""
    size = width * tokens * 3 * (shapes.hidden + shapes.inner)
    return min(size, _BATCH_BYTES) if on_gpu else size


def _between(shapes: Shapes, work: PruneWork, width: int, on_gpu: bool) -> int:
    """A forward pass, while the states of another one behind a block are kept."""
    if not work.corrects:
        return 0
    kept = (width + 2 * _FLOAT) * work.tokens * shapes.hidden
    kept = min(kept, _BATCH_BYTES) if on_gpu else kept
    return kept + _forward(shapes, work.tokens, width, on_gpu)


def _depth_bytes(
    shapes: Shapes, work: PruneWork, width: int, on_gpu: bool
) -> tuple[int, int]:
    block = width * shapes.block
    if work.by == "importance":
        compared = 3 * _FLOAT * work.tokens * shapes.hidden
        compared = min(compared, _BATCH_BYTES) if on_gpu else compared
        forward = _forward(shapes, work.tokens, width, on_gpu)
        return width * work.tokens * shapes.hidden, block + max(forward, compared)
    tokens = work.some(depth.WINDOWS)
    places = len(candidates(shapes.blocks, 0, attention=work.attention))
    states = width * tokens * shapes.hidden * (1 + places)
    logits = 3 * _FLOAT * work.length * shapes.vocabulary
    head = width * shapes.vocabulary * shapes.hidden + logits
    return states, max(block + _forward(shapes, tokens, width, on_gpu), head)


def _gradient_bytes(shapes: Shapes, work: PruneWork, width: int) -> tuple[int, int]:
    each = work.length * shapes.hidden * (shapes.blocks + 2)
    count = max(1, gradients.STORED_BYTES // (_FLOAT * each))
    count = min(count, work.some(GRADIENT_WINDOWS) // work.length)
    kept = count * (width * each + _FLOAT * work.length * shapes.hidden)
    tokens = max(gradients.TOKENS_A_CALL, work.length)
    graph = width * (shapes.block + tokens * _graph(shapes))
    logits = 4 * _FLOAT * work.length * shapes.vocabulary
    head = width * shapes.vocabulary * shapes.hidden + logits
    return kept, max(graph, head)


def _graph(shapes: Shapes) -> int:
    return GRAPH[0] * shapes.hidden + GRAPH[1] * shapes.inner


def _gate_bytes(shapes: Shapes, work: PruneWork, width: int) -> tuple[int, int]:
    """The whole model, its states of all windows, and one block's graph."""
    tokens = max(gates.TOKENS, work.length)
    states = (work.some(GRADIENT_WINDOWS) + tokens * shapes.blocks) * shapes.hidden
    logits = 6 * _FLOAT * 1024 * shapes.vocabulary
    whole = shapes.parameters + states + tokens * _graph(shapes)
    return 0, width * whole + logits


def _solving(shapes: Shapes, work: PruneWork) -> list[tuple[int, int]]:
    """Moments of all MLPs of a block, and one that is solved: counts and sizes."""
    if not work.measures and work.budgets not in ("measured", "standardised"):
        return []
    columns = max(shapes.inner if work.neurons else 0, work.heads)
    squares = _REPAIR_SQUARES if work.ranks else _CHOICE_SQUARES
    return [
        (work.mlps + 1, _FLOAT * columns**2),
        (squares, _DOUBLE * columns**2),
        (4 + 2 * work.corrects, _DOUBLE * columns * shapes.hidden),
    ]
