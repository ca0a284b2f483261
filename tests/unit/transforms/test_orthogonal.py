"""Orthogonal matrices of any size, against the definition."""

from __future__ import annotations

import pytest
import torch

from compress.transforms.operations import RotateColumns, RotateRows
from compress.transforms.orthogonal import paley, random_orthogonal, sylvester

SIZES = [1, 9, 16, 37, 60, 64, 80, 96, 128, 576, 768, 896]


@pytest.mark.parametrize("size", SIZES)
def test_the_matrix_is_orthogonal(size: int) -> None:
    matrix = random_orthogonal(size, 1).apply(torch.eye(size))
    # Each entry of the product sums `size` terms of float32 rounding 6e-8.
    assert torch.allclose(matrix @ matrix.T, torch.eye(size), atol=1e-5)


@pytest.mark.parametrize("size", [64, 96, 576, 768, 896, 2304])
def test_outliers_are_spread_evenly(size: int) -> None:
    spike = torch.zeros(1, size)
    spike[0, 5] = 1
    spread = random_orthogonal(size, 0).apply(spike).abs()
    assert torch.allclose(spread, torch.full_like(spread, size**-0.5), rtol=1e-5)


@pytest.mark.parametrize("order", [12, 20, 28])
def test_paley_matrices_are_hadamard(order: int) -> None:
    matrix = paley(order // 4) * order**0.5
    assert torch.equal(matrix.abs().round(decimals=4), torch.ones(order, order))
    assert torch.equal((matrix @ matrix.T).round(), order * torch.eye(order))


def test_sylvester_is_the_recursion() -> None:
    small, large = sylvester(4) * 2, sylvester(8) * 8**0.5
    expected = torch.cat([torch.cat([small, small], 1), torch.cat([small, -small], 1)])
    assert torch.allclose(large, expected)


def test_the_seed_decides() -> None:
    values = torch.randn(3, 36, generator=torch.Generator().manual_seed(0))
    first = random_orthogonal(36, 7).apply(values)
    assert torch.equal(first, random_orthogonal(36, 7).apply(values))
    assert not torch.allclose(first, random_orthogonal(36, 8).apply(values))


def test_rows_and_columns_turn_as_the_whole_matrix_says() -> None:
    turn = random_orthogonal(12, 0)
    matrix = turn.apply(torch.eye(12))
    blocks = torch.block_diag(matrix, matrix)
    weight = torch.randn(24, 24, generator=torch.Generator().manual_seed(0))
    columns = RotateColumns(turn).apply(weight.clone())
    assert torch.allclose(columns, weight @ blocks, atol=1e-5)
    rows = RotateRows(turn).apply(weight.clone())
    assert torch.allclose(rows, blocks.T @ weight, atol=1e-5)
    part = RotateRows(turn, start=6, count=12).apply(weight.clone())
    assert torch.equal(part[:6], weight[:6]) and torch.equal(part[18:], weight[18:])
    assert torch.allclose(part[6:18], matrix.T @ weight[6:18], atol=1e-5)
    bias = RotateRows(turn).apply(weight[0].clone())
    assert torch.allclose(bias, blocks.T @ weight[0], atol=1e-5)
