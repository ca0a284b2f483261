"""A budget in place of a scheme: the file keeps it, and the work is not lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pipeline_fixtures import config_of, save_checkpoint, write_text

import compress
from compress.core.errors import CompressError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "model")
    write_text(tmp_path)
    return tmp_path


def budgeted(folder: Path, name: str, budget: dict[str, Any]) -> dict[str, Any]:
    return config_of(
        folder / "model",
        folder / "text.txt",
        folder / name,
        quantize=None,
        evaluate=None,
        export=[{"format": "gguf"}],
    ) | {
        "quantize": {"method": "gptq"},
        "budget": budget,
        "allocate": {"schemes": ["q4_0", "q5_0", "q8_0"], "samples": 8, "windows": 2},
    }


def file_of(folder: Path, name: str) -> Path:
    (file,) = (folder / name / "export/gguf").glob("*.gguf")
    return file


def test_the_file_is_no_larger_than_the_budget(folder: Path) -> None:
    sizes = []
    for bits in (7.0, 10.0):
        name = f"run-{bits}"
        report = compress.run(budgeted(folder, name, {"bits_per_weight": bits})).report
        sizes.append(file_of(folder, name).stat().st_size)
        assert report["allocation"]["budget_bytes"] >= sizes[-1]
    assert sizes[0] < sizes[1]


def test_a_budget_that_nothing_fits_is_refused_before_work(folder: Path) -> None:
    with pytest.raises(CompressError, match="budget"):
        compress.run(budgeted(folder, "run", {"bytes": 100}))
    assert not (folder / "run" / "blocks").exists()


def test_a_finished_run_resumes_to_the_same_file(folder: Path) -> None:
    config = budgeted(folder, "run", {"bits_per_weight": 9.0})
    compress.run(config)
    first = file_of(folder, "run").read_bytes()
    compress.run(config, resume=True)
    assert file_of(folder, "run").read_bytes() == first


def test_a_preview_says_that_the_plan_is_not_the_final_one(folder: Path) -> None:
    config = budgeted(folder, "run", {"bits_per_weight": 9.0})
    assert "uniform choice" in compress.plan(config).text()
    plain = config_of(folder / "model", folder / "text.txt", folder / "run")
    assert "uniform choice" not in compress.plan(plain).text()
