"""Grids: how far rounding may move a weight, and what is stored for it."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from compress.core import grids
from compress.core.scheme import Scheme, Zero
from compress.core.tensors import TORCH_DTYPES

GROUP = 8


@st.composite
def schemes(draw: st.DrawFn) -> Scheme:
    zero = draw(st.sampled_from(Zero))
    bits = draw(st.integers(2, 7 if zero is Zero.OFFSET else 8))
    storage = draw(st.sampled_from(["float16", "bfloat16", "float32"]))
    return Scheme(bits, GROUP, zero, storage)


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    shape = (draw(st.integers(1, 3)), GROUP * draw(st.integers(1, 3)))
    value = st.floats(-100, 100, width=32, allow_subnormal=False)
    return torch.from_numpy(draw(arrays(np.float32, shape, elements=value)))


def distance_to_range(groups: Tensor, ends: tuple[Tensor, Tensor]) -> Tensor:
    """Return how far each value is outside what the grid can reach."""
    low, high = torch.minimum(*ends), torch.maximum(*ends)
    return (groups - high).clamp(min=0) + (low - groups).clamp(min=0)


@settings(deadline=None)
@given(weights(), schemes(), st.sampled_from([1.0, 0.7, 1.1]))
def test_rounding_moves_a_value_in_range_by_half_a_step_at_most(
    weight: Tensor, scheme: Scheme, factor: float
) -> None:
    groups = grids.as_groups(weight, scheme)
    parameters = grids.range_parameters(groups, scheme, factor)
    codes = grids.encode(groups, parameters, scheme)
    values = grids.decode_groups(codes, parameters, scheme)
    ends = [
        grids.decode_groups(torch.full_like(codes, end), parameters, scheme)
        for end in (scheme.lowest, scheme.highest)
    ]
    step = parameters.scale.abs().unsqueeze(-1)
    allowed = step / 2 + distance_to_range(groups, (ends[0], ends[1]))
    # Dividing, subtracting a minimum and multiplying again each round once.
    slack = 4 * torch.finfo(torch.float32).eps * (groups.abs() + step + 100)
    assert bool(((values - groups).abs() <= allowed + slack).all())


@settings(deadline=None)
@given(weights(), st.integers(2, 8))
def test_a_symmetric_grid_clips_half_a_step_at_most(weight: Tensor, bits: int) -> None:
    scheme = Scheme(bits, GROUP, scale_dtype="float32")
    groups = grids.as_groups(weight, scheme)
    parameters = grids.range_parameters(groups, scheme)
    codes = grids.encode(groups, parameters, scheme)
    error = (grids.decode_groups(codes, parameters, scheme) - groups).abs().amax(-1)
    largest = groups.abs().amax(-1)
    rounding = (
        4 * torch.finfo(torch.float32).eps * largest
    )  # scale, product, difference
    assert bool((error <= largest / ((1 << bits) - 1) + rounding).all())


@settings(deadline=None)
@given(weights(), schemes(), st.booleans())
def test_codes_are_on_the_grid_and_parameters_as_stored(
    weight: Tensor, scheme: Scheme, searched: bool
) -> None:
    groups = grids.as_groups(weight, scheme)
    choose = grids.search_parameters if searched else grids.range_parameters
    parameters = choose(groups, scheme)
    codes = grids.encode(groups, parameters, scheme)
    values = grids.decode_groups(codes, parameters, scheme).view(weight.shape)
    stored = grids.assemble(codes.view(weight.shape), parameters, scheme)
    assert stored.scale.dtype == TORCH_DTYPES[scheme.scale_dtype]
    assert torch.equal(stored.scale.float(), parameters.scale)
    assert int(stored.codes.min()) >= scheme.lowest
    assert int(stored.codes.max()) <= scheme.highest
    assert torch.equal(stored.dequantize(), values)


@settings(deadline=None)
@given(schemes(), st.booleans())
def test_groups_of_zeros_stay_zero(scheme: Scheme, searched: bool) -> None:
    groups = torch.zeros(2, 3, GROUP)
    choose = grids.search_parameters if searched else grids.range_parameters
    parameters = choose(groups, scheme)
    codes = grids.encode(groups, parameters, scheme)
    assert bool((parameters.scale > 0).all())
    assert torch.equal(grids.decode_groups(codes, parameters, scheme), groups)


@settings(deadline=None, max_examples=40)
@given(weights(), schemes(), st.integers(0, 1000))
def test_a_search_is_never_worse_than_the_range(
    weight: Tensor, scheme: Scheme, seed: int
) -> None:
    groups = grids.as_groups(weight, scheme)
    generator = torch.Generator().manual_seed(seed)
    importance = torch.rand(groups.shape[1:], generator=generator)

    def lost(parameters: grids.GridParameters) -> Tensor:
        codes = grids.encode(groups, parameters, scheme)
        error = grids.decode_groups(codes, parameters, scheme) - groups
        return (error.square() * importance).sum(-1)

    searched = grids.search_parameters(groups, scheme, importance=importance)
    assert bool((lost(searched) <= lost(grids.range_parameters(groups, scheme))).all())


# Grids of different widths are not nested, so a single group can lose by a bit more;
# the claim is about many weights.
@settings(deadline=None, max_examples=30)
@given(st.sampled_from(Zero), st.booleans(), st.integers(0, 1 << 30))
def test_more_bits_never_increase_the_error_of_rounding(
    zero: Zero, searched: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(16, 64, generator=generator)
    choose = grids.search_parameters if searched else grids.range_parameters
    errors = []
    for bits in range(2, 8 if zero is Zero.OFFSET else 9):
        scheme = Scheme(bits, 32, zero)
        groups = grids.as_groups(weight, scheme)
        parameters = choose(groups, scheme)
        codes = grids.encode(groups, parameters, scheme)
        error = grids.decode_groups(codes, parameters, scheme) - groups
        errors.append(float(error.square().mean()))
    assert errors == sorted(errors, reverse=True)
