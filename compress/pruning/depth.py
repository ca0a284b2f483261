"""Which blocks a model can do without.

* ``importance``: ``1 - mean cos(h, h')``; the block that turns its input least goes.
* ``perplexity``: the one without which the model predicts calibration text best, every
  candidate tried.

Both are found anew after each block, since a dropped one changes what its neighbours
see. The first two blocks and the last stay: they make and read the residual stream.

Source: Men et al., ShortGPT (arXiv 2403.03853) for importance; Kim et al., Shortened
LLaMA (arXiv 2402.02834) for perplexity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from compress.core.artifact import ModelDescription, TensorSource
from compress.model.states import Activations
from compress.model.streaming import StreamedModel
from compress.pruning.surgery import without_blocks

_FIRST, _LAST = 2, 1
_WINDOWS = 16  # of calibration text, for perplexity


@dataclass(frozen=True)
class Turn:
    """How a block changes its input, mean over tokens.

    Attributes:
        angle: ``arccos(cos(h, h')) / pi``.
        importance: ``1 - cos(h, h')``.
    """

    angle: float
    importance: float


@torch.no_grad()
def turns_of(model: StreamedModel, windows: Tensor) -> list[Turn]:
    """Return how each block turns the residual stream, in one pass.

    Args:
        model: Dense.
        windows: int64 ``[N, T]`` tokens.
    """
    states = model.embed(windows)
    found = []
    indices = range(model.description.block_count)
    for index in tqdm(indices, desc="importance", leave=False, disable=None):
        with model.block(index):
            found.append(_turn(model, index, states))
    return found


def _turn(model: StreamedModel, index: int, states: Activations) -> Turn:
    """Send all states through a block and compare."""
    angles, importances = [], []
    rows = model.batches(states)
    for part, (hidden,) in zip(rows, model.feed(rows, states), strict=True):
        output = model.call_block(index, hidden, states.calls[index])
        cos = torch.cosine_similarity(hidden.float(), output.float(), dim=-1)
        cos = cos.clamp(-1, 1)
        angles.append((cos.arccos() / torch.pi).flatten())
        importances.append((1 - cos).flatten())
        model.store(states, part, output)
    model_angles, model_importances = torch.cat(angles), torch.cat(importances)
    return Turn(float(model_angles.mean()), float(model_importances.mean()))


def choose_blocks(
    model: ModelDescription,
    source: TensorSource,
    windows: Tensor,
    *,
    count: int,
    by: str,
    streamed: Callable[[ModelDescription, TensorSource], StreamedModel],
) -> list[int]:
    """Return the blocks to drop, by their numbers in the original, in that order.

    Args:
        model: Dense.
        source: Its tensors.
        windows: int64 ``[N, T]`` calibration tokens.
        count: How many.
        by: ``importance`` or ``perplexity``.
        streamed: Makes a model that runs.
    """
    dropped: list[int] = []
    for _ in range(count):
        left = [i for i in range(model.block_count) if i not in dropped]
        running = streamed(*without_blocks(model, source, dropped))
        candidates = range(_FIRST, len(left) - _LAST)
        if by == "importance":
            turns = turns_of(running, windows)
            worst = min(candidates, key=lambda i: turns[i].importance)
        else:
            losses = _losses_without(running, windows[:_WINDOWS], candidates)
            worst = min(candidates, key=lambda i: losses[i])
        dropped.append(left[worst])
    return dropped


@torch.no_grad()
def _losses_without(
    model: StreamedModel, windows: Tensor, candidates: Sequence[int]
) -> dict[int, float]:
    """Return the cross-entropy without each of some blocks, nats a token.

    All candidates walk together: each skips its own block, and from there on has
    states of its own.
    """
    states = model.embed(windows)
    apart: dict[int, Activations] = {}
    for index in range(model.description.block_count):
        if index in candidates:
            apart[index] = model.copy(states)
        with model.block(index):
            for other, own in apart.items():
                if other != index:
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
