"""Work is dealt so that no process has much more of it than another."""

from __future__ import annotations

import pytest

from compress.distributed.dealing import coders, deal


def test_the_costliest_goes_to_who_has_least() -> None:
    owners = deal([1.0, 5.0, 3.0, 3.0], 2)
    loads = [
        sum(c for c, o in zip([1, 5, 3, 3], owners, strict=True) if o == r)
        for r in (0, 1)
    ]
    assert sorted(loads) == [6, 6]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_piece_has_one_owner(size: int) -> None:
    owners = deal([2.0] * 8, size)
    assert [owners.count(rank) for rank in range(size)] == [8 // size] * size


def test_one_matrix_is_split_by_rows() -> None:
    assert coders([(4096, 512)], [True], 4) == [(0, 1, 2, 3)]


def test_rows_that_share_something_stay_together() -> None:
    assert coders([(4096, 512)], [False], 4) == [(0,)]


def test_as_many_matrices_as_processes_stay_whole() -> None:
    found = coders([(512, 512)] * 4, [True] * 4, 4)
    assert sorted(found) == [(0,), (1,), (2,), (3,)]
