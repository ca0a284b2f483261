"""What stays takes over what goes, against regressions on the activations."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning_fixtures import random_mlp, statistics_of
from torch import Tensor

from compress.core.compensation import (
    Downdate,
    complement,
    factor,
    least_squares,
    scaled_columns,
    with_ridge,
)
from compress.core.neurons import GatedMLP
from compress.pruning.repair import repaired

TINY = 1e-9
KEPT = torch.tensor([0, 2, 3, 5, 7, 8, 11])


def error_on(
    x: Tensor, mlp: GatedMLP, kept: Tensor, down: Tensor, bias: Tensor
) -> float:
    """Return the mean squared error of the output, relative, from the activations."""
    y = x.double() @ mlp.down.double().T
    ours = x[:, kept].double() @ down.double().T + bias.double()
    return float((y - ours).square().sum() / y.square().sum())


def test_least_squares_is_the_regression_on_what_stays() -> None:
    mlp, x = random_mlp(neurons=12)
    y = x.double() @ mlp.down.double().T
    expected = torch.linalg.lstsq(x[:, KEPT].double(), y).solution.T.float()
    found = least_squares(mlp.down, statistics_of(x).gram, KEPT, TINY)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_scales_are_the_best_scales() -> None:
    mlp, x = random_mlp(neurons=12)
    y = (x.double() @ mlp.down.double().T).flatten()
    columns = [(x[:, j, None] * mlp.down[:, j]).double().flatten() for j in KEPT]
    best = torch.linalg.lstsq(torch.stack(columns, 1), y[:, None]).solution[:, 0]
    found = scaled_columns(mlp.down, statistics_of(x).gram, KEPT, TINY)
    wanted = (mlp.down[:, KEPT] * best).float()
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_scales_that_are_beyond_belief_are_not_taken() -> None:
    x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    x[:, 1] = 50 * x[:, 0]
    mlp = GatedMLP(torch.ones(2, 3), torch.ones(2, 3), torch.ones(3, 2))
    kept = torch.tensor([0])  # would have to be 51 times as loud
    found = scaled_columns(mlp.down, statistics_of(x).gram, kept, TINY)
    assert torch.equal(found, mlp.down[:, :1])


@given(seed=st.integers(0, 1000), count=st.integers(1, 11))
@settings(max_examples=25)
def test_least_squares_beats_scales_and_scales_beat_nothing(
    seed: int, count: int
) -> None:
    mlp, x = random_mlp(neurons=12, seed=seed)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    kept, found = order[:count].sort().values, statistics_of(x)
    errors = [
        repaired(mlp, found, kept, kind).error
        for kind in ("least_squares", "mask", "none")
    ]
    assert errors == sorted(errors)  # ridges of 1e-4 cost less than the difference


@pytest.mark.parametrize("kind", ["least_squares", "mask", "bias", "none"])
def test_reported_errors_are_those_of_the_activations(kind: str) -> None:
    mlp, x = random_mlp(neurons=12)
    made = repaired(mlp, statistics_of(x), KEPT, kind)
    bias = torch.zeros(12) if made.bias is None else made.bias
    assert made.error == pytest.approx(
        error_on(x, mlp, KEPT, made.down, bias), rel=1e-3
    )


def test_the_bias_is_what_went_on_average() -> None:
    mlp, x = random_mlp(neurons=12)
    made = repaired(mlp, statistics_of(x), KEPT, "bias")
    gone = complement(KEPT, 12)
    expected = (x[:, gone] @ mlp.down[:, gone].T).mean(0)
    assert made.bias is not None
    torch.testing.assert_close(made.bias, expected)
    assert torch.equal(made.down, mlp.down[:, KEPT])


@pytest.mark.parametrize("kind", ["least_squares", "mask", "bias", "none"])
def test_where_nothing_goes_nothing_changes(kind: str) -> None:
    mlp, x = random_mlp(neurons=12)
    made = repaired(mlp, statistics_of(x), torch.arange(12), kind)
    assert torch.equal(made.down, mlp.down)
    assert (made.bias, made.error) == (None, 0.0)


def test_downdates_are_least_squares_step_by_step() -> None:
    mlp, x = random_mlp(neurons=12)
    gram = statistics_of(x).gram
    left = Downdate(mlp.down, gram, TINY)
    for chunk in ([1, 4], [0, 7], [3]):
        left.remove(torch.tensor(chunk))
    assert left.alive.tolist() == [2, 3, 5, 7, 8, 10, 11]
    expected = least_squares(mlp.down, gram, left.alive, TINY)
    torch.testing.assert_close(left.weight.float(), expected, rtol=1e-4, atol=1e-5)
    inverse = torch.linalg.inv(with_ridge(gram, TINY)[left.alive][:, left.alive])
    torch.testing.assert_close(left.inverse, inverse, rtol=1e-4, atol=1e-5)


def test_rounded_moments_of_massive_activations_are_solved_all_the_same() -> None:
    """Two neurons that are huge at one token: in bfloat16 no moments of anything."""
    mlp, x = random_mlp(neurons=12)
    x[0, 3:5] = torch.tensor([3e3, -7.1e3])
    gram = statistics_of(x).gram
    gram[3, 4] = gram[4, 3] = gram[3, 4] * (1 + 2**-8)  # a unit in the last place
    _, failed = torch.linalg.cholesky_ex(with_ridge(gram))
    assert bool(failed), "this case is too easy"
    damped, lower = factor(gram)
    torch.testing.assert_close(lower @ lower.T, damped)
    assert least_squares(mlp.down, gram, torch.arange(6)).isfinite().all()
    assert Downdate(mlp.down, gram).inverse.isfinite().all()


def test_a_block_that_never_speaks_is_solved_too() -> None:
    mlp, x = random_mlp(neurons=12)
    silent = statistics_of(0 * x).gram
    assert torch.equal(least_squares(mlp.down, silent, KEPT), mlp.down[:, KEPT])
    assert torch.equal(scaled_columns(mlp.down, silent, KEPT), mlp.down[:, KEPT])
