"""Weighted k-means of numbers, many groups at once: where a palette's values lie.

Minimises ``sum_i f_i (w_i - c_k(i))^2`` in each group. Numbers are sorted once and
``f``, ``f w`` and ``f w^2`` summed up to each of them, in float64; a cluster is a run
of sorted numbers, its mean and its error differences of these sums. So an iteration
costs a binary search for each border between two centroids, and no distance of a number
to all centroids is ever taken.

The start spreads centroids with a density of ``(f p)^(1/3)``, where ``f p`` is the
density of weight, which is best for many of them; quantiles, that is ``f p`` itself,
leave too few for the tails. :func:`optimal_centroids` finds the least error of all.

Source: Lloyd (1982), "Least squares quantization in PCM"; the density is that of Panter
and Dite (1951), "Quantization distortion in pulse-count modulation with nonuniform
spacing of levels"; weights as in Kim et al. (2023), "SqueezeLLM", arXiv 2306.07629,
section 4.1. The optimum by divide and conquer: Wu (1991), "Optimal quantization by
matrix searching".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_POINTS_AT_ONCE = 1 << 21  # some 40 bytes each
_BINS = 1 << 16
_HISTOGRAM = 1024  # bins that densities are taken in
_LEAST_BINS, _BINS_OF_CLUSTER, _MOST_BINS = 128, 16, 512  # the start is optimal for
_MOST_OPTIMAL = 64  # clusters; with more, the time would be too long
_CANDIDATES_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class SortedGroups:
    """Numbers of some groups in order, and sums over those before each.

    Attributes:
        values: float64 ``[G, n]``, ascending.
        sums: float64 ``[3, G, n + 1]``: of ``f``, ``f w`` and ``f w^2``.
    """

    values: Tensor
    sums: Tensor

    @classmethod
    def of(cls, values: Tensor, weights: Tensor) -> SortedGroups:
        """Sort ``values`` and ``weights`` ``[G, n]``, any float type.

        A group without any weight is taken with equal weights.
        """
        values, order = values.double().sort(dim=1, stable=True)
        f = weights.double().gather(1, order)
        total = f.sum(1, keepdim=True)
        f = torch.where(total > 0, f / total, 1.0 / f.shape[1])
        sums = f.new_zeros(3, f.shape[0], f.shape[1] + 1)
        for power in range(3):
            torch.cumsum(f * values**power, 1, out=sums[power, :, 1:])
        return cls(values, sums)

    def clusters(self, edges: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return weight, mean and error of runs between ``edges`` ``[G, K + 1]``.

        The mean of a run without weight is 0.
        """
        index = edges.expand(3, *edges.shape)
        f, fw, fww = self.sums.gather(2, index).diff(dim=2)
        mean = torch.where(f > 0, fw / f.clamp(min=1e-300), 0.0)
        return f, mean, (fww - fw * mean).clamp(min=0)


def centroids(
    values: Tensor, weights: Tensor, count: int, *, iterations: int = 50
) -> Tensor:
    """Return the centroids of weighted k-means, float32 ``[G, count]``, ascending.

    Args:
        values: ``[G, n]``, any float type. Groups of more than 2^21 numbers are first
            put into 65,536 bins of equal width, each at its mean.
        weights: ``[G, n]``, at least 0; a number of weight 0 moves nothing.
        count: Clusters of each group.
        iterations: At most; fewer once an error falls by less than 1e-6 of itself.
    """
    return _by_groups(
        values, weights, lambda group: lloyd(group, count, iterations=iterations)[0]
    )


def optimal_centroids(values: Tensor, weights: Tensor, count: int) -> Tensor:
    """Return centroids of the least error there is, float32 ``[G, count]``, ascending.

    Takes ``count * n log n`` steps for each group, where :func:`centroids` takes
    ``n log n`` and is on normally distributed numbers within a percent of it.

    Args: as :func:`centroids`; the optimum is that of the bins where it makes them.
    """
    return _by_groups(values, weights, lambda group: optimum(group, count)[0])


def _by_groups(
    values: Tensor, weights: Tensor, solve: Callable[[SortedGroups], Tensor]
) -> Tensor:
    """Run ``solve`` on as many groups as fit into memory at a time."""
    n = values.shape[1]
    if n > _POINTS_AT_ONCE:
        found = [
            solve(SortedGroups.of(*_binned(w, f)))
            for w, f in zip(values, weights, strict=True)
        ]
    else:
        size = max(1, _POINTS_AT_ONCE // n)
        runs = zip(torch.split(values, size), torch.split(weights, size), strict=True)
        found = [solve(SortedGroups.of(w, f)) for w, f in runs]
    return torch.cat(found).float()


def _binned(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return means and weights ``[1, bins]`` of one long group ``[n]``."""
    weights = torch.where(weights.sum() > 0, weights, torch.ones_like(weights))
    low, high = values.min().double(), values.max().double()
    width = (high - low).clamp(min=1e-300) / _BINS
    sums = torch.zeros(2, _BINS, dtype=torch.float64, device=values.device)
    pairs = zip(
        torch.split(values, _POINTS_AT_ONCE),
        torch.split(weights, _POINTS_AT_ONCE),
        strict=True,
    )
    for run, weight in pairs:
        w, f = run.double(), weight.double()
        place = ((w - low) / width).long().clamp_(0, _BINS - 1)
        sums[0].index_add_(0, place, f)
        sums[1].index_add_(0, place, f * w)
    used = sums[0] > 0
    return (sums[1] / sums[0])[used][None], sums[0][used][None]


def lloyd(
    group: SortedGroups, count: int, *, iterations: int = 50
) -> tuple[Tensor, Tensor]:
    """Return centroids float64 ``[G, count]`` and the error of each group ``[G]``.

    The error is that of the centroids to the runs they are the means of, over the sum
    of weights; it never rises from one iteration to the next.
    """
    centers = _start(group, count)
    least = torch.full_like(centers[:, 0], torch.inf)
    for _ in range(iterations):
        f, mean, error = group.clusters(_edges(group, centers))
        empty = f <= 0
        loss = error.sum(1)
        centers = torch.where(empty, centers, mean)
        settled = loss >= least * (1 - 1e-6)
        least = torch.minimum(least, loss)
        split = _split_worst(group, centers, empty, error)
        if split is not None:
            centers = split
        elif bool(settled.all()):
            break
    return centers, least


def _edges(group: SortedGroups, centers: Tensor) -> Tensor:
    """Return where runs begin, and end, ``[G, K + 1]``."""
    borders = (centers[:, 1:] + centers[:, :-1]) / 2
    places = torch.searchsorted(group.values, borders.contiguous())
    n = group.values.shape[1]
    return torch.nn.functional.pad(
        torch.nn.functional.pad(places, (1, 0)), (0, 1), value=n
    )


def _start(group: SortedGroups, count: int) -> Tensor:
    """Return centroids ``[G, count]`` to begin with."""
    bins = min(max(_LEAST_BINS, _BINS_OF_CLUSTER * count), _MOST_BINS)
    if count > _MOST_OPTIMAL:
        return _spread(group, count)
    if bins >= group.values.shape[1]:
        return optimum(group, count)[0]
    walls = torch.searchsorted(group.values, _spread(group, bins))
    walls[:, 0], walls[:, -1] = 0, group.values.shape[1]
    sums = group.sums.gather(2, walls.expand(3, *walls.shape))
    return optimum(SortedGroups(group.values[:, : bins - 1], sums), count)[0]


def _spread(group: SortedGroups, count: int) -> Tensor:
    """Return ``[G, count]`` numbers with a density of ``(f p)^(1/3)``."""
    values = group.values
    low, high = values[:, :1], values[:, -1:]
    steps = torch.linspace(0, 1, _HISTOGRAM + 1, dtype=values.dtype).to(values.device)
    walls = low + (high - low) * steps
    places = torch.searchsorted(values, walls)
    places[:, -1] = values.shape[1]
    density = group.sums[0].gather(1, places).diff(dim=1).clamp(min=0)
    height = torch.nn.functional.pad((density ** (1 / 3)).cumsum(1), (1, 0))
    share = torch.arange(count, device=values.device, dtype=values.dtype)
    wanted = (share + 0.5) / count * height[:, -1:]
    right = torch.searchsorted(height, wanted).clamp_(1, _HISTOGRAM)
    before, after = height.gather(1, right - 1), height.gather(1, right)
    inside = ((wanted - before) / (after - before).clamp(min=1e-300)).clamp(0, 1)
    left = walls.gather(1, right - 1)
    return left + inside * (walls.gather(1, right) - left)


def _split_worst(
    group: SortedGroups, centers: Tensor, empty: Tensor, error: Tensor
) -> Tensor | None:
    """Return centroids with those of empty clusters put to use, if there are any.

    The clusters of the largest errors are cut at their means, and an empty one takes
    the upper half of each.
    """
    if not bool(empty.any()):
        return None
    order = empty.double().argsort(
        dim=1, descending=True, stable=True
    )  # empty ones first
    worst = error.argsort(dim=1, descending=True, stable=True)
    count = centers.shape[1]
    edges = _edges(group, centers)
    middle = torch.searchsorted(group.values, centers.gather(1, worst).contiguous())
    starts, ends = edges[:, :-1].gather(1, worst), edges[:, 1:].gather(1, worst)
    middle = torch.minimum(torch.maximum(middle, starts), ends)
    halves = []
    for begin, stop in ((starts, middle), (middle, ends)):
        pair = torch.stack([begin, stop], -1).view(len(begin), 2 * count)
        f, mean, _ = group.clusters(pair)
        halves.append((f[:, ::2], mean[:, ::2]))
    (left_f, left), (right_f, right) = halves
    free = empty.gather(1, order) & (left_f > 0) & (right_f > 0)
    free &= error.gather(1, worst) > 0
    if not bool(free.any()):
        return None
    # A cluster is either empty or split, so these writes do not meet.
    result = centers.scatter(
        1, order, torch.where(free, right, centers.gather(1, order))
    )
    result = result.scatter(1, worst, torch.where(free, left, result.gather(1, worst)))
    return result.sort(1).values


def optimum(group: SortedGroups, count: int) -> tuple[Tensor, Tensor]:
    """Return centroids float64 ``[G, count]`` of least error, and that error ``[G]``.

    ``D_k(j) = min_i D_(k-1)(i) + error(i..j)`` for the first ``j`` numbers in ``k``
    clusters. The best ``i`` does not fall as ``j`` grows, so that those of all ``j``
    are found from the middle outwards, each between two that are known. Two rows of
    ``D`` are held, and the splits of each ``k``.
    """
    groups, n = group.values.shape
    splits = []
    none = torch.zeros(groups, n + 1, dtype=torch.long, device=group.values.device)
    ends = torch.arange(n + 1, device=none.device).expand(groups, n + 1)
    best = _run_errors(group, none, ends)
    for _ in range(1, count):
        best, split = _next_row(group, best)
        splits.append(split)
    edge = torch.full_like(none[:, :1], n)
    edges = [edge]
    for split in reversed(splits):
        edge = split.gather(1, edge)
        edges.append(edge)
    walls = torch.cat([none[:, :1], *reversed(edges)], 1)
    f, mean, error = group.clusters(walls)
    # Clusters without weight take the mean of a neighbour: they are not needed.
    filled = torch.where(f > 0, mean, -torch.inf).cummax(1).values
    first = torch.where(f > 0, mean, torch.inf).amin(1, keepdim=True)
    return torch.maximum(filled, first), error.sum(1)


def _run_errors(group: SortedGroups, starts: Tensor, ends: Tensor) -> Tensor:
    """Return the errors of runs, ``[G, m]``, about their means."""
    f, fw, fww = (x.gather(1, ends) - x.gather(1, starts) for x in group.sums)
    safe = torch.where(f > 0, f, 1.0)
    return torch.where(f > 0, fww - fw * fw / safe, 0.0).clamp(min=0)


def _next_row(group: SortedGroups, before: Tensor) -> tuple[Tensor, Tensor]:
    """Return the next row of ``D`` ``[G, n + 1]``, and the best ``i`` of each ``j``."""
    groups, width = before.shape
    row, split = torch.zeros_like(before), torch.zeros_like(before, dtype=torch.long)
    n = width - 1
    step = 1 << max(0, n.bit_length() - 1)
    while step:
        at = torch.arange(step, width, 2 * step, device=before.device)
        low = split[:, at - step]
        beyond = at + step
        known = split[:, beyond.clamp(max=n)]
        high = torch.where(beyond <= n, known, at).minimum(at)
        size = max(1, _CANDIDATES_AT_ONCE // (groups * (width // max(1, len(at)) + 1)))
        for run in torch.split(torch.arange(len(at), device=at.device), size):
            found = _least(group, before, at[run], low[:, run], high[:, run])
            row[:, at[run]], split[:, at[run]] = found
        step //= 2
    return row, split


def _least(
    group: SortedGroups, before: Tensor, at: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the least of ``D(i) + error(i..j)`` for ``j`` ``[m]``, and its ``i``.

    Args:
        group: The numbers.
        before: ``D`` of one cluster less.
        at: The ``j``.
        low: First ``i`` of each, ``[G, m]``.
        high: Last one.
    """
    groups, m = low.shape
    sizes = (high - low + 1).flatten()
    owner = torch.repeat_interleave(sizes)
    first = sizes.cumsum(0) - sizes
    place = torch.arange(len(owner), device=owner.device) - first[owner]
    i = low.flatten()[owner] + place
    row = owner // m
    width = before.shape[1]
    begin, end = row * width + i, row * width + at[owner % m]
    f, fw, fww = (x.flatten()[end] - x.flatten()[begin] for x in group.sums)
    error = torch.where(f > 0, fww - fw * fw / torch.where(f > 0, f, 1.0), 0.0)
    total = before.flatten()[begin] + error.clamp(min=0)
    least = torch.full((groups * m,), torch.inf, dtype=total.dtype, device=total.device)
    least = least.scatter_reduce(0, owner, total, "amin")
    hit = torch.where(total <= least[owner], i, width)
    best = torch.full_like(sizes, width).scatter_reduce(0, owner, hit, "amin")
    return least.view(groups, m), best.view(groups, m)
