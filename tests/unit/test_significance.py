"""Tests of paired data, against enumerations of all that could have been drawn."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from compress.evaluation.significance import FEWEST, Interval, bootstrap, holm, mcnemar


def exact_quantiles(values: list[float]) -> tuple[float, float]:
    """Return 2.5 % and 97.5 % of the means of all draws with replacement."""
    count = len(values)
    shares: dict[float, float] = {}
    for drawn in itertools.combinations_with_replacement(range(count), count):
        ways = math.factorial(count)
        for index in range(count):
            ways //= math.factorial(drawn.count(index))
        mean = sum(values[i] for i in drawn) / count
        shares[mean] = shares.get(mean, 0.0) + ways / count**count
    assert sum(shares.values()) == pytest.approx(1)
    ends = []
    for level in (0.025, 0.975):
        total = 0.0
        for mean in sorted(shares):
            total += shares[mean]
            if total >= level:
                ends.append(mean)
                break
    return ends[0], ends[1]


def test_the_interval_is_that_of_all_possible_draws() -> None:
    values = [0.9, -1.3, 2.1, 0.4, 0.05, 1.7, -0.6, 3.2]
    found = bootstrap([torch.tensor(values)])
    low, high = exact_quantiles(values)
    # The quantile of 4000 draws has a standard error of about 0.03 here.
    assert found.value == pytest.approx(sum(values) / 8)
    assert found.low == pytest.approx(low, abs=0.12)
    assert found.high == pytest.approx(high, abs=0.12)


def test_a_known_spread_gives_a_known_interval() -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(2000, generator=generator, dtype=torch.float64)
    found = bootstrap([values])
    half = 1.96 * float(values.std()) / math.sqrt(2000)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.06)


def test_sizes_make_it_a_ratio_of_sums() -> None:
    sizes = torch.arange(1.0, 13.0)
    found = bootstrap([2.5 * sizes], [sizes])
    assert found.value == pytest.approx(2.5)
    assert found.low == pytest.approx(2.5)
    assert found.high == pytest.approx(2.5)


def test_strata_count_alike_whatever_their_size() -> None:
    found = bootstrap([torch.zeros(1000), torch.ones(10)])
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))


def test_the_same_seed_gives_the_same_interval() -> None:
    values = torch.arange(20.0)
    assert bootstrap([values], seed=3) == bootstrap([values], seed=3)
    assert bootstrap([values], seed=3) != bootstrap([values], seed=4)


@pytest.mark.parametrize("values", [torch.ones(FEWEST - 1), torch.ones(1)])
def test_few_items_have_no_interval(values: Tensor) -> None:
    found = bootstrap([values])
    assert found.value == 1
    assert math.isnan(found.low) and not found.excludes_zero
    assert found.to_dict()["low"] is None


def test_an_interval_around_zero_is_not_significant() -> None:
    assert not Interval(0.1, -0.1, 0.3).excludes_zero
    assert Interval(0.2, 0.1, 0.3).excludes_zero
    assert Interval(-0.2, -0.3, -0.1).excludes_zero


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (3, 0), (2, 5), (4, 4), (9, 1)])
def test_mcnemar_counts_all_splits_as_uneven(lost: int, gained: int) -> None:
    total = lost + gained
    splits = [sum(signs) for signs in itertools.product((0, 1), repeat=total)]
    uneven = [s for s in splits if abs(2 * s - total) >= abs(lost - gained)]
    assert mcnemar(lost, gained) == pytest.approx(len(uneven) / 2**total)


def test_mcnemar_of_many_is_near_the_normal_law() -> None:
    z = (600 - 500 - 1) / math.sqrt(1100)  # continuity correction
    assert mcnemar(600, 500) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.02)


def test_holm_multiplies_by_the_tests_that_are_left() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("pair", [(12, 3), (40, 61)])
def test_mcnemar_is_scipys_binomial_test(pair: tuple[int, int]) -> None:
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(pair[0], sum(pair), 0.5).pvalue
    assert mcnemar(*pair) == pytest.approx(expected, rel=1e-9)


def test_the_interval_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(60, generator=generator, dtype=torch.float64)
    import numpy as np

    expected = stats.bootstrap(
        (values.numpy(),), np.mean, method="percentile", n_resamples=4000, rng=0
    ).confidence_interval
    found = bootstrap([values])
    assert found.low == pytest.approx(expected.low, abs=0.02)
    assert found.high == pytest.approx(expected.high, abs=0.02)
