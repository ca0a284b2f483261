"""The reference of W6A8 layers is the formula, for every shape and kind of scales."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.core.errors import SchemeError
from compress.runtime.w6a8.reference import linear, quantize_activations, run_sums

SHAPES = [(1, 1, 32), (2, 8, 96), (3, 15, 128), (7, 17, 160), (9, 16, 384)]


def codes(*shape: int, low: int, high: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, generator=generator).to(torch.int8)


def scales(*shape: int, seed: int = 5) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) + 0.5


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("run", [32, 128])
def test_sums_of_runs_are_those_of_int64(m: int, n: int, k: int, run: int) -> None:
    qa, qw = codes(m, k, low=-127, high=127), codes(n, k, low=-32, high=31)
    found = run_sums(qa, qw, run)
    assert found.dtype == torch.int32
    for i, start in enumerate(range(0, k, run)):
        part = slice(start, start + run)
        expected = qa[:, part].long() @ qw[:, part].long().t()
        assert torch.equal(found[:, i].long(), expected)


@pytest.mark.parametrize("weight", [-32, 31])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_are_exact_over_any_width(weight: int, sign: int) -> None:
    k = 14336  # far beyond what float32 sums exactly
    qa = torch.full((1, k), 127 * sign, dtype=torch.int8)
    qw = torch.full((1, k), weight, dtype=torch.int8)
    assert run_sums(qa, qw, k).item() == k * 127 * sign * weight
    one = torch.ones(1, 1)
    y = linear((qa, one), (qw, one), None, dtype=torch.float32)
    assert y.item() == float(torch.tensor(k * 127 * sign * weight, dtype=torch.float32))


@pytest.mark.parametrize("of_inputs", [None, 32, 64])
@pytest.mark.parametrize("of_weights", [None, 32, 64])
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_result_is_the_ascending_float32_sum(
    of_inputs: int | None, of_weights: int | None, has_bias: bool
) -> None:
    m, n, k = 3, 5, 128
    ga, gw = of_inputs or k, of_weights or k
    qa, qw = codes(m, k, low=-127, high=127), codes(n, k, low=-32, high=31)
    sa, sw = scales(m, k // ga), scales(n, k // gw, seed=6).half()
    bias = scales(n, seed=7) if has_bias else None
    found = linear((qa, sa), (qw, sw), bias, dtype=torch.float32)
    run = min(ga, gw)
    for i in range(m):
        for j in range(n):
            total = torch.zeros(())
            for start in range(0, k, run):
                part = slice(start, start + run)
                acc = int(qa[i, part].long() @ qw[j, part].long())
                total += acc * sa[i, start // ga] * sw[j, start // gw].float()
            if bias is not None:
                total += bias[j]
            assert found[i, j] == total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_sum_is_rounded_once(dtype: torch.dtype) -> None:
    qa, qw = codes(2, 64, low=-127, high=127), codes(3, 64, low=-32, high=31)
    given = (qa, scales(2, 1) * 1e-3), (qw, scales(3, 1))
    exact = linear(*given, None, dtype=torch.float32)
    assert torch.equal(linear(*given, None, dtype=dtype), exact.to(dtype))


def test_no_tokens_give_no_rows() -> None:
    qa, sa = quantize_activations(torch.zeros(2, 0, 64), None)
    assert qa.shape == (0, 64)
    qw = codes(3, 64, low=-32, high=31)
    y = linear((qa, sa), (qw, scales(3, 1)), None, dtype=torch.float32)
    assert y.shape == (0, 3)


@pytest.mark.parametrize("group", [None, 32])
def test_leading_dimensions_become_rows(group: int | None) -> None:
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    qa, sa = quantize_activations(x, group)
    flat = quantize_activations(x.reshape(6, 64), group)
    assert qa.dtype == torch.int8
    assert sa.shape == (6, 1 if group is None else 2)
    assert torch.equal(qa, flat[0]) and torch.equal(sa, flat[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("group", [None, 32])
def test_a_bad_input_makes_its_row_nan_and_no_other(
    bad: float, group: int | None
) -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    x[1, 40] = bad
    qw = codes(4, 64, low=-32, high=31)
    qw[0] = 0  # NaN even where all codes are zero
    y = linear(quantize_activations(x, group), (qw, scales(4, 1)), None, dtype=x.dtype)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


def test_rows_of_zeros_and_outliers_are_ordinary() -> None:
    x = torch.zeros(2, 64)
    x[1, 5] = 1e30
    qw = codes(4, 64, low=-32, high=31)
    y = linear(quantize_activations(x, None), (qw, scales(4, 1)), None, dtype=x.dtype)
    assert torch.equal(y[0], torch.zeros(4))
    assert y[1].isfinite().all()


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(SchemeError, match="do not divide"):
        quantize_activations(torch.zeros(1, 96), 64)
