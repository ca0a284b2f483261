"""A budget in place of a scheme: the file keeps it, and the work is not lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pipeline_fixtures import (
    call,
    config_of,
    digests,
    save_checkpoint,
    write_config,
    write_text,
)

import compress
from compress import searching
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


def test_a_searched_plan_is_the_one_that_a_run_carries_out(
    folder: Path, tmp_path: Path
) -> None:
    config = budgeted(folder, "run", {"bits_per_weight": 9.0})
    file = write_config(tmp_path / "run.yaml", config)
    before = digests(folder)
    printed = call("plan", file, "--budget", "8bpw", "--json")
    assert printed.exit_code == 0, printed.output
    assert digests(folder) == before  # nothing but the cache was written
    found = json.loads(printed.stdout)
    report = compress.run(budgeted(folder, "run", {"bits_per_weight": 8.0})).report
    assert json.loads((folder / "run/plan.json").read_text()) == found["plan"]
    told, real = found["allocation"], report["allocation"]
    for key in ("assignment", "budget_bytes", "file_bytes", "measured_kl"):
        assert told[key] == real[key], key
    assert report["exports"]["gguf"]["size_bytes"] == told["file_bytes"]


def test_a_search_is_told_unit_by_unit(folder: Path) -> None:
    text = searching.search(budgeted(folder, "run", {"bits_per_weight": 8.0})).text()
    assert "of the budget" in text and "measured KL" in text
    for name in ("model.embed_tokens", "model.layers.1.mlp.down_proj"):
        (line,) = (x for x in text.splitlines() if x.strip().startswith(name))
        assert line.split()[1] in ("int4-g32", "int5-g32", "int8-g32")


def test_a_search_without_a_budget_is_refused(folder: Path) -> None:
    plain = config_of(folder / "model", folder / "text.txt", folder / "run")
    with pytest.raises(CompressError, match="--budget"):
        searching.search(plain)


def test_a_searched_plan_for_vllm_fuses_what_vllm_fuses(folder: Path) -> None:
    config = budgeted(folder, "run", {"bits_per_weight": 14.0}) | {
        "export": [{"format": "safetensors", "runtime": "vllm"}],
        "allocate": {"schemes": ["int4-g32", "int8-g32"], "samples": 4, "windows": 2},
    }
    outcome = searching.search(config)
    layers = outcome.plan.layers
    schemes = {layer.scheme.name for layer in layers.values()}
    assert schemes == {"int4-g32", "int8-g32"}
    for group in ("self_attn.q self_attn.k self_attn.v", "mlp.gate mlp.up"):
        for block in range(2):
            names = [f"model.layers.{block}.{x}_proj" for x in group.split()]
            assert len({layers[name].scheme for name in names}) == 1
    assert outcome.record["file_bytes"] <= outcome.record["budget_bytes"]


def test_a_search_that_was_killed_measures_nothing_twice(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress.allocation.assemble import Assembly

    monkeypatch.setenv("COMPRESS_CACHE", str(folder / "cache"))
    settings = budgeted(folder, "run", {"bits_per_weight": 8.0})
    settings["allocate"] |= {"method": "evolution", "options": {"evaluations": 20}}
    measure, asked = Assembly.measure, 0

    def stopped(self: Assembly, *arguments: Any) -> float:
        nonlocal asked
        asked += 1
        if asked == stop_at:
            raise KeyboardInterrupt
        return measure(self, *arguments)

    monkeypatch.setattr(Assembly, "measure", stopped)
    stop_at = 0
    whole = compress.run({**settings, "run": {"workdir": str(folder / "whole")}})
    needed = asked
    (folder / "cache").rename(folder / "other")
    asked, stop_at = 0, needed // 2
    with pytest.raises(KeyboardInterrupt):
        compress.run(settings)
    stop_at = 0
    resumed = compress.run(settings, resume=True)
    assert asked == needed + 1  # the one that was interrupted
    found, expected = (r.report["allocation"] for r in (resumed, whole))
    assert [found[k] for k in ("history", "measured_kl")] == [
        expected[k] for k in ("history", "measured_kl")
    ]
    assert digests(folder / "run" / "export") == digests(folder / "whole" / "export")
