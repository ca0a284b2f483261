"""FLAP: neurons by the fluctuation of what they add to the stream.

    score_j = Var(X_j) |down_j|_2^2

What a neuron adds on average can move into a bias (repair ``bias``), so only its
variance counts. The paper standardises scores within a block and then cuts all blocks
at one threshold: budgets ``standardised``.

Source: An et al., FLAP (arXiv 2312.11983), equations 4 to 6.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from compress.core.contracts import Pruner
from compress.core.neurons import GatedMLP, NeuronStatistics


class FLAP(Pruner):
    """See the module."""

    name: ClassVar[str] = "flap"
    summary: ClassVar[str] = "fluctuation of activations; mean moves to a bias"
    source: ClassVar[str] = "arXiv 2312.11983, equations 4 to 6"
    budgets: ClassVar[str] = "standardised"

    def scores(self, mlp: GatedMLP, statistics: NeuronStatistics | None) -> Tensor:
        """Return variance times squared column norm."""
        assert statistics is not None
        return statistics.variance * mlp.down.square().sum(0)
