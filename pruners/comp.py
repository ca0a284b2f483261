"""COMP-style: neurons by energy and collinearity, removed chunk by chunk.

With ``G`` the second moment of the inputs of ``down`` (plus a ridge),

    score_j = |down_j|^2 G_jj / VIF_j^gamma,    VIF_j = G_jj (G^-1)_jj

A neuron that others can stand in for linearly has a large variance inflation factor.
``gamma = 0`` looks at energy alone; ``gamma = 1`` is ``|down_j|^2 / (G^-1)_jj``, the
exact loss of the best linear compensation (OBS). Which neurons are replaceable depends
on who else stays: after each chunk weights are compensated and the inverse is
downdated, and of twins only one goes in a chunk.

Source: Xu et al., COMP (arXiv 2501.15255) gives the stages (blocks first, then neurons
by matrix condition, then mask tuning) without formulas or code; these formulas are a
reconstruction, hence "style". Chunked downdates: SlimGPT (arXiv 2412.18110).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.core.compensation import RIDGE, Downdate, with_ridge
from compress.core.contracts import Options, Pruner
from compress.core.neurons import GatedMLP, NeuronStatistics


class COMPOptions(Options):
    """Options of ``comp``.

    Attributes:
        gamma: Weight of collinearity.
        chunk: Neurons that go between two downdates.
        ridge: Share of the mean diagonal of ``G``.
    """

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

    def scores(self, mlp: GatedMLP, statistics: NeuronStatistics | None) -> Tensor:
        """Return the scores while all neurons are there."""
        assert statistics is not None
        damped = with_ridge(statistics.gram, self.options.ridge)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        return self._scores(mlp.down.double(), damped.diagonal(), inverse.diagonal())

    def _scores(self, down: Tensor, energy: Tensor, inverse: Tensor) -> Tensor:
        inflation = (energy * inverse).clamp(min=1)
        return down.square().sum(0) * energy / inflation**self.options.gamma

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
        energy = with_ridge(statistics.gram, options.ridge).diagonal()
        guarded = torch.zeros(mlp.neurons, dtype=torch.bool, device=mlp.down.device)
        if protected is not None:
            guarded[protected] = True
        while len(left.alive) > keep:
            scores = self._scores(
                left.weight, energy[left.alive], left.inverse.diagonal()
            )
            scores = scores.masked_fill(guarded[left.alive], torch.inf)
            count = min(options.chunk, len(left.alive) - keep)
            left.remove(left.lowest(scores, count))
        return left.alive
