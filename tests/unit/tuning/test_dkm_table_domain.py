import pytest
import torch
from torch import Tensor

from compress.tuning.dkm.assignment import soft_tables, soft_values, temperature
from compress.tuning.dkm.table_domain import cluster, rounded
from compress.tuning.dkm.unique import unique_values


def values(groups: int, count: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(groups, count, generator=generator) * 0.02).to(dtype)


def start(weights: Tensor, entries: int) -> Tensor:
    places = torch.linspace(0, weights.shape[1] - 1, entries).long()
    return weights.sort(dim=1).values[:, places].clone()


def plain(
    weights: Tensor, tables: Tensor, tau: Tensor, importances: Tensor | None
) -> tuple[Tensor, Tensor]:
    columns = weights.unsqueeze(-1)
    after = soft_tables(
        columns, tables.unsqueeze(-1), tau, iterations=5, importances=importances
    )
    return soft_values(columns, after, tau).squeeze(-1), after.squeeze(-1)


@pytest.mark.parametrize("weighted", [False, True])
def test_values_and_gradients_are_those_of_plain_dkm(weighted: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    master = values(4, 20_000).requires_grad_()
    f = torch.rand(4, 20_000, generator=generator) if weighted else None
    tables = start(rounded(master).detach(), 8)
    tau = temperature(tables.unsqueeze(-1), 0.2)
    wanted = torch.randn(4, 20_000, generator=generator)

    soft, after = cluster(rounded(master), tables, tau, iterations=5, importances=f)
    (gradient,) = torch.autograd.grad((soft * wanted).sum(), master)
    expected, centroids = plain(rounded(master), tables, tau, f)
    (reference,) = torch.autograd.grad((expected * wanted).sum(), master)

    assert torch.allclose(soft, expected, rtol=0, atol=1e-6)
    assert torch.allclose(after, centroids, rtol=0, atol=1e-6)
    assert (gradient - reference).norm() < 1e-5 * reference.norm()


@pytest.mark.parametrize("weighted", [False, True])
def test_gradcheck_with_duplicates(weighted: bool) -> None:
    weights = values(2, 50, dtype=torch.float64)
    weights[:, 25:] = weights[:, :25]  # each value twice
    f = values(2, 50, dtype=torch.float64).abs() if weighted else None
    tables = start(weights, 4)
    tau = temperature(tables.unsqueeze(-1), 0.5)

    def soft(x: Tensor) -> Tensor:
        return cluster(x, tables, tau, iterations=3, importances=f)[0]

    assert torch.autograd.gradcheck(soft, weights.requires_grad_(), eps=1e-7)


def test_frozen_tables_give_the_gradient_of_the_assignment_alone() -> None:
    weights = values(2, 300, dtype=torch.float64).requires_grad_()
    tables = start(weights.detach(), 4)
    tau = temperature(tables.unsqueeze(-1), 0.5)
    soft, after = cluster(weights, tables, tau, iterations=0)
    (gradient,) = torch.autograd.grad(soft.square().sum(), weights)
    expected = soft_values(weights.unsqueeze(-1), tables.unsqueeze(-1), tau)
    (reference,) = torch.autograd.grad(expected.square().sum(), weights)
    assert torch.equal(after, tables)
    assert torch.allclose(gradient, reference, rtol=1e-12)


def test_groups_of_bounded_memory_are_as_all_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = rounded(values(6, 500)).requires_grad_()
    tables = start(weights.detach(), 4)
    tau = temperature(tables.unsqueeze(-1), 0.2)
    results = []
    for limit in (1 << 26, 1):
        monkeypatch.setattr("compress.tuning.dkm.table_domain._VALUES_AT_ONCE", limit)
        soft, _ = cluster(weights, tables, tau, iterations=3)
        (gradient,) = torch.autograd.grad(soft.square().sum(), weights)
        results.append((soft, gradient))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_two_bytes_a_weight_are_saved() -> None:
    sizes = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.nbytes)
        return tensor.detach()

    weights = rounded(values(1, 1 << 20)).requires_grad_()
    tables = start(weights.detach(), 8)
    tau = temperature(tables.unsqueeze(-1), 0.2)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        cluster(weights, tables, tau, iterations=5)
    count = len(torch.unique(weights))
    # Values in bfloat16 and mass in float32; table and temperature.
    assert sum(sizes) == 2 * (1 << 20) + 6 * count + 4 * 8 + 4


def test_rounding_passes_gradients_as_they_are() -> None:
    master = values(1, 100).requires_grad_()
    wanted = torch.full((1, 100), 1 / 3)
    (gradient,) = torch.autograd.grad((rounded(master) * wanted).sum(), master)
    assert torch.equal(rounded(master), master.bfloat16().float())
    assert torch.equal(gradient, wanted)


def test_unique_values_are_those_of_torch() -> None:
    weights = rounded(values(3, 5000))
    f = values(3, 5000).abs()
    found = unique_values(weights, f)
    for g in range(3):
        expected, inverse = torch.unique(weights[g], return_inverse=True)
        count = len(expected)
        mass = torch.zeros(count).index_add_(0, inverse, f[g])
        assert torch.equal(found.values[g, :count], expected)
        assert torch.equal(found.inverse[g], inverse)
        assert torch.allclose(found.mass[g, :count], mass)
        assert torch.equal(weights[g, found.first[g, :count]], expected)
        assert not found.mass[g, count:].any()


def test_more_values_than_16_bits_are_told_apart() -> None:
    weights = torch.arange(70_000, dtype=torch.float32).view(1, -1)
    assert torch.equal(unique_values(weights).inverse, torch.arange(70_000).view(1, -1))
