"""The front of a sweep against its definition, point by point."""

from __future__ import annotations

import itertools
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from compress.report.front import (
    BITS_PER_BYTE,
    KL,
    best_that_fit,
    measure_of,
    staircase,
    with_front,
)

NUMBERS = st.integers(1, 4)
POINTS = st.lists(
    st.fixed_dictionaries(
        {
            "bytes": NUMBERS,
            "kl": NUMBERS,
            "bits_per_byte": NUMBERS,
            "tokens_per_second": NUMBERS,
            "model": st.sampled_from(["a", "b"]),
            "text": st.just("t"),
        }
    ),
    min_size=1,
    max_size=8,
).map(lambda points: [p | {"name": str(i)} for i, p in enumerate(points)])


def without(points: list[dict[str, Any]], *keys: str) -> list[dict[str, Any]]:
    return [{k: v for k, v in p.items() if k not in keys} for p in points]


def beats(a: dict[str, Any], b: dict[str, Any], key: str) -> bool:
    """Whether ``a`` is no worse in anything, and better in something."""
    pairs = [(a["bytes"], b["bytes"]), (a[key], b[key])]
    if "tokens_per_second" in a:
        pairs.append((-a["tokens_per_second"], -b["tokens_per_second"]))
    return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)


@given(POINTS)
def test_what_is_on_the_front_is_beaten_by_nothing(
    points: list[dict[str, Any]],
) -> None:
    for given_points in (points, without(points, "tokens_per_second")):
        key = measure_of(given_points)
        found = with_front(given_points)
        for point in found:
            rivals = [p for p in found if key != KL or p["model"] == point["model"]]
            beaten = any(beats(p, point, key) for p in rivals)
            assert not (point["on_front"] and beaten)
            if not (beaten or point["on_front"]):  # then an equal one stands for it
                twins = [
                    p for p in rivals if not beats(p, point, key) and p["on_front"]
                ]
                assert any(
                    p["bytes"] == point["bytes"] and p[key] == point[key] for p in twins
                )


def test_speeds_within_their_spread_are_alike() -> None:
    fast = {"model": "a", "text": "t", "kl": 0.2, "bytes": 2, "name": "fast"}
    fast |= {"tokens_per_second": 10.4, "tokens_per_second_spread": 1.0}
    small = {**fast, "name": "small", "bytes": 1, "kl": 0.1}
    small |= {"tokens_per_second": 10.0, "tokens_per_second_spread": 0.1}
    found = with_front([fast, small])
    assert [(p["name"], p["on_front"]) for p in found] == [
        ("small", True),
        ("fast", False),
    ]
    found = with_front([{**fast, "tokens_per_second": 11.1}, small])
    assert all(point["on_front"] for point in found)


@given(POINTS)
def test_models_are_compared_by_bits_per_byte_where_they_can_be(
    points: list[dict[str, Any]],
) -> None:
    several = len({p["model"] for p in points}) > 1
    assert measure_of(points) == (BITS_PER_BYTE if several else KL)
    assert measure_of(without(points, "bits_per_byte")) == KL


def test_a_text_of_its_own_for_each_model_compares_nothing() -> None:
    points = [
        {"model": m, "text": m, "bits_per_byte": 1.0, "kl": 0.1, "bytes": 1}
        for m in "ab"
    ]
    assert measure_of(points) == KL
    assert len(best_that_fit(points, 1)) == 2  # one of each model


@given(POINTS, st.integers(0, 5))
def test_the_best_that_fits_is_the_least_loss(
    points: list[dict[str, Any]], size: int
) -> None:
    key = measure_of(points)
    fitting = [p for p in points if p["bytes"] <= size]
    found = best_that_fit(points, size)
    assert [p[key] for p in found] == sorted(p[key] for p in fitting)[:1]


@given(POINTS)
def test_a_staircase_goes_down(points: list[dict[str, Any]]) -> None:
    steps = staircase(points, KL)
    for left, right in itertools.pairwise(steps):
        assert left["bytes"] < right["bytes"] and left["kl"] > right["kl"]
    assert steps[-1]["kl"] == min(p["kl"] for p in points)
