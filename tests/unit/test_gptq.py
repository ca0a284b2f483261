"""GPTQ against rounding, a slow textbook loop, and its own objective."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from compress.core import feedback, grids, refit
from compress.core.scheme import Scheme
from compress.core.statistics import LayerStatistics
from compress.core.tensors import QuantizedTensor
from compress.quantizers.gptq import GPTQ, GPTQOptions
from compress.quantizers.rtn import RoundToNearest, RoundToNearestOptions

PLAIN: dict[str, Any] = {"shrink": 0.0, "drift": 0.0, "refit": 0}
GRIDS = ["int2-g32", "int3", "int4-g64", "int4-g32-asym", "int4-g32-offset", "int8"]


def random_weight(rows: int = 24, columns: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def correlated_inputs(count: int, columns: int, seed: int = 1) -> Tensor:
    """Return AR(1) inputs ``[count, columns]``: neighbours correlate by 0.9."""
    noise = torch.randn(count, columns, generator=torch.Generator().manual_seed(seed))
    inputs = noise.clone()
    for i in range(1, columns):
        inputs[:, i] = 0.9 * inputs[:, i - 1] + (1 - 0.81) ** 0.5 * noise[:, i]
    return inputs * torch.linspace(0.5, 2, columns)


def statistics_of(inputs: Tensor, dense: Tensor | None = None) -> LayerStatistics:
    drift = None if dense is None else 2 * (dense - inputs).T @ inputs
    return LayerStatistics(2 * inputs.T @ inputs, len(inputs), drift)


def solved(
    weight: Tensor, scheme: str, statistics: LayerStatistics, **options: Any
) -> QuantizedTensor:
    quantizer = GPTQ(GPTQOptions(**options))
    return quantizer.quantize(weight, Scheme.parse(scheme), statistics)


def rounded(weight: Tensor, scheme: str, *, search: bool = False) -> QuantizedTensor:
    quantizer = RoundToNearest(RoundToNearestOptions(search=search))
    return quantizer.quantize(weight, Scheme.parse(scheme), None)


def matrix_of(
    weight: Tensor, hessian: Tensor, parameters: grids.GridParameters, order: Tensor
) -> feedback.Matrix:
    factor = feedback.inverse_factor(hessian, order)
    assert factor is not None
    return feedback.Matrix(weight, hessian, parameters, order, factor)


def solve(
    weight: Tensor,
    hessian: Tensor,
    parameters: grids.GridParameters,
    grid: Scheme,
    *,
    order: Tensor,
) -> Tensor:
    return feedback.solve([matrix_of(weight, hessian, parameters, order)], grid)[0]


def objective(weight: Tensor, result: QuantizedTensor, hessian: Tensor) -> float:
    error = (weight - result.dequantize()).double()
    return float(((error @ hessian.double()) * error).sum())


def same(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    return torch.equal(a.codes, b.codes) and torch.equal(a.scale, b.scale)


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("scheme", GRIDS)
def test_an_identity_hessian_gives_rounding(scheme: str, search: bool) -> None:
    weight = random_weight()
    identity = LayerStatistics(torch.eye(64), 64)
    found = solved(weight, scheme, identity, search=search, **PLAIN)
    assert same(found, rounded(weight, scheme, search=search))
    assert found.notes == ()


def test_a_diagonal_hessian_with_act_order_gives_rounding() -> None:
    weight = random_weight()
    diagonal = torch.rand(64, generator=torch.Generator().manual_seed(5)) + 0.1
    statistics = LayerStatistics(torch.diag(diagonal), 64)
    found = solved(
        weight, "int4-g32", statistics, act_order=True, search=False, **PLAIN
    )
    assert same(found, rounded(weight, "int4-g32"))


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("scheme", GRIDS)
def test_error_feedback_beats_rounding_on_correlated_inputs(
    scheme: str, act_order: bool
) -> None:
    weight, statistics = random_weight(), statistics_of(correlated_inputs(512, 64))
    options = {**PLAIN, "search": False, "act_order": act_order}
    found = solved(weight, scheme, statistics, **options)
    base = rounded(weight, scheme)
    assert torch.equal(found.scale, base.scale)
    hessian = statistics.hessian
    assert objective(weight, found, hessian) < 0.9 * objective(weight, base, hessian)


@pytest.mark.parametrize("scheme", GRIDS)
def test_defaults_beat_rounding_on_correlated_inputs(scheme: str) -> None:
    weight, statistics = random_weight(), statistics_of(correlated_inputs(512, 64))
    hessian = statistics.hessian
    found = solved(weight, scheme, statistics)
    base = rounded(weight, scheme)
    assert objective(weight, found, hessian) < 0.9 * objective(weight, base, hessian)


def textbook_codes(weight: Tensor, hessian: Tensor, scheme: Scheme) -> Tensor:
    """Optimal brain quantization left to right, with the inverse written out.

    After each column the inverse Hessian loses that row and column by Gaussian
    elimination (Frantar et al. 2022, equation 3), all in float64.
    """
    rows, columns = weight.shape
    parameters = grids.range_parameters(grids.as_groups(weight, scheme), scheme)
    scale = parameters.scale.double().expand(rows, columns)  # one for each row
    work, inverse = weight.double().clone(), torch.linalg.inv(hessian.double())
    codes = torch.empty(rows, columns, dtype=torch.float64)
    for i in range(columns):
        code = (work[:, i] / scale[:, i]).round().clamp(scheme.lowest, scheme.highest)
        error = (work[:, i] - code * scale[:, i]) / inverse[i, i]
        codes[:, i] = code
        work -= torch.outer(error, inverse[i])
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return codes


@pytest.mark.parametrize("scheme", ["int3", "int4", "int8"])
def test_the_loop_is_optimal_brain_quantization(scheme: str) -> None:
    weight, inputs = random_weight(columns=16), correlated_inputs(256, 16)
    hessian = 2 * inputs.T @ inputs
    grid = Scheme.parse(scheme).with_scales("float32")
    parameters = grids.range_parameters(grids.as_groups(weight, grid), grid)
    order = torch.arange(16)
    found = solve(weight, hessian, parameters, grid, order=order)
    assert torch.equal(found.double(), textbook_codes(weight, hessian, grid))


@pytest.mark.parametrize("columns_at_once", [7, 32, 96])
def test_the_loop_does_not_depend_on_its_blocks(
    columns_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, inputs = random_weight(columns=96), correlated_inputs(512, 96)
    hessian, grid = 2 * inputs.T @ inputs, Scheme.parse("int4-g32")
    parameters = grids.range_parameters(grids.as_groups(weight, grid), grid)
    order = torch.argsort(hessian.diagonal(), descending=True)
    whole = solve(weight, hessian, parameters, grid, order=order)
    monkeypatch.setattr(feedback, "_AT_ONCE", columns_at_once)
    parts = solve(weight, hessian, parameters, grid, order=order)
    # Sums in another order can tip a weight that lies between two codes.
    assert float((whole != parts).float().mean()) < 0.005


def test_order_of_columns_is_undone() -> None:
    weight, inputs = random_weight(columns=32), correlated_inputs(256, 32)
    grid = Scheme.parse("int4").with_scales("float32")
    parameters = grids.range_parameters(grids.as_groups(weight, grid), grid)
    hessian = 2 * inputs.T @ inputs
    order = torch.randperm(32, generator=torch.Generator().manual_seed(7))
    found = solve(weight, hessian, parameters, grid, order=order)
    moved = solve(
        weight[:, order].contiguous(),
        hessian[order][:, order],
        parameters,
        grid,
        order=torch.arange(32),
    )
    assert torch.equal(found[:, order], moved)


def test_columns_that_are_never_fed_become_zero() -> None:
    weight, inputs = random_weight(), correlated_inputs(512, 64)
    dead = [3, 17, 40]
    inputs[:, dead] = 0
    found = solved(weight, "int4-g32", statistics_of(inputs))
    assert float(found.dequantize()[:, dead].abs().max()) == 0
    assert found.notes == ()


def test_a_layer_that_is_never_fed_is_quantized() -> None:
    statistics = LayerStatistics(torch.zeros(64, 64), 10)
    found = solved(random_weight(), "int4-g32", statistics)
    assert float(found.dequantize().abs().max()) == 0


def test_fewer_tokens_than_columns_are_enough() -> None:
    weight, inputs = random_weight(), correlated_inputs(20, 64)
    statistics = statistics_of(inputs)
    found = solved(weight, "int4-g32", statistics)
    base = rounded(weight, "int4-g32")
    hessian = statistics.hessian
    assert objective(weight, found, hessian) < objective(weight, base, hessian)


def with_eigenvalue(value: float) -> LayerStatistics:
    """Return statistics whose H has mean diagonal near 1 and one given eigenvalue."""
    generator = torch.Generator().manual_seed(2)
    basis = torch.linalg.qr(torch.randn(64, 64, generator=generator).double()).Q
    values = torch.ones(64, dtype=torch.float64)
    values[0] = value
    return LayerStatistics(((basis * values) @ basis.T).float(), 64)


def test_damping_is_raised_until_the_hessian_can_be_factored() -> None:
    found = solved(
        random_weight(), "int4-g32", with_eigenvalue(-0.05), damp=0.01, **PLAIN
    )
    assert found.notes == ("damp raised to 0.1: the Hessian is near singular",)


def test_a_hopeless_hessian_falls_back_to_rounding_with_a_note() -> None:
    weight = random_weight()
    found = solved(weight, "int4-g32", with_eigenvalue(-5.0), **PLAIN)
    assert same(found, rounded(weight, "int4-g32", search=True))
    assert len(found.notes) == 1
    assert found.notes[0].startswith("rounded to nearest: the Hessian cannot be")


@pytest.mark.parametrize("scheme", GRIDS)
def test_refitting_and_descent_never_raise_the_objective(scheme: str) -> None:
    weight, grid = random_weight(), Scheme.parse(scheme)
    hessian = 2 * correlated_inputs(256, 64).T @ correlated_inputs(256, 64)
    groups = grids.as_groups(weight, grid)
    parameters = grids.range_parameters(groups, grid)
    codes = grids.encode(groups, parameters, grid).view(weight.shape)
    order = torch.arange(64)

    def lost() -> float:
        return objective(weight, grids.assemble(codes, parameters, grid), hessian)

    seen = [lost()]
    for _ in range(3):
        parameters = refit.refit_scales(weight, hessian, codes, parameters, grid)
        seen.append(lost())
        matrix = matrix_of(weight, hessian, parameters, order)
        codes = feedback.descend([matrix], [codes], grid)[0]
        seen.append(lost())
    # Float32 sums of some thousand terms, held against float64.
    assert all(b <= a * (1 + 1e-5) for a, b in zip(seen, seen[1:], strict=False))
    assert seen[-1] < 0.8 * seen[0]


def test_refit_improves_what_gptq_returns() -> None:
    weight, statistics = random_weight(), statistics_of(correlated_inputs(512, 64))
    hessian = statistics.hessian
    before, after = (
        objective(
            weight,
            solved(weight, "int3-g32", statistics, **{**PLAIN, "refit": n}),
            hessian,
        )
        for n in (0, 2)
    )
    assert after < before


def test_drift_correction_lowers_the_distance_to_the_dense_outputs() -> None:
    weight, dense = random_weight(), correlated_inputs(1024, 64)
    generator = torch.Generator().manual_seed(4)
    mixing = torch.eye(64) + 0.03 * torch.randn(64, 64, generator=generator)
    inputs = dense @ mixing + 0.05 * torch.randn(dense.shape, generator=generator)
    statistics = statistics_of(inputs, dense)

    def distance(drift: float) -> float:
        options = {**PLAIN, "drift": drift}
        values = solved(weight, "int4-g32", statistics, **options).dequantize()
        return float((dense @ weight.T - inputs @ values.T).square().sum())

    none, half, full = distance(0.0), distance(0.5), distance(1.0)
    assert full < half < none


def test_the_weight_that_is_given_is_not_changed() -> None:
    weight = random_weight()
    before = weight.clone()
    inputs = correlated_inputs(256, 64)
    inputs[:, 0] = 0
    solved(weight, "int4-g32", statistics_of(inputs, inputs * 1.1))
    assert torch.equal(weight, before)


@pytest.mark.parametrize("scheme", ["int4-g32", "int4-g32-offset", "q4_k", "fp8-w8a8"])
def test_rows_may_be_solved_in_parts(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(10, 256, generator=generator)
    statistics = statistics_of(correlated_inputs(600, 256))
    whole = solved(weight, scheme, statistics, refit=1)
    monkeypatch.setattr("compress.quantizers.gptq._WEIGHTS_AT_ONCE", 3 * 256)
    parts = solved(weight, scheme, statistics, refit=1)
    # Sums of a product may be taken in another order, which moves a code now and then.
    assert float((parts.codes != whole.codes).float().mean()) < 0.02
    lost = [objective(weight, x, statistics.hessian) for x in (parts, whole)]
    assert lost[0] == pytest.approx(lost[1], rel=0.01)


@pytest.mark.parametrize("scheme", [*GRIDS, "nvfp4", "int4-g32-lorc4"])
def test_matrices_side_by_side_get_the_codes_that_each_gets_alone(scheme: str) -> None:
    grid = Scheme.parse(scheme)
    known = [
        statistics_of(x := correlated_inputs(256, 64, seed), x + 0.1)
        for seed in (1, 2, 3)
    ]
    known[1] = LayerStatistics(-known[1].hessian, 256)  # has no factor
    weights = [random_weight(seed=seed) for seed in (4, 5, 6)]
    quantizer = GPTQ(GPTQOptions(refit=1))
    found = quantizer.quantize_alike(weights, grid, known)
    for weight, statistics, together in zip(weights, known, found, strict=True):
        alone = quantizer.quantize(weight, grid, statistics)
        assert same(together, alone)
        assert torch.equal(together.dequantize(), alone.dequantize())
        assert together.notes == alone.notes
    assert [bool(one.notes) for one in found] == [False, True, False]
