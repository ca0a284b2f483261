"""Continuations of one context laid out as one sequence."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from compress.core.continuations import (
    COMMON,
    Branches,
    Continuation,
    lay_out,
    totals,
)


@st.composite
def groups(draw: st.DrawFn) -> list[Continuation]:
    """Continuations that mostly start alike, some of one token, some equal."""
    token = st.integers(0, 2)
    start = draw(st.lists(token, min_size=1, max_size=5))
    found = []
    for _ in range(draw(st.integers(1, 4))):
        context = [*start, *draw(st.lists(token, max_size=2))]
        answer = draw(st.lists(token, min_size=1, max_size=4))
        found.append(Continuation((*context, *answer), len(context)))
    return found


def seen_from(layout: Branches, place: int) -> list[int]:
    """Return the tokens that a place sees, in the order of their positions."""
    owner = layout.owners[place]
    seen = {
        layout.positions[i]: layout.tokens[i]
        for i in range(place + 1)
        if layout.owners[i] in (owner, COMMON)
    }
    assert sorted(seen) == list(range(len(seen)))
    return [seen[i] for i in range(len(seen))]


@given(groups())
def test_each_prediction_sees_exactly_what_is_before_it(
    group: list[Continuation],
) -> None:
    layout = lay_out(group)
    wanted = sorted(
        (index, one.ids[:place], one.ids[place])
        for index, one in enumerate(group)
        for place in range(one.start, len(one.ids))
    )
    found = sorted(
        (index, tuple(seen_from(layout, place)), token)
        for place, token, index in layout.reads
    )
    assert found == wanted


@given(groups())
def test_what_all_start_with_is_there_once(group: list[Continuation]) -> None:
    layout = lay_out(group)
    inputs = [one.ids[:-1] for one in group]
    longest = max(
        n
        for n in range(len(min(inputs, key=len)) + 1)
        if len({i[:n] for i in inputs}) == 1
    )
    assert layout.owners.count(COMMON) == longest
    assert len(layout.tokens) == longest + sum(len(i) - longest for i in inputs)


def test_letters_after_one_context_are_one_place() -> None:
    layout = lay_out([Continuation((5, 6, letter), 2) for letter in (1, 2, 3, 4)])
    assert layout.tokens == (5, 6)
    assert layout.reads == ((1, 1, 0), (1, 2, 1), (1, 3, 2), (1, 4, 3))


def test_totals_add_tokens_and_want_all_of_them_likeliest() -> None:
    layout = lay_out([Continuation((7, 1, 2), 1), Continuation((7, 1, 3), 1)])
    values = {(1, 0): (-1.0, True), (1, 1): (-1.0, True)}
    values |= {(2, 0): (-2.0, True), (3, 1): (-4.0, False)}
    read = [values[token, index] for _, token, index in layout.reads]
    first, second = totals(layout, [v for v, _ in read], [g for _, g in read])
    assert (first.nats, first.is_greedy) == (-3.0, True)
    assert (second.nats, second.is_greedy) == (-5.0, False)
