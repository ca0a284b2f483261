"""Scores against slow loops and closed forms."""

from __future__ import annotations

import pytest
import torch
from pruning_fixtures import random_mlp, statistics_of
from torch import Tensor

from compress.core.neurons import GatedMLP, keep_largest, loudest
from compress.pruners.cfsp import CFSP, CFSPOptions
from compress.pruners.comp import COMP, COMPOptions
from compress.pruners.flap import FLAP
from compress.pruners.maw import MAW
from compress.pruners.random_choice import Random, RandomOptions
from compress.pruners.wanda_sp import WandaSP

TINY = 1e-9  # a ridge that changes nothing


def test_maw_is_the_range_of_gate_plus_that_of_up() -> None:
    gate = torch.tensor([[-0.2, 0.1], [-0.5, 0.4], [0.3, 0.1], [-0.2, -0.7]])
    mlp = GatedMLP(gate, torch.zeros(4, 2), torch.ones(2, 4))
    expected = torch.tensor([0.3, 0.9, 0.4, 0.5])  # one sign: still max + |min|
    torch.testing.assert_close(MAW().scores(mlp, None), expected)
    both = GatedMLP(gate, gate.flip(0), torch.ones(2, 4))
    torch.testing.assert_close(MAW().scores(both, None), expected + expected.flip(0))


def test_maw_is_summed_in_float32() -> None:
    gate = torch.tensor([[256.0, -1.0], [1.0, 1.0]], dtype=torch.bfloat16)
    mlp = GatedMLP(gate, torch.zeros_like(gate), gate.T)
    scores = MAW().scores(mlp, None)
    assert scores.dtype == torch.float32
    assert float(scores[0]) == 257  # bfloat16 has 256 and 258


def printed_cfsp(mlp: GatedMLP, x: Tensor) -> Tensor:
    """Return the fine criterion as the released code has it, b = c = 1."""
    hidden, neurons = mlp.down.shape
    n = x.square().mean(0).sqrt()
    scores = torch.zeros(neurons)
    for j in range(neurons):
        a = mlp.down[:, j].abs() * n[j]
        up, gate = mlp.up[j].abs(), mlp.gate[j].abs()
        for i in range(hidden):
            share = a[i] / a.sum() + up[i] / up.sum() + gate[i] / gate.sum()
            scores[j] += share * n[j] / hidden
    return scores


def test_the_printed_criterion_of_cfsp_is_the_activation_norm() -> None:
    mlp, x = random_mlp()
    act = CFSP(CFSPOptions(fine="act")).scores(mlp, statistics_of(x))
    printed = printed_cfsp(mlp, x)
    torch.testing.assert_close(printed, 3 / 12 * act, rtol=1e-5, atol=0)


def test_relative_cfsp_normalises_over_neurons() -> None:
    mlp, x = random_mlp(neurons=6, hidden=5)
    n = x.square().mean(0).sqrt()
    expected = torch.zeros(6)
    for j in range(6):
        for i in range(5):
            down = mlp.down[i, j].abs() * n[j] / sum(mlp.down[i].abs() * n)
            gate = mlp.gate[j, i].abs() / sum(mlp.gate[:, i].abs())
            up = mlp.up[j, i].abs() / sum(mlp.up[:, i].abs())
            expected[j] += (down + gate + up) * n[j] / 5
    found = CFSP(CFSPOptions(fine="relative")).scores(mlp, statistics_of(x))
    torch.testing.assert_close(found, expected)


def test_cfsp_wx_is_the_size_of_what_a_neuron_adds() -> None:
    mlp, x = random_mlp()
    added = [x[:, j, None] * mlp.down[:, j] for j in range(24)]  # each [T, H]
    expected = torch.stack([a.square().sum(1).mean().sqrt() for a in added])
    torch.testing.assert_close(CFSP().scores(mlp, statistics_of(x)), expected)


def test_flap_is_the_variance_of_what_a_neuron_adds() -> None:
    mlp, x = random_mlp()
    added = [x[:, j, None] * mlp.down[:, j] for j in range(24)]
    expected = torch.stack([a.var(0, unbiased=False).sum() for a in added])
    found = FLAP().scores(mlp, statistics_of(x))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_wanda_sp_is_the_mean_of_weight_times_norm() -> None:
    mlp, x = random_mlp(neurons=6, hidden=5)
    n = x.square().mean(0).sqrt()
    loops = [sum(abs(mlp.down[i, j]) * n[j] for i in range(5)) / 5 for j in range(6)]
    found = WandaSP().scores(mlp, statistics_of(x))
    torch.testing.assert_close(found, torch.stack([torch.as_tensor(v) for v in loops]))


def test_lots_depend_on_seed_and_block_alone() -> None:
    mlp, _ = random_mlp()
    other = GatedMLP(mlp.gate, mlp.up, mlp.down, block=1)
    first = Random().scores(mlp, None)
    torch.manual_seed(5)
    assert torch.equal(first, Random().scores(mlp, None))
    assert not torch.equal(first, Random().scores(other, None))
    seeded = Random(RandomOptions(seed=1)).scores(mlp, None)
    assert not torch.equal(first, seeded)


def least_loss_without(mlp: GatedMLP, x: Tensor, gone: list[int]) -> float:
    """Return the error of the best linear stand-in for some neurons, by lstsq."""
    stay = [j for j in range(mlp.neurons) if j not in gone]
    x = x.double()
    wanted = x[:, gone] @ mlp.down[:, gone].double().T
    found = torch.linalg.lstsq(x[:, stay], wanted).solution
    return float((wanted - x[:, stay] @ found).square().sum(1).mean())


def test_comp_with_gamma_1_is_the_loss_after_the_best_compensation() -> None:
    mlp, x = random_mlp(neurons=8)
    expected = [least_loss_without(mlp, x, [j]) for j in range(8)]
    comp = COMP(COMPOptions(gamma=1, ridge=TINY))
    found = comp.scores(mlp, statistics_of(x))
    wanted = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=0)


def test_comp_with_gamma_0_is_the_energy_that_a_neuron_adds() -> None:
    mlp, x = random_mlp()
    found = COMP(COMPOptions(gamma=0, ridge=TINY)).scores(mlp, statistics_of(x))
    wanted = CFSP().scores(mlp, statistics_of(x)).square().double()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)


def test_comp_by_effect_weighs_the_effect_by_what_others_take_over() -> None:
    mlp, x = random_mlp()
    effect = torch.rand(24, generator=torch.Generator().manual_seed(9))
    found = statistics_of(x, effect)
    alone = COMP(COMPOptions(worth="effect", gamma=0)).scores(mlp, found)
    torch.testing.assert_close(alone.float(), effect)
    ratio = [
        COMP(COMPOptions(worth=worth, gamma=1)).scores(mlp, found)
        / COMP(COMPOptions(worth=worth, gamma=0)).scores(mlp, found)
        for worth in ("output", "effect")
    ]
    torch.testing.assert_close(ratio[0], ratio[1])


def test_comp_one_at_a_time_is_greedy_removal() -> None:
    mlp, x = random_mlp(neurons=8)
    gone: list[int] = []
    for _ in range(4):
        left = [j for j in range(8) if j not in gone]
        gone.append(min(left, key=lambda j: least_loss_without(mlp, x, [*gone, j])))
    comp = COMP(COMPOptions(chunk=1, ridge=TINY))
    kept = comp.select(mlp, statistics_of(x), 4)
    assert kept.tolist() == [j for j in range(8) if j not in gone]


def with_twins(scale: float = 1.0) -> tuple[GatedMLP, Tensor]:
    """Return an MLP whose last neuron repeats the first, with half of its column."""
    mlp, x = random_mlp(neurons=12)
    down = mlp.down.clone()
    down[:, 0] /= 2
    twin = GatedMLP(
        torch.cat([mlp.gate, mlp.gate[:1]]),
        torch.cat([mlp.up, mlp.up[:1]]),
        torch.cat([down, down[:, :1]], 1),
    )
    return twin, torch.cat([x, x[:, :1]], 1)


def test_twins_score_lowest_and_only_one_goes() -> None:
    mlp, x = with_twins()
    comp = COMP(COMPOptions(chunk=2))
    lowest = comp.scores(mlp, statistics_of(x)).argsort()[:2]
    assert sorted(lowest.tolist()) == [0, 12]
    kept = comp.select(mlp, statistics_of(x), 11)
    assert (0 in kept) != (12 in kept)


@pytest.mark.parametrize("keep", [1, 3, 12])
def test_comp_keeps_what_is_protected_among_twins(keep: int) -> None:
    """Where all that may go are twins of one another, chunks get smaller."""
    mlp, x = random_mlp(neurons=4)
    same = torch.cat([x[:, :1]] * 12 + [x[:, 1:2]], 1)
    repeated = GatedMLP(*(torch.ones(13, 5) for _ in range(2)), torch.ones(5, 13))
    protected = torch.tensor([12])
    kept = COMP().select(repeated, statistics_of(same), keep, protected)
    assert len(kept) == keep
    assert 12 in kept


def test_ties_fall_to_the_lower_index_and_order_is_kept() -> None:
    scores = torch.tensor([1.0, 3.0, 1.0, 3.0, 2.0])
    assert keep_largest(scores, 4).tolist() == [0, 1, 3, 4]
    assert keep_largest(scores, 2, torch.tensor([2])).tolist() == [1, 2]


def test_the_loudest_thousandth_is_protected() -> None:
    _, x = random_mlp(neurons=1500, tokens=3)
    x[1, 700], x[2, 3] = 1e4, -1e5
    assert sorted(loudest(statistics_of(x)).tolist()) == [3, 700]
