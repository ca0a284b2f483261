"""Tables and scales for given codes: least squares in H's metric.

With ``S`` the linear map from tables to values, tables minimise

    sum_o s_o^2 (x_o - (S C)_o) H (x_o - (S C)_o)^T

for rows ``x_o = w_o / s_o``. It is quadratic in ``C``, so that conjugate gradients
solve it. A product with its matrix is a decode, a product with H and a sum over the
runs that point to each entry. The preconditioner is the matrix's own block for each
entry, ``sum_oj s_o^2 H_jj`` over the runs that point to it. The scale of a row is the
closed form ``<w, q>_H / <q, q>_H``.

Source: the objective is that of Egiazarian et al. (2024), "AQLM", arXiv 2401.06118,
section 3.3. Differs: AQLM takes 100 steps of Adam a round for tables and scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.core.additive.sums import (
    decoded,
    diagonal_blocks,
    gathered,
    row_losses,
    values_at_once,
)

_RIDGE = 1e-4  # of a preconditioner block's mean diagonal
_CONVERGED = 1e-11
_TINY = 1e-30


def fitted_tables(
    target: Tensor,
    weights: Tensor,
    hessian: Tensor,
    codes: Tensor,
    tables: Tensor,
    *,
    iterations: int,
) -> Tensor:
    """Return tables ``[M, K, g]`` of which the objective is no larger.

    Entries that no code points to stay as they are.

    Args:
        target: float32 ``[R, C]``, rows divided by their scales.
        weights: float32 ``[R]``, the squares of the scales.
        hessian: float32 ``[C, C]``, positive definite.
        codes: int64 ``[R, J, M]``.
        tables: float32 ``[M, K, g]`` to start from.
        iterations: Of conjugate gradients.
    """
    entries = tables.shape[1]
    inverse = _preconditioner(weights, hessian, codes, tables)

    def pushed(values: Tensor) -> Tensor:
        """Return the gradient of tables for an error ``[R, C]``, negated."""
        return gathered((values @ hessian).mul_(weights.unsqueeze(1)), codes, entries)

    residual = pushed(target - decoded(codes, tables))
    change = torch.zeros_like(tables)
    guess = _solved(inverse, residual)
    direction, dot = guess, (residual * guess).sum()
    least = _CONVERGED * dot  # what is below it is rounding, and would be amplified
    for _ in range(iterations):
        product = pushed(decoded(codes, direction))
        size = dot / (direction * product).sum().clamp(min=_TINY)
        size = torch.where(dot > least, size, 0.0)
        change += size * direction
        residual -= size * product
        guess = _solved(inverse, residual)
        before, dot = dot, (residual * guess).sum()
        direction = guess + dot / before.clamp(min=_TINY) * direction
    fitted = tables + change
    lost = [
        (weights * row_losses(target - decoded(codes, x), hessian)).sum()
        for x in (tables, fitted)
    ]
    return torch.where(lost[1] < lost[0], fitted, tables)


def _preconditioner(
    weights: Tensor, hessian: Tensor, codes: Tensor, tables: Tensor
) -> Tensor:
    """Return the inverse blocks ``[M, K, g, g]`` of the normal matrix's diagonal."""
    count, entries, vector = tables.shape
    rows, groups, _ = codes.shape
    blocks = diagonal_blocks(hessian, vector).view(groups, -1)
    found = []
    # One run at a time where a table of [J, K] weights would be large.
    step = max(1, values_at_once(hessian.device) // entries)
    for m in range(count):
        total = hessian.new_zeros(entries, vector * vector)
        for start in range(0, groups, step):
            run = slice(start, start + step)
            places = codes[:, run, m]
            width = places.shape[1]
            flat = places * width + torch.arange(width, device=hessian.device)
            held = hessian.new_zeros(entries * width, dtype=torch.float64)
            every = weights.double().unsqueeze(1).expand(rows, width)
            held.scatter_add_(0, flat.flatten(), every.flatten())
            total += held.float().view(entries, width) @ blocks[run]
        found.append(total.view(entries, vector, vector))
    normal = torch.stack(found)
    mean = normal.diagonal(dim1=-2, dim2=-1).mean(-1)
    ridge = _RIDGE * mean + _TINY
    normal += torch.diag_embed(ridge.unsqueeze(-1).expand(count, entries, vector))
    unused = (mean == 0)[..., None, None]
    one = torch.eye(vector, device=hessian.device)
    inverse: Tensor = torch.linalg.inv_ex(torch.where(unused, one, normal)).inverse
    return inverse


def _solved(inverse: Tensor, residual: Tensor) -> Tensor:
    return (inverse @ residual.unsqueeze(-1)).squeeze(-1)


def fitted_scales(
    weight: Tensor, hessian: Tensor, values: Tensor, scales: Tensor
) -> Tensor:
    """Return the scale of least loss of each row, float32 ``[R]``.

    Scales stay positive: a row whose best scale is not keeps the one that it has.

    Args:
        weight: float32 ``[R, C]``.
        hessian: float32 ``[C, C]``.
        values: float32 ``[R, C]``, decoded without scales.
        scales: float32 ``[R]``, the present ones.
    """
    pulled = values @ hessian
    along, across = (pulled * weight).sum(1), (pulled * values).sum(1)
    best = along / across.clamp(min=_TINY)
    return torch.where((best > 0) & (across > _TINY), best, scales)


def folded(tables: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same values with the largest table entry 1, so that halves hold it."""
    largest = tables.abs().amax().clamp(min=_TINY)
    return tables / largest, scales * largest
