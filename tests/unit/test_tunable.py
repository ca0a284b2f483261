"""Codes that can be tuned: what they decode to, their gradients, and projections."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from tuning_fixtures import coded

from compress.core.codebooks import from_stored
from compress.core.errors import SchemeError
from compress.core.scheme import Scheme
from compress.core.tensors import QuantizedTensor
from compress.core.tunable import TunableCodes, tunable, tuning_problem

GRIDS = (
    *("int2-g64", "int3-g32-asym", "int4-g32-offset", "int8", "iq4_nl"),
    *("fp4-g32", "fp8-b128", "fp8-tensor", "q2_k", "q3_k", "q4_k", "q6_k", "iq4_xs"),
)
TABLES = (
    *("palette3", "palette4-r1", "palette2-tensor", "palette4-scaled"),
    *("palette-2x6", "palette-4x6-r64", "aqlm-1x9g8", "aqlm-2x4g8"),
    *("pq-4x5", "pq-8x4x2-scaled"),
)
ROWS, COLUMNS = 72, 256


def matrices(name: str, count: int = 2) -> list[QuantizedTensor]:
    generator = torch.Generator().manual_seed(0)
    scheme = Scheme.parse(name)
    weights = torch.randn(count, ROWS, COLUMNS, generator=generator)
    return [coded(weight, scheme) for weight in weights]


def wanted(codes: TunableCodes, seed: int = 1) -> Tensor:
    return torch.randn(codes.shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", [*GRIDS, *TABLES])
def test_values_are_those_of_the_stored_form(name: str) -> None:
    given = matrices(name)
    codes = tunable(given)
    values = codes.decode()
    for own, before, after in zip(values, given, codes.result(), strict=True):
        assert torch.equal(own, before.dequantize())
        assert torch.equal(own, after.dequantize())
        assert torch.equal(before.codes, after.codes)


@pytest.mark.parametrize("name", [*GRIDS, *TABLES])
def test_what_is_stored_is_what_is_decoded_after_any_change(name: str) -> None:
    codes = tunable(matrices(name))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for value in codes.continuous_parameters().values():
            value.mul_(1 + 0.1 * torch.randn(value.shape, generator=generator))
    codes.settle_()
    codes.replace_(codes.project(wanted(codes), None), None)
    values = codes.decode()
    for own, stored in zip(values, codes.result(), strict=True):
        assert torch.equal(own, stored.dequantize())


@pytest.mark.parametrize("name", [*GRIDS, *TABLES])
def test_projecting_present_values_changes_none(name: str) -> None:
    codes = tunable(matrices(name))
    values = codes.decode().detach()
    found = codes.project(values, None, order=range(codes.codes.shape[2]))
    # Entries of a table may be equal: the values count.
    assert torch.equal(codes.values(found, None).view(codes.shape), values)


@pytest.mark.parametrize("name", ["int2-g64", "int4-g32-offset", "q4_k", "fp4-g32"])
def test_codes_of_a_grid_are_the_nearest(name: str) -> None:
    codes = tunable(matrices(name, 1))
    scheme = codes.scheme
    target = wanted(codes)
    every = torch.arange(scheme.lowest, scheme.highest + 1)
    errors = []
    for code in every.tolist():
        same = torch.full_like(codes.codes, code)
        values = codes.values(same, None).view(codes.shape)
        errors.append((values - target).abs())
    found = codes.values(codes.project(target, None), None).view(codes.shape)
    least = torch.stack(errors).amin(0)
    torch.testing.assert_close((found - target).abs(), least, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "palette3",
        "palette3-r8",
        "palette2-tensor",
        "palette-2x6",
        "aqlm-1x9g8",
        "pq-4x5",
    ],
)
def test_a_code_of_one_table_is_the_nearest(name: str) -> None:
    codes = tunable(matrices(name))
    target = wanted(codes)
    found = codes.group_norms(
        target - codes.values(codes.project(target, None), None).view(codes.shape)
    )
    least = torch.full_like(found, torch.inf)
    for code in range(1 << codes.scheme.bits):
        same = torch.full_like(codes.codes, code)
        values = codes.values(same, None).view(codes.shape)
        least = least.minimum(codes.group_norms(target - values))
    torch.testing.assert_close(found, least, rtol=1e-4, atol=1e-4)


def test_a_full_beam_finds_the_best_sum_of_two() -> None:
    given = matrices("aqlm-2x4g8", 1)
    codes = tunable(given)
    target = wanted(codes)
    best = torch.full((1, codes.units), torch.inf)
    for pair in itertools.product(range(16), repeat=2):
        same = torch.tensor(pair, dtype=torch.uint8).expand_as(codes.codes)
        values = codes.values(same, None).view(codes.shape)
        best = best.minimum(codes.group_norms(target - values))

    def error(beam: int, order: tuple[int, int]) -> Tensor:
        found = codes.project(target, None, beam=beam, order=order)
        values = codes.values(found, None).view(codes.shape)
        return codes.group_norms(target - values)

    present = codes.group_norms(target - codes.decode().detach())
    for order in ((0, 1), (1, 0)):
        greedy, wide = error(1, order), error(16, order)
        assert bool((greedy <= present + 1e-4).all())
        assert float(wide.mean()) <= float(greedy.mean())
        assert bool((wide >= best - 1e-4).all())
    torch.testing.assert_close(error(16, (0, 1)), best, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "name", ["int3-g32-asym", "q4_k", "palette3", "palette3-r8", "aqlm-2x4g8"]
)
def test_some_units_are_treated_as_among_all(name: str) -> None:
    codes = tunable(matrices(name))
    target, tables = wanted(codes), range(codes.codes.shape[2])
    every = codes.project(target, None, beam=2, order=tables)
    generator = torch.Generator().manual_seed(3)
    units = torch.stack(
        [torch.randperm(codes.units, generator=generator)[:40] for _ in range(2)]
    )
    some = codes.project(target, units, beam=2, order=tables)
    before = codes.codes.clone()
    codes.replace_(some, units)
    for number in range(2):
        assert torch.equal(some[number], every[number, units[number]])
        others = torch.ones(codes.units, dtype=torch.bool)
        others[units[number]] = False
        assert torch.equal(codes.codes[number, others], before[number, others])
        assert torch.equal(codes.codes[number, units[number]], some[number])


@pytest.mark.parametrize("name", ["palette3", "palette4-scaled", "aqlm-2x4g8"])
def test_the_gradient_of_tables_is_a_scatter_add(name: str) -> None:
    scheme = Scheme.parse(name).with_scales("float32")
    generator = torch.Generator().manual_seed(0)
    tensor = coded(torch.randn(32, 16, generator=generator), scheme)
    assert tensor.tables is not None and scheme.codebook is not None
    codes = tunable([tensor])
    gradient = torch.randn(1, 32, 16, generator=generator)
    torch.autograd.backward(codes.decode(), gradient)
    expected = torch.zeros(tensor.tables.shape)
    of_scale = torch.zeros(32, 1)
    scale = tensor.scale.float().expand(32, 1)
    vector, count = scheme.codebook.vector, scheme.codebook.count
    places = from_stored(tensor.codes).view(32, -1, count)
    block = scheme.rows_of_scale(32)
    for row, group, m in itertools.product(
        range(32), range(16 // vector), range(count)
    ):
        part = gradient[0, row, group * vector : (group + 1) * vector]
        entry = (row // block, m, places[row, group, m])
        expected[entry] += part * scale[row]
        of_scale[row] += part @ tensor.tables[entry].float()
    found = codes.continuous_parameters()
    torch.testing.assert_close(found["tables"].grad[0], expected)
    if "scale" in found:
        torch.testing.assert_close(found["scale"].grad[0], of_scale)


@pytest.mark.parametrize("name", ["int4-g32-offset", "q4_k"])
def test_gradients_of_scales_and_minima_are_slopes(name: str) -> None:
    codes = tunable(matrices(name, 1))
    direction = wanted(codes)
    torch.autograd.backward((codes.decode() * direction).sum())
    for key, value in codes.continuous_parameters().items():
        # Values are linear in each number, so any step will do; doubling it keeps it a
        # number of the storage type.
        before = (codes.decode() * direction).double().sum().item()
        own = value[0, 3, 1].item()
        with torch.no_grad():
            value[0, 3, 1] = 2 * own
        after = (codes.decode() * direction).double().sum().item()
        with torch.no_grad():
            value[0, 3, 1] = own
        assert value.grad is not None
        slope = float(value.grad[0, 3, 1])
        assert (after - before) / own == pytest.approx(slope, rel=1e-2), key


def test_scales_keep_their_sign_and_a_part_of_their_size() -> None:
    codes = tunable(matrices("int2-g64"))
    scale = codes.continuous_parameters()["scale"]
    before = scale.detach().clone()
    with torch.no_grad():
        scale.mul_(-1)
    codes.settle_()
    assert torch.equal(torch.sign(scale), torch.sign(before))
    assert bool((scale.abs() >= before.abs() / 65).all())


def test_a_number_that_is_not_finite_is_not_stored() -> None:
    codes = tunable(matrices("palette3", 1))
    with torch.no_grad():
        codes.continuous_parameters()["tables"][0, 0, 0, 0, 0] = torch.nan
    with pytest.raises(SchemeError, match="tables is not finite any more"):
        codes.result()


@pytest.mark.parametrize(
    ("name", "part"),
    [("nvfp4", "two_level"), ("mxfp4", "pow2"), ("int4-g64-lorc8", "use int4-g64")],
)
def test_schemes_without_free_numbers_are_refused(name: str, part: str) -> None:
    problem = tuning_problem(Scheme.parse(name))
    assert problem is not None and part in problem
    assert all(tuning_problem(Scheme.parse(n)) is None for n in (*GRIDS, *TABLES))
