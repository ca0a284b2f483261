"""Time of pruning, from the passes, moments and systems that it needs.

A pass sends all calibration tokens through all blocks; what each stage of a pruning is
in passes and products is in the functions here, one a stage. How long a method's own
choice takes, which is cubic for some, is measured on small MLPs and carried to the
model's width by the exponent that two sizes show.

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
from compress.planning import duration, exchanges
from compress.planning.duration import Speeds
from compress.planning.shapes import Shapes
from compress.pruning import depth, gates
from compress.pruning.dealing import GRADIENT_WINDOWS, LADDER

if TYPE_CHECKING:
    from compress.pruning.stage import Pruning

_PASSES_TO_COPY = 6  # a weight read, cut and written, for the new checkpoint
_PASSES_TO_LOAD = 4  # a weight read, checked and cast, for one pass
_START_SECONDS = 0.5  # the module tree, built for each model that runs
# A backward pass without gradients of weights is as many products as a forward pass,
# which is run again before it.
_BACKWARD = 2
_LOGITS_PASSES = 12
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
        corrects: Whether o and ``down`` are fitted to the original's stream.
        repair: Resolved.
        neurons: Whether any goes.
        heads: Width of all heads together if o is measured, else 0.
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
    corrects: bool
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
            corrects=pruning.corrects,
            repair=pruning.repair,
            neurons=cuts,
            heads=heads * width if pruning.section.kv_groups or pruning.corrects else 0,
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
        total += _walks(work) * _pass(shapes, work.tokens, speeds)
        total += _moments(shapes, work, speeds) + _wanted(shapes, work, speeds)
    mlps = shapes.blocks * work.mlps
    if work.neurons:
        total += mlps * (work.choice + _repair(shapes.inner, shapes, work, speeds))
    if work.heads:
        total += shapes.blocks * _repair(work.heads, shapes, work, speeds)
    return total


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
        places = candidates(left, gone, attention=work.attention)
        # Each candidate has states of its own from its block on.
        runs = left + sum(left - place - (not work.attention) for place in places)
        total += _pass(shapes, 0, speeds)
        total += runs / shapes.blocks * duration.sweep(shapes, tokens, speeds)
        total += len(places) * _head(shapes, tokens, speeds)
    return total


def candidates(left: int, gone: int, *, attention: bool) -> Sequence[int]:
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


def _walks(work: PruneWork) -> int:
    """How often blocks run while they are cut."""
    fitted = work.neurons + (work.heads > 0)
    if work.corrects:
        return 2 + 2 * fitted - work.neurons  # the original goes along
    return 1 + work.propagates * fitted


def _wanted(shapes: Shapes, work: PruneWork, speeds: Speeds) -> float:
    """Products of inputs with what is to come of them, where that is another output."""
    if not work.corrects:
        return 0.0
    inputs = work.neurons * shapes.inner + work.heads
    return 2 * work.tokens * shapes.blocks * shapes.hidden * inputs / speeds.exact


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
