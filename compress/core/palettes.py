"""Choosing codes of a palette, and its tables, in the metric of a layer's inputs.

Minimises ``sum_r (w_r - q_r) M (w_r - q_r)^T`` for rows ``w_r [C]`` of a target, a
positive definite ``M [C, C]`` and values ``q_r`` whose runs of ``g`` columns are
entries of the tables of the row. Three steps, each of which can be repeated:

* :func:`solve`: codes by error feedback, run by run, for tables that are fixed. With
  ``M^-1 = U^T U`` the error ``e`` of a run costs ``|e U_gg^-1|^2`` once later columns
  have made up for it; ``e U_gg^-1 U_g,later`` is taken from these;
* :func:`descend`: each run is set to its best entry while all others are held;
* :func:`refit`: entries by least squares for codes that are fixed. The normal equations
  are solved by conjugate gradients, a step of which costs one product with ``M``.

Source: Frantar et al. (2022), "GPTQ", algorithm 1, and van Baalen et al. (2024),
"GPTVQ", arXiv 2402.15319, algorithm 1, for :func:`solve`; Behdin et al. (2023),
"QuantEase", for :func:`descend`; least squares of a codebook in the inputs' metric as
in Egiazarian et al. (2024), "AQLM", section 3.3, there by Adam. Differs from GPTVQ: the
nearest entry is searched in the whole ``g x g`` metric, not by its diagonal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.core.tables import Tables

_COLUMNS_AT_ONCE = 128
_STEPS = 12  # of conjugate gradients; an error falls by ever less


def solve(target: Tensor, tables: Tables, factor: Tensor, order: Tensor) -> Tensor:
    """Return codes by error feedback, int64 ``[R, C / g]``.

    Args:
        target: float32 ``[R, C]``.
        tables: Fixed.
        factor: float32 ``[C, C]``, upper, ``feedback.inverse_factor`` of ``M`` and
            ``order``.
        order: int64 ``[C]``, whole runs of ``g`` columns one after another.
    """
    return torch.cat(
        [
            _solved(target[rows], tables, rows, factor, order)
            for rows in tables.runs(*target.shape)
        ]
    )


def _solved(
    target: Tensor, tables: Tables, rows: slice, factor: Tensor, order: Tensor
) -> Tensor:
    vector, columns = tables.vector, target.shape[1]
    search = tables.search(rows)
    work = target[:, order].T.contiguous()  # columns as rows
    found = order.new_empty(columns // vector, len(target))
    inverses = _run_inverses(factor, vector)
    size = max(1, _COLUMNS_AT_ONCE // vector) * vector
    for start in range(0, columns, size):
        stop = min(start + size, columns)
        errors = work.new_empty(stop - start, len(target))
        for at in range(start, stop, vector):
            run, inverse = slice(at, at + vector), inverses[at // vector]
            wanted = work[run].T
            found[at // vector], value = search(wanted, inverse)
            lost = ((wanted - value) @ inverse).T  # [g, R]
            errors[at - start : at - start + vector] = lost
            later = factor[run, at + vector : stop]
            work[at + vector : stop].addmm_(later.T, lost, alpha=-1)
        work[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    codes = torch.empty_like(found)
    codes[order[::vector] // vector] = found
    return codes.T.contiguous()


def _run_inverses(factor: Tensor, vector: int) -> Tensor:
    """Return inverses ``[C / g, g, g]`` of the diagonal runs of an upper factor."""
    count = len(factor) // vector
    blocks = factor.view(count, vector, count, vector)
    at = torch.arange(count, device=factor.device)
    one = torch.eye(vector, device=factor.device).expand(count, vector, vector)
    inverse: Tensor = torch.linalg.solve_triangular(blocks[at, :, at], one, upper=True)
    return inverse


def descend(
    target: Tensor, tables: Tables, codes: Tensor, hessian: Tensor, order: Tensor
) -> Tensor:
    """Return codes after one pass over all runs; the objective never rises.

    Args:
        target: float32 ``[R, C]``.
        tables: Fixed.
        codes: int64 ``[R, C / g]``.
        hessian: ``M``.
        order: As in :func:`solve`.
    """
    return torch.cat(
        [
            _descended(target[rows], tables, rows, codes[rows], hessian, order)
            for rows in tables.runs(*target.shape)
        ]
    )


def _descended(
    target: Tensor,
    tables: Tables,
    rows: slice,
    codes: Tensor,
    hessian: Tensor,
    order: Tensor,
) -> Tensor:
    vector, columns = tables.vector, target.shape[1]
    search = tables.search(rows)
    metric = hessian[order][:, order]
    places = order[::vector] // vector
    values = tables.values(codes, rows)[:, order].T.contiguous()
    gradient = metric @ (target[:, order].T - values)
    found = codes.T[places].contiguous()
    lower = torch.linalg.cholesky(_diagonal_runs(metric, vector))
    size = max(1, _COLUMNS_AT_ONCE // vector) * vector
    for start in range(0, columns, size):
        stop = min(start + size, columns)
        local, moves = (
            gradient[start:stop].clone(),
            torch.empty_like(gradient[start:stop]),
        )
        for at in range(start, stop, vector):
            run, near = slice(at, at + vector), slice(at - start, at - start + vector)
            factor = lower[at // vector]
            step = torch.cholesky_solve(local[near], factor)
            wanted = (values[run] + step).T
            found[at // vector], value = search(wanted, factor)
            moves[near] = value.T - values[run]
            local.addmm_(metric[start:stop, run], moves[near], alpha=-1)
        gradient.addmm_(metric[:, start:stop], moves, alpha=-1)
    result = torch.empty_like(found)
    result[places] = found
    return result.T.contiguous()


def _diagonal_runs(matrix: Tensor, vector: int) -> Tensor:
    count = len(matrix) // vector
    at = torch.arange(count, device=matrix.device)
    return matrix.view(count, vector, count, vector)[at, :, at]


def refit(
    target: Tensor,
    tables: Tables,
    codes: Tensor,
    hessian: Tensor,
    row_weights: Tensor | None = None,
) -> Tensor:
    """Return entries float32 ``[T, K, g]`` nearer to the best for these codes.

    Entries that no code points to stay; numbers may no longer ascend.

    Args:
        target: float32 ``[R, C]``.
        tables: Where to start.
        codes: int64 ``[R, C / g]``.
        hessian: ``M``.
        row_weights: ``[R, 1]``, how much the error of each row counts.
    """
    entries = tables.entries.clone()
    curvature = _spread_back(hessian.diagonal(), tables, codes, row_weights)
    safe = torch.where(curvature > 0, curvature, 1.0)
    residual = _pulled(target, tables, codes, hessian, row_weights, against=entries)
    step = residual / safe
    direction, slope = step, _inner(residual, step)
    for _ in range(_STEPS):
        bent = _pulled(None, tables, codes, hessian, row_weights, against=direction)
        curve = _inner(direction, bent)
        length = torch.where(curve > 0, slope / curve.clamp(min=1e-30), 0.0)
        entries = entries + length * direction
        residual = residual - length * bent
        step = residual / safe
        after = _inner(residual, step)
        share = torch.where(slope > 0, after / slope.clamp(min=1e-30), 0.0)
        direction, slope = step + share * direction, after
    return entries


def _inner(left: Tensor, right: Tensor) -> Tensor:
    """Return products by table, ``[T, 1, 1]``: tables are independent."""
    return (left.double() * right.double()).sum((1, 2), keepdim=True).float()


def _pulled(
    target: Tensor | None,
    tables: Tables,
    codes: Tensor,
    hessian: Tensor,
    row_weights: Tensor | None,
    *,
    against: Tensor,
) -> Tensor:
    """Return ``A^T M (target - A against)``, or ``A^T M A against``, ``[T, K, g]``."""
    other = Tables(against, tables.block)
    total = torch.zeros_like(against, dtype=torch.float64)
    for rows in tables.runs(len(codes), len(hessian)):
        values = other.values(codes[rows], rows)
        if target is not None:
            values = target[rows] - values
        pull = values @ hessian
        if row_weights is not None:
            pull *= row_weights[rows]
        _add_(total, pull, tables, codes[rows], rows)
    return total.float()


def _spread_back(
    diagonal: Tensor, tables: Tables, codes: Tensor, row_weights: Tensor | None
) -> Tensor:
    """Return the summed curvature of each entry, ``[T, K, g]``."""
    total = torch.zeros_like(tables.entries, dtype=torch.float64)
    for rows in tables.runs(len(codes), len(diagonal)):
        weights = 1.0 if row_weights is None else row_weights[rows]
        pull = diagonal.expand(rows.stop - rows.start, -1) * weights
        _add_(total, pull, tables, codes[rows], rows)
    return total.float()


def _add_(
    total: Tensor, pull: Tensor, tables: Tables, codes: Tensor, rows: slice
) -> None:
    """Add ``[R, C]`` to the float64 entries that codes point to."""
    places = tables.owner(rows).unsqueeze(1) * total.shape[1] + codes
    flat = total.view(-1, tables.vector)
    flat.index_add_(0, places.flatten(), pull.reshape(-1, tables.vector).double())


def losses(
    target: Tensor,
    tables: Tables,
    codes: Tensor,
    hessian: Tensor,
    row_weights: Tensor | None = None,
) -> Tensor:
    """Return the objective of each row, float32 ``[R]``. Arguments as :func:`refit`."""
    found = []
    for rows in tables.runs(*target.shape):
        error = target[rows] - tables.values(codes[rows], rows)
        lost = ((error @ hessian) * error).sum(1)
        found.append(lost if row_weights is None else lost * row_weights[rows, 0])
    return torch.cat(found)
