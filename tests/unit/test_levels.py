"""Float grids against torch's own float8 types and tables written by hand."""

from __future__ import annotations

import pytest
import torch

from compress.core.levels import FLOAT_GRIDS, NAMED_GRIDS, IntegerGrid
from compress.core.scheme import IQ4

TABLES = {
    "e2m1": [0, 0.5, 1, 1.5, 2, 3, 4, 6],
    "e3m0": [0, 0.125, 0.25, 0.5, 1, 2, 4, 8],
    "e2m3": [i / 8 for i in range(16)]
    + [2 * (1 + i / 8) for i in range(8)]
    + [4 * (1 + i / 8) for i in range(8)],
}
TYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def inputs() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(20000, generator=generator) * torch.exp2(
        torch.randint(-16, 18, (20000,), generator=generator).float()
    )
    return torch.cat([spread, torch.zeros(1), torch.tensor([1e30, -1e30, 2.0**-20])])


@pytest.mark.parametrize("name", TABLES)
def test_levels_are_those_of_the_format(name: str) -> None:
    grid = FLOAT_GRIDS[name]
    codes = torch.arange(1 << (grid.bits - 1), dtype=torch.uint8)
    assert grid.to_levels(codes).tolist() == TABLES[name]
    negative = codes | (1 << (grid.bits - 1))
    assert grid.to_levels(negative).tolist() == [-x for x in TABLES[name]]


@pytest.mark.parametrize("name", FLOAT_GRIDS)
def test_rounding_is_to_the_nearest_level(name: str) -> None:
    grid = FLOAT_GRIDS[name]
    codes = torch.arange(1 << grid.bits, dtype=torch.int16).to(torch.uint8)
    levels = grid.to_levels(codes)
    levels = levels[levels.abs() <= grid.highest].unique()
    values = inputs().clamp(grid.lowest, grid.highest)
    distance = (values[:, None] - levels).abs().amin(1)
    assert torch.equal((grid.round_(values.clone()) - values).abs(), distance)


@pytest.mark.parametrize("name", FLOAT_GRIDS)
def test_codes_give_their_levels_back(name: str) -> None:
    grid = FLOAT_GRIDS[name]
    levels = grid.round_(inputs())
    assert torch.equal(grid.to_levels(grid.to_codes(levels)), levels)


@pytest.mark.parametrize("name", TYPES)
def test_codes_are_those_of_the_torch_cast(name: str) -> None:
    grid = FLOAT_GRIDS[name]
    values = inputs().clamp(grid.lowest, grid.highest)
    expected = values.to(TYPES[name]).view(torch.uint8)
    assert torch.equal(grid.to_codes(grid.round_(values.clone())), expected)


def test_ties_of_fp4_go_to_the_even_code() -> None:
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])
    expected = torch.tensor([0.0, 1, 1, 2, 2, 4, 4])
    assert torch.equal(FLOAT_GRIDS["e2m1"].round_(middles.clone()), expected)
    assert torch.equal(FLOAT_GRIDS["e2m1"].round_(-middles), -expected)


def test_integers_are_clamped_and_their_own_codes() -> None:
    grid = IntegerGrid(4, -8)
    levels = grid.round_(torch.tensor([-9.0, -0.5, 2.5, 7.6]))
    assert levels.tolist() == [-8, 0, 2, 7]
    assert grid.to_codes(levels).tolist() == [-8, 0, 2, 7]


def test_a_table_rounds_to_the_nearest_level_and_ties_upwards() -> None:
    grid = NAMED_GRIDS[IQ4]
    levels = grid.to_levels(torch.arange(16))
    halves = torch.arange(-300, 300) / 2
    near = torch.nextafter(halves, torch.tensor(-1e3))
    values = torch.cat([halves, near, inputs()]).clamp(-200, 200)
    distance = (values[:, None].double() - levels).abs()
    ties = distance == distance.amin(1, keepdim=True)
    highest = torch.where(ties, levels, -torch.inf).amax(1)
    assert torch.equal(grid.round_(values.clone()), highest)
