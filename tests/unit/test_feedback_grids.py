"""Error feedback on every grid and kind of scale, against a slow textbook loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.core import feedback, grids
from compress.core.grids import GridParameters
from compress.core.scheme import Scheme, Zero
from compress.core.statistics import LayerStatistics
from compress.core.tensors import QuantizedTensor
from compress.quantizers.gptq import GPTQ, GPTQOptions
from compress.quantizers.rtn import RoundToNearest, RoundToNearestOptions
from compress.quantizers.zeroquant_fp import ZeroQuantFP, ZeroQuantFPOptions

SCHEMES = (
    *("int3-g16", "int4-g16-asym", "int4-g16-offset", "int8"),
    *("fp4-g16", "fp4-g16-pow2", "fp4-g16-ratio", "e3m0-g16", "e3m0-g16-ratio"),
    *("fp6-g16", "e3m2-g16", "fp8", "e5m2-g16", "fp8-tensor", "fp8-b16"),
    *("nvfp4", "mxfp4", "mxfp6", "mxfp8"),
)
PLAIN = {"shrink": 0.0, "drift": 0.0}


def random_weight(rows: int, columns: int) -> Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return weight * torch.linspace(0.2, 2, columns)  # groups differ


def correlated_inputs(count: int, columns: int) -> Tensor:
    """Return AR(1) inputs ``[count, columns]``: neighbours correlate by 0.9."""
    noise = torch.randn(count, columns, generator=torch.Generator().manual_seed(1))
    inputs = noise.clone()
    for i in range(1, columns):
        inputs[:, i] = 0.9 * inputs[:, i - 1] + (1 - 0.81) ** 0.5 * noise[:, i]
    return inputs * torch.linspace(2, 0.5, columns)


def all_levels(scheme: Scheme) -> Tensor:
    """Return every number of the grid, as float64."""
    if scheme.is_integer:
        return torch.arange(scheme.lowest, scheme.highest + 1).double()
    grid = scheme.levels
    codes = torch.arange(1 << scheme.bits, dtype=torch.int16).to(torch.uint8)
    levels = grid.to_levels(codes).double()
    return levels[levels.abs() <= grid.highest].unique()


def textbook_levels(
    weight: Tensor, hessian: Tensor, parameters: GridParameters, scheme: Scheme
) -> Tensor:
    """Optimal brain quantization left to right, with the inverse written out.

    After each column the inverse Hessian loses that row and column by Gaussian
    elimination (Frantar et al. 2022, equation 3); the nearest value is looked for among
    all of them. Everything in float64.
    """
    rows, columns = weight.shape
    each = columns // parameters.scale.shape[1]
    work, inverse = weight.double().clone(), torch.linalg.inv(hessian.double())
    numbers, found = all_levels(scheme), torch.empty(rows, columns)
    for i in range(columns):
        scale = parameters.scale[:, i // each].double()[:, None]
        values = numbers * scale
        if scheme.zero is not Zero.NONE:
            assert parameters.zero is not None
            zero = parameters.zero[:, i // each].double()[:, None]
            integer = scheme.zero is Zero.INTEGER
            values = (numbers - zero) * scale if integer else values + zero
        nearest = (values - work[:, i, None]).abs().argmin(1)
        found[:, i] = numbers[nearest].float()
        rounded = values.gather(1, nearest[:, None])[:, 0]
        error = (work[:, i] - rounded) / inverse[i, i]
        work -= torch.outer(error, inverse[i])
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        inverse[:, i] = inverse[i] = 0
        inverse[i, i] = 1  # it is done; only keeps the diagonal usable
    return found


@pytest.mark.parametrize("name", SCHEMES)
def test_the_loop_is_optimal_brain_quantization(name: str) -> None:
    scheme = Scheme.parse(name)
    columns = max(32, scheme.group_size or 0)
    weight, inputs = random_weight(16, columns), correlated_inputs(256, columns)
    hessian = 2 * inputs.T @ inputs
    parameters = grids.search_parameters(grids.as_groups(weight, scheme), scheme)
    order = torch.arange(columns)
    factor = feedback.inverse_factor(hessian, order)
    assert factor is not None
    matrix = feedback.Matrix(weight, hessian, parameters, order, factor)
    (found,) = feedback.solve([matrix], scheme)
    expected = textbook_levels(weight, hessian, parameters, scheme)
    if scheme.bits == 8:  # steps so fine that float32 sums tip some weights
        assert float((found == expected).float().mean()) > 0.99
    else:
        assert torch.equal(found, expected)


def solved(
    weight: Tensor, name: str, hessian: Tensor, **options: bool
) -> QuantizedTensor:
    statistics = LayerStatistics(hessian, 512)
    quantizer = GPTQ(GPTQOptions(**PLAIN, **options))
    return quantizer.quantize(weight, Scheme.parse(name), statistics)


def rounded(weight: Tensor, name: str, *, search: bool) -> QuantizedTensor:
    quantizer = RoundToNearest(RoundToNearestOptions(search=search))
    return quantizer.quantize(weight, Scheme.parse(name), None)


def assert_same(left: QuantizedTensor, right: QuantizedTensor) -> None:
    for key, tensor in left.state().items():
        # torch compares no float8 numbers
        assert torch.equal(tensor.float(), right.state()[key].float()), key


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("name", SCHEMES)
def test_an_identity_hessian_gives_rounding(name: str, search: bool) -> None:
    weight = random_weight(48, 64)
    found = solved(weight, name, torch.eye(64), search=search)
    assert_same(found, rounded(weight, name, search=search))


@pytest.mark.parametrize("name", SCHEMES)
def test_a_diagonal_hessian_with_act_order_gives_rounding(name: str) -> None:
    weight = random_weight(48, 64)
    diagonal = torch.rand(64, generator=torch.Generator().manual_seed(5)) + 0.1
    found = solved(weight, name, torch.diag(diagonal), act_order=True, search=False)
    assert_same(found, rounded(weight, name, search=False))


def objective(weight: Tensor, result: QuantizedTensor, hessian: Tensor) -> float:
    error = (weight - result.dequantize()).double()
    return float(((error @ hessian.double()) * error).sum())


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", SCHEMES)
def test_error_feedback_beats_rounding_on_correlated_inputs(
    name: str, act_order: bool
) -> None:
    weight, inputs = random_weight(48, 64), correlated_inputs(512, 64)
    hessian = 2 * inputs.T @ inputs
    found = solved(weight, name, hessian, search=False, act_order=act_order)
    base = rounded(weight, name, search=False)
    assert torch.equal(found.scales(), base.scales())
    assert objective(weight, found, hessian) < 0.8 * objective(weight, base, hessian)


@pytest.mark.parametrize("rounding", ["mse", "nearest", "ceil", "floor"])
@pytest.mark.parametrize("name", ["fp4-g16-pow2", "fp4-g16-ratio"])
def test_zeroquant_fp_beats_rounding_with_the_same_scales(
    name: str, rounding: str
) -> None:
    weight, inputs = random_weight(48, 64), correlated_inputs(512, 64)
    statistics = LayerStatistics(2 * inputs.T @ inputs, 512)
    options = ZeroQuantFPOptions.model_validate({**PLAIN, "scale_rounding": rounding})
    scheme = Scheme.parse(name)
    found = ZeroQuantFP(options).quantize(weight, scheme, statistics)
    groups = grids.as_groups(weight, scheme)
    parameters = GridParameters(found.scales())
    plain = grids.decode_groups(
        grids.encode(groups, parameters, scheme), parameters, scheme
    )
    error = plain.view_as(weight) - weight
    rounding_loss = float(((error @ statistics.hessian) * error).sum())
    assert objective(weight, found, statistics.hessian) < 0.8 * rounding_loss


@pytest.mark.parametrize("name", ["fp4-g16-pow2", "fp4-g16-ratio"])
def test_exponents_chosen_by_error_are_the_best_with_feedback_too(name: str) -> None:
    weight, inputs = random_weight(48, 64), correlated_inputs(512, 64)
    statistics = LayerStatistics(2 * inputs.T @ inputs, 512)
    losses = {}
    for rounding in ("mse", "nearest", "ceil", "floor"):
        options = ZeroQuantFPOptions.model_validate(
            {**PLAIN, "scale_rounding": rounding}
        )
        found = ZeroQuantFP(options).quantize(weight, Scheme.parse(name), statistics)
        losses[rounding] = objective(weight, found, statistics.hessian)
    assert min(losses, key=losses.__getitem__) == "mse", losses


def test_the_papers_ceil_is_what_it_says() -> None:
    weight = random_weight(48, 64)
    statistics = LayerStatistics(torch.eye(64), 64)
    quantizer = ZeroQuantFP(ZeroQuantFPOptions(scale_rounding="ceil"))
    wanted = weight.view(48, 4, 16).abs().amax(-1).double() / 6
    powers = quantizer.quantize(weight, Scheme.parse("fp4-g16-pow2"), statistics)
    assert torch.equal(powers.scales().double(), 2 ** wanted.log2().ceil())
    ratios = quantizer.quantize(
        weight, Scheme.parse("fp4-g16-ratio").with_scales("float32"), statistics
    )
    most = wanted.amax(1, keepdim=True)
    expected = most / 2 ** (most / wanted).log2().ceil()
    torch.testing.assert_close(ratios.scales().double(), expected, rtol=1e-6, atol=0)
