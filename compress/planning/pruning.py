"""Time and memory of pruning, from the passes, moments and systems that it needs.

A pass sends all calibration tokens through all blocks; what each stage of a pruning is
in passes and products is in the functions here, one a stage. How long a method's own
choice takes, which is cubic for some, is measured on small MLPs and carried to the
model's width by the exponent that two sizes show.

Memory: what is held at the busiest moment of each stage, as in ``planning/memory``. On
a CPU all windows go through a block together; on a GPU a batch of them, while states
wait in memory of the host if they are large. What CUDA itself takes is not counted.

On a CPU of two cores (SmolLM2-135M, 16 x 512 tokens, a fifth of the neurons) stages of
19, 60 and 36 seconds by wanda_sp, taylor and comp were predicted as 23, 74 and 40.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from compress.core.contracts import Pruner
from compress.core.neurons import GatedMLP, NeuronStatistics, loudest
from compress.model.states import HELD_BYTES
from compress.planning import duration, exchanges, memory
from compress.planning.duration import Speeds
from compress.planning.shapes import Shapes
from compress.pruning import depth, gates, gradients
from compress.pruning.dealing import GRADIENT_WINDOWS, LADDER

if TYPE_CHECKING:
    from compress.pruning.stage import Pruning

_FLOAT, _DOUBLE = 4, 8
_PASSES_TO_COPY = 6  # a weight read, cut and written, for the new checkpoint
_PASSES_TO_LOAD = 4  # a weight read, checked and cast, for one pass
_START_SECONDS = 0.5  # the module tree, built for each model that runs
# A backward pass without gradients of weights is as many products as a forward pass,
# which is run again before it.
_BACKWARD = 2
_LOGITS_PASSES = 12
# Matrices [I, I] of doubles: the moments of what stays twice and a factor, in a repair;
# beside them inverse and correlations, and a copy while columns go, in a choice.
_REPAIR_SQUARES, _CHOICE_SQUARES = 3, 6
# Kept by autograd in a block, per token: of the width of the states, and of the MLP.
GRAPH = (14, 5)
_BATCH_BYTES = 1 << 30  # of temporary tensors on a GPU (model/states.py)
_PROBES = (256, 512)


@dataclass(frozen=True)
class PruneWork:
    """What a pruning does.

    Attributes:
        windows: Calibration windows and tokens a window; ``None`` without text.
        removals: Blocks or attentions that go.
        by: ``importance`` or ``perplexity``.
        attention: Whether these are attentions.
        gradients: Whether effects are measured by a backward pass.
        budgets: How neurons are dealt.
        measures: Whether inputs of what is cut are measured.
        propagates: Whether blocks run again after they are cut.
        repair: Resolved.
        neurons: Whether any goes.
        heads: Width of all heads together if some go, else 0.
        mlps: MLPs of a block; more than one in a mixture.
        share: Of all tokens that one of them sees.
        ranks: Whether the method only ranks neurons; others hold matrices.
        choice: Seconds of its choice in one MLP.
        exchanges: Rounds.
        generated: Windows that the original writes, which ``windows`` counts.
    """

    windows: tuple[int, int] | None
    removals: int
    by: str
    attention: bool
    gradients: bool
    budgets: str
    measures: bool
    propagates: bool
    repair: str
    neurons: bool
    heads: int
    mlps: int
    share: float
    ranks: bool
    choice: float
    exchanges: int = 0
    generated: int = 0

    @classmethod
    def of(cls, pruning: Pruning, windows: tuple[int, int]) -> PruneWork:
        """Read what a checked pruning does.

        Args:
            pruning: As the config says.
            windows: Calibration windows and tokens a window, where text is used.
        """
        model, target, pruner = pruning.model, pruning.target, pruning.pruner
        config, cuts = model.config, pruning.target.cuts_neurons
        heads = int(config["num_attention_heads"])
        width = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
        mlps = max(1, model.experts(0))
        inner = max(target.widths)
        keep = 1 - target.removed / sum(target.widths)
        generated = pruning.section.generated
        windows = windows[0] + generated, windows[1]
        return cls(
            windows=windows if pruning.needs_windows else None,
            removals=target.dropped + target.attentions,
            by=pruning.depth_by,
            attention=target.attentions > 0,
            gradients=cuts
            and (pruner.needs_gradients or pruning.budgets in ("effect", "measured")),
            budgets=pruning.budgets if cuts else "uniform",
            measures=pruning.measures_blocks,
            propagates=pruning.section.propagate == "pruned",
            repair=pruning.repair,
            neurons=cuts,
            heads=heads * width if pruning.section.kv_groups else 0,
            mlps=mlps,
            share=int(config["num_experts_per_tok"]) / mlps if mlps > 1 else 1.0,
            ranks=type(pruner).select is Pruner.select,
            choice=choice_seconds(pruner, inner, int(config["hidden_size"]), keep)
            if cuts
            else 0.0,
            exchanges=pruning.section.exchanges,
            generated=generated,
        )

    @property
    def tokens(self) -> int:
        """Of calibration."""
        return 0 if self.windows is None else self.windows[0] * self.windows[1]

    def some(self, windows: int) -> int:
        """Return the tokens of at most so many windows."""
        return (
            0 if self.windows is None else min(windows, self.windows[0]) * self.length
        )

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return 0 if self.windows is None else self.windows[1]


def prune_seconds(shapes: Shapes, work: PruneWork, speeds: Speeds) -> float:
    """Return the prediction for the stage.

    Args:
        shapes: Of the dense model.
        work: What is done.
        speeds: Of the device that it is done on.
    """
    files = 2 * shapes.stored_bytes * shapes.parameters / duration.DISK_BYTES_A_SECOND
    total = files + shapes.parameters * _PASSES_TO_COPY * speeds.host_pass
    total += _depth(shapes, work, speeds)
    if work.gradients:
        total += _gradients(shapes, work, speeds)
    total += _budgets(shapes, work, speeds)
    total += exchanges.seconds(shapes, work, speeds)
    if work.exchanges:
        total += _pass(shapes, work.tokens, speeds) + _moments(shapes, work, speeds)
        total += shapes.blocks * work.choice
    if work.measures:
        passes = 1 + work.propagates * (work.neurons + (work.heads > 0))
        total += passes * _pass(shapes, work.tokens, speeds) + _moments(
            shapes, work, speeds
        )
    mlps = shapes.blocks * work.mlps
    if work.neurons:
        total += mlps * (work.choice + _repair(shapes.inner, shapes, work, speeds))
    if work.heads:
        total += shapes.blocks * _repair(work.heads, shapes, work, speeds)
    return total


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
        stages.append((states, block + memory.total(_solving(shapes, work))))
    ahead = shapes.stored_bytes * shapes.block  # the next block is being read
    if not on_gpu:
        kept = int(memory.KEPT * memory.small(_solving(shapes, work)))
        return ahead + kept + max(copying, *(sum(stage) for stage in stages)), 0
    host = max(kept for kept, _ in stages) if pinned else 0
    device = max(used + (0 if pinned else kept) for kept, used in stages)
    return ahead + max(copying, host), ahead + device


def choice_seconds(pruner: Pruner, inner: int, hidden: int, keep: float) -> float:
    """Return how long a method takes to choose among ``inner`` neurons.

    Two small random MLPs of the same proportions are timed; the exponent that they
    show, between 1 and 3, is carried on.

    Args:
        pruner: The method.
        inner: Neurons.
        hidden: Width of the states.
        keep: Share that stays.
    """
    times = [_choice(pruner, n, max(1, n * hidden // inner), keep) for n in _PROBES]
    power = math.log(times[1] / times[0]) / math.log(_PROBES[1] / _PROBES[0])
    return times[1] * math.pow(inner / _PROBES[1], min(3.0, max(1.0, power)))


def _choice(pruner: Pruner, inner: int, hidden: int, keep: float) -> float:
    generator = torch.Generator().manual_seed(0)
    gate, up, down, x = (
        torch.randn(*shape, generator=generator)
        for shape in ((inner, hidden), (inner, hidden), (hidden, inner), (inner, inner))
    )
    mlp, found = GatedMLP(gate, up, down), None
    if pruner.needs_activations:
        gram, power = x.T @ x / inner, x.square().mean(0)
        found = NeuronStatistics(gram, x.mean(0), x.abs().amax(0), inner, power)
    protected = None if found is None else loudest(found)
    count = max(1, round(keep * inner))
    return duration.timed(lambda: pruner.select(mlp, found, count, protected), times=2)


def _pass(shapes: Shapes, tokens: int, speeds: Speeds) -> float:
    """All blocks, loaded one after another, on some tokens."""
    loading = shapes.active * shapes.blocks * _PASSES_TO_LOAD * speeds.host_pass
    return _START_SECONDS + loading + duration.sweep(shapes, tokens, speeds)


def _head(shapes: Shapes, tokens: int, speeds: Speeds) -> float:
    """Logits, and what is done with them."""
    products = 2 * tokens * shapes.vocabulary * shapes.hidden / speeds.blocks
    return products + _LOGITS_PASSES * tokens * shapes.vocabulary * speeds.device_pass


def _depth(shapes: Shapes, work: PruneWork, speeds: Speeds) -> float:
    total = 0.0
    tokens = work.some(depth.WINDOWS)
    for gone in range(work.removals):
        left = shapes.blocks - (0 if work.attention else gone)
        if work.by == "importance":
            total += left / shapes.blocks * _pass(shapes, work.tokens, speeds)
            continue
        places = _candidates(left, gone, attention=work.attention)
        # Each candidate has states of its own from its block on.
        runs = left + sum(left - place - (not work.attention) for place in places)
        total += _pass(shapes, 0, speeds)
        total += runs / shapes.blocks * duration.sweep(shapes, tokens, speeds)
        total += len(places) * _head(shapes, tokens, speeds)
    return total


def _candidates(left: int, gone: int, *, attention: bool) -> Sequence[int]:
    """Return places that are tried; which attentions went is not known yet."""
    if attention:
        return range(1 + gone, left)
    return range(depth.FIRST, left - depth.LAST)


def _gradients(shapes: Shapes, work: PruneWork, speeds: Speeds) -> float:
    tokens = work.some(GRADIENT_WINDOWS)
    blocks = 2 * _pass(shapes, 0, speeds)
    blocks += (1 + _BACKWARD) * duration.sweep(shapes, tokens, speeds)
    return blocks + 2 * _head(shapes, tokens, speeds)


def _budgets(shapes: Shapes, work: PruneWork, speeds: Speeds) -> float:
    if work.budgets in ("uniform", "effect"):
        return 0.0
    total = _pass(shapes, work.tokens, speeds)
    if work.budgets == "cfsp":
        return total
    total += _moments(shapes, work, speeds)
    mlps = shapes.blocks * work.mlps
    if work.budgets == "measured":
        one = work.choice + _repair(shapes.inner, shapes, work, speeds)
        return total + mlps * len(LADDER) * one
    total += mlps * work.choice
    if work.budgets == "learned":
        dense = work.some(GRADIENT_WINDOWS)
        steps = gates.STEPS * min(gates.TOKENS, dense)
        trained = dense + (1 + _BACKWARD) * steps
        total += duration.sweep(shapes, trained, speeds)
        total += 3 * _head(shapes, steps, speeds)
    return total


def _moments(shapes: Shapes, work: PruneWork, speeds: Speeds) -> float:
    """Second moments of what is cut, in float32 or on matrix units."""
    operations = 0.0
    if work.neurons or work.budgets != "uniform":
        operations += work.mlps * work.share * shapes.inner**2
    operations += work.heads**2
    share = 2 * duration.GRAM_SHARE * work.tokens * shapes.blocks
    return share * operations / speeds.exact


def _repair(columns: int, shapes: Shapes, work: PruneWork, speeds: Speeds) -> float:
    """A system and the error of its solution, for one matrix ``[H, columns]``."""
    if not work.measures:
        return 0.0
    error = 4 * shapes.hidden * columns**2
    solving = {
        "least_squares": 2 * columns**3 / 3 + 4 * shapes.hidden * columns**2,
        "mask": 4 * columns**3 / 3 + 2 * shapes.hidden * columns**2,
    }.get(work.repair, 0.0)
    return (error + solving) / speeds.double


def _forward(shapes: Shapes, tokens: int, width: int, on_gpu: bool) -> int:
    """Tensors inside a block: three as wide as the states, three as the MLP."""
    size = width * tokens * 3 * (shapes.hidden + shapes.inner)
    return min(size, _BATCH_BYTES) if on_gpu else size


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
    places = len(_candidates(shapes.blocks, 0, attention=work.attention))
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
        (4, _DOUBLE * columns * shapes.hidden),
    ]
