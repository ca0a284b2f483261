"""Budgets in bytes, and text that the search may look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from export_fixtures import tiny_llama
from gguf_fixtures import save_tokenizer
from pipeline_fixtures import write_text

from compress.allocation.budget import budget_bytes, format_of_budget
from compress.allocation.text import reward_windows
from compress.calibration.data import load_tokens
from compress.config import BudgetSection
from compress.core.errors import CalibrationError, ConfigError


@pytest.mark.parametrize("tied", [True, False])
def test_each_form_of_a_budget_counts_the_same_weights(tied: bool) -> None:
    state, model = tiny_llama(tied=tied, dtype="bfloat16")
    weights = sum(tensor.numel() for tensor in state.values())
    assert budget_bytes(BudgetSection(bytes="95MB"), model) == 95_000_000
    assert budget_bytes(BudgetSection(bytes=1234), model) == 1234
    assert budget_bytes(BudgetSection(bits_per_weight=4.0), model) == weights // 2
    assert budget_bytes(BudgetSection(ratio=0.25), model) == weights // 2


def test_a_budget_never_rounds_up() -> None:
    _, model = tiny_llama()
    exact = 4.3 * sum(info.elements for info in model.tensors.values()) / 8
    assert exact - 1 < budget_bytes(BudgetSection(bits_per_weight=4.3), model) <= exact


def test_a_budget_is_of_one_export() -> None:
    budget = BudgetSection(bytes=1000)
    assert format_of_budget(budget, ["gguf", "safetensors"]) == "gguf"
    other = BudgetSection(bytes=1000, format="safetensors")
    assert format_of_budget(other, ["gguf", "safetensors"]) == "safetensors"
    with pytest.raises(ConfigError, match="safetensors is not exported"):
        format_of_budget(other, ["gguf"])
    with pytest.raises(ConfigError, match="add an export"):
        format_of_budget(budget, [])


@pytest.fixture
def text(tmp_path: Path) -> dict[str, Any]:
    from transformers import AutoTokenizer

    save_tokenizer(tmp_path)
    return {
        "spec": str(write_text(tmp_path)),
        "tokenizer": AutoTokenizer.from_pretrained(tmp_path),
    }


def rows_of(tokens: torch.Tensor) -> set[tuple[int, ...]]:
    return {tuple(row) for row in tokens.tolist()}


def calibration(text: dict[str, Any], samples: int) -> torch.Tensor:
    return load_tokens(
        text["spec"], text["tokenizer"], samples=samples, sequence_length=32, seed=0
    ).tokens


def test_reward_text_has_no_window_of_calibration(text: dict[str, Any]) -> None:
    seen = calibration(text, 60)
    found = reward_windows(**text, calibration=seen, count=12, length=32, seed=0)
    assert found.shape == (12, 32)
    assert len(rows_of(found)) == 12
    assert not rows_of(found) & rows_of(seen)
    again = reward_windows(**text, calibration=seen, count=12, length=32, seed=0)
    assert torch.equal(found, again)


def test_reward_text_is_cut_to_its_length(text: dict[str, Any]) -> None:
    seen = calibration(text, 4)
    found = reward_windows(**text, calibration=seen, count=3, length=8, seed=0)
    whole = reward_windows(**text, calibration=seen, count=3, length=99, seed=0)
    assert torch.equal(found, whole[:, :8])


def test_too_little_text_is_an_error(text: dict[str, Any]) -> None:
    seen = calibration(text, 370)  # of 374
    with pytest.raises(CalibrationError, match=r"allocate\.windows"):
        reward_windows(**text, calibration=seen, count=12, length=32, seed=0)
