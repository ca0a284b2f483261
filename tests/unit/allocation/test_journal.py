"""Measurements of a search: made once, whatever ends the search."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from compress.allocation.journal import Journal


class Model:
    """Counts how often it is measured."""

    def __init__(self) -> None:
        self.asked: list[tuple[tuple[int | None, ...], float]] = []

    def __call__(self, assignment: Sequence[int | None], share: float) -> float:
        self.asked.append((tuple(assignment), share))
        return sum(x or 0 for x in assignment) / 3 * share


def test_a_second_search_measures_only_what_is_new(tmp_path: Path) -> None:
    first, second = Model(), Model()
    path = tmp_path / "a" / "b.jsonl"
    asked = [([0, 1], 1.0), ([None, 2], 0.25), ([0, 1], 0.25)]
    found = [Journal(path, first)(*each) for each in asked]
    again = Journal(path, second)
    assert [again(*each) for each in asked] == found  # to the last bit
    assert second.asked == []
    again([2, 2], 1.0)
    assert second.asked == [((2, 2), 1.0)]


@pytest.mark.parametrize("cut", [1, 5, 12])
def test_a_line_that_was_cut_short_is_measured_again(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "x.jsonl"
    journal = Journal(path, Model())
    journal([0, 1])
    journal([1, 1])
    path.write_bytes(path.read_bytes()[:-cut])
    model = Model()
    journal = Journal(path, model)
    journal([0, 1])
    journal([1, 1])
    journal([2, 1])
    assert model.asked[-1] == ((2, 1), 1.0)
    assert ((0, 1), 1.0) not in model.asked
    last = Model()
    for assignment in ([0, 1], [1, 1], [2, 1]):
        Journal(path, last)(assignment)
    assert last.asked == []


def test_a_disk_that_is_full_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    journal = Journal(tmp_path / "file" / "x.jsonl", Model())
    assert journal([3, 0]) == 1.0
    assert "is not kept" in caplog.text
