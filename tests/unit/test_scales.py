"""Scales: what is stored is what arithmetic saw, for each way of storing them."""

from __future__ import annotations

import pytest
import torch

from compress.core import grids, scales
from compress.core.scheme import Scheme

NAMES = (
    *("int4-g32", "fp4-g32", "fp4-g32-pow2", "mxfp4", "nvfp4", "fp4-g32-ratio"),
    *("fp8", "fp8-tensor", "fp8-b64", "e3m0-g32-ratio", "fp6-g32", "int4-g32-asym"),
)


def weight() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(96, 128, generator=generator)
    values[0] = 0
    values[5, :64] = 0
    values[7] *= 1e-6
    values[9] *= 300
    return values


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("search", [False, True])
def test_stored_scales_are_those_that_levels_were_computed_with(
    name: str, search: bool
) -> None:
    scheme = Scheme.parse(name)
    groups = grids.as_groups(weight(), scheme)
    make = grids.search_parameters if search else grids.range_parameters
    parameters = make(groups, scheme)
    levels = grids.encode(groups, parameters, scheme)
    stored = grids.assemble(levels.view(96, 128), parameters, scheme)
    expected = grids.decode_groups(levels, parameters, scheme).view(96, 128)
    assert torch.equal(stored.scales(), parameters.scale)
    assert torch.equal(stored.dequantize(), expected)
    assert stored.dequantize().isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_searched_scales_are_never_worse(name: str) -> None:
    scheme = Scheme.parse(name)
    values = weight()
    groups = grids.as_groups(values, scheme)

    def error(parameters: grids.GridParameters) -> float:
        levels = grids.encode(groups, parameters, scheme)
        decoded = grids.decode_groups(levels, parameters, scheme)
        return float((decoded - groups).square().sum())

    plain = error(grids.range_parameters(groups, scheme))
    assert error(grids.search_parameters(groups, scheme)) <= plain * (1 + 1e-6)


def test_powers_of_two_have_no_mantissa() -> None:
    scheme = Scheme.parse("fp4-g32-pow2")
    groups = grids.as_groups(weight(), scheme)
    mantissa, _ = torch.frexp(grids.search_parameters(groups, scheme).scale)
    assert torch.all(mantissa == 0.5)


def test_ratios_are_powers_of_two_of_the_rows_scale() -> None:
    scheme = Scheme.parse("fp4-g32-ratio")
    parameters = grids.search_parameters(grids.as_groups(weight(), scheme), scheme)
    assert parameters.outer is not None
    mantissa, exponent = torch.frexp(
        parameters.scale[1:] / parameters.outer[1:].clamp(min=1e-30)
    )
    assert torch.all(mantissa == 0.5)
    assert int(exponent.max()) <= 1 and int(exponent.min()) >= 1 - 15


def test_one_multiplication_a_row_decodes_ratio_scales() -> None:
    scheme = Scheme.parse("fp4-g32-ratio")
    groups = grids.as_groups(weight()[10:], scheme)
    parameters = grids.search_parameters(groups, scheme)
    assert parameters.outer is not None
    levels = grids.encode(groups, parameters, scheme)
    shifted = levels * (parameters.scale / parameters.outer).unsqueeze(-1)
    expected = grids.decode_groups(levels, parameters, scheme)
    assert torch.equal(shifted * parameters.outer.unsqueeze(-1), expected)


def test_microscaling_exponents_follow_the_specification() -> None:
    scheme = Scheme.parse("mxfp4")
    values = torch.zeros(5, 32)
    values[:, 0] = torch.tensor([5.9, 4.0, 0.027, 6.99, 7.0])
    groups = grids.as_groups(values, scheme)
    stored, _ = scales.to_stored(
        grids.range_parameters(groups, scheme).scale, scheme, None
    )
    # floor(log2(amax)) - 2 + 127; from 7 on, compressed-tensors rounds up to 8
    assert stored.flatten().tolist() == [127, 127, 119, 127, 128]


def test_nvfp4_scales_follow_compressed_tensors() -> None:
    scheme = Scheme.parse("nvfp4")
    values = weight()
    groups = grids.as_groups(values, scheme)
    parameters = grids.range_parameters(groups, scheme)
    stored, outer = scales.to_stored(parameters.scale, scheme, parameters.outer)
    assert outer is not None
    assert outer.item() == pytest.approx(448 * 6 / float(values.abs().max()), rel=1e-6)
    wanted = groups.abs().amax(-1) / 6 * outer
    kept = wanted >= 2.0**-9
    same = stored.float()[kept] == wanted[kept].to(torch.float8_e4m3fn).float()
    assert float(same.float().mean()) > 0.999  # one rounding of difference at ties


@pytest.mark.parametrize("name", ["int4-g32-asym", "nvfp4", "fp4-g32-ratio", "fp8-b32"])
def test_a_stack_splits_into_its_parts(name: str) -> None:
    scheme = Scheme.parse(name)
    groups = grids.as_groups(weight(), scheme)
    parameters = grids.range_parameters(groups, scheme)
    levels = grids.encode(groups, parameters, scheme)
    whole = grids.assemble(levels.view(96, 128), parameters, scheme)
    parts = whole.split_rows([64, 32])
    assert [part.shape for part in parts] == [(64, 128), (32, 128)]
    joined = torch.cat([part.dequantize() for part in parts])
    assert torch.equal(joined, whole.dequantize())
