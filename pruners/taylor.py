"""Taylor: neurons by what the model's predictions lose without them.

    score_j = E[(x_j dL/dx_j)^2],   L = sum_t log p(s_t),  s_t drawn from p_t

is twice the KL in nats, to second order, when neuron ``j`` is set to zero everywhere
(Fisher information; products of two positions are left out, which is exact in the last
block only). Labels are drawn
from the model, so that no labelled text is needed and the mean gradient is zero, where
a first-order score would only be noise. Scores of all blocks have one unit, so that a
global threshold makes sense: budgets ``effect``.

Source: Molchanov et al. (arXiv 1906.10771), equation 8, for the squared product; the
sampled labels are those of Fisher information. LLM-Pruner (arXiv 2305.11627) uses the
same expansion with true labels.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from compress.core.contracts import Pruner
from compress.core.neurons import GatedMLP, NeuronStatistics


class Taylor(Pruner):
    """See the module."""

    name: ClassVar[str] = "taylor"
    summary: ClassVar[str] = "loss of predictions, by one backward pass"
    source: ClassVar[str] = "arXiv 1906.10771, equation 8, with sampled labels"
    budgets: ClassVar[str] = "effect"

    @property
    def needs_gradients(self) -> bool:
        """Always."""
        return True

    def scores(self, mlp: GatedMLP, statistics: NeuronStatistics | None) -> Tensor:
        """Return the effect of each neuron."""
        assert statistics is not None and statistics.effect is not None
        return statistics.effect
