"""Error feedback on a quadratic objective: the column loop, and its refinements.

All functions minimise ``tr((W - Q) H (W - Q)^T)`` over values ``Q`` of a grid. They
know nothing of statistics or options, so any method that has a target and a positive
definite ``H`` can use them.

Source: Frantar et al. (2022), "GPTQ", algorithm 1, for :func:`solve`; Behdin et al.
(2023), "QuantEase", for :func:`descend`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from compress.core import grids
from compress.core.grids import GridParameters
from compress.core.scheme import Scheme
from compress.core.tensors import decode

_AT_ONCE = 128  # columns


class Matrix(NamedTuple):
    """What is coded, in which metric, and on which grid.

    Attributes:
        weight: float32 ``[R, C]`` target.
        hessian: float32 ``[C, C]``, positive definite.
        parameters: Scales and zero points, fixed.
        order: int64 ``[C]``, the order in which columns are rounded.
        factor: :func:`inverse_factor` of the Hessian in that order, where it is used.
    """

    weight: Tensor
    hessian: Tensor
    parameters: GridParameters
    order: Tensor
    factor: Tensor | None = None


def inverse_factor(hessian: Tensor, order: Tensor) -> Tensor | None:
    """Return ``U`` float32 ``[C, C]``, upper, with ``U^T U`` the inverse Hessian.

    With rows and columns turned round, ``H = L L^T`` by Cholesky; turned back, ``L`` is
    upper, and its inverse is ``U``: one factorization and one triangular inverse, where
    the usual way through the inverse takes two factorizations and an inverse.

    Args:
        hessian: float32 ``[C, C]``.
        order: int64 ``[C]``; rows and columns of ``U`` are in this order.

    Returns:
        ``None`` if the Hessian is not positive definite.
    """
    turned = order.flip(0)
    lower, failed = torch.linalg.cholesky_ex(hessian[turned][:, turned])
    if int(failed) or not bool(lower.diagonal().isfinite().all()):
        return None
    one = torch.eye(len(order), device=hessian.device)
    upper: Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), one, upper=True)
    return upper.contiguous()  # it is read by rows


def solve(
    weight: Tensor,
    hessian: Tensor,
    parameters: GridParameters,
    scheme: Scheme,
    *,
    order: Tensor,
    factor: Tensor | None = None,
) -> Tensor:
    """Return float32 levels ``[R, C]`` by error feedback, column by column.

    The arguments are those of :class:`Matrix`, and the grid.
    """
    matrix = Matrix(weight, hessian, parameters, order, factor)
    return solve_alike([matrix], scheme)[0]


def solve_alike(matrices: Sequence[Matrix], scheme: Scheme) -> list[Tensor]:
    """Return levels by error feedback, one loop over the columns of all matrices.

    A GPU takes about as long for one small matrix as for many side by side. Each gets
    the levels that it gets alone, to the last bit.

    Args:
        matrices: Of one shape.
        scheme: Their grid.

    Returns:
        float32 levels ``[R, C]`` of each.
    """
    work, scale, zero = _as_columns(matrices, scheme)
    factors = [_factor_of(matrix) for matrix in matrices]
    columns = work.shape[1]
    levels, errors = torch.empty_like(work), torch.empty_like(work[:, :_AT_ONCE])
    for start in range(0, columns, _AT_ONCE):
        stop = min(start + _AT_ONCE, columns)
        run = slice(start, stop)
        near = torch.stack([factor[run, run] for factor in factors])
        for i, at in enumerate(range(start, stop)):
            z = None if zero is None else zero[:, at]
            levels[:, at] = grids.to_levels(work[:, at], scale[:, at], z, scheme)
            value = decode(levels[:, at], scale[:, at], z, scheme.zero)
            lost = errors[:, i]
            torch.div(work[:, at] - value, near[:, i, i, None], out=lost)
            work[:, at + 1 : stop].addcmul_(
                near[:, i, i + 1 :, None], lost[:, None], value=-1
            )
        for rest, factor, lost in zip(
            work[:, stop:], factors, errors[:, : stop - start], strict=True
        ):
            rest.addmm_(factor[run, stop:].T, lost, alpha=-1)
    return _as_rows(levels, matrices)


def descend(
    weight: Tensor,
    hessian: Tensor,
    levels: Tensor,
    parameters: GridParameters,
    scheme: Scheme,
    *,
    order: Tensor,
) -> Tensor:
    """Return levels after one pass of coordinate descent; the objective never rises.

    Each column is set to its best level while all others are held.

    Args: as :func:`solve`, and ``levels`` ``[R, C]`` to start from.
    """
    matrix = Matrix(weight, hessian, parameters, order)
    return descend_alike([matrix], [levels], scheme)[0]


def descend_alike(
    matrices: Sequence[Matrix], levels: Sequence[Tensor], scheme: Scheme
) -> list[Tensor]:
    """Return what :func:`descend` returns for each, in one loop over the columns.

    Args:
        matrices: Of one shape.
        levels: ``[R, C]`` of each to start from.
        scheme: Their grid.
    """
    target, scale, zero = _as_columns(matrices, scheme)
    turned = [m.hessian[m.order][:, m.order] for m in matrices]
    diagonal = torch.stack([hessian.diagonal() for hessian in turned]).unsqueeze(-1)
    pairs = zip(levels, matrices, strict=True)
    work = torch.stack([found[:, m.order].T for found, m in pairs])
    values = decode(work, scale, zero, scheme.zero)
    gradient = torch.stack(
        [hessian @ gap for hessian, gap in zip(turned, target - values, strict=True)]
    )
    columns = work.shape[1]
    for start in range(0, columns, _AT_ONCE):
        stop = min(start + _AT_ONCE, columns)
        run = slice(start, stop)
        near = torch.stack([hessian[run, run] for hessian in turned])
        local = gradient[:, run].clone()
        moves = torch.empty_like(local)
        for i, at in enumerate(range(start, stop)):
            z = None if zero is None else zero[:, at]
            wanted = values[:, at] + local[:, i] / diagonal[:, at]
            work[:, at] = grids.to_levels(wanted, scale[:, at], z, scheme)
            moves[:, i] = decode(work[:, at], scale[:, at], z, scheme.zero)
            moves[:, i] -= values[:, at]
            local.addcmul_(near[:, :, i, None], moves[:, i, None], value=-1)
        for owed, hessian, moved in zip(gradient, turned, moves, strict=True):
            owed.addmm_(hessian[:, run], moved, alpha=-1)
    return _as_rows(work, matrices)


def _factor_of(matrix: Matrix) -> Tensor:
    """Return the factor at hand, or make it."""
    if matrix.factor is not None:
        return matrix.factor
    factor = inverse_factor(matrix.hessian, matrix.order)
    assert factor is not None, "the Hessian is not positive definite"
    return factor


def _as_columns(
    matrices: Sequence[Matrix], scheme: Scheme
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return targets, scales and zero points ``[B, C, R]``, columns in their order.

    The loops read and write one column at a time.
    """
    columns = matrices[0].weight.shape[1]

    def spread(values: Tensor, order: Tensor) -> Tensor:
        wide = values.repeat_interleave(columns // values.shape[1], dim=1)
        return wide[:, order].T

    zeros = [m.parameters.zero for m in matrices]
    found = [z for z in zeros if z is not None]
    orders = [m.order for m in matrices]
    pairs = zip(found, orders, strict=True) if found else ()
    return (
        torch.stack([m.weight[:, m.order].T for m in matrices]),
        torch.stack([spread(m.parameters.scale, m.order) for m in matrices]),
        torch.stack([spread(*pair) for pair in pairs]) if found else None,
    )


def _as_rows(levels: Tensor, matrices: Sequence[Matrix]) -> list[Tensor]:
    """Return levels ``[R, C]`` of each matrix in its own order of columns."""
    results = []
    for found, matrix in zip(levels, matrices, strict=True):
        result = torch.empty_like(matrix.weight, dtype=torch.float32)
        result[:, matrix.order] = found.T
        results.append(result)
    return results


Coded = tuple[GridParameters, Tensor]
"""Parameters, and float32 levels ``[R, C]``."""


def better_rows(
    weight: Tensor, hessian: Tensor, scheme: Scheme, first: Coded, second: Coded
) -> Coded:
    """Return, row by row, which of two loses less; the second one if they are equal.

    Args:
        weight: float32 ``[R, C]`` target.
        hessian: float32 ``[C, C]``.
        scheme: The grid.
        first: One way to code it.
        second: Another; where rows share scales, with the same ones.
    """
    before, after = (_lost(weight, hessian, scheme, coded) for coded in (first, second))
    worse = (after > before).unsqueeze(1)
    if not bool(worse.any()):
        return second
    (old, old_levels), (new, new_levels) = first, second

    def chosen(x: Tensor | None, y: Tensor | None) -> Tensor | None:
        if x is None or y is None or len(x) != len(worse):
            return y
        return torch.where(worse, x, y)

    scale = torch.where(worse, old.scale, new.scale)
    zero, outer = chosen(old.zero, new.zero), chosen(old.outer, new.outer)
    levels = torch.where(worse, old_levels, new_levels)
    return GridParameters(scale, zero, outer), levels


def _lost(weight: Tensor, hessian: Tensor, scheme: Scheme, coded: Coded) -> Tensor:
    """Return the objective of each row, ``[R]``."""
    parameters, levels = coded
    groups = levels.view(len(weight), parameters.scale.shape[1], -1)
    error = weight - grids.decode_groups(groups, parameters, scheme).view_as(weight)
    return ((error @ hessian) * error).sum(1)
