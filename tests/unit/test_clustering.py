import itertools

import pytest
import torch
from torch import Tensor

from compress.core import clustering
from compress.core.clustering import SortedGroups, centroids, lloyd, optimal_centroids
from compress.core.vector_clustering import nearest_entries, vector_centroids


def make(groups: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(groups, n, generator=generator)
    return values, torch.rand(groups, n, generator=generator) ** 3


def error(values: Tensor, weights: Tensor, centers: Tensor) -> Tensor:
    """Weighted squared error to the nearest of all centers, one by one."""
    gaps = (values.double().unsqueeze(2) - centers.double().unsqueeze(1)).square()
    return (weights.double() * gaps.amin(2)).sum(1)


def least_error(values: Tensor, weights: Tensor, count: int) -> float:
    """The optimum by trying every way to cut the sorted numbers."""
    values, order = values.double().sort()
    weights = weights.double()[order]
    best = float("inf")
    for cuts in itertools.combinations(range(1, len(values)), count - 1):
        edges = [0, *cuts, len(values)]
        total = 0.0
        for start, stop in itertools.pairwise(edges):
            w, f = values[start:stop], weights[start:stop]
            mean = (f * w).sum() / f.sum()
            total += float((f * (w - mean).square()).sum())
        best = min(best, total)
    return best


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_optimum_is_that_of_all_cuts(count: int) -> None:
    values, weights = make(3, 12)
    found = error(values, weights, optimal_centroids(values, weights, count))
    for w, f, e in zip(values, weights, found, strict=True):
        assert float(e) == pytest.approx(least_error(w, f, count), rel=1e-5)


@pytest.mark.parametrize("count", [2, 3, 8, 16, 70])
def test_lloyd_is_never_below_the_optimum(count: int) -> None:
    values, weights = make(4, 700)
    close = error(values, weights, centroids(values, weights, count))
    least = error(values, weights, optimal_centroids(values, weights, count))
    assert (least <= close * (1 + 1e-5)).all()


def test_lloyd_is_close_to_the_optimum_on_normal_numbers() -> None:
    values, _ = make(4, 4000)
    even = torch.ones_like(values)
    close = error(values, even, centroids(values, even, 8))
    least = error(values, even, optimal_centroids(values, even, 8))
    assert (close <= 1.01 * least).all()


def test_errors_of_lloyd_never_rise() -> None:
    group = SortedGroups.of(*make(8, 3000))
    losses = [lloyd(group, 100, iterations=i)[1] for i in (1, 2, 4, 8, 16)]
    for before, after in itertools.pairwise(losses):
        assert (after <= before).all()


@pytest.mark.parametrize("solve", [centroids, optimal_centroids])
@pytest.mark.parametrize("count", [5, 8, 128])
def test_as_many_clusters_as_numbers_have_no_error(solve, count: int) -> None:  # type: ignore[no-untyped-def]
    levels = torch.tensor([-3.0, -0.25, 0.0, 1.0, 40.0])
    generator = torch.Generator().manual_seed(0)
    values = levels[torch.randint(5, (2, 600), generator=generator)]
    found = solve(values, torch.rand(2, 600, generator=generator) + 0.1, count)
    assert found.shape == (2, count) and found.isfinite().all()
    gaps = (levels[None, :, None] - found[:, None, :]).abs().amin(2)
    assert float(gaps.max()) <= 40 * 2**-23


@pytest.mark.parametrize("solve", [centroids, optimal_centroids])
def test_one_cluster_is_the_weighted_mean(solve) -> None:  # type: ignore[no-untyped-def]
    values, weights = make(3, 100)
    mean = (values * weights).double().sum(1) / weights.double().sum(1)
    assert solve(values, weights, 1)[:, 0].double() == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("count", [8, 100])
def test_scaled_numbers_have_scaled_centroids(count: int) -> None:
    values, weights = make(2, 900)
    found = centroids(values, weights, count)
    assert torch.equal(centroids(values * 4, weights, count), found * 4)


def test_the_order_of_numbers_does_not_matter() -> None:
    values, weights = make(2, 900)
    order = torch.randperm(900, generator=torch.Generator().manual_seed(3))
    found = centroids(values[:, order], weights[:, order], 8)
    assert torch.equal(found, centroids(values, weights, 8))


@pytest.mark.parametrize("count", [8, 100])
def test_numbers_without_weight_do_not_move_centroids(count: int) -> None:
    values, weights = make(2, 3000)
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    others = low + (high - low) * torch.rand(2, 500)
    both = torch.cat([values, others], 1)
    masses = torch.cat([weights, torch.zeros_like(others)], 1)
    kept = error(values, weights, centroids(both, masses, count))
    alone = error(values, weights, centroids(values, weights, count))
    assert kept == pytest.approx(alone, rel=1e-2)  # borders of bins may differ
    best = optimal_centroids(both, masses, 8)
    assert best == pytest.approx(optimal_centroids(values, weights, 8), abs=1e-6)


def test_a_group_without_weight_is_taken_evenly() -> None:
    values, weights = make(1, 500)
    none, even = torch.zeros_like(weights), torch.ones_like(weights)
    assert torch.equal(centroids(values, none, 4), centroids(values, even, 4))


def test_long_groups_are_binned(monkeypatch: pytest.MonkeyPatch) -> None:
    values, weights = make(2, 5000)
    exact = error(values, weights, centroids(values, weights, 8))
    monkeypatch.setattr(clustering, "_POINTS_AT_ONCE", 999)
    binned = error(values, weights, centroids(values, weights, 8))
    assert binned == pytest.approx(exact, rel=1e-3)


# Vectors


def vectors() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(3000, 2, generator=generator)
    return points, torch.rand(3000, 2, generator=generator) + 0.01


def test_nearest_entries_are_those_of_all_distances() -> None:
    points, weights = vectors()
    entries = points[:16]
    gaps = points[:, None].double() - entries.double()
    far = (weights[:, None] * gaps.square()).sum(2)
    found = nearest_entries(points, weights, entries)
    assert (far.gather(1, found[:, None])[:, 0] <= far.amin(1) + 1e-5).all()


def test_errors_of_vector_k_means_never_rise() -> None:
    _, losses = vector_centroids(*vectors(), 32)
    assert len(losses) > 3
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(losses))


def test_as_many_entries_as_points_have_no_error() -> None:
    points, weights = vectors()
    distinct = points[:10].repeat(30, 1)
    entries, _ = vector_centroids(distinct, weights[:300], 16)
    gaps = (distinct[:, None] - entries).square().sum(2).amin(1)
    assert float(gaps.max()) < 1e-10


def test_one_entry_is_the_mean_of_each_coordinate() -> None:
    points, weights = vectors()
    entries, _ = vector_centroids(points, weights, 1)
    mean = (points * weights).double().sum(0) / weights.double().sum(0)
    assert entries[0].double() == pytest.approx(mean, abs=1e-5)


def test_coordinates_without_weight_do_not_matter() -> None:
    points, weights = vectors()
    weights[:, 1] = 0
    moved = points.clone()
    moved[:, 1] = 7.0
    found, other = (vector_centroids(x, weights, 8)[0][:, 0] for x in (points, moved))
    assert torch.equal(found, other)
