"""HQQ against the published loop, plain rounding, and cases without a range."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.core.scheme import Scheme
from compress.core.tensors import QuantizedTensor
from compress.quantizers import hqq
from compress.quantizers.hqq import HQQ, HQQOptions
from compress.quantizers.rtn import RoundToNearest, RoundToNearestOptions

SCHEMES = [f"int{b}-g64-{z}" for b in (2, 3, 4) for z in ("offset", "asym")]


def heavy_tailed(size: float = 0.05) -> Tensor:
    """Return weights of a t distribution, 5 degrees of freedom, groups off centre."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(6, 64, 256, generator=generator)
    weight = normal[0] / normal[1:].square().mean(0).sqrt()
    return size * (weight + torch.randn(64, 4, generator=generator).repeat(1, 64))


def error(weight: Tensor, found: QuantizedTensor) -> float:
    return float((found.dequantize() - weight).double().square().sum())


def published(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """The package's default solver: one start, a fixed scale, one early stop for all.

    Scale and zero point are as in the package (an inverse scale, a zero point in codes)
    and rounded to float16 at the end, as they are stored.
    """
    values, most = weight.double().view(-1, group_size), 2**bits - 1
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    inverse = most / (high - low)
    zero, beta, best = -low * inverse, 10.0, float("inf")
    for _ in range(20):
        codes = (values * inverse + zero).round().clamp(0, most)
        gap = values - (codes - zero) / inverse
        shrunk = (gap.abs() - gap.abs().pow(0.7 - 1) / beta).clamp(min=0) * gap.sign()
        zero = (codes - (values - shrunk) * inverse).mean(1, keepdim=True)
        beta *= 1.01
        if float(gap.abs().mean()) >= best:
            break
        best = float(gap.abs().mean())
    codes = (values * inverse + zero).round().clamp(0, most)
    scale = (1 / inverse).half().double()
    return ((codes - zero.half().double()) * scale).view_as(weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_error_is_less_than_that_of_the_published_loop(bits: int) -> None:
    weight = heavy_tailed()
    found = HQQ().quantize(weight, Scheme.parse(f"int{bits}-g64-offset"), None)
    reference = published(weight, bits, 64)
    theirs = float((reference - weight.double()).square().sum())
    assert error(weight, found) < theirs


@pytest.mark.parametrize("name", SCHEMES)
def test_error_is_at_most_that_of_searched_rounding(name: str) -> None:
    weight, scheme = heavy_tailed(), Scheme.parse(name)
    searched = RoundToNearest(RoundToNearestOptions(search=True))
    rounded = searched.quantize(weight, scheme, None)
    found, base = HQQ().quantize(weight, scheme, None), error(weight, rounded)
    assert error(weight, found) <= base


@pytest.mark.parametrize("bits", [3, 4])
def test_errors_of_a_group_have_nearly_no_mean(bits: int) -> None:
    """A mean is what inputs with means would multiply."""
    weight, scheme = heavy_tailed(), Scheme.parse(f"int{bits}-g64-offset")

    def mean_share(found: QuantizedTensor) -> float:
        gap = (found.dequantize() - weight).view(64, 4, 64)
        return float((64 * gap.mean(-1).square()).sum() / gap.square().sum())

    # Errors without structure have a share of 1/64 = .016.
    assert mean_share(HQQ().quantize(weight, scheme, None)) < 0.01


def test_more_rounds_are_never_worse() -> None:
    weight, scheme = heavy_tailed(), Scheme.parse("int3-g64-offset")
    errors = [
        error(weight, HQQ(HQQOptions(rounds=n)).quantize(weight, scheme, None))
        for n in (1, 5, 20)
    ]
    assert errors == sorted(errors, reverse=True)


def test_large_errors_are_shrunk_as_the_formula_says() -> None:
    values = torch.tensor([-0.9, -0.1, 0.0, 0.05, 0.3, 2.0])
    expected = [
        (abs(x) - abs(x) ** (0.7 - 1) / 10) * (1 if x > 0 else -1)
        if x and abs(x) > abs(x) ** (0.7 - 1) / 10
        else 0
        for x in values.tolist()
    ]
    found = hqq._shrink(values, 0.7, 10.0)
    assert found.tolist() == pytest.approx(expected, rel=1e-6)
    assert not hqq._shrink(values[1:4], 0.7, 10.0).any()


@pytest.mark.parametrize("name", ["int4-g64-offset", "int4-g64-asym"])
@pytest.mark.parametrize("value", [0.0, 0.3, -2.0])
def test_groups_of_one_value_are_kept(name: str, value: float) -> None:
    weight = heavy_tailed()
    weight[:, :64] = value
    found = HQQ().quantize(weight, Scheme.parse(name), None).dequantize()
    assert found.isfinite().all()
    # float16 parameters: a relative step of 2^-11, and the codes' own rounding.
    assert (found[:, :64] - value).abs().max() <= abs(value) * 2**-10


def test_symmetric_grids_are_refused() -> None:
    assert not HQQ().supports(Scheme.parse("int4-g64"))
    assert not HQQ().supports(Scheme.parse("nvfp4"))
    assert HQQ().supports(Scheme.parse("int4-g64-asym"))
