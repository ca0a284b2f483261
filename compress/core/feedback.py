"""Error feedback on a quadratic objective: the column loop, and its refinements.

All functions minimise ``tr((W - Q) H (W - Q)^T)`` over values ``Q`` of a grid. They
know nothing of statistics or options, so any method that has a target and a positive
definite ``H`` can use them.

Source: Frantar et al. (2022), "GPTQ", algorithm 1, for :func:`solve`; Behdin et al.
(2023), "QuantEase", for :func:`descend`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.core import grids
from compress.core.grids import GridParameters
from compress.core.scheme import Scheme
from compress.core.tensors import decode

_COLUMNS_AT_ONCE = 128


def _spread(values: Tensor, columns: int, order: Tensor) -> Tensor:
    """Expand ``[R, G]`` to one value a column, ``[C, R]``, in the given order."""
    wide = values.repeat_interleave(columns // values.shape[1], dim=1)
    return wide[:, order].T.contiguous()


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
    """Return levels by error feedback, column by column.

    Args:
        weight: float32 ``[R, C]`` target.
        hessian: float32 ``[C, C]``, positive definite.
        parameters: Scales and zero points, fixed.
        scheme: The grid.
        order: int64 ``[C]``, the order in which columns are rounded.
        factor: :func:`inverse_factor` of both, if it is at hand.

    Returns:
        float32 levels ``[R, C]``.
    """
    columns = weight.shape[1]
    upper = inverse_factor(hessian, order) if factor is None else factor
    assert upper is not None, "the Hessian is not positive definite"
    # Columns as rows: the loop reads and writes one column at a time.
    work = weight[:, order].T.contiguous()
    scale = _spread(parameters.scale, columns, order)
    zeros = parameters.zero
    zero = None if zeros is None else _spread(zeros, columns, order)
    levels, errors = torch.empty_like(work), torch.empty_like(work[:_COLUMNS_AT_ONCE])
    for start in range(0, columns, _COLUMNS_AT_ONCE):
        stop = min(start + _COLUMNS_AT_ONCE, columns)
        run, lost = slice(start, stop), errors[: stop - start]
        round_columns_(
            work[run],
            upper[run, run],
            scale[run],
            None if zero is None else zero[run],
            scheme,
            levels=levels[run],
            errors=lost,
        )
        work[stop:].addmm_(upper[run, stop:].T, lost, alpha=-1)
    result = torch.empty_like(weight, dtype=torch.float32)
    result[:, order] = levels.T
    return result


def round_columns_(
    work: Tensor,
    factor: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    scheme: Scheme,
    *,
    levels: Tensor,
    errors: Tensor,
) -> None:
    """Round a few columns, each after what it owes to those before it.

    Args:
        work: float32 ``[n, R]``, the columns of the target as rows; used up.
        factor: float32 ``[n, n]``, upper.
        scale: float32 ``[n, R]``.
        zero: As ``scale``, or ``None``.
        scheme: The grid.
        levels: ``[n, R]`` to fill.
        errors: ``[n, R]`` to fill: what later columns have to make up for.
    """
    for i in range(work.shape[0]):
        z = None if zero is None else zero[i]
        levels[i] = grids.to_levels(work[i], scale[i], z, scheme)
        value = decode(levels[i], scale[i], z, scheme.zero)
        torch.div(work[i] - value, factor[i, i], out=errors[i])
        work[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)


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
    columns = weight.shape[1]
    permuted = hessian[order][:, order]
    diagonal = permuted.diagonal()
    scale = _spread(parameters.scale, columns, order)
    zeros = parameters.zero
    zero = None if zeros is None else _spread(zeros, columns, order)
    work = levels[:, order].T.contiguous()
    values = decode(work, scale, zero, scheme.zero)
    gradient = permuted @ (weight[:, order].T - values)
    for start in range(0, columns, _COLUMNS_AT_ONCE):
        stop = min(start + _COLUMNS_AT_ONCE, columns)
        local = gradient[start:stop].clone()
        moves = torch.empty_like(local)
        for i in range(stop - start):
            at = start + i
            z = None if zero is None else zero[at]
            wanted = values[at] + local[i] / diagonal[at]
            work[at] = grids.to_levels(wanted, scale[at], z, scheme)
            moves[i] = decode(work[at], scale[at], z, scheme.zero) - values[at]
            local.addr_(permuted[start:stop, at], moves[i], alpha=-1)
        gradient.addmm_(permuted[:, start:stop], moves, alpha=-1)
    result = torch.empty_like(levels)
    result[:, order] = work.T
    return result


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
