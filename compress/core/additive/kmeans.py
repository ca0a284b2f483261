"""First tables and codes: weighted k-means on what the tables before left over.

Minimises ``sum_i w_i |x_i - C[code_i]|^2`` by Lloyd's iterations, table after table,
each on the residual of the last one. A cluster that lost its points is moved to the
point of the largest error, which cannot raise the sum.

Source: Egiazarian et al. (2024), "Extreme Compression of Large Language Models via
Additive Quantization", arXiv 2401.06118, section 3.1, for the residual k-means; Liu et
al. (2024), "VPTQ", arXiv 2409.17066, for the weights; Arthur and Vassilvitskii (2007)
for k-means++. The authors of AQLM keep the old centre of an empty cluster.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.core.additive.sums import values_at_once

_MOST_CAREFUL = 1 << 10  # k-means++ takes a step for each centre
_MOST_MOVED = 1 << 10


def nearest(points: Tensor, centres: Tensor) -> Tensor:
    """Return int64 ``[N]``, the nearest of ``centres`` ``[K, g]`` to each point."""
    found = torch.empty(len(points), dtype=torch.int64, device=points.device)
    half = centres.square().sum(1) / 2
    step = max(1, values_at_once(points.device) // len(centres))
    for start in range(0, len(points), step):
        run = slice(start, start + step)
        scores = torch.addmm(half, points[run], centres.T, alpha=-1)
        torch.argmin(scores, dim=1, out=found[run])
    return found


def step(points: Tensor, weights: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Return better centres ``[K, g]``, and the inertia of the given ones as a scalar.

    Args:
        points: float32 ``[N, g]``.
        weights: float32 ``[N]``, not negative.
        centres: float32 ``[K, g]``.
    """
    codes = nearest(points, centres)
    errors = (points - centres[codes]).square().sum(1) * weights
    shape = (len(centres), points.shape[1])
    sums = torch.zeros(shape, dtype=torch.float64, device=points.device)
    index = codes.unsqueeze(1).expand_as(points)
    sums.scatter_add_(0, index, (points * weights.unsqueeze(1)).double())
    totals = torch.zeros(shape[0], dtype=torch.float64, device=points.device)
    totals.scatter_add_(0, codes, weights.double())
    empty = totals <= 0
    means = (sums / totals.clamp(min=1e-300).unsqueeze(1)).float()
    worst = errors.topk(min(len(centres), len(points), _MOST_MOVED)).indices
    rank = empty.cumsum(0) - 1
    moved = points[worst[rank.clamp(0, len(worst) - 1)]]
    spare = empty & (rank < len(worst))
    kept = torch.where(empty.unsqueeze(1), centres, means)
    return torch.where(spare.unsqueeze(1), moved, kept), errors.sum()


def kmeans(
    points: Tensor,
    weights: Tensor,
    count: int,
    *,
    iterations: int,
    generator: torch.Generator,
) -> Tensor:
    """Return ``count`` centres of weighted points, float32 ``[K, g]``.

    Few centres start from k-means++, many from points drawn at random.

    Args:
        points: float32 ``[N, g]``.
        weights: float32 ``[N]``, not negative.
        count: ``K``.
        iterations: Of Lloyd.
        generator: On the device of the points.
    """
    if count <= _MOST_CAREFUL:
        centres = _spread_out(points, weights, count, generator)
    else:
        drawn = torch.randperm(len(points), generator=generator, device=points.device)
        places = torch.arange(count, device=points.device) % len(points)
        centres = points[drawn[places]]
    for _ in range(iterations):
        centres, _inertia = step(points, weights, centres)
    return centres


def _spread_out(
    points: Tensor, weights: Tensor, count: int, generator: torch.Generator
) -> Tensor:
    """Return points drawn with a chance proportional to their error so far."""
    draws = torch.rand(count, generator=generator, device=points.device)
    errors = weights.clone()
    centres = points.new_empty(count, points.shape[1])
    gaps = torch.full_like(weights, torch.inf)
    for number in range(count):
        sums = errors.double().cumsum(0)
        place = torch.searchsorted(sums, (draws[number].double() * sums[-1]).view(1))
        centres[number] = points[place.clamp(max=len(points) - 1)][0]
        gap = (points - centres[number]).square().sum(1)
        gaps = torch.minimum(gaps, gap)
        errors = gaps * weights
    return centres


def residual_tables(
    points: Tensor,
    weights: Tensor,
    *,
    count: int,
    entries: int,
    points_per_entry: int,
    iterations: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Return tables float32 ``[M, K, g]`` and codes int64 ``[N, M]``.

    Args:
        points: float32 ``[N, g]``.
        weights: float32 ``[N]``, not negative.
        count: ``M``.
        entries: ``K``.
        points_per_entry: How many points for each entry are drawn for k-means.
        iterations: Of Lloyd, for each table.
        generator: On the device of the points.
    """
    residual = points.clone()
    tables, codes = [], []
    size = min(len(points), points_per_entry * entries)
    for _ in range(count):
        order = torch.randperm(len(points), generator=generator, device=points.device)
        sample = order[:size]
        centres = kmeans(
            residual[sample],
            weights[sample],
            entries,
            iterations=iterations,
            generator=generator,
        )
        places = nearest(residual, centres)
        residual -= centres[places]
        tables.append(centres)
        codes.append(places)
    return torch.stack(tables), torch.stack(codes, dim=1)
