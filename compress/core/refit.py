"""Scales and minima refitted to fixed levels by least squares.

Values are linear in every number that is stored beside the levels: a group's scale,
its minimum, and what super-blocks share. For a number ``t`` that moves values along
``v`` the best change is ``<e, v>_H / <v, v>_H`` with ``e`` the present error. It is
rounded to what can be stored and kept, row by row, only where the objective still
falls. Numbers are taken one after another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.core import grids, super_scales
from compress.core.grids import GridParameters
from compress.core.scheme import SUPER_COLUMNS, Scales, Scheme, Zero

_TINY = 1e-30


def refit_scales(
    weight: Tensor,
    hessian: Tensor,
    levels: Tensor,
    parameters: GridParameters,
    scheme: Scheme,
) -> GridParameters:
    """Return parameters of which ``tr((W - Q) H (W - Q)^T)`` is no larger.

    Scales that several rows share, and integer zero points, are left as they are.

    Args:
        weight: float32 ``[R, C]`` target.
        hessian: float32 ``[C, C]``, positive definite.
        levels: float32 ``[R, C]``.
        parameters: Where to start.
        scheme: The grid.
    """
    if scheme.row_block != 1:
        return parameters
    rows, columns = weight.shape
    groups = levels.view(rows, parameters.scale.shape[1], -1)
    values = grids.decode_groups(groups, parameters, scheme)
    if scheme.zero is Zero.INTEGER and parameters.zero is not None:
        groups = groups - parameters.zero.unsqueeze(-1)
    gradient = (weight - values.view(rows, columns)) @ hessian
    fit = _Fit(hessian, gradient)
    found = _groups(fit, groups, parameters, scheme)
    if scheme.scales is Scales.SUPER:
        found = _super_blocks(fit, groups, found, scheme)
    return found


@dataclass
class _Fit:
    """The objective along one direction at a time.

    Attributes:
        hessian: float32 ``[C, C]``.
        gradient: ``(W - Q) H`` of the present values ``[R, C]``; kept up to date.
    """

    hessian: Tensor
    gradient: Tensor

    def move(
        self,
        start: int,
        direction: Tensor,
        present: Tensor,
        store: Callable[[Tensor], Tensor],
        *,
        may_be_zero: bool,
    ) -> Tensor:
        """Return a number of each row, ``[R]``, after its best change.

        Args:
            start: First column that it moves.
            direction: ``[R, n]``, how far a change of one moves these columns.
            present: ``[R]``.
            store: Rounds numbers to those that can be stored.
            may_be_zero: Otherwise a change to zero is not made.
        """
        part = slice(start, start + direction.shape[1])
        moved = direction @ self.hessian[part]
        curvature = (moved[:, part] * direction).sum(1)
        slope = (self.gradient[:, part] * direction).sum(1)
        stored = store(present + slope / curvature.clamp(min=_TINY))
        change = stored - present
        kept = change * change * curvature < 2 * change * slope
        if not may_be_zero:
            kept &= stored != 0
        change = torch.where(kept, change, torch.zeros_like(change))
        self.gradient -= change.unsqueeze(1) * moved
        return present + change


def _groups(
    fit: _Fit, levels: Tensor, parameters: GridParameters, scheme: Scheme
) -> GridParameters:
    """Refit the scale, and the float minimum, of each group."""
    scale, zero = parameters.scale.clone(), parameters.zero
    minima = scheme.zero is Zero.OFFSET and zero is not None
    if minima and zero is not None:
        zero = zero.clone()
    size = levels.shape[2]
    for group in range(levels.shape[1]):
        scale[:, group] = fit.move(
            group * size,
            levels[:, group],
            scale[:, group],
            _scale_store(group, parameters, scheme),
            may_be_zero=False,
        )
        if minima and zero is not None:
            zero[:, group] = fit.move(
                group * size,
                torch.ones_like(levels[:, group]),
                zero[:, group],
                _minimum_store(group, parameters, scheme),
                may_be_zero=True,
            )
    return GridParameters(scale, zero, parameters.outer)


def _super_blocks(
    fit: _Fit, levels: Tensor, parameters: GridParameters, scheme: Scheme
) -> GridParameters:
    """Refit what the groups of each super-block share; whole numbers stay."""
    assert parameters.outer is not None
    step, least = super_scales.parts_of(parameters.outer, scheme)
    scale, step = _shared(fit, levels, parameters.scale, step, scheme)
    if least is None or parameters.zero is None:
        return GridParameters(scale, parameters.zero, step)
    ones = torch.ones_like(levels)
    zero, least = _shared(fit, ones, parameters.zero, least, scheme)
    return GridParameters(scale, zero, torch.cat([step, least], dim=1))


def _shared(
    fit: _Fit, levels: Tensor, values: Tensor, step: Tensor, scheme: Scheme
) -> tuple[Tensor, Tensor]:
    """Refit ``step`` ``[R, S]``; ``values`` ``[R, G]`` are whole multiples of it."""
    rows, count = step.shape
    wide = super_scales.spread(step, scheme)
    safe = torch.where(wide == 0, torch.ones_like(wide), wide)
    codes = torch.where(wide == 0, torch.zeros_like(wide), (values / safe).round())
    directions = (levels * codes.unsqueeze(-1)).view(rows, count, SUPER_COLUMNS)
    step = step.clone()
    for block in range(count):
        step[:, block] = fit.move(
            block * SUPER_COLUMNS,
            directions[:, block],
            step[:, block],
            super_scales.to_half,
            may_be_zero=False,
        )
    refitted = codes * super_scales.spread(step, scheme)
    return torch.where(codes == 0, values, refitted), step


def _scale_store(
    group: int, parameters: GridParameters, scheme: Scheme
) -> Callable[[Tensor], Tensor]:
    """Return what rounds scales ``[R]`` of one group to those that can be stored."""
    if scheme.scales is Scales.SUPER:
        return _whole_multiples(0, group, parameters, scheme)
    signed = scheme.scales is Scales.FREE

    def store(wanted: Tensor) -> Tensor:
        usable = (wanted if signed else wanted.clamp(min=0)).unsqueeze(1)
        return grids.round_to_storage(usable, scheme, parameters.outer).squeeze(1)

    return store


def _minimum_store(
    group: int, parameters: GridParameters, scheme: Scheme
) -> Callable[[Tensor], Tensor]:
    if scheme.scales is not Scales.SUPER:
        return lambda wanted: grids.round_to_storage(wanted, scheme, parameters.outer)
    store = _whole_multiples(1, group, parameters, scheme)
    return lambda wanted: -store(-wanted)


def _whole_multiples(
    which: int, group: int, parameters: GridParameters, scheme: Scheme
) -> Callable[[Tensor], Tensor]:
    """Return what rounds to multiples of ``d`` (0) or ``dmin`` (1) of a group."""
    assert parameters.outer is not None
    step = super_scales.parts_of(parameters.outer, scheme)[which]
    assert step is not None
    step = super_scales.spread(step, scheme)[:, group]
    safe = torch.where(step == 0, torch.ones_like(step), step)
    return lambda wanted: (wanted / safe).round().clamp(*scheme.scale_codes) * step
