"""AWQ's clip search: closed form against outputs, and against an exhaustive loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.core import grids, scales
from compress.core.scheme import Scheme
from compress.core.statistics import LayerStatistics
from compress.quantizers.awq import AWQ, AWQOptions, group_blocks
from compress.quantizers.rtn import RoundToNearest


def data(columns: int = 64) -> tuple[Tensor, Tensor]:
    """Return weights ``[R, C]`` and correlated inputs ``[T, C]``."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(columns, columns, generator=generator)
    x = torch.randn(400, columns, generator=generator) @ mix
    x *= torch.exp(torch.randn(columns, generator=generator))
    return torch.randn(20, columns, generator=generator), x


def statistics_of(x: Tensor) -> LayerStatistics:
    return LayerStatistics(2 * x.T @ x, len(x))


def scheme_of(name: str) -> Scheme:
    return Scheme.parse(name).with_scales("float32")


@pytest.mark.parametrize("name", ["int4-g32", "int3-g16-asym", "fp4-g16"])
def test_each_group_has_the_clipping_of_least_output_error(name: str) -> None:
    weight, x = data()
    scheme = scheme_of(name)
    made = AWQ(AWQOptions(shrink=0)).quantize(weight, scheme, statistics_of(x))
    size = scheme.group_of(64)
    values = made.dequantize()
    for group in range(64 // size):
        part = slice(group * size, (group + 1) * size)
        own, fed = weight[:, part].unsqueeze(1), x[:, part]
        least = torch.full((20,), torch.inf)
        for factor in (1.0, *scales.search_factors(scheme)):
            parameters = grids.range_parameters(own, scheme, factor)
            levels = grids.encode(own, parameters, scheme)
            rounded = grids.decode_groups(levels, parameters, scheme)
            outputs = (rounded - own).squeeze(1) @ fed.T
            least = torch.minimum(least, outputs.square().sum(1))
        found = ((values - weight)[:, part] @ fed.T).square().sum(1)
        assert torch.allclose(found, least, rtol=1e-3)


@pytest.mark.parametrize("name", ["int2-g32", "int4-g32", "int4-g64-asym", "mxfp4"])
def test_it_beats_rounding_on_the_outputs_of_the_layer(name: str) -> None:
    weight, x = data()
    scheme = scheme_of(name)
    clipped = AWQ().quantize(weight, scheme, statistics_of(x)).dequantize()
    rounded = RoundToNearest().quantize(weight, scheme, None).dequantize()

    def loss(values: Tensor) -> float:
        return float(((values - weight) @ x.T).square().sum())

    assert loss(clipped) < loss(rounded)


def test_blocks_lie_on_the_diagonal_and_shrink_beside_it() -> None:
    _, x = data(12)
    hessian = x.T @ x
    blocks = group_blocks(hessian, 3, 0.25)
    for i, block in enumerate(blocks):
        part = hessian[4 * i : 4 * i + 4, 4 * i : 4 * i + 4]
        assert torch.equal(block.diagonal(), part.diagonal())
        assert torch.allclose(block[0, 1:], 0.75 * part[0, 1:])


def test_of_wide_groups_the_diagonal_counts() -> None:
    hessian = torch.eye(600) + 0.1
    assert torch.equal(group_blocks(hessian, 1, 0.1), hessian.diagonal().view(1, 600))
    weight = torch.randn(3, 600, generator=torch.Generator().manual_seed(0))
    made = AWQ().quantize(weight, scheme_of("int8"), LayerStatistics(hessian, 9))
    assert made.scale.shape == (3, 1)


def test_a_diagonal_hessian_gives_the_weighted_search() -> None:
    weight, _ = data()
    diagonal = torch.rand(64, generator=torch.Generator().manual_seed(1)) + 0.1
    scheme = scheme_of("int4-g32")
    made = AWQ().quantize(weight, scheme, LayerStatistics(diagonal.diag(), 9))
    groups = grids.as_groups(weight, scheme)
    parameters = grids.search_parameters(
        groups, scheme, importance=diagonal.view(2, 32)
    )
    assert torch.equal(made.scale, parameters.scale)


def test_it_brings_the_transform_along() -> None:
    assert AWQ.transforms == ("awq",)
    assert RoundToNearest.transforms == ()
