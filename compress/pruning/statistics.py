"""Moments of the inputs of ``down``, and of attention's o, one block at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compress.calibration.collect import Moments
from compress.core.neurons import GatedMLP, NeuronStatistics
from compress.model.states import Activations
from compress.model.streaming import StreamedModel
from compress.pruning.heads import AttentionPlace
from compress.pruning.places import MLPPlace


class NeuronMoments:
    """Sums over the tokens that one MLP, or one attention, sees."""

    def __init__(self) -> None:
        self._products = Moments()
        self._sum: Tensor | None = None
        self._peak: Tensor | None = None

    @property
    def tokens(self) -> int:
        """How many tokens were counted."""
        return self._products.tokens

    def add(self, inputs: Tensor) -> None:
        """Count some tokens, ``[..., I]``."""
        flat = inputs.detach().reshape(-1, inputs.shape[-1])
        if not len(flat):
            return
        self._products.add(flat.unsqueeze(0))
        total, peak = flat.sum(0, dtype=torch.float32), flat.abs().amax(0).float()
        self._sum = total if self._sum is None else self._sum + total
        self._peak = peak if self._peak is None else torch.maximum(self._peak, peak)

    def result(self, name: str, effect: Tensor | None) -> NeuronStatistics:
        """Return the statistics, once.

        Args:
            name: Of the layer, for messages.
            effect: See :class:`NeuronStatistics`.

        Raises:
            CalibrationError: The inputs are not finite.
        """
        assert self._sum is not None and self._peak is not None
        found = self._products.statistics(name)
        return NeuronStatistics(
            gram=found.hessian.div_(2 * found.tokens),
            mean=self._sum / found.tokens,
            peak=self._peak,
            tokens=found.tokens,
            effect=None if effect is None else effect.to(self._sum.device),
        )


def unseen(mlp: GatedMLP) -> NeuronStatistics:
    """Return what is assumed of an expert that saw too few tokens: inputs all alike.

    Every criterion then ranks by weights alone, and nothing is taken over.
    """
    ones = torch.ones(mlp.neurons, device=mlp.down.device)
    return NeuronStatistics(
        torch.diag(ones), ones * 0, ones, 0, mlp.down.square().sum(0)
    )


@contextmanager
def watched(
    block: nn.Module, places: Sequence[MLPPlace | AttentionPlace]
) -> Iterator[Mapping[str, NeuronMoments]]:
    """Count the inputs of each ``down`` of a block for a while, by path of place."""
    found = {place.path: NeuronMoments() for place in places}
    hooks = [
        block.get_submodule(place.down_path).register_forward_pre_hook(
            partial(_count, found[place.path])
        )
        for place in places
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _count(moments: NeuronMoments, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
    moments.add(inputs[0])


@torch.no_grad()
def run_through(model: StreamedModel, index: int, states: Activations) -> None:
    """Send all states through a loaded block and forget the outputs."""
    rows = model.batches(states)
    for (hidden,) in model.feed(rows, states):
        model.call_block(index, hidden, states.calls[index])
