"""Round to nearest: each weight goes to the closest point of its group's grid.

The baseline that every calibrated method is measured against, and the fallback of those
that cannot treat a layer. Needs no data. By default scales map the group's range to the
grid, ``s = amax / ((2^b - 1) / 2)``, as other tools do, so that figures compare;
``search: true`` picks the scale of least squared error instead. ggml's K and IQ4 types
are encoded as ggml encodes them, with its searches. With ``calibration.imatrix`` each
column's error counts by its importance there.

Source: compressed-tensors conventions for symmetric scales; see ``core/grids.py``.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from compress.core import block_encoders, grids, low_rank
from compress.core.contracts import Options, Quantizer
from compress.core.scheme import Scheme
from compress.core.statistics import LayerStatistics
from compress.core.tensors import QuantizedTensor


class RoundToNearestOptions(Options):
    """Options of ``rtn``.

    Attributes:
        search: Choose each scale by squared error instead of by the group's range.
    """

    search: bool = False


class RoundToNearest(Quantizer):
    """Round to nearest on any grid; needs no data."""

    name = "rtn"
    summary = "round to nearest; needs no data"
    source = "baseline; scales as in compressed-tensors"
    Options: ClassVar[type[Options]] = RoundToNearestOptions
    options: RoundToNearestOptions

    def schemes(self) -> tuple[str, ...]:
        """Names of schemes an allocator may choose, most bits first."""
        return tuple(f"int{bits}-g32" for bits in range(8, 1, -1))

    def supports(self, scheme: Scheme) -> bool:
        """Whether this quantizer can produce ``scheme``: any on a grid."""
        return scheme.codebook is None

    def codes_rows_apart(self, scheme: Scheme) -> bool:
        """Whether a row's codes are the same whatever rows lie beside it."""
        return scheme.rows_are_independent

    def quantize(
        self, weight: Tensor, scheme: Scheme, statistics: LayerStatistics | None
    ) -> QuantizedTensor:
        """Return the nearest codes of ``weight`` ``[R, C]``.

        Statistics are not needed; a search that is handed some weighs columns by them.
        """
        diagonal = None if statistics is None else statistics.hessian.diagonal()
        return self._nearest(weight, scheme, diagonal)

    def takes_importance(self, scheme: Scheme) -> bool:
        """Whether scales are searched for, and not set by each group's range."""
        return self.options.search or block_encoders.treats(scheme)

    def quantize_by_importance(
        self, weight: Tensor, scheme: Scheme, importance: Tensor
    ) -> QuantizedTensor:
        """Return the nearest codes on scales of least weighted squared error."""
        return self._nearest(weight, scheme, importance)

    def _nearest(
        self, weight: Tensor, scheme: Scheme, importance: Tensor | None
    ) -> QuantizedTensor:
        groups = grids.as_groups(weight, scheme)
        if self.takes_importance(scheme):
            if importance is not None:
                importance = importance.view(groups.shape[1], -1)
            parameters = grids.search_parameters(
                groups, scheme, importance=importance, by_magnitude=True
            )
        else:
            parameters = grids.range_parameters(groups, scheme)
        codes = grids.encode(groups, parameters, scheme)
        coded = grids.assemble(codes.view(weight.shape), parameters, scheme)
        return low_rank.correct(weight, coded)
