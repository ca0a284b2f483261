"""Statistics of inputs, and when they are handed over."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.calibration.collect import first_arrivals, gram, measure
from compress.core.errors import CalibrationError
from compress.core.families import family_of


def inputs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("columns", [1, 3, 4, 63, 64, 130])
def test_gram_is_twice_the_second_moment(columns: int) -> None:
    x = inputs(50, columns)
    exact = (2 * x.double().T @ x.double()).float()
    found = gram(x)
    assert torch.allclose(found, exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(found, found.T)


def test_statistics_run_over_all_windows() -> None:
    x, dense = inputs(3, 7, 16), inputs(3, 7, 16, seed=1)
    found = measure(x, dense, "layer")
    rows, others = x.reshape(-1, 16), dense.reshape(-1, 16)
    drift = sum(2 * torch.outer(y - v, v) for v, y in zip(rows, others, strict=True))
    assert (found.tokens, found.columns) == (21, 16)
    assert torch.allclose(found.hessian, 2 * rows.T @ rows, atol=1e-4)
    assert found.drift is not None
    assert torch.allclose(found.drift, torch.as_tensor(drift), atol=1e-4)


def test_without_the_dense_model_there_is_no_drift() -> None:
    assert measure(inputs(2, 3, 4), None, "layer").drift is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_refused(value: float) -> None:
    x = inputs(2, 3, 4)
    x[1, 2, 3] = value
    with pytest.raises(CalibrationError, match=r"inputs of model\.x are NaN or inf"):
        measure(x, None, "model.x")


def test_layers_that_share_an_input_are_told_once() -> None:
    linears = family_of("llama").linears
    seen: list[tuple[str, int]] = []
    hooks = first_arrivals(linears, lambda name, x: seen.append((name, int(x))))
    for number, linear in enumerate(linears):
        hooks[linear.path](torch.tensor(number))
    assert seen == [
        ("attention", 0),
        ("attention_output", 3),
        ("mlp", 4),
        ("mlp_output", 6),
    ]
