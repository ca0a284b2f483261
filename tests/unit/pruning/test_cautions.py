"""What a user is warned of before anything is pruned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_fixtures import random_model
from pruning_fixtures import pruning_of

from compress.reshaping import cautions

NOISE, WORSE = "fits their noise", "worse for it"


@pytest.mark.parametrize(
    "section, share, phrase, warns",
    [
        ({"method": "cfsp"}, 3.9, NOISE, True),
        ({"method": "cfsp"}, 4.0, NOISE, False),
        ({"method": "cfsp", "repair": "mask"}, 0.1, NOISE, False),
        ({"method": "cfsp", "repair": "none"}, 0.1, NOISE, False),
        ({"propagate": "corrected"}, 127, WORSE, True),
        ({"propagate": "corrected"}, 128, WORSE, False),
        ({"propagate": "pruned"}, 127, WORSE, False),
    ],
)
def test_a_repair_by_little_text_is_warned_of(
    tmp_path: Path, section: dict[str, str], share: float, phrase: str, warns: bool
) -> None:
    _, model, source = random_model()
    pruning = pruning_of(model, source, tmp_path, sparsity=0.25, **section)
    tokens = round(share * model.config["intermediate_size"])
    found = [text for text in cautions(pruning, tokens) if phrase in text]
    assert bool(found) == warns
    assert all(f"{tokens:,} tokens" in text for text in found)


@pytest.mark.parametrize("windows, warns", [(255, True), (256, False)])
def test_exchanges_on_little_text_are_warned_of(
    tmp_path: Path, windows: int, warns: bool
) -> None:
    _, model, source = random_model()
    options = {"exchanges": 2, "generated": windows - 8, "sparsity": 0.25}
    pruning = pruning_of(model, source, tmp_path, **options)
    tokens = pruning.tokens(torch.zeros(8, 512, dtype=torch.int64))
    assert tokens == 512 * windows
    found = [text for text in cautions(pruning, tokens) if "by heart" in text]
    assert bool(found) == warns


def test_a_method_without_data_is_warned_of(tmp_path: Path) -> None:
    _, model, source = random_model()
    pruning = pruning_of(model, source, tmp_path, sparsity=0.25, method="maw")
    assert "Data-driven scores are better" in cautions(pruning, 0)[0]
