"""Samples in a run: written once, shown in the report, in memory only where asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pipeline_fixtures import Ground

import compress
from compress import serving

SECTION = {"generate": 6, "prompts": ["a b c", "d"]}


def test_a_run_shows_what_both_models_write(ground: Ground) -> None:
    config = ground.config("samples", evaluate=SECTION)
    report = compress.run(config).report
    samples = report["samples"]
    assert samples["tokens"] == 6
    assert [entry["prompt"] for entry in samples["prompts"]] == ["a b c", "d"]
    page = (ground.folder / "samples" / "report.html").read_text("utf-8")
    assert "Samples" in page and report["warnings"] == []


def test_resuming_writes_no_sample_again(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ground.config("samples_again", evaluate=SECTION)
    first = compress.run(config).report["samples"]

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("written a second time")

    monkeypatch.setattr(serving, "generations", never)
    assert compress.run(config, resume=True).report["samples"] == first


def test_a_model_that_does_not_fit_is_a_warning_and_the_run_goes_on(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(serving, "WholeModel", full)
    report = compress.run(ground.config("samples_full", evaluate=SECTION)).report
    assert "does not fit cpu" in report["samples"]["skipped"]
    assert any("evaluate.generate" in text for text in report["warnings"])
    assert report["exports"]


def test_a_model_that_nothing_changed_writes_what_the_base_writes(
    ground: Ground,
) -> None:
    config = ground.config("samples_same", evaluate=SECTION, quantize=None)
    for entry in compress.run(config).report["samples"]["prompts"]:
        assert entry["texts"]["compressed"] == entry["texts"]["base"]
        assert entry["same_tokens"]["compressed"] >= 1
