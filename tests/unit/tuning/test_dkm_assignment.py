import math

import pytest
import torch
from torch import Tensor

from compress.tuning.dkm.assignment import (
    annealed,
    hard_values,
    nearest,
    soft_tables,
    soft_values,
    softness,
    temperature,
)


def weights(groups: int = 3, count: int = 200, vector: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (groups, count, vector)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * 0.02


def start(values: Tensor, entries: int) -> Tensor:
    """Entries spread over the weights of each group."""
    places = torch.linspace(0, values.shape[1] - 1, entries).long()
    return values.sort(dim=1).values[:, places].clone()


def test_tables_follow_the_formula_written_as_loops() -> None:
    w, f = weights(2, 30), weights(2, 30).abs().squeeze(-1) + 0.01
    tables = start(w, 4)
    tau = temperature(tables, 0.3)
    after = soft_tables(w, tables, tau, iterations=2, importances=f)
    expected = tables.squeeze(-1).tolist()
    for g in range(2):
        for _ in range(2):
            drawn, mass = [0.0] * 4, [0.0] * 4
            for i in range(30):
                x = float(w[g, i, 0])
                e = [math.exp(-((x - c) ** 2) / float(tau[g])) for c in expected[g]]
                for j in range(4):
                    drawn[j] += e[j] / sum(e) * float(f[g, i]) * x
                    mass[j] += e[j] / sum(e) * float(f[g, i])
            expected[g] = [d / m for d, m in zip(drawn, mass, strict=True)]
    # An entry's old place counts 1e-7 of its mean mass.
    assert after.squeeze(-1).tolist() == [pytest.approx(e, rel=1e-4) for e in expected]


def test_cold_weights_are_the_nearest_entries() -> None:
    w = weights(vector=2)
    tables = start(w, 4)
    soft = soft_values(w, tables, temperature(tables, 1e-12))
    assert torch.equal(soft, hard_values(w, tables))


def test_hot_entries_are_the_mean() -> None:
    w = weights()
    tables = start(w, 4)
    hot = torch.full((3,), 1e12, dtype=w.dtype)
    after = soft_tables(w, tables, hot, iterations=1)
    # Its old place counts 1e-7 of an entry.
    mean = w.mean(1, keepdim=True).expand_as(after)
    assert torch.allclose(after, mean, atol=2e-7 * float(w.abs().max()))


def test_cold_frozen_tables_leave_no_gradient_but_moving_ones_do() -> None:
    w = weights().requires_grad_()
    tables = start(w.detach(), 4)
    cold = temperature(tables, 1e-12)
    frozen = soft_values(w, soft_tables(w, tables, cold, iterations=0), cold)
    (none,) = torch.autograd.grad((frozen**2).sum(), w)
    moving = soft_values(w, soft_tables(w, tables, cold, iterations=1), cold)
    (some,) = torch.autograd.grad((moving**2).sum(), w)
    assert torch.count_nonzero(none) == 0
    assert torch.count_nonzero(some) == w.numel()


def test_importances_of_zero_do_not_move_tables() -> None:
    w = weights()
    f = torch.ones(3, 200, dtype=w.dtype)
    f[:, :50] = 0
    tables = start(w, 4)
    tau = temperature(tables, 0.1)
    after = soft_tables(w, tables, tau, iterations=3, importances=f)
    moved = w.clone()
    moved[:, :50] = 5.0
    again = soft_tables(moved, tables, tau, iterations=3, importances=f)
    assert torch.equal(after, again)


def test_entries_without_weights_stay() -> None:
    w = weights()
    tables = torch.cat([start(w, 3), torch.full((3, 1, 1), 9.0, dtype=w.dtype)], 1)
    after = soft_tables(w, tables, temperature(tables, 0.1), iterations=3)
    assert torch.equal(after[:, 3], tables[:, 3])


def test_gap_is_the_median_distance_of_neighbours() -> None:
    tables = torch.tensor([[[0.0], [1.0], [3.0], [7.0], [8.0]]])
    # Nearest neighbours at 1, 1, 2, 1 and 1.
    assert temperature(tables, 0.5).tolist() == [0.5]


@pytest.mark.parametrize("alpha", [0.02, 0.002])
def test_softness_of_evenly_spread_weights_is_as_derived(alpha: float) -> None:
    w = torch.linspace(0.5, 14.5, 200_001, dtype=torch.float64).view(1, -1, 1)
    tables = torch.arange(16, dtype=torch.float64).view(1, 16, 1)
    soft = soft_values(w, tables, temperature(tables, alpha))
    found = softness(soft, hard_values(w, tables), w) * w.norm() / w.numel() ** 0.5
    expected = math.sqrt(alpha * (math.log(2) - 0.5))
    # Weights run over 14 gaps between 15 borders, 2 of which are half inside.
    assert float(found) == pytest.approx(expected, rel=0.01)


def test_nearest_is_the_least_distance() -> None:
    w, tables = weights(vector=3), weights(count=5, vector=3)
    assert torch.equal(nearest(w, tables), torch.cdist(w, tables).argmin(-1))


def test_alpha_falls_by_equal_factors() -> None:
    values = [annealed(0.5, 0.005, share) for share in (0.0, 0.5, 1.0, 2.0)]
    assert values == pytest.approx([0.5, 0.05, 0.005, 0.005])
