"""Models attend without masks where none is needed, and compute what they did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from recovery_fixtures import opened, save_pair, text_of
from transformers import AutoModelForCausalLM, masking_utils

from compress.recovery.models import WholeModel


def states(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Return what transformers computes of an unchanged model."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    )
    with torch.no_grad():
        return model.model(ids).last_hidden_state


@pytest.mark.parametrize(
    ("kind", "freely"),
    [("llama", True), ("qwen3", True), ("mistral", False), ("gemma3_text", False)],
)
def test_masks_are_made_where_they_say_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, freely: bool
) -> None:
    folder, _ = save_pair(tmp_path, kind=kind)
    ids = text_of().train[:3]
    expected = states(folder, ids)
    looks = [0]
    look = masking_utils.find_packed_sequence_indices

    def counted(*given: Any, **more: Any) -> Any:
        looks[0] += 1
        return look(*given, **more)

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", counted)
    model = WholeModel(opened(folder), device="cpu", dtype=torch.float32)
    found = model.states(ids)
    assert (looks[0] == 0) is freely
    # Whatever else runs the model, with a cache of its own, gets the masks it needs.
    assert model.module.config._attn_implementation == "sdpa"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
