"""Which blocks a model can do without, or which attention.

* ``importance``: ``1 - mean cos(h, h')``; what turns the residual stream least goes.
  ``h'`` is the output of a block, or ``h`` plus what attention writes.
* ``perplexity``: that without which the model predicts calibration text best, every
  candidate tried.

Both are found anew after each one, since what is gone changes what its neighbours see.
Of blocks the first two and the last stay: they make and read the residual stream. The
attention of the first block stays, by whose heads llama.cpp knows the width of all.

Source: Men et al., ShortGPT (arXiv 2403.03853) for importance of blocks, He et al.
(arXiv 2406.15786) of attention; Kim et al., Shortened LLaMA (arXiv 2402.02834) for
blocks by perplexity, Sandri et al., 2SSP (arXiv 2501.17771) for attention, which is its
second stage. What differs from 2SSP: attention goes before neurons do, so that these
are measured, and the rest repaired, on what is left; 16 windows instead of one sample.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.core.artifact import ModelDescription, TensorSource
from compress.model.states import Activations, BlockCall
from compress.model.streaming import StreamedModel
from compress.progress import progress_bar
from compress.pruning.surgery import without_attention, without_blocks

FIRST, LAST = 2, 1
WINDOWS = 16  # of calibration text, for perplexity


@dataclass(frozen=True)
class Turn:
    """How a block changes its input, mean over tokens.

    Attributes:
        angle: ``arccos(cos(h, h')) / pi``.
        importance: ``1 - cos(h, h')``.
    """

    angle: float
    importance: float


class Unit(ABC):
    """What goes as a whole: a block, or the attention of one."""

    @abstractmethod
    def without(
        self, model: ModelDescription, source: TensorSource, gone: Sequence[int]
    ) -> tuple[ModelDescription, TensorSource]:
        """Return the model without some, by the numbers of their blocks."""

    @abstractmethod
    def left(self, model: ModelDescription, gone: Sequence[int]) -> dict[int, int]:
        """Return candidates: numbers in what is left, and those in ``model``."""

    @abstractmethod
    def skip(self, model: StreamedModel, index: int, states: Activations) -> None:
        """Send states through a loaded block without its unit."""

    @abstractmethod
    def call(
        self, model: StreamedModel, index: int, hidden: Tensor, call: BlockCall
    ) -> tuple[Tensor, Tensor]:
        """Return the output of a loaded block, and ``h'``; see the module."""


class Blocks(Unit):
    """Whole blocks."""

    def without(
        self, model: ModelDescription, source: TensorSource, gone: Sequence[int]
    ) -> tuple[ModelDescription, TensorSource]:
        """Return the model with blocks numbered anew."""
        return without_blocks(model, source, gone)

    def left(self, model: ModelDescription, gone: Sequence[int]) -> dict[int, int]:
        """Return all but the first two and the last."""
        left = [i for i in range(model.block_count) if i not in gone]
        return dict(list(enumerate(left))[FIRST : len(left) - LAST])

    def skip(self, model: StreamedModel, index: int, states: Activations) -> None:
        """Leave the states as they are."""

    def call(
        self, model: StreamedModel, index: int, hidden: Tensor, call: BlockCall
    ) -> tuple[Tensor, Tensor]:
        """Return the output twice."""
        output = model.call_block(index, hidden, call)
        return output, output


class Attention(Unit):
    """Attention, with the norms around it."""

    def without(
        self, model: ModelDescription, source: TensorSource, gone: Sequence[int]
    ) -> tuple[ModelDescription, TensorSource]:
        """Return the model with as many blocks."""
        return without_attention(model, source, gone)

    def left(self, model: ModelDescription, gone: Sequence[int]) -> dict[int, int]:
        """Return all but that of the first block."""
        numbers = range(1, model.block_count)
        return {i: i for i in numbers if i not in gone and model.has_attention(i)}

    def skip(self, model: StreamedModel, index: int, states: Activations) -> None:
        """Run the block with attention that writes zeros."""
        handle = _writer(model, index).register_forward_hook(_zeros)
        try:
            model.advance(index, states)
        finally:
            handle.remove()

    def call(
        self, model: StreamedModel, index: int, hidden: Tensor, call: BlockCall
    ) -> tuple[Tensor, Tensor]:
        """Return the output, and the input plus what attention writes."""
        if not model.description.has_attention(index):
            return model.call_block(index, hidden, call), hidden
        written: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            written.append(output[0] if isinstance(output, tuple) else output)

        handle = _writer(model, index).register_forward_hook(keep)
        try:
            output = model.call_block(index, hidden, call)
        finally:
            handle.remove()
        return output, hidden.to(written[0]) + written[0]


_BLOCKS = Blocks()
UNITS: dict[str, Unit] = {"block": _BLOCKS, "attention": Attention()}


def _writer(model: StreamedModel, index: int) -> nn.Module:
    """Return the module whose output attention adds to the stream."""
    family = model.description.family
    path = family.output_norms[0] if family.output_norms else family.attention
    found: nn.Module = model.model.get_submodule(f"{family.block(index)}.{path}")
    return found


def _zeros(_module: nn.Module, _inputs: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return (torch.zeros_like(output[0]), *output[1:])
    return torch.zeros_like(output)


@torch.no_grad()
def turns_of(model: StreamedModel, windows: Tensor, unit: Unit = _BLOCKS) -> list[Turn]:
    """Return how each block, or its attention, turns the stream, in one pass.

    Args:
        model: Dense.
        windows: int64 ``[N, T]`` tokens.
        unit: What is looked at.
    """
    states = model.embed(windows)
    found = []
    indices = range(model.description.block_count)
    for index in progress_bar(indices, desc="importance", leave=False):
        with model.block(index):
            found.append(_turn(model, index, states, unit))
    return found


def _turn(model: StreamedModel, index: int, states: Activations, unit: Unit) -> Turn:
    """Send all states through a block and compare."""
    angles, importances = [], []
    rows = model.batches(states)
    for part, (hidden,) in zip(rows, model.feed(rows, states), strict=True):
        output, turned = unit.call(model, index, hidden, states.calls[index])
        cos = torch.cosine_similarity(hidden.float(), turned.float(), dim=-1)
        cos = cos.clamp(-1, 1)
        angles.append((cos.arccos() / torch.pi).flatten())
        importances.append((1 - cos).flatten())
        model.store(states, part, output)
    model_angles, model_importances = torch.cat(angles), torch.cat(importances)
    return Turn(float(model_angles.mean()), float(model_importances.mean()))


def choose_units(
    model: ModelDescription,
    source: TensorSource,
    windows: Tensor,
    *,
    unit: Unit,
    count: int,
    by: str,
    streamed: Callable[[ModelDescription, TensorSource], StreamedModel],
) -> list[int]:
    """Return what goes, by numbers of blocks in the original, in that order.

    Args:
        model: Dense.
        source: Its tensors.
        windows: int64 ``[N, T]`` calibration tokens.
        unit: Blocks, or attention.
        count: How many.
        by: ``importance`` or ``perplexity``.
        streamed: Makes a model that runs.
    """
    gone: list[int] = []
    for _ in range(count):
        running = streamed(*unit.without(model, source, gone))
        left = unit.left(model, gone)
        if by == "importance":
            turns = turns_of(running, windows, unit)
            worst = min(left, key=lambda i: turns[i].importance)
        else:
            losses = _losses_without(running, windows[:WINDOWS], list(left), unit)
            worst = min(left, key=lambda i: losses[i])
        gone.append(left[worst])
    return gone


@torch.no_grad()
def _losses_without(
    model: StreamedModel, windows: Tensor, candidates: Sequence[int], unit: Unit
) -> dict[int, float]:
    """Return the cross-entropy without each of some units, nats a token.

    All candidates walk together: each skips its own unit, and from there on has
    states of its own.
    """
    states = model.embed(windows)
    apart: dict[int, Activations] = {}
    for index in range(model.description.block_count):
        if index in candidates:
            apart[index] = model.copy(states)
        with model.block(index):
            for other, own in apart.items():
                if other == index:
                    unit.skip(model, index, own)
                else:
                    model.advance(index, own)
            model.advance(index, states)
    with model.head(on_device=True) as head:
        return {i: _cross_entropy(head, own, windows) for i, own in apart.items()}


def _cross_entropy(
    head: Callable[[Tensor], Tensor], states: Activations, windows: Tensor
) -> float:
    losses = []
    for hidden, tokens in zip(states.hidden, windows, strict=True):
        logits = head(hidden)[:-1]
        losses.append(
            torch.nn.functional.cross_entropy(logits, tokens[1:].to(logits.device))
        )
    return float(torch.stack(losses).mean())
