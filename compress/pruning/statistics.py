"""Moments of the inputs of ``down``, and of attention's o, one block at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compress.calibration.collect import Moments
from compress.core.errors import CalibrationError
from compress.core.neurons import GatedMLP, NeuronStatistics, Wanted
from compress.model.states import Activations
from compress.model.streaming import StreamedModel
from compress.pruning.heads import AttentionPlace
from compress.pruning.places import MLPPlace

_AT_ONCE = 4096  # tokens of one product in float32


class NeuronMoments:
    """Sums over the tokens that one MLP, or one attention, sees."""

    def __init__(self) -> None:
        self._products = Moments()
        self._sum: Tensor | None = None
        self._peak: Tensor | None = None
        self._wanted: Tensor | None = None
        self._power = 0.0

    @property
    def tokens(self) -> int:
        """How many tokens were counted."""
        return self._products.tokens

    def add(self, inputs: Tensor, wanted: Tensor | None = None) -> None:
        """Count some tokens.

        Args:
            inputs: ``[..., I]``.
            wanted: float32 ``[..., H]``, what the matrix is to give; always or never.
        """
        flat = inputs.detach().reshape(-1, inputs.shape[-1])
        if not len(flat):
            return
        self._products.add(flat.unsqueeze(0))
        if wanted is not None:
            self._add_wanted(flat, wanted.detach().reshape(len(flat), -1))
        total, peak = flat.sum(0, dtype=torch.float32), flat.abs().amax(0).float()
        self._sum = total if self._sum is None else self._sum + total
        self._peak = peak if self._peak is None else torch.maximum(self._peak, peak)

    def _add_wanted(self, flat: Tensor, wanted: Tensor) -> None:
        parts = torch.split(flat, _AT_ONCE), torch.split(wanted, _AT_ONCE)
        for x, t in zip(*parts, strict=True):
            product = t.float().T @ x.float()
            # Few sums of many tokens: double, where the device has it.
            kind = torch.float32 if x.device.type == "mps" else torch.float64
            total = product.to(kind)
            self._wanted = total if self._wanted is None else self._wanted + total
            self._power += float(t.float().square().sum())

    def result(self, name: str, effect: Tensor | None) -> NeuronStatistics:
        """Return the statistics, once.

        Args:
            name: Of the layer, for messages.
            effect: See :class:`NeuronStatistics`.

        Raises:
            CalibrationError: The inputs are not finite, or what is wanted is not.
        """
        if not math.isfinite(self._power):
            raise CalibrationError(
                f"{name}: what it is to give is NaN or infinite; set "
                "calibration.dtype: float32"
            )
        assert self._sum is not None and self._peak is not None
        found = self._products.statistics(name)
        return NeuronStatistics(
            gram=found.hessian.div_(2 * found.tokens),
            mean=self._sum / found.tokens,
            peak=self._peak,
            tokens=found.tokens,
            effect=None if effect is None else effect.to(self._sum.device),
            wanted=None
            if self._wanted is None
            else Wanted(self._wanted / found.tokens, self._power / found.tokens),
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
