"""Wanda-sp: neurons by the mean of weight times activation norm.

    score_j = mean_i |down_ij| |X_j|_2

Source: the structured form of Wanda in An et al., FLAP (arXiv 2312.11983), section 4.1.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from compress.core.contracts import Pruner
from compress.core.neurons import GatedMLP, NeuronStatistics


class WandaSP(Pruner):
    """See the module."""

    name: ClassVar[str] = "wanda_sp"
    summary: ClassVar[str] = "mean of |weight| times activation norm"
    source: ClassVar[str] = "arXiv 2312.11983, section 4.1"
    budgets: ClassVar[str] = "uniform"

    def scores(self, mlp: GatedMLP, statistics: NeuronStatistics | None) -> Tensor:
        """Return the mean of ``|down_ij|`` times the norm of ``X_j``."""
        assert statistics is not None
        return mlp.down.abs().mean(0) * statistics.energy.clamp(min=0).sqrt()
