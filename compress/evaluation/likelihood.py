"""Log-likelihood of continuations, by a streamed model, block by block.

The choices of a question are one sequence (:mod:`compress.core.continuations`) under a
mask of their own. Each block is read once for as many sequences as fit the bound on
hidden states; the head is applied where an answer is, nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from compress.core.continuations import (
    COMMON,
    Branches,
    Continuation,
    Likelihood,
    lay_out,
    totals,
)
from compress.core.errors import CompressError
from compress.model.states import Activations
from compress.model.streaming import StreamedModel
from compress.progress import progress_bar

_HIDDEN_BYTES = 1 << 29
"""Hidden states that are held at once."""

_POSITIONS = 512
"""Positions whose logits are held at once."""

Groups = Sequence[Sequence[Continuation]]
"""Continuations, those of one question together."""


class Scorer(Protocol):
    """Anything that scores continuations: a streamed model, or llama.cpp."""

    def __call__(self, groups: Groups) -> list[list[Likelihood]]:
        """Return the likelihood of each, in the order of ``groups``."""


def likelihoods(
    model: StreamedModel, groups: Groups, *, name: str = "model"
) -> list[list[Likelihood]]:
    """Return the likelihood of each continuation, in order.

    Args:
        model: Inputs and cache are rounded if it rounds them.
        groups: Any number of questions.
        name: Labels the progress bar.

    Raises:
        CompressError: Logits are not finite.
    """
    config = model.description.config
    reach = config.get("sliding_window")
    layouts: list[tuple[int, Branches]] = []
    for index, group in enumerate(groups):
        longest = max(len(one.ids) for one in group)
        # A mask that is given replaces the model's own, which ends at its window.
        is_wide = reach is not None and longest > reach
        for part in [[one] for one in group] if is_wide else [group]:
            layouts.append((index, lay_out(part)))
    most = _HIDDEN_BYTES // (4 * int(config["hidden_size"]))
    found: list[list[Likelihood]] = [[] for _ in groups]
    for run in _runs(layouts, most):
        states = model.embed_all(_call(layout) for _, layout in run)
        _advance(model, states, name)
        with model.head(on_device=True) as head, torch.inference_mode():
            for (index, layout), activations in zip(run, states, strict=True):
                found[index] += _scored(head, activations.hidden[0], layout)
    return found


def _advance(model: StreamedModel, states: list[Activations], name: str) -> None:
    indices = range(model.description.block_count)
    for index in progress_bar(indices, desc=name, unit="block", leave=False):
        with model.block(index):
            for activations in states:
                activations.hidden = model.run_block(index, activations)


_Layouts = list[tuple[int, Branches]]


def _runs(layouts: _Layouts, most: int) -> Iterator[_Layouts]:
    """Yield layouts that together have at most ``most`` tokens, or one alone."""
    run: _Layouts = []
    held = 0
    for layout in layouts:
        size = len(layout[1].tokens)
        if run and held + size > most:
            yield run
            run, held = [], 0
        run.append(layout)
        held += size
    yield run


def _call(layout: Branches) -> dict[str, Tensor]:
    """Return what a model is called with: tokens, and for branches positions and mask.

    The mask is added to the scores: float32 ``[1, 1, T, T]``.
    """
    ids = torch.tensor([layout.tokens])
    if len(set(layout.owners)) == 1:
        return {"input_ids": ids}
    owners = torch.tensor(layout.owners)
    is_seen = (owners[:, None] == owners) | (owners == COMMON)
    mask = torch.zeros(len(owners), len(owners))
    mask.masked_fill_(~is_seen.tril(), torch.finfo(mask.dtype).min)
    return {
        "input_ids": ids,
        "position_ids": torch.tensor([layout.positions]),
        "attention_mask": mask[None, None],
    }


def _scored(
    head: Callable[[Tensor], Tensor], hidden: Tensor, layout: Branches
) -> list[Likelihood]:
    """Return likelihoods of continuations by final states ``[T, C]``."""
    nats: list[float] = []
    greedy: list[bool] = []
    for part in torch.split(torch.tensor(layout.reads), _POSITIONS):
        place, true, _ = part.T
        logits = head(hidden[place.to(hidden.device)])
        true = true.to(logits.device)
        values = logits.gather(1, true[:, None])[:, 0] - logits.logsumexp(-1)
        nats += values.tolist()
        greedy += (logits.argmax(-1) == true).tolist()
    if not all(map(math.isfinite, nats)):
        raise CompressError("the model yields NaN or infinite logits")
    return totals(layout, nats, greedy)
