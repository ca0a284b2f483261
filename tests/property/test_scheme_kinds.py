"""Every grid with every kind of scale: what rounding may do, and what is stored."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from compress.core import grids, low_rank
from compress.core.scheme import FLOAT_FORMATS, Scheme
from compress.core.tensors import QuantizedTensor

COLUMNS = 64
KINDS = ("-g16", "-g32-pow2", "-g16-ratio", "", "-tensor", "-b16")
NAMES = (
    *(grid + kind for grid, kind in itertools.product(FLOAT_FORMATS, KINDS)),
    *("nvfp4", "mxfp4", "mxfp6", "mxfp8"),
)


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    shape = (draw(st.integers(1, 20)), COLUMNS)
    # Below 1e-3 float16 scales of the widest grids lose their precision.
    least = float(np.float32(1e-3))
    value = st.one_of(
        st.just(0.0),
        st.floats(least, 1, width=32),
        st.floats(-1, -least, width=32),
    )
    values = draw(arrays(np.float32, shape, elements=value))
    return torch.from_numpy(values) * draw(st.sampled_from([1.0, 30.0]))


def coded(weight: Tensor, scheme: Scheme, *, search: bool) -> QuantizedTensor:
    groups = grids.as_groups(weight, scheme)
    choose = grids.search_parameters if search else grids.range_parameters
    parameters = choose(groups, scheme)
    levels = grids.encode(groups, parameters, scheme)
    return grids.assemble(levels.view(weight.shape), parameters, scheme)


def spacing(magnitudes: Tensor, grid: str) -> Tensor:
    """Return the distance between neighbouring numbers at a magnitude."""
    form = FLOAT_FORMATS[grid]
    exponent = torch.floor(torch.log2(magnitudes.double().clamp(min=1e-30)))
    return torch.exp2(exponent.clamp(min=form.least_exponent) - form.mantissa_bits)


@settings(deadline=None, max_examples=60)
@given(weights(), st.sampled_from(NAMES), st.booleans())
def test_rounding_moves_a_value_by_half_the_local_spacing_or_clips_it(
    weight: Tensor, name: str, search: bool
) -> None:
    scheme = Scheme.parse(name).with_scales("float32")
    found = coded(weight, scheme, search=search)
    scale = found.scales().repeat_interleave(scheme.group_of(COLUMNS), 1).double()
    error = (found.dequantize() - weight).double().abs()
    size = weight.double().abs() / scale
    highest = FLOAT_FORMATS[scheme.grid].highest
    clipped = (size - highest).clamp(min=0)
    allowed = spacing(size.clamp(max=highest), scheme.grid) / 2 + clipped
    # Division and product round once each.
    slack = 4 * torch.finfo(torch.float32).eps * weight.double().abs()
    assert bool((error <= allowed * scale + slack).all())


@settings(deadline=None, max_examples=60)
@given(weights(), st.sampled_from(NAMES), st.booleans(), st.booleans())
def test_a_state_decodes_to_the_same_values(
    weight: Tensor, name: str, search: bool, corrected: bool
) -> None:
    scheme = Scheme.parse(f"{name}-lorc1" if corrected else name)
    found = low_rank.correct(weight, coded(weight, scheme, search=search))
    again = QuantizedTensor.from_state(found.state(), scheme)
    assert torch.equal(again.dequantize(), found.dequantize())
    assert found.dequantize().isfinite().all()
    levels = scheme.levels.to_levels(found.codes)
    assert torch.equal(scheme.levels.to_codes(levels), found.codes)


@settings(deadline=None, max_examples=60)
@given(weights(), st.sampled_from(NAMES))
def test_a_search_is_never_worse_than_the_range(weight: Tensor, name: str) -> None:
    scheme = Scheme.parse(name)
    plain, searched = (
        float((coded(weight, scheme, search=s).dequantize() - weight).square().sum())
        for s in (False, True)
    )
    assert searched <= plain * (1 + 1e-5)


@settings(deadline=None, max_examples=60)
@given(weights(), st.sampled_from(NAMES), st.sampled_from([1, 4]))
def test_a_correction_never_raises_the_error(
    weight: Tensor, name: str, rank: int
) -> None:
    scheme = Scheme.parse(f"{name}-lorc{min(rank, len(weight))}")
    plain = coded(weight, scheme, search=False)
    found = low_rank.correct(weight, plain)
    before, after = (
        float((x.dequantize() - weight).double().square().sum()) for x in (plain, found)
    )
    assert after <= before


# The scale maps the largest weight elsewhere, so that single groups can lose; the claim
# is of many weights, and of formats that only gain mantissa.
@settings(deadline=None, max_examples=20)
@given(
    st.sampled_from([("e2m1", "e2m3"), ("e3m0", "e3m2")]),
    st.sampled_from(KINDS),
    st.booleans(),
    st.integers(0, 1 << 30),
)
def test_more_mantissa_never_increases_the_error(
    formats: tuple[str, str], kind: str, search: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(32, COLUMNS, generator=generator)
    found = [coded(weight, Scheme.parse(f + kind), search=search) for f in formats]
    fewer, more = (float((x.dequantize() - weight).square().sum()) for x in found)
    assert more < fewer


@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zeros(name: str) -> None:
    scheme, zeros = Scheme.parse(name), torch.zeros(20, COLUMNS)
    for search in (False, True):
        assert torch.equal(coded(zeros, scheme, search=search).dequantize(), zeros)
