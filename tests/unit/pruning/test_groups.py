"""Key-value groups that go, against the model whose o columns are silenced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pruning_fixtures import WINDOWS, kept_neurons, loaded, pruned
from streaming_fixtures import FAMILIES, model_of

# Four groups of two query heads; transformers wants heads that divide the width.
HEADS: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4}


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_model_without_groups_is_the_model_that_does_not_hear_them(
    kind: str, tmp_path: Path
) -> None:
    """And generation with a cache gives the tokens of whole passes."""
    model, description, source = model_of(kind, **HEADS)
    section = {"method": "cfsp", "kv_groups": 2, "repair": "none"}
    record, _ = pruned(description, source, tmp_path, **section)
    assert record["kv_groups"]["after"] == 2
    found = loaded(tmp_path)
    with torch.no_grad():
        for path, groups in kept_neurons(tmp_path).items():
            weight = model.get_submodule(f"{path}.o_proj").weight
            for group in set(range(4)) - set(groups):
                weight[:, 32 * group : 32 * (group + 1)] = 0
        expected, ours = model(WINDOWS).logits, found(WINDOWS).logits
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    config = found.config
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    assert config.head_dim == 16
    text = WINDOWS[:1, :12]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    written = found.generate(text, use_cache=True, pad_token_id=0, **options)
    whole = found.generate(text, use_cache=False, pad_token_id=0, **options)
    assert torch.equal(written, whole)


def test_least_squares_lowers_the_error_of_every_attention(tmp_path: Path) -> None:
    _, description, source = model_of("llama", **HEADS)
    errors = []
    for repair in ("none", "least_squares"):
        section = {"method": "cfsp", "kv_groups": 2, "repair": repair}
        record, _ = pruned(description, source, tmp_path / repair, **section)
        errors.append([block["attention_error"] for block in record["blocks"]])
    assert all(after < before for before, after in zip(*errors, strict=True))
