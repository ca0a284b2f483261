"""Second moments of inputs, summed batch by batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.calibration.collect import Moments
from compress.core.errors import CalibrationError


def inputs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("columns", [1, 3, 4, 63, 64, 130])
def test_the_hessian_is_twice_the_second_moment(columns: int) -> None:
    x = inputs(2, 25, columns)
    moments = Moments()
    moments.add(x)
    found = moments.statistics("layer").hessian
    flat = x.reshape(-1, columns).double()
    assert torch.allclose(found, (2 * flat.T @ flat).float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(found, found.T)


def test_statistics_run_over_all_batches() -> None:
    x, dense = inputs(3, 7, 16), inputs(3, 7, 16, seed=1)
    moments = Moments()
    for window, other in zip(x.split(2), dense.split(2), strict=True):
        moments.add(window, other)
    found = moments.statistics("layer")
    rows, others = x.reshape(-1, 16), dense.reshape(-1, 16)
    drift = sum(2 * torch.outer(y - v, v) for v, y in zip(rows, others, strict=True))
    assert (found.tokens, found.columns) == (21, 16)
    assert torch.allclose(found.hessian, 2 * rows.T @ rows, atol=1e-4)
    assert found.drift is not None
    assert torch.allclose(found.drift, torch.as_tensor(drift), atol=1e-4)


def test_sums_of_bfloat16_inputs_are_kept_in_float32() -> None:
    # Sixteen products, each rounded to 8 bits: an element is off by at most 2^-9.
    x = inputs(16, 4096, 24).bfloat16()
    dense = (x.float() + 0.05 * inputs(16, 4096, 24, seed=1)).bfloat16()
    moments = Moments()
    moments.add(x, dense)
    found = moments.statistics("layer")
    exact = x.reshape(-1, 24).double()
    moved = (dense - x).reshape(-1, 24).double()
    assert found.hessian.dtype is torch.float32
    diagonal = (2 * exact.T @ exact).diagonal()
    assert torch.allclose(found.hessian.diagonal().double(), diagonal, rtol=2**-9)
    assert relative(found.hessian, 2 * exact.T @ exact) < 2**-9
    assert found.drift is not None
    assert relative(found.drift, 2 * moved.T @ exact) < 2**-7


def test_without_the_dense_model_there_is_no_drift() -> None:
    moments = Moments()
    moments.add(inputs(2, 3, 4))
    assert moments.statistics("layer").drift is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["inputs", "dense"])
def test_inputs_that_are_not_finite_are_refused(
    value: float, dtype: torch.dtype, where: str
) -> None:
    both = {"inputs": inputs(2, 3, 4).to(dtype), "dense": inputs(2, 3, 4).to(dtype)}
    both[where][1, 2, 3] = value
    moments = Moments()
    moments.add(both["inputs"], both["dense"])
    with pytest.raises(CalibrationError, match=r"inputs of model\.x are NaN or inf"):
        moments.statistics("model.x")
