"""Widths of blocks: formulas by hand, sums, and searches against trying all."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.pruning.budgets import (
    LEAST,
    cfsp_shares,
    deal,
    least_loss,
    standardised,
    threshold_shares,
)


def test_cfsp_shares_are_sigmoids_of_distances() -> None:
    d = [0.2, 0.21, 0.19, 0.2]
    s = [1 / (1 + math.exp(-13.1 * (x - 0.2))) for x in d]
    expected = [0.7 * x / (sum(s) / 4) for x in s]
    assert cfsp_shares(d, 0.7) == pytest.approx(expected)


@given(
    d=st.lists(st.floats(0, 1), min_size=2, max_size=12),
    keep=st.floats(0.05, 0.99),
)
def test_cfsp_shares_keep_what_is_asked_and_none_is_full(
    d: list[float], keep: float
) -> None:
    shares = cfsp_shares(d, keep)
    assert sum(shares) / len(d) == pytest.approx(keep)
    assert all(0 < share < 1 for share in shares)


def test_a_block_that_would_keep_too_much_draws_all_to_the_mean() -> None:
    shares = cfsp_shares([0.5, 0.1, 0.1], 0.8)
    assert max(shares) == pytest.approx(0.8 + 0.2 / 1.05)
    assert shares[1] == pytest.approx(shares[2])


def test_equal_distances_give_equal_shares() -> None:
    assert cfsp_shares([0.3] * 4, 0.6) == pytest.approx([0.6] * 4)


def test_one_threshold_keeps_the_best_of_all_blocks() -> None:
    scores = [torch.tensor([9.0, 8, 7, 1]), torch.tensor([6.0, 3, 2, 0])]
    assert threshold_shares(scores, 5 / 8) == [3 / 4, 2 / 4]


def test_a_block_keeps_a_quarter_whatever_its_scores() -> None:
    scores = [torch.arange(8.0) + 100, torch.arange(8.0)]
    assert threshold_shares(scores, 0.5) == [6 / 8, 2 / 8]
    assert threshold_shares(scores, 0.2) == [0.2, 0.2]  # no room for a choice


def test_standardised_scores_have_mean_0_and_deviation_1() -> None:
    found = standardised(torch.tensor([1.0, 2, 3, 10]))
    assert float(found.mean()) == pytest.approx(0, abs=1e-12)
    assert float(found.std()) == pytest.approx(1)
    assert torch.equal(standardised(torch.ones(3)), torch.zeros(3, dtype=torch.double))


@given(data=st.data())
@settings(max_examples=200)
def test_dealt_widths_are_multiples_and_add_up(data: st.DataObject) -> None:
    blocks = data.draw(st.integers(1, 8))
    unit = data.draw(st.sampled_from([1, 8, 16, 24, 64]))
    widths = data.draw(st.lists(st.integers(64, 400), min_size=blocks, max_size=blocks))
    shares = data.draw(st.lists(st.floats(0, 1.5), min_size=blocks, max_size=blocks))
    floor = -(-LEAST // unit) * unit
    total = data.draw(st.integers(blocks * floor, sum(widths)))
    found = deal(shares, widths, total, unit)
    for width, own in zip(found, widths, strict=True):
        assert width == own or (width % unit == 0 and floor <= width < own)
    assert 2 * abs(sum(found) - total) <= unit


def test_dealing_gives_the_largest_remainders_one_more() -> None:
    assert deal([0.55, 0.62, 0.58], [160] * 3, 272, 16) == [80, 96, 96]
    assert deal([0.5] * 3, [96] * 3, 160, 32) == [64, 64, 32]  # ties: the first ones


def test_a_width_that_is_no_multiple_can_be_left_or_cut() -> None:
    assert deal([1.0, 0.6], [96, 96], 160, 64) == [96, 64]


@given(
    ladders=st.lists(
        st.lists(st.floats(0, 9), min_size=3, max_size=3), min_size=1, max_size=4
    ),
    room=st.integers(0, 8),
)
def test_least_loss_is_the_best_of_all_combinations(
    ladders: list[list[float]], room: int
) -> None:
    steps = [list(zip((1, 2, 4), losses, strict=True)) for losses in ladders]
    total = len(ladders) + room
    everything = [
        sum(loss for _, loss in choice)
        for choice in itertools.product(*steps)
        if sum(width for width, _ in choice) <= total
    ]
    found = least_loss(steps, total)
    losses = [dict(s)[width] for s, width in zip(steps, found, strict=True)]
    assert sum(found) <= total
    assert sum(losses) == pytest.approx(min(everything))


def test_least_loss_says_that_nothing_fits() -> None:
    with pytest.raises(ValueError, match="add up to 4, above 3"):
        least_loss([[(2, 0.0)], [(2, 0.0), (3, 0.0)]], 3)
