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

from compress.core import grids, replay
from compress.core.grids import GridParameters
from compress.core.scheme import Scheme
from compress.core.tensors import decode

_AT_ONCE = 128  # columns
# Hessians of up to this many columns are factored by a GPU this many at a time.
_BATCHED_COLUMNS, _BATCH = 1024, 16


class Matrix(NamedTuple):
    """What is coded, in which metric, and on which grid.

    Attributes:
        weight: float32 ``[R, C]`` target.
        hessian: float32 ``[C, C]``, positive definite.
        parameters: Scales and zero points, fixed.
        order: int64 ``[C]``, the order in which columns are rounded.
        factor: :func:`inverse_factor` of the Hessian in that order.
    """

    weight: Tensor
    hessian: Tensor
    parameters: GridParameters
    order: Tensor
    factor: Tensor


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
    return inverse_factors([hessian], [order])[0]


def inverse_factors(
    hessians: Sequence[Tensor], orders: Sequence[Tensor]
) -> list[Tensor | None]:
    """Return :func:`inverse_factor` of each of some Hessians of one size.

    A GPU does small ones in batches, which takes a fraction of the time; with thousands
    of columns there is nothing to gain. All batches have one size, so that a factor
    does not depend on what lies beside it.
    """
    if not hessians[0].is_cuda or len(hessians[0]) > _BATCHED_COLUMNS:
        pairs = zip(hessians, orders, strict=True)
        return [_factors(h[None], o[None])[0] for h, o in pairs]
    found: list[Tensor | None] = []
    for start in range(0, len(hessians), _BATCH):
        some, turns = hessians[start : start + _BATCH], orders[start : start + _BATCH]
        more = _BATCH - len(some)
        batch = torch.stack([*some, *[some[-1]] * more])
        found += _factors(batch, torch.stack([*turns, *[turns[-1]] * more]))[
            : len(some)
        ]
    return found


def _factors(hessians: Tensor, orders: Tensor) -> list[Tensor | None]:
    """Return the factors of Hessians ``[B, C, C]``, each in its order of ``[B, C]``."""
    turned = orders.flip(1)
    pairs = zip(hessians, turned, strict=True)
    parts = [hessian[order][:, order] for hessian, order in pairs]
    whole = torch.stack(parts) if len(parts) > 1 else parts[0][None]
    lower, failed = torch.linalg.cholesky_ex(whole)
    finite = lower.diagonal(dim1=1, dim2=2).isfinite().all(1)
    one = torch.eye(orders.shape[1], device=hessians.device).expand_as(lower)
    upper = torch.linalg.solve_triangular(lower.flip(1, 2), one, upper=True)
    upper = upper.contiguous()  # it is read by rows
    good = (finite & (failed == 0)).tolist()
    return [factor if fine else None for factor, fine in zip(upper, good, strict=True)]


def solve(matrices: Sequence[Matrix], scheme: Scheme) -> list[Tensor]:
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
    factors = [matrix.factor for matrix in matrices]
    columns = work.shape[1]
    levels = torch.empty_like(work)
    for start in range(0, columns, _AT_ONCE):
        stop = min(start + _AT_ONCE, columns)
        run = slice(start, stop)
        near = torch.stack([factor[run, run] for factor in factors])
        z = None if zero is None else zero[:, run]
        levels[:, run], errors = replay.run(
            _rounded_run, scheme, (work[:, run], near, scale[:, run], z)
        )
        for rest, factor, lost in zip(work[:, stop:], factors, errors, strict=True):
            rest.addmm_(factor[run, stop:].T, lost, alpha=-1)
    return _as_rows(levels, matrices)


def descend(
    matrices: Sequence[Matrix], levels: Sequence[Tensor], scheme: Scheme
) -> list[Tensor]:
    """Return levels after one pass of coordinate descent; the objective never rises.

    Each column is set to its best level while all others are held. Like :func:`solve`
    it is one loop for all.

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
        z = None if zero is None else zero[:, run]
        work[:, run], moves = replay.run(
            _descended_run,
            scheme,
            (
                values[:, run],
                gradient[:, run],
                near,
                diagonal[:, run],
                scale[:, run],
                z,
            ),
        )
        for owed, hessian, moved in zip(gradient, turned, moves, strict=True):
            owed.addmm_(hessian[:, run], moved, alpha=-1)
    return _as_rows(work, matrices)


def _rounded_run(
    scheme: Scheme, work: Tensor, factor: Tensor, scale: Tensor, zero: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return levels of a few columns, and what later columns owe for their errors.

    Args:
        scheme: The grid.
        work: float32 ``[B, n, R]``, columns of the targets; used up.
        factor: float32 ``[B, n, n]``, upper.
        scale: float32 ``[B, n, R]``.
        zero: As ``scale``, or ``None``.
    """
    levels, errors = torch.empty_like(work), torch.empty_like(work)
    for i in range(work.shape[1]):
        z = None if zero is None else zero[:, i]
        levels[:, i] = grids.to_levels(work[:, i], scale[:, i], z, scheme)
        value = decode(levels[:, i], scale[:, i], z, scheme.zero)
        torch.div(work[:, i] - value, factor[:, i, i, None], out=errors[:, i])
        work[:, i + 1 :].addcmul_(
            factor[:, i, i + 1 :, None], errors[:, i, None], value=-1
        )
    return levels, errors


def _descended_run(
    scheme: Scheme,
    values: Tensor,
    gradient: Tensor,
    hessian: Tensor,
    diagonal: Tensor,
    scale: Tensor,
    zero: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the best levels of a few columns, and how far their values moved.

    Args:
        scheme: The grid.
        values: float32 ``[B, n, R]``, what the columns hold.
        gradient: As ``values``: ``H (W - Q)``.
        hessian: float32 ``[B, n, n]``.
        diagonal: float32 ``[B, n, 1]``.
        scale: As ``values``.
        zero: As ``values``, or ``None``.
    """
    local, levels = gradient.clone(), torch.empty_like(values)
    moves = torch.empty_like(values)
    for i in range(values.shape[1]):
        z = None if zero is None else zero[:, i]
        wanted = values[:, i] + local[:, i] / diagonal[:, i]
        levels[:, i] = grids.to_levels(wanted, scale[:, i], z, scheme)
        moves[:, i] = decode(levels[:, i], scale[:, i], z, scheme.zero)
        moves[:, i] -= values[:, i]
        local.addcmul_(hessian[:, :, i, None], moves[:, i, None], value=-1)
    return levels, moves


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
