"""GPTQ: round column by column, and let later columns make up for the error.

Minimises ``tr((W - Q) H (W - Q)^T)`` for weights ``W [R, C]``, codes' values ``Q`` and
the inputs' second moment ``H = 2 sum x x^T`` (the Hessian of the layer's squared output
error). Columns are taken in order of falling ``diag(H)``; the error of each, divided by
the diagonal of ``U`` with ``H^-1 = U^T U``, is spread over the columns still to come.

Source: Frantar et al. (2022), "GPTQ: Accurate Post-Training Quantization for Generative
Pre-trained Transformers", algorithm 1; the drift correction follows the idea of Li et
al. (2025), "GPTAQ", in another form. Differs from the paper:

* scales are static, chosen before the loop by a weighted search over both signs
  (``core/grids.py``), so that act-order needs no index at inference. Column ``j``
  weighs ``1 / U_jj^2``, which is what its rounding costs once later columns have made
  up for it, and not ``H_jj``;
* the off-diagonal of H is shrunk, the usual cure for a covariance from few samples: it
  is what makes the result hold on text unlike the calibration text;
* ``drift``: half of the least-squares correction towards the dense model's outputs is
  added to W first, so that a layer repairs what the layers before it lost;
* ``refit``: closed-form scales and one pass of coordinate descent over the codes after
  the loop, accepted only where the objective falls;
* a row is merely rounded where the loop loses more than that.

Limits: memory is a few ``[C, C]`` matrices and a few copies of up to 2^27 weights; time
grows as ``R C^2``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from compress.core import feedback, grids, low_rank, refit, second_moments
from compress.core.contracts import Options, Quantizer
from compress.core.scheme import Scales, Scheme
from compress.core.statistics import LayerStatistics
from compress.core.tensors import QuantizedTensor

_WEIGHTS_AT_ONCE = 1 << 27  # half a GiB for each of a handful of float32 copies


class GPTQOptions(Options):
    """Options of ``gptq``.

    Attributes:
        damp: Added to the diagonal of H, as a share of its mean. Multiplied by ten, up
            to 1, while H is not positive definite; then the layer is merely rounded.
        shrink: Share by which the off-diagonal of H is reduced.
        drift: Share of the correction towards the dense model's outputs that is added.
        act_order: Take columns by falling ``diag(H)`` instead of from left to right.
        search: Choose scales by weighted error instead of by each group's range.
        refit: Rounds of closed-form scales and coordinate descent after the loop; by
            default 1 on ggml's K types, whose scales are coarse, and 0 elsewhere.
    """

    damp: float = Field(default=0.01, gt=0, le=second_moments.LARGEST_DAMP)
    shrink: float = Field(default=0.1, ge=0, lt=1)
    drift: float = Field(default=0.5, ge=0, le=1)
    act_order: bool = True
    search: bool = True
    refit: int | None = Field(default=None, ge=0, le=10)

    def refits(self, scheme: Scheme) -> int:
        """Return the rounds of ``refit`` for a scheme."""
        if self.refit is not None:
            return self.refit
        return 1 if scheme.scales is Scales.SUPER else 0


class _Ready(NamedTuple):
    """What a matrix is solved with; ``factor`` is missing where H has none."""

    target: Tensor
    hessian: Tensor
    order: Tensor
    factor: Tensor | None
    notes: tuple[str, ...]

    def rows(self, run: slice) -> _Ready:
        """Return some of its rows."""
        return self._replace(target=self.target[run])


class GPTQ(Quantizer):
    """Error feedback on any integer grid, with statistics from calibration."""

    name = "gptq"
    summary = "error feedback with weighted scale search and drift correction"
    source = "Frantar et al. 2022 (arXiv 2210.17323); Li et al. 2025 (GPTAQ)"
    Options: ClassVar[type[Options]] = GPTQOptions
    options: GPTQOptions
    needs_statistics = True

    @property
    def needs_drift(self) -> bool:
        """Whether the drift correction is on."""
        return self.options.drift > 0

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
        """Return codes of ``weight`` ``[R, C]``, solved in float32 on its device.

        Falls back to round to nearest, with a note, when H cannot be factored.
        """
        assert statistics is not None, "gptq declares needs_statistics"
        return self.quantize_alike([weight], scheme, [statistics])[0]

    def quantize_alike(
        self,
        weights: Sequence[Tensor],
        scheme: Scheme,
        statistics: Sequence[LayerStatistics | None],
    ) -> list[QuantizedTensor]:
        """Return codes of matrices ``[R, C]``, in one loop over their columns."""
        options, known = self.options, []
        for one in statistics:
            assert one is not None, "gptq declares needs_statistics"
            known.append(one)
        hessians = [
            second_moments.regularized(one.hessian, options.shrink) for one in known
        ]
        orders = [
            second_moments.column_order(one.hessian, act_order=options.act_order)
            for one in known
        ]
        damped = second_moments.damp_alike_(hessians, orders, options.damp)
        ready = []
        for i, (factor, notes) in enumerate(damped):
            target = weights[i].float().clone()
            target[:, known[i].hessian.diagonal() == 0] = 0  # never fed: cannot matter
            drift = known[i].drift
            if factor is not None and drift is not None and options.drift:
                owed = options.drift * drift
                second_moments.add_drift_(target, owed, factor, orders[i])
            ready.append(_Ready(target, hessians[i], orders[i], factor, notes))
        return self._coded(ready, scheme)

    def _coded(self, ready: Sequence[_Ready], scheme: Scheme) -> list[QuantizedTensor]:
        """Return codes of matrices of one shape."""
        solvable = [one for one in ready if one.factor is not None]
        rows = _rows_at_once(scheme, ready[0].target)
        runs = [
            self._solved([one.rows(slice(at, at + rows)) for one in solvable], scheme)
            for at in range(0, len(ready[0].target), rows)
        ]
        solved = iter(zip(*runs, strict=True))
        results = []
        for target, hessian, _, factor, notes in ready:
            if factor is None:
                results.append(low_rank.correct(target, _round(target, scheme, notes)))
                continue
            parts = next(solved)
            parameters = grids.joined([part for part, _ in parts])
            codes = torch.cat([levels for _, levels in parts])
            coded = grids.assemble(codes, parameters, scheme, notes=notes)
            results.append(low_rank.correct(target, coded, hessian=hessian))
        return results

    def _solved(self, ready: Sequence[_Ready], scheme: Scheme) -> list[feedback.Coded]:
        """Return parameters and levels of matrices that have a factor."""
        first, matrices = [], []
        for target, hessian, order, factor, _ in ready:
            assert factor is not None
            cost = torch.empty_like(factor[0])
            cost[order] = factor.diagonal() ** -2
            parameters = self.parameters(target, scheme, cost / cost.mean())
            plain = grids.encode(grids.as_groups(target, scheme), parameters, scheme)
            first.append((parameters, plain.view(target.shape)))
            matrices.append(feedback.Matrix(target, hessian, parameters, order, factor))
        if not matrices:
            return []
        codes = feedback.solve(matrices, scheme)
        for _ in range(self.options.refits(scheme)):
            matrices = [
                matrix._replace(
                    parameters=refit.refit_scales(
                        matrix.weight, matrix.hessian, found, matrix.parameters, scheme
                    )
                )
                for matrix, found in zip(matrices, codes, strict=True)
            ]
            codes = feedback.descend(matrices, codes, scheme)
        return [
            feedback.better_rows(
                matrix.weight,
                matrix.hessian,
                scheme,
                plain,
                (matrix.parameters, found),
            )
            for matrix, plain, found in zip(matrices, first, codes, strict=True)
        ]

    def parameters(
        self, target: Tensor, scheme: Scheme, importance: Tensor
    ) -> grids.GridParameters:
        """Return the scales and zero points of ``target`` ``[R, C]``.

        Args:
            target: float32 weights.
            scheme: The grid.
            importance: float32 ``[C]`` of columns.
        """
        groups = grids.as_groups(target, scheme)
        if not self.options.search:
            return grids.range_parameters(groups, scheme)
        weights = importance.view(groups.shape[1], -1)
        return grids.search_parameters(groups, scheme, importance=weights)


def _rows_at_once(scheme: Scheme, target: Tensor) -> int:
    """Return how many rows are solved together: all, unless a head would be too many.

    Rows are independent but for scales that they share.
    """
    shared = scheme.row_block != 1 or scheme.scales not in (Scales.FREE, Scales.SUPER)
    rows, columns = target.shape
    return rows if shared else max(1, _WEIGHTS_AT_ONCE // columns)


def _round(target: Tensor, scheme: Scheme, notes: tuple[str, ...]) -> QuantizedTensor:
    groups = grids.as_groups(target, scheme)
    parameters = grids.search_parameters(groups, scheme)
    codes = grids.encode(groups, parameters, scheme).view(target.shape)
    return grids.assemble(codes, parameters, scheme, notes=notes)
