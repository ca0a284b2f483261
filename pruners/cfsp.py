"""CFSP: neurons by activation norm, in three readings of its fine criterion.

With ``n_j = |X_j|_2``, root mean square over calibration tokens:

* ``act``: ``score_j = n_j``. That is what the released code ranks by: its bracket
  ``sum_i (A_ij / sum_i A_ij + ...)`` is constant, since each fraction sums to one over
  the very index it is summed over, so weights drop out.
* ``wx`` (default): ``|down_j|_2 n_j``, the size of what a neuron adds to the stream.
* ``relative``: each matrix normalised over neurons instead of within one, as the paper
  words it: ``mean_i |down_ij| n_j / sum_j |down_ij| n_j`` and the same for rows of gate
  and up without ``n``, times ``n_j``.

Blocks get their share by angular distance (budgets ``cfsp``).

Source: Wang et al., CFSP (arXiv 2409.13199), section 3 and its released code.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from compress.core.contracts import Options, Pruner
from compress.core.neurons import GatedMLP, NeuronStatistics


class CFSPOptions(Options):
    """Options of ``cfsp``.

    Attributes:
        fine: Reading of the fine criterion.
    """

    fine: Literal["act", "wx", "relative"] = "wx"


class CFSP(Pruner):
    """See the module."""

    name: ClassVar[str] = "cfsp"
    summary: ClassVar[str] = "activation norms, blocks by angular distance"
    source: ClassVar[str] = "arXiv 2409.13199, section 3"
    Options: ClassVar[type[Options]] = CFSPOptions
    options: CFSPOptions

    def scores(self, mlp: GatedMLP, statistics: NeuronStatistics | None) -> Tensor:
        """Return the scores of the chosen reading."""
        assert statistics is not None
        norms = statistics.energy.clamp(min=0).sqrt()
        if self.options.fine == "act":
            return norms
        if self.options.fine == "wx":
            sizes: Tensor = mlp.down.norm(dim=0)
            return sizes * norms
        parts = (
            _share(mlp.down.abs() * norms, axis=1).mean(0),
            _share(mlp.gate.abs(), axis=0).mean(1),
            _share(mlp.up.abs(), axis=0).mean(1),
        )
        return (parts[0] + parts[1] + parts[2]) * norms


def _share(values: Tensor, axis: int) -> Tensor:
    """Return values as shares of their sum over neurons."""
    return values / values.sum(axis, keepdim=True).clamp(min=1e-30)
