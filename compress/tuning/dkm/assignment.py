"""Soft k-means that gradients flow through: DKM.

Weights ``w`` of a group share a table ``C`` of ``K`` entries that is no parameter: each
forward computes it anew from the weights, by ``T`` rounds of

    ``A_ij = softmax_j(-|w_i - C_j|^2 / tau)``
    ``C_j = sum_i A_ij f_i w_i / sum_i A_ij f_i``

and the layer uses ``w~ = A C``. Gradients reach ``w`` through the last ``A`` and
through all rounds of ``C``. Weights may be vectors; ``f`` are optional importances.

Source: Cho et al. (2022), "DKM: differentiable k-means clustering layer for neural
network compression", arXiv 2108.12659, section 3. Differs: ``tau`` follows the gap
between entries, so that one schedule suits every layer and number of bits; the number
of rounds is fixed, since a test for convergence would wait for the device; an entry
that no weight is near stays where it is, instead of a floor under ``A``, which would
draw it to the mean. Everything is plain arithmetic for autograd to differentiate and
costs ``2 T`` saved tensors of ``[G, n, K]``; ``table_domain`` and ``saved`` are what
makes that affordable.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

AT_REST = 1e-7  # of an entry's mean mass: what its old place counts in its new one
_VALUES_AT_ONCE = 1 << 24


def soft_assignment(weights: Tensor, tables: Tensor, temperature: Tensor) -> Tensor:
    """Return how much each weight belongs to each entry, ``[G, n, K]``.

    Args:
        weights: ``[G, n, g]``, float32 or float64.
        tables: ``[G, K, g]``.
        temperature: ``[G]``, in squared units of the weights.
    """
    # Subtracted, not expanded into products: gaps are 1e-3 of what would cancel.
    gaps = weights.unsqueeze(2) - tables.unsqueeze(1)  # [G, n, K, g]
    distance = gaps.square().sum(-1)
    return torch.softmax(distance / -temperature.view(-1, 1, 1), dim=-1)


def soft_tables(
    weights: Tensor,
    tables: Tensor,
    temperature: Tensor,
    *,
    iterations: int,
    importances: Tensor | None = None,
) -> Tensor:
    """Return the tables after so many rounds of soft k-means, ``[G, K, g]``.

    Args:
        weights: ``[G, n, g]``, float32 or float64.
        tables: ``[G, K, g]`` to start from.
        temperature: ``[G]``, in squared units of the weights.
        iterations: Rounds ``T``; none leaves the tables as they are.
        importances: ``[G, n]``, not negative; equal if left out.
    """
    groups, count, _ = weights.shape
    if importances is None:
        total = weights.new_full((groups, 1, 1), float(count))
        pull = weights
    else:
        total = importances.sum(1).view(-1, 1, 1)
        pull = weights * importances.unsqueeze(-1)
    rest = total * (AT_REST / tables.shape[1]) + torch.finfo(weights.dtype).tiny
    for _ in range(iterations):
        share = soft_assignment(weights, tables, temperature)
        drawn = (share.unsqueeze(-1) * pull.unsqueeze(2)).sum(1)  # [G, K, g]
        if importances is not None:
            share = share * importances.unsqueeze(-1)
        mass = share.sum(1).unsqueeze(-1)  # [G, K, 1]
        tables = (drawn + rest * tables) / (mass + rest)
    return tables


def soft_values(weights: Tensor, tables: Tensor, temperature: Tensor) -> Tensor:
    """Return the soft weights ``w~ = A C``, ``[G, n, g]``.

    Args:
        weights: ``[G, n, g]``, float32 or float64.
        tables: ``[G, K, g]``.
        temperature: ``[G]``, in squared units of the weights.
    """
    share = soft_assignment(weights, tables, temperature)
    return (share.unsqueeze(-1) * tables.unsqueeze(1)).sum(2)


@torch.no_grad()
def nearest(weights: Tensor, tables: Tensor) -> Tensor:
    """Return the place of the nearest entry of each weight, int64 ``[G, n]``.

    Args:
        weights: ``[G, n, g]``, any float type.
        tables: ``[G, K, g]``.
    """
    groups, count, vector = weights.shape
    if vector == 1:
        ordered, places = tables.squeeze(-1).sort(dim=1)
        borders = (ordered[:, 1:] + ordered[:, :-1]) / 2
        numbers = weights.squeeze(-1).contiguous()
        return places.gather(1, torch.searchsorted(borders, numbers))
    found = torch.empty(groups, count, dtype=torch.int64, device=weights.device)
    step = max(1, _VALUES_AT_ONCE // (groups * tables[0].numel()))
    for start in range(0, count, step):
        part = weights[:, start : start + step]
        gaps = part.unsqueeze(2) - tables.unsqueeze(1)
        found[:, start : start + step] = gaps.square().sum(-1).argmin(-1)
    return found


def entries(tables: Tensor, codes: Tensor) -> Tensor:
    """Return the entries that codes point to, ``[G, n, g]``; differentiable.

    Args:
        tables: ``[G, K, g]``.
        codes: int64 ``[G, n]``.
    """
    places = codes.unsqueeze(-1).expand(-1, -1, tables.shape[2])
    return tables.gather(1, places)


def hard_values(weights: Tensor, tables: Tensor) -> Tensor:
    """Return the nearest entry of each weight, ``[G, n, g]``; no gradient in weights.

    Args:
        weights: ``[G, n, g]``, any float type.
        tables: ``[G, K, g]``.
    """
    return entries(tables, nearest(weights, tables))


def softness(soft: Tensor, hard: Tensor, weights: Tensor) -> Tensor:
    """Return ``|w~ - w^| / |w|``, a scalar: what snapping to the tables changes.

    It is about ``0.44 sqrt(alpha) gap / std(w)``, see :func:`temperature`.
    """
    size = weights.square().sum().clamp_min(torch.finfo(weights.dtype).tiny)
    return ((soft - hard).square().sum() / size).sqrt()


def temperature(tables: Tensor, alpha: float) -> Tensor:
    """Return ``tau = alpha * gap^2`` of each group, ``[G]``.

    The gap is the median distance of an entry to its nearest neighbour. Half way
    between two entries, at a distance ``x`` from the border, the further one has a
    share of ``1 / (1 + exp(2 x / (alpha gap)))``: alpha is the width of the blur in
    gaps. Integrated over weights that are spread evenly, the soft weight is
    ``sqrt(alpha (log 2 - 1/2))`` gaps, root mean square, from the hard one.

    Args:
        tables: ``[G, K, g]``, at least two entries.
        alpha: Above 0.
    """
    count = tables.shape[1]
    squares = (tables.unsqueeze(2) - tables.unsqueeze(1)).square().sum(-1)
    itself = torch.eye(count, dtype=torch.bool, device=tables.device)
    squares = squares.masked_fill(itself, torch.inf).amin(2)  # [G, K]
    # A table of equal entries has no gap; any temperature then means the same.
    least = torch.finfo(tables.dtype).tiny ** 0.5
    return (alpha * squares.median(1).values).clamp_min(least)


def annealed(first: float, last: float, share: float) -> float:
    """Return the value at a share of the training, from ``first`` to ``last``.

    It falls by equal factors in equal times.
    """
    return first * math.exp(min(1.0, max(0.0, share)) * math.log(last / first))
