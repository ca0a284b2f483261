"""COMP-style: neurons by energy and collinearity, removed chunk by chunk.

With ``G`` the second moment of the inputs of ``down`` (plus a ridge),

    score_j = worth_j / VIF_j^gamma,    VIF_j = G_jj (G^-1)_jj

where ``worth_j`` is ``|down_j|^2 G_jj``, the mean square of what a neuron adds to the
stream, or its ``effect`` on the model's predictions (see ``taylor``). A neuron that
others can stand in for linearly has a large variance inflation factor.
``gamma = 0`` looks at energy alone; ``gamma = 1`` is ``|down_j|^2 / (G^-1)_jj``, the
exact loss of the best linear compensation (OBS). Which neurons are replaceable depends
on who else stays: after each chunk weights are compensated and the inverse is
downdated, and of twins only one goes in a chunk.

Source: Xu et al., COMP (arXiv 2501.15255) gives the stages (blocks first, then neurons
by matrix condition, then mask tuning) without formulas or code; these formulas are a
reconstruction, hence "style". Chunked downdates: SlimGPT (arXiv 2412.18110).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.core.compensation import RIDGE, Downdate
from compress.core.contracts import Options, Pruner
from compress.core.neurons import GatedMLP, NeuronStatistics


class COMPOptions(Options):
    """Options of ``comp``.

    Attributes:
        worth: What a neuron is worth before others stand in for it: ``output`` or
            ``effect``, which takes a backward pass of the whole model.
        gamma: Weight of collinearity.
        chunk: Neurons that go between two downdates.
        ridge: Share of the mean diagonal of ``G``.
    """

    worth: Literal["output", "effect"] = "output"
    gamma: float = Field(default=1.0, ge=0, le=2)
    chunk: int = Field(default=24, ge=1)
    ridge: float = Field(default=RIDGE, gt=0)


class COMP(Pruner):
    """See the module."""

    name: ClassVar[str] = "comp"
    summary: ClassVar[str] = "COMP-style: collinearity with chunked downdates"
    source: ClassVar[str] = "after arXiv 2501.15255; downdates as arXiv 2412.18110"
    Options: ClassVar[type[Options]] = COMPOptions
    depth_share: ClassVar[float] = 0.5
    options: COMPOptions

    @property
    def needs_gradients(self) -> bool:
        """Whether neurons are worth their effect."""
        return self.options.worth == "effect"

    def scores(self, mlp: GatedMLP, statistics: NeuronStatistics | None) -> Tensor:
        """Return the scores while all neurons are there."""
        assert statistics is not None
        left = Downdate(mlp.down, statistics.gram, self.options.ridge)
        return self._scores(left, self._rate(left, statistics))

    def _rate(self, whole: Downdate, statistics: NeuronStatistics) -> Tensor:
        """Return what a neuron is worth for each unit of what it adds to the stream."""
        if self.options.worth == "output":
            return torch.ones_like(whole.energy)
        assert statistics.effect is not None
        added = whole.weight.square().sum(0) * whole.energy
        return statistics.effect.double() / added.clamp(min=1e-30)

    def _scores(self, left: Downdate, rate: Tensor) -> Tensor:
        """Return the scores of the neurons that are left, by their present weights."""
        energy = left.energy[left.alive]
        inflation = (energy * left.inverse.diagonal()).clamp(min=1)
        added = left.weight.square().sum(0) * energy
        return rate[left.alive] * added / inflation**self.options.gamma

    def select(
        self,
        mlp: GatedMLP,
        statistics: NeuronStatistics | None,
        keep: int,
        protected: Tensor | None = None,
    ) -> Tensor:
        """Return what is left after chunks of the lowest scores have gone."""
        assert statistics is not None
        options = self.options
        left = Downdate(mlp.down, statistics.gram, options.ridge)
        rate = self._rate(left, statistics)
        guarded = torch.zeros(mlp.neurons, dtype=torch.bool, device=mlp.down.device)
        if protected is not None:
            guarded[protected[:keep]] = True
        while len(left.alive) > keep:
            scores = self._scores(left, rate)
            scores = scores.masked_fill(guarded[left.alive], torch.inf)
            count = min(options.chunk, len(left.alive) - keep)
            left.remove(left.lowest(scores, count))
        return left.alive
