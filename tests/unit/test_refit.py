"""Least-squares refits of what is stored beside levels, and rows kept as rounded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.core import feedback, grids, refit
from compress.core.scheme import Scheme

ROWS, COLUMNS = 12, 512
GRIDS = [
    *("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs"),
    *("q4_1", "int3-g64", "int4-g64-asym", "int4-g32-offset"),
]


def problem() -> tuple[Tensor, Tensor]:
    """Return weights, and a Hessian with strong correlations."""
    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(ROWS, COLUMNS, generator=generator)
    weight[3, 256:] = 0  # a super-block of zeros
    weight[4, :32] = 0.01  # a group of equal weights
    mixed = torch.randn(COLUMNS, COLUMNS, generator=generator) / COLUMNS**0.5
    inputs = torch.randn(2 * COLUMNS, COLUMNS, generator=generator) @ mixed
    return weight, 2 * inputs.T @ inputs + 5 * torch.eye(COLUMNS)


def start(weight: Tensor, scheme: Scheme) -> tuple[grids.GridParameters, Tensor]:
    groups = grids.as_groups(weight, scheme)
    parameters = grids.search_parameters(groups, scheme)
    return parameters, grids.encode(groups, parameters, scheme).view(weight.shape)


def values(parameters: grids.GridParameters, codes: Tensor, scheme: Scheme) -> Tensor:
    groups = codes.view(len(codes), parameters.scale.shape[1], -1)
    return grids.decode_groups(groups, parameters, scheme).view(codes.shape)


def losses(weight: Tensor, found: Tensor, hessian: Tensor) -> Tensor:
    error = (weight - found).double()
    return ((error @ hessian.double()) * error).sum(1)


@pytest.mark.parametrize("name", GRIDS)
def test_every_row_loses_less_and_can_be_stored(name: str) -> None:
    scheme, (weight, hessian) = Scheme.parse(name), problem()
    parameters, codes = start(weight, scheme)
    before = losses(weight, values(parameters, codes, scheme), hessian)
    found = refit.refit_scales(weight, hessian, codes, parameters, scheme)
    decoded = values(found, codes, scheme)
    after = losses(weight, decoded, hessian)
    assert bool((after <= before * (1 + 1e-4)).all())
    assert float(after.sum()) < 0.995 * float(before.sum())
    stored = grids.assemble(codes, found, scheme).dequantize()
    # A group without a scale computes with 1e-30, see super_scales.EMPTY_SCALE.
    assert torch.allclose(stored, decoded, rtol=0, atol=1e-20)


@pytest.mark.parametrize("name", ["q4_k", "q2_k"])
def test_minima_are_refitted_too(name: str) -> None:
    scheme, (weight, hessian) = Scheme.parse(name), problem()
    parameters, codes = start(weight, scheme)
    found = refit.refit_scales(weight, hessian, codes, parameters, scheme)
    assert parameters.zero is not None
    assert found.zero is not None
    assert not torch.equal(found.zero, parameters.zero)
    assert float(found.zero.max()) <= 0


def test_what_super_blocks_share_is_refitted() -> None:
    scheme, (weight, hessian) = Scheme.parse("q6_k"), problem()
    parameters, codes = start(weight, scheme)
    found = refit.refit_scales(weight, hessian, codes, parameters, scheme)
    assert found.outer is not None
    assert parameters.outer is not None
    assert torch.equal(found.outer, found.outer.half().float())
    assert not torch.equal(found.outer, parameters.outer)


@pytest.mark.parametrize("name", ["int4-g64", "q4_k"])
def test_the_better_of_two_is_taken_row_by_row(name: str) -> None:
    scheme, (weight, hessian) = Scheme.parse(name), problem()
    parameters, codes = start(weight, scheme)
    refitted = refit.refit_scales(weight, hessian, codes, parameters, scheme)
    spoiled = codes.clone()
    spoiled[::2] = spoiled[::2].roll(1, dims=1)
    found = feedback.better_rows(
        weight, hessian, scheme, (parameters, codes), (refitted, spoiled)
    )
    decoded = values(*found, scheme)
    assert torch.equal(decoded[::2], values(parameters, codes, scheme)[::2])
    assert torch.equal(decoded[1::2], values(refitted, codes, scheme)[1::2])
    assert torch.equal(grids.assemble(found[1], found[0], scheme).dequantize(), decoded)
