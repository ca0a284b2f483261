"""Assembled candidates measure what a model with the levels' weights would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_fixtures import config_of, save_checkpoint, write_text
from torch import Tensor

from compress.allocation.assemble import Assembly, LevelSource
from compress.config import load_config
from compress.model.resident import ResidentModel
from compress.model.streaming import StreamedModel
from compress.pipeline import Run

ROOM = 1 << 30


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Levels of a tiny model, ready to be put in."""
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    save_checkpoint(tmp_path / "model")
    config = config_of(
        tmp_path / "model",
        write_text(tmp_path),
        tmp_path / "run",
        quantize=None,
        evaluate=None,
        export=[{"format": "gguf"}],
    ) | {
        "quantize": {"method": "rtn"},
        "budget": {"bits_per_weight": 12.0},
        "allocate": {"schemes": ["q4_0", "q8_0"], "samples": 2, "windows": 3},
    }
    run = Run(load_config(config))
    tokens = run._calibration_tokens()
    assert run.search is not None and tokens is not None
    run.search.problem(tokens)
    return run.search


def assembly(search: Any, model: StreamedModel | None = None, **held: Any) -> Assembly:
    units = [[o.layers for o in unit.options] for unit in search.candidates.units]
    if model is None:
        run = search._run
        source = LevelSource(
            run.transformed.source, search._store, device="cpu", **held
        )
        model = ResidentModel(run.model, source)
    return Assembly(model, windows(search), units, search._levels)


def windows(search: Any) -> Tensor:
    tokens: Tensor = search._tokens.tokens
    return tokens[:3]


def by_transformers(search: Any, assignment: list[int]) -> list[float]:
    """Return the KL of each window by a plain model with the weights replaced."""
    from transformers import AutoModelForCausalLM

    path = search._run.config.model.path
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    @torch.no_grad()
    def predicted() -> list[Tensor]:
        logits = [model(row[None]).logits[0, :-1] for row in windows(search)]
        return [x.log_softmax(-1) for x in logits]

    dense = predicted()
    for unit, index in zip(search.candidates.units, assignment, strict=True):
        for layer in unit.options[index].layers:
            level = search._store.read(search._levels[layer].key)
            with torch.no_grad():
                weight = model.get_submodule(layer.name).weight
                weight.copy_(level.dequantize())
    return [
        float((p.exp() * (p - q)).sum(-1).mean())
        for p, q in zip(dense, predicted(), strict=True)
    ]


@pytest.mark.parametrize(
    "held",
    [
        {"held_bytes": ROOM, "decoded": True},
        {"held_bytes": ROOM},
        {"held_bytes": 0},
    ],
)
def test_windows_have_the_kl_of_a_plain_model(
    search: Any, held: dict[str, Any]
) -> None:
    made = assembly(search, **held)
    count = len(search.candidates.units)
    for assignment in ([i % 2 for i in range(count)], [0] * count, [1] * count):
        found = made.measure_windows(assignment)
        expected = by_transformers(search, assignment)
        # float32 log-probabilities: sums of terms of order 1e-7 each.
        assert found.tolist() == pytest.approx(expected, abs=2e-5)
        assert made.measure(assignment) == pytest.approx(float(found.mean()))


def test_a_share_of_the_text_is_its_first_windows(search: Any) -> None:
    made = assembly(search, held_bytes=ROOM)
    low = [0] * len(search.candidates.units)
    few = made.measure_windows(low, 1)
    everything = made.measure_windows(low)
    assert few.tolist() == pytest.approx(everything[:1].tolist(), abs=1e-6)
    assert made.measure(low, 1 / 3) == pytest.approx(float(few), abs=1e-6)


def test_an_assembly_on_a_used_model_is_compared_with_the_dense_one(
    search: Any,
) -> None:
    first = assembly(search, held_bytes=ROOM)
    low = [0] * len(search.candidates.units)
    expected = first.measure(low)
    again = assembly(search, model=first._model)
    assert again.measure(low) == pytest.approx(expected, abs=1e-6)
