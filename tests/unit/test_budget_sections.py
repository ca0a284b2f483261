"""How a budget is written on the command line."""

from __future__ import annotations

from typing import Any

import pytest

from compress.config import budget_assignments, load_config
from compress.core.errors import ConfigError

BASE: dict[str, Any] = {
    "model": {"path": "somewhere"},
    "quantize": {"method": "rtn", "scheme": "int4-g32"},
    "export": [{"format": "gguf"}],
}


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("95MB", "bytes", 95_000_000),
        ("1.5 GiB", "bytes", 3 << 29),
        ("4.25bpw", "bits_per_weight", 4.25),
        ("0.3x", "ratio", 0.3),
        ("4 BPW", "bits_per_weight", 4),
    ],
)
def test_each_form_sets_its_own_key_alone(text: str, key: str, value: float) -> None:
    before = BASE | {"budget": {"ratio": 0.9, "format": "gguf"}}
    before["quantize"] = {"method": "rtn"}
    budget = load_config(before, budget_assignments(text)).budget
    assert budget is not None
    given = budget.model_dump(exclude_none=True)
    assert given == {"format": "gguf", key: value}


def test_a_budget_takes_the_place_of_the_scheme() -> None:
    config = load_config(BASE, budget_assignments("4bpw"))
    assert config.quantize is not None and config.quantize.scheme is None


@pytest.mark.parametrize("text", ["", "95QB", "4.25 bits", "x", "-1bpw", "0MB"])
def test_other_words_are_refused_with_the_forms(text: str) -> None:
    with pytest.raises(ConfigError, match="95MB.*4.25bpw.*0.3x"):
        budget_assignments(text)


def test_a_share_beyond_the_original_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"budget\.ratio"):
        load_config(BASE, budget_assignments("1.5x"))
