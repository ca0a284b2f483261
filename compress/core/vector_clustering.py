"""Weighted k-means of short vectors: where the entries of a vector palette lie.

Minimises ``sum_i sum_c f_ic (x_ic - t_kc)^2``: each coordinate of a point has a weight
of its own, since it stands in a column of its own. The squared distance of all points
to all entries is one product, ``[f x, f] [-2 t, t^2]^T``, up to what does not depend on
the entry, and entries are weighted means by coordinate.

The start is k-means++ on a sample; where there are many entries several are drawn at
once. An entry that no point is nearest to moves to the point of the largest error.

Source: Arthur and Vassilvitskii (2007), "k-means++"; weights by coordinate as in van
Baalen et al. (2024), "GPTVQ", arXiv 2402.15319, section 3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

_DISTANCES_AT_ONCE = 1 << 24
_SAMPLE_OF_ENTRY, _LEAST_SAMPLE = 32, 4096
_DRAWS = 256  # rounds of the start


def vector_centroids(
    points: Tensor,
    weights: Tensor,
    count: int,
    *,
    seed: int = 0,
    iterations: int = 25,
) -> tuple[Tensor, list[float]]:
    """Return entries float32 ``[count, d]``, and the error of each iteration.

    Args:
        points: float32 ``[n, d]``.
        weights: ``[n, d]``, at least 0.
        count: Entries.
        seed: Of the start.
        iterations: At most; fewer once the error falls by less than 1e-4 of itself.
    """
    total = weights.sum()
    weights = torch.where(total > 0, weights, torch.ones_like(weights))
    entries = _seeded(points, weights, count, seed)
    losses: list[float] = []
    for _ in range(iterations):
        sums, mass, errors = _assigned(points, weights, entries)
        losses.append(float(errors.sum(dtype=torch.float64)))
        moved = torch.where(mass > 0, sums / mass.clamp(min=1e-30), entries.double())
        entries = moved.float()
        unused = (mass.sum(1) <= 0).nonzero()[:, 0][: len(points)]
        worst = errors.topk(len(unused)).indices
        worst = worst[errors[worst] > 0]
        entries[unused[: len(worst)]] = points[worst]
        if not len(worst) and len(losses) > 1 and losses[-1] >= losses[-2] * (1 - 1e-4):
            break
    return entries, losses


def _assigned(
    points: Tensor, weights: Tensor, entries: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return weighted sums and weights of each entry's points, and errors of points."""
    sums = torch.zeros(entries.shape, dtype=torch.float64, device=points.device)
    mass, errors = torch.zeros_like(sums), []
    size = max(1, _DISTANCES_AT_ONCE // len(entries))
    for x, f in zip(torch.split(points, size), torch.split(weights, size), strict=True):
        place = nearest_entries(x, f, entries)
        errors.append((f * (x - entries[place]).square()).sum(1))
        sums.index_add_(0, place, (f * x).double())
        mass.index_add_(0, place, f.double())
    return sums, mass, torch.cat(errors)


def nearest_entries(points: Tensor, weights: Tensor, entries: Tensor) -> Tensor:
    """Return the entry nearest to each point, int64 ``[n]``; the first of several.

    Args:
        points: float32 ``[n, d]``.
        weights: ``[n, d]`` of its coordinates.
        entries: float32 ``[K, d]``.
    """
    left = torch.cat([weights * points, weights], 1)
    right = torch.cat([-2 * entries, entries.square()], 1)
    return (left @ right.T).argmin(1)


def _seeded(points: Tensor, weights: Tensor, count: int, seed: int) -> Tensor:
    """Return ``[count, d]`` points of a sample, drawn by their distance to the rest."""
    generator = torch.Generator().manual_seed(seed)
    wanted = min(len(points), max(_LEAST_SAMPLE, _SAMPLE_OF_ENTRY * count))
    chosen = torch.randperm(len(points), generator=generator)[:wanted]
    chosen = chosen.to(points.device)
    x, f = points[chosen], weights[chosen]
    mean = (f * x).sum(0) / f.sum(0).clamp(min=1e-30)
    nearest = (f * (x - mean).square()).sum(1)
    entries = x.new_empty(0, x.shape[1])
    while len(entries) < count:
        draws = min(max(1, count // _DRAWS), count - len(entries))
        heights = nearest.double().cumsum(0)
        level = torch.rand(draws, generator=generator, dtype=torch.float64)
        place = torch.searchsorted(heights, level.to(heights) * heights[-1])
        added = x[place.clamp_(max=len(x) - 1)]
        entries = torch.cat([entries, added])
        size = max(1, _DISTANCES_AT_ONCE // draws)
        for run in torch.split(torch.arange(len(x), device=x.device), size):
            gaps = x[run, None] - added  # [n, draws, d]
            far = (f[run, None] * gaps.square()).sum(2).amin(1)
            nearest[run] = torch.minimum(nearest[run], far)
    return entries
