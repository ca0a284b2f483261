"""From soft weights to codes: hard assignment, and which tables to keep.

Source: Cho et al. (2022), DKM, arXiv 2108.12659, section 3.2: at the end each weight
takes its nearest entry. Differs: two tables are tried for each group, the last soft one
and the means of the weights that take each entry, and that is kept whose values are
nearer to the soft weights, which is what the loss was computed with. Entries are
stored in ascending order (vectors by their first number), so files do not depend on
the order that training left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.tuning.dkm.assignment import entries, nearest

_WITHIN = 0.5  # of the way to the border; rounding to bf16 must not cross it
_SHIFTS = 5


@torch.no_grad()
def snap(
    weights: Tensor,
    tables: Tensor,
    soft: Tensor,
    *,
    dtype: torch.dtype,
    importances: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return tables as stored, and the place of each weight in them.

    Args:
        weights: ``[G, n, g]``, float32.
        tables: ``[G, K, g]``, the last soft tables.
        soft: ``[G, n, g]``, soft weights.
        dtype: That tables are stored in.
        importances: ``[G, n]``, not negative; equal if left out.

    Returns:
        Tables ``[G, K, g]`` in ``dtype``; codes int64 ``[G, n]``.
    """
    means = member_means(weights, tables, importances)
    candidates = [_stored(kept, dtype) for kept in (tables, means)]
    codes = [nearest(weights, kept.to(weights.dtype)) for kept in candidates]
    errors = []
    for kept, places in zip(candidates, codes, strict=True):
        off = (entries(kept.to(soft.dtype), places) - soft).square().sum(-1)
        errors.append((off if importances is None else off * importances).sum(1))
    takes_means = errors[1] < errors[0]
    return (
        torch.where(takes_means.view(-1, 1, 1), candidates[1], candidates[0]),
        torch.where(takes_means.view(-1, 1), codes[1], codes[0]),
    )


@torch.no_grad()
def at_rest(
    weights: Tensor,
    tables: Tensor,
    wanted: Tensor,
    *,
    importances: Tensor | None = None,
) -> Tensor:
    """Return weights moved to where k-means finds given codes, and leaves the tables.

    The weights of an entry are shifted until their mean is the entry. Those that lie in
    another cell then go as far as to the ball around their entry that lies within its
    cell: with a radius of half the distance to the next entry, less a margin.

    Args:
        weights: ``[G, n, g]``, float32.
        tables: ``[G, K, g]``.
        wanted: ``[G, n, g]``, each near the entry that is wanted.
        importances: ``[G, n]``, not negative; equal if left out.
    """
    each = torch.ones_like(weights[..., 0]) if importances is None else importances
    codes = nearest(wanted, tables)
    entry = entries(tables, codes)
    gaps = (tables.unsqueeze(2) - tables.unsqueeze(1)).square().sum(-1)
    itself = torch.eye(tables.shape[1], dtype=torch.bool, device=tables.device)
    next_entry = gaps.masked_fill(itself, torch.inf).amin(2).sqrt()  # [G, K]
    radius = (_WITHIN / 2) * next_entry.gather(1, codes).unsqueeze(-1)
    for _ in range(_SHIFTS):
        means = _means(weights, tables, codes, each)
        off = weights + entries(tables - means, codes) - entry
        length = torch.linalg.vector_norm(off, dim=-1, keepdim=True)
        least = torch.finfo(length.dtype).tiny
        inside = entry + off * (radius / length.clamp_min(least)).clamp_max(1)
        stays = (nearest(entry + off, tables) == codes).unsqueeze(-1)
        weights = torch.where(stays, entry + off, inside)
    return weights


@torch.no_grad()
def member_means(
    weights: Tensor, tables: Tensor, importances: Tensor | None = None
) -> Tensor:
    """Return the mean of the weights that are nearest to each entry, ``[G, K, g]``.

    An entry that has no weight, or none of importance, stays.

    Args:
        weights: ``[G, n, g]``.
        tables: ``[G, K, g]``.
        importances: ``[G, n]``, not negative; equal if left out.
    """
    each = torch.ones_like(weights[..., 0]) if importances is None else importances
    return _means(weights, tables, nearest(weights, tables), each)


def _means(weights: Tensor, tables: Tensor, codes: Tensor, each: Tensor) -> Tensor:
    mass = torch.zeros_like(tables[..., 0]).scatter_add_(1, codes, each).unsqueeze(-1)
    places = codes.unsqueeze(-1).expand_as(weights)
    drawn = torch.zeros_like(tables)
    drawn.scatter_add_(1, places, weights * each.unsqueeze(-1))
    least = torch.finfo(mass.dtype).tiny
    return torch.where(mass > 0, drawn / mass.clamp_min(least), tables)


def _stored(tables: Tensor, dtype: torch.dtype) -> Tensor:
    order = tables[..., 0].argsort(1).unsqueeze(-1)
    return tables.gather(1, order.expand_as(tables)).to(dtype)
