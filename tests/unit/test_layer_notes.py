"""Notes on layers as the report's warnings say them."""

from __future__ import annotations

from typing import Any

from compress.reporting import _layer_notes


def rows(note: str, count: int) -> list[dict[str, Any]]:
    return [{"name": f"layer{i}", "notes": [note]} for i in range(count)]


def test_a_note_that_many_layers_share_is_one_line() -> None:
    assert _layer_notes(rows("q5_0 stands in", 4)) == [
        "4 layers, such as layer0: q5_0 stands in"
    ]


def test_few_layers_are_named_each() -> None:
    found = _layer_notes(rows("clipped", 2) + rows("other", 1))
    assert found == ["layer0: clipped", "layer1: clipped", "layer0: other"]
