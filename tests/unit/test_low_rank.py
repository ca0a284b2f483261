"""Low-rank corrections: against the exact decomposition, and never a loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.core import grids, low_rank
from compress.core.contracts import Quantizer
from compress.core.errors import SchemeError
from compress.core.scheme import Scheme
from compress.core.statistics import LayerStatistics
from compress.core.tensors import QuantizedTensor
from compress.quantizers.awq import AWQ
from compress.quantizers.gptq import GPTQ
from compress.quantizers.hqq import HQQ
from compress.quantizers.rtn import RoundToNearest
from compress.quantizers.zeroquant_fp import ZeroQuantFP

ROWS, COLUMNS = 48, 64


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def coded(weight: Tensor, name: str) -> QuantizedTensor:
    """Return ``weight`` rounded without a correction."""
    scheme = Scheme.parse(name)
    groups = grids.as_groups(weight, scheme)
    parameters = grids.range_parameters(groups, scheme)
    levels = grids.encode(groups, parameters, scheme)
    return grids.assemble(levels.view(weight.shape), parameters, scheme)


def skewed_hessian(columns: int = COLUMNS) -> Tensor:
    inputs = random(512, columns, seed=1) @ random(columns, columns, seed=2)
    inputs *= torch.linspace(0.1, 3, columns)
    return 2 * inputs.T @ inputs


def loss(error: Tensor, hessian: Tensor | None) -> float:
    error = error.double()
    metric = torch.eye(error.shape[1]) if hessian is None else hessian
    return float(((error @ metric.double()) * error).sum())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_loss_is_that_of_the_exact_decomposition(rank: int, weighted: bool) -> None:
    """8 bits and iteration may cost 1 % of what the exact one leaves."""
    weight = random(ROWS, COLUMNS)
    hessian = skewed_hessian() if weighted else None
    plain = coded(weight, f"int3-g32-lorc{rank}")
    found = low_rank.correct(weight, plain, hessian=hessian)
    error = (weight - plain.dequantize()).double()
    metric = torch.eye(COLUMNS) if hessian is None else hessian
    singular = torch.linalg.svdvals(error @ torch.linalg.cholesky(metric.double()))
    left = float(singular[rank:].square().sum())
    assert left * 0.999 < loss(weight - found.dequantize(), hessian) < left * 1.01


@pytest.mark.parametrize("weighted", [False, True])
def test_full_rank_leaves_what_8_bits_leave(weighted: bool) -> None:
    weight = random(ROWS, COLUMNS)
    hessian = skewed_hessian() if weighted else None
    plain = coded(weight, f"int2-g32-lorc{ROWS}")
    found = low_rank.correct(weight, plain, hessian=hessian)
    error, rest = weight - plain.dequantize(), weight - found.dequantize()
    # Rounding to 127 steps of a column's or row's largest number moves each factor by
    # under 1 %.
    assert loss(rest, hessian) < 1e-3 * loss(error, hessian)


def test_no_rank_is_no_change() -> None:
    weight = random(ROWS, COLUMNS)
    plain = coded(weight, "int4-g32")
    assert low_rank.correct(weight, plain, hessian=skewed_hessian()) is plain


def test_weighting_helps_in_its_own_metric() -> None:
    weight, hessian = random(ROWS, COLUMNS), skewed_hessian()
    plain = coded(weight, "int3-g32-lorc4")
    found = (low_rank.correct(weight, plain, hessian=h) for h in (hessian, None))
    weighted, unweighted = (loss(weight - x.dequantize(), hessian) for x in found)
    assert weighted < unweighted


def test_a_correction_that_brings_little_is_left_out_with_a_note() -> None:
    weight = random(ROWS, COLUMNS)
    plain = coded(weight, "int4-g32-lorc1")
    kept = low_rank.correct(weight, plain, gain=0.01)
    assert kept.low_rank is not None and kept.notes == ()
    dropped = low_rank.correct(weight, plain, gain=0.9)
    assert dropped.low_rank is None
    assert "left out" in dropped.notes[0]
    assert torch.equal(dropped.dequantize(), plain.dequantize())


def test_weights_without_an_error_are_left_alone() -> None:
    weight = torch.zeros(ROWS, COLUMNS)
    found = low_rank.correct(weight, coded(weight, "int4-g32-lorc2"))
    assert found.low_rank is None and len(found.notes) == 1


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("of_hessian", [1e-8, 1.0, 1e8])
def test_the_gain_does_not_depend_on_units(scale: float, of_hessian: float) -> None:
    weight, hessian = random(ROWS, COLUMNS), skewed_hessian()

    def left(by: float, metric: Tensor) -> float:
        scheme = Scheme.parse("int3-g32-lorc4").with_scales("float32")
        groups = grids.as_groups(by * weight, scheme)
        parameters = grids.range_parameters(groups, scheme)
        levels = grids.encode(groups, parameters, scheme).view(ROWS, COLUMNS)
        plain = grids.assemble(levels, parameters, scheme)
        found = low_rank.correct(by * weight, plain, hessian=metric)
        error = by * weight - found.dequantize()
        return loss(error, metric) / loss(by * weight - plain.dequantize(), metric)

    expected = left(1.0, hessian)
    assert left(scale, hessian * of_hessian) == pytest.approx(expected, rel=0.01)


def test_a_singular_hessian_is_damped() -> None:
    inputs = random(8, COLUMNS, seed=3)  # far fewer tokens than columns
    hessian = 2 * inputs.T @ inputs
    hessian[5] = hessian[:, 5] = 0  # a channel that is never fed
    weight = random(ROWS, COLUMNS)
    plain = coded(weight, "int3-g32-lorc4")
    found = low_rank.correct(weight, plain, hessian=hessian)
    assert found.dequantize().isfinite().all()
    before = loss(weight - plain.dequantize(), hessian)
    assert loss(weight - found.dequantize(), hessian) < before


def test_a_rank_above_the_matrix_is_refused() -> None:
    weight = random(ROWS, COLUMNS)
    with pytest.raises(SchemeError, match="-lorc48 or less"):
        low_rank.correct(weight, coded(weight, "int4-g32-lorc49"))


@pytest.mark.parametrize("quantizer", [RoundToNearest, AWQ, GPTQ, HQQ, ZeroQuantFP])
@pytest.mark.parametrize("name", ["int3-g32", "fp4-g32-ratio", "int3-g32-offset"])
def test_every_method_gains_by_it(quantizer: type[Quantizer], name: str) -> None:
    """In the metric that the method works in; codes and scales stay the same."""
    weight, method = random(ROWS, COLUMNS), quantizer()
    if not method.supports(Scheme.parse(name)):
        pytest.skip(f"{method.name} does not do {name}")
    statistics, hessian = None, None
    if method.needs_statistics:
        hessian = skewed_hessian()
        statistics = LayerStatistics(hessian, 512)
    plain = method.quantize(weight, Scheme.parse(name), statistics)
    found = method.quantize(weight, Scheme.parse(f"{name}-lorc8"), statistics)
    assert torch.equal(found.codes, plain.codes)
    assert found.low_rank is not None
    before, after = (loss(weight - x.dequantize(), hessian) for x in (plain, found))
    assert after < 0.99 * before


def test_split_parts_keep_the_correction() -> None:
    weight = random(ROWS, COLUMNS)
    whole = low_rank.correct(weight, coded(weight, "int3-g32-lorc4"))
    joined = torch.cat([part.dequantize() for part in whole.split_rows([16, 32])])
    torch.testing.assert_close(joined, whole.dequantize(), rtol=1e-6, atol=1e-6)


def test_a_state_gives_the_matrix_back() -> None:
    weight = random(ROWS, COLUMNS)
    whole = low_rank.correct(weight, coded(weight, "fp4-g32-ratio-lorc4"))
    again = QuantizedTensor.from_state(whole.state(), whole.scheme)
    assert torch.equal(again.dequantize(), whole.dequantize())
