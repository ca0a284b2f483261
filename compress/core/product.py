"""Product quantization of a matrix in a metric of its columns: codes and tables.

Columns are cut into runs ``J`` of ``g``; each run has ``M`` tables that all rows share.
Minimises ``sum_v r_v (w_v - q_v) H (w_v - q_v)^T`` over both:

1. Run by run, k-means of what error feedback has made of the run, in the metric
   ``(U_J^T U_J)^-1`` with ``H^-1 = U^T U``: what an error costs once later runs have
   made up for it. A second table takes what the first leaves.
2. Sweeps of block coordinate descent. For one table, all others fixed, the best free
   values of a run are ``q_J + (W - Q) H_J H_JJ^-1``; one step of k-means moves entries
   and codes towards these, in the metric ``H_JJ``. It is kept where it loses less.

Entries are rounded to what is stored before codes are chosen, so that codes are the
nearest entries of the tables that are stored, and no sweep raises the loss.

Source: Jegou et al. (2011), "Product quantization for nearest neighbor search", IEEE
TPAMI 33(1); feedback between runs as in van Baalen et al. (2024), "GPTVQ", arXiv
2402.15319, there with tables for blocks of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.core.vector_clustering import vector_centroids

_DISTANCES_AT_ONCE = 1 << 24
_SAMPLE_OF_ENTRY = 64  # rows that k-means sees; sweeps see all of them


@dataclass
class Product:
    """Codes and tables of ``[R, C]``, while they are improved.

    Attributes:
        codes: int64 ``[R, J, M]``.
        tables: float32 ``[J, M, K, g]``, as stored.
    """

    codes: Tensor
    tables: Tensor

    def run(self, number: int) -> Tensor:
        """Return the values ``[R, g]`` of one run of columns."""
        tables, codes = self.tables[number], self.codes[:, number]
        total = tables[0][codes[:, 0]]
        for m in range(1, len(tables)):
            total = total + tables[m][codes[:, m]]
        return total


@dataclass(frozen=True)
class Metric:
    """What errors cost.

    Attributes:
        hessian: float32 ``[C, C]``, positive definite.
        factor: ``U`` upper ``[C, C]`` with ``U^T U`` the inverse, in ``order``.
        order: int64 ``[C]``; columns of a run stay together.
        rows: float32 ``[R]``, what the errors of each row count.
    """

    hessian: Tensor
    factor: Tensor
    order: Tensor
    rows: Tensor


def fed_back(
    target: Tensor,
    metric: Metric,
    *,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    seed: int = 0,
) -> Product:
    """Return the result of the first step.

    Args:
        target: float32 ``[R, C]``.
        metric: Of the errors.
        shape: Tables ``M`` of a run, entries ``K``, columns ``g``.
        dtype: That entries are stored in.
        seed: Of the start of k-means.
    """
    count, entries, vector = shape
    errors = torch.zeros_like(target)  # in order, each run times the inverse of U_J
    runs = metric.order.view(-1, vector)[:, 0] // vector
    found = Product(
        runs.new_zeros(len(target), len(runs), count),
        target.new_zeros(len(runs), count, entries, vector),
    )
    for position, run in enumerate(runs.tolist()):
        here = slice(position * vector, (position + 1) * vector)
        inverse = torch.linalg.inv(metric.factor[here, here])
        cost = inverse @ inverse.T
        wanted = target[:, run * vector : (run + 1) * vector].clone()
        wanted -= errors[:, : here.start] @ metric.factor[: here.start, here]
        for m in range(count):
            table = clustered(wanted, cost, metric.rows, entries, dtype, seed=seed + m)
            codes = nearest(wanted, table, cost)
            found.tables[run, m], found.codes[:, run, m] = table, codes
            wanted -= table[codes]
        errors[:, here] = wanted @ inverse
    return found


def sweep_(found: Product, target: Tensor, metric: Metric, dtype: torch.dtype) -> None:
    """Improve every table and its codes once; the loss does not rise.

    Args:
        found: Codes and tables of ``target``.
        target: float32 ``[R, C]``.
        metric: Of the errors.
        dtype: That entries are stored in.
    """
    runs, count, _, vector = found.tables.shape
    error = torch.cat([found.run(run) for run in range(runs)], 1)
    error = torch.sub(target, error, out=error)
    for run in range(runs):
        here = slice(run * vector, (run + 1) * vector)
        cost = metric.hessian[here, here]
        for m in range(count):
            table, codes = found.tables[run, m], found.codes[:, run, m]
            owed = error @ metric.hessian[:, here]
            step = torch.linalg.solve(cost, owed, left=False)
            wanted = table[codes] + step
            moved = rounded(means(wanted, codes, metric.rows, table), dtype)
            chosen = nearest(wanted, moved, cost)
            before = loss(step, cost, metric.rows)
            after = loss(wanted - moved[chosen], cost, metric.rows)
            if after < before:
                error[:, here] += table[codes] - moved[chosen]
                found.tables[run, m], found.codes[:, run, m] = moved, chosen


def clustered(
    points: Tensor,
    cost: Tensor,
    weights: Tensor,
    count: int,
    dtype: torch.dtype,
    *,
    seed: int = 0,
) -> Tensor:
    """Return entries ``[count, g]`` of k-means, rounded to ``dtype``, as float32.

    Args:
        points: float32 ``[R, g]``.
        cost: ``[g, g]`` positive definite, the metric.
        weights: ``[R]`` of points.
        count: Entries.
        dtype: To round to.
        seed: Of the start.
    """
    turn = torch.linalg.cholesky(cost)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(points), generator=generator)
    drawn = drawn[: _SAMPLE_OF_ENTRY * count].to(points.device)
    spread = weights[drawn].unsqueeze(1).expand(-1, points.shape[1])
    centers, _ = vector_centroids(points[drawn] @ turn, spread, count, seed=seed)
    entries = torch.linalg.solve_triangular(turn, centers, upper=False, left=False)
    # In the points' own space, where the mean of one point is that point.
    codes = nearest(points, entries, cost)
    return rounded(means(points, codes, weights, entries), dtype)


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float32 values that ``dtype`` has; those beyond its range are its most."""
    most = torch.finfo(dtype).max
    return values.clamp(-most, most).to(dtype).float()


def means(points: Tensor, codes: Tensor, weights: Tensor, entries: Tensor) -> Tensor:
    """Return the weighted means of points by code; entries without points stay."""
    sums = torch.zeros(entries.shape, dtype=torch.float64, device=points.device)
    mass = torch.zeros(len(entries), 1, dtype=torch.float64, device=points.device)
    wide = weights.double().unsqueeze(1)
    sums.index_add_(0, codes, points.double() * wide)
    mass.index_add_(0, codes, wide)
    return torch.where(mass > 0, sums / mass.clamp(min=1e-30), entries.double()).float()


def nearest(points: Tensor, entries: Tensor, cost: Tensor) -> Tensor:
    """Return the entry of least ``(x - t) cost (x - t)^T`` for each point, int64 [R].

    Args:
        points: float32 ``[R, g]``.
        entries: float32 ``[K, g]``.
        cost: ``[g, g]``, symmetric.
    """
    turned = entries @ cost
    half = (turned * entries).sum(1) / 2
    size = max(1, _DISTANCES_AT_ONCE // len(entries))
    return torch.cat(
        [
            torch.addmm(half, x, turned.T, alpha=-1).argmin(1)
            for x in torch.split(points, size)
        ]
    )


def loss(error: Tensor, cost: Tensor, weights: Tensor) -> float:
    """Return ``sum_v r_v e_v cost e_v^T`` of errors ``[R, g]``."""
    return float(weights @ ((error @ cost) * error).sum(1))
