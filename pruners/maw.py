"""MAW: neurons by the range of their gate and up weights; no data.

    score_j = r(gate_j) + r(up_j),    r(w) = max(w) + |min(w)|

Source: Martra, "Width pruning of GLU models" (arXiv 2512.22671, where version 3 calls
it peak to peak magnitude). In spite of the name it is a range, not a magnitude, and
``down`` is not looked at. Scores are float32 whatever the checkpoint is; the range of a
row whose weights have one sign is still ``max + |min|``.

Limits: without data it may be worse than drawing neurons by lot, since how loud a
neuron is decides more than how large its weights are. ``activation`` costs one pass.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from compress.core.contracts import Pruner
from compress.core.neurons import GatedMLP, NeuronStatistics


class MAW(Pruner):
    """See the module."""

    name: ClassVar[str] = "maw"
    summary: ClassVar[str] = "range of gate and up weights; needs no data"
    source: ClassVar[str] = "arXiv 2512.22671, section 3"
    needs_activations: ClassVar[bool] = False
    budgets: ClassVar[str] = "uniform"

    def scores(self, mlp: GatedMLP, statistics: NeuronStatistics | None) -> Tensor:
        """Return the summed ranges of gate and up rows."""
        return _range(mlp.gate) + _range(mlp.up)


def _range(rows: Tensor) -> Tensor:
    wide = rows.float()
    return wide.amax(1) + wide.amin(1).abs()
