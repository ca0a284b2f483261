"""Sweeps: points on one level database, resumed, and the front that they make."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
from pipeline_fixtures import (
    call,
    config_of,
    save_checkpoint,
    write_config,
    write_text,
)

import compress
from compress import pipeline, searching, sweep_speed
from compress.core.errors import CompressError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    save_checkpoint(tmp_path / "model")
    write_text(tmp_path)
    return tmp_path


def base_of(folder: Path, **changes: Any) -> dict[str, Any]:
    base = config_of(
        folder / "model",
        folder / "text.txt",
        folder / "unused",
        quantize=None,
        **({"evaluate": None, "export": [{"format": "gguf"}]} | changes),
    )
    return base | {
        "quantize": {"method": "rtn"},
        "allocate": {"schemes": ["q4_0", "q5_0", "q8_0"], "samples": 4, "windows": 2},
    }


def sweep_of(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "base": base_of(folder),
        "budgets": ["8bpw", "9bpw"],
        "workdir": str(folder / "sweep"),
        **changes,
    }


def count_calls(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """Return a list that fills with the budgets that a function is called for."""
    calls: list[str] = []
    module = searching if name == "search" else pipeline
    real = getattr(module, name)

    def counted(config: Any, **options: Any) -> Any:
        calls.append(str(config.budget.bits_per_weight))
        return real(config, **options)

    monkeypatch.setattr(module, name, counted)
    return calls


def test_points_keep_their_budgets_and_share_the_levels(folder: Path) -> None:
    first = compress.sweep(sweep_of(folder, budgets=["9bpw"])).data["points"]
    levels = sorted((folder / "cache/levels").rglob("*.safetensors"))
    times = [path.stat().st_mtime_ns for path in levels]
    points = compress.sweep(sweep_of(folder, budgets=["9bpw", "8bpw"])).data["points"]
    assert sorted((folder / "cache/levels").rglob("*.safetensors")) == levels
    assert [path.stat().st_mtime_ns for path in levels] == times
    assert points[1] == {**first[0], "on_front": True}
    assert points[0]["bytes"] < points[1]["bytes"]
    assert points[0]["kl"] > points[1]["kl"]
    assert all(point["bytes"] <= point["budget_bytes"] for point in points)
    assert not (folder / "sweep/points/9bpw/run/blocks").exists()  # only searched


def test_finished_points_are_not_run_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = compress.sweep(sweep_of(folder)).data["points"]
    calls = count_calls(monkeypatch, "search")
    assert compress.sweep(sweep_of(folder)).data["points"] == before
    assert calls == []
    (folder / "sweep/points/8bpw/point.json").write_text("{")
    compress.sweep(sweep_of(folder))
    assert calls == ["8.0"]
    compress.sweep(sweep_of(folder), overwrite=True)
    assert calls == ["8.0", "8.0", "9.0"]


def test_a_changed_base_is_run_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress.sweep(sweep_of(folder))
    calls = count_calls(monkeypatch, "search")
    changes = {"allocate.method": ["greedy"]}
    compress.sweep(sweep_of(folder, set=changes))
    assert calls == ["8.0", "9.0"]


def test_a_grid_runs_every_combination(folder: Path) -> None:
    changes = {"allocate.method": ["ilp", "uniform"], "quantize.method": ["rtn"]}
    data = compress.sweep(sweep_of(folder, set=changes)).data
    names = {point["name"]: point["settings"] for point in data["points"]}
    assert set(names) == {"8bpw-ilp", "8bpw-uniform", "9bpw-ilp", "9bpw-uniform"}
    assert names["8bpw-uniform"] == {"allocate.method": "uniform"}


def test_an_evaluated_and_exported_point_says_what_was_measured(folder: Path) -> None:
    text = str(folder / "text.txt")
    evaluate = {"perplexity": [text], "windows": 2, "sequence_length": 32}
    base = base_of(folder, evaluate=evaluate)
    plain = compress.sweep(sweep_of(folder, base=base, budgets=["9bpw"])).data
    run = folder / "sweep/points/9bpw/run"
    assert not (run / "export").exists()
    exported = sweep_of(folder, base=base, budgets=["9bpw"], export=True)
    data = compress.sweep(exported).data
    (point,), (before,) = data["points"], plain["points"]
    (file,) = (run / "export/gguf").glob("*.gguf")
    assert file.stat().st_size == point["bytes"] == before["bytes"]
    report = json.loads((run / "report.json").read_text())
    assert point["kl"] == before["kl"] == report["metrics"]["compressed"]["kl"]
    assert point["text"] == next(iter(report["metrics"]["compressed"]["texts"]))


def test_the_command_line_writes_table_page_and_figure(folder: Path) -> None:
    others = folder / "others.json"
    others.write_text('[{"name": "other <Q4>", "bytes": 150000, "kl": 0.02}]')
    file = write_config(folder / "sweep.yaml", sweep_of(folder, points=str(others)))
    result = call("sweep", file)
    assert result.exit_code == 0, result.output
    assert "other <Q4>" in result.stdout and "8bpw" in result.stdout
    assert "\r" not in result.stderr and "point 2 of 2" in result.stderr  # no bars
    page = (folder / "sweep/sweep.html").read_text()
    assert "other &lt;Q4&gt;" in page and "<Q4>" not in page
    ElementTree.parse(folder / "sweep/pareto.svg")


def test_every_budget_that_nothing_fits_is_told_before_work(folder: Path) -> None:
    changes = sweep_of(folder, budgets=["9bpw", "100B", "1KB"])
    with pytest.raises(CompressError, match="(?s)100B: .*\n1KB: "):
        compress.sweep(changes)
    assert not (folder / "sweep").exists()


def wide_sweep(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return two models, pruned or not, under a budget and in one scheme."""
    save_checkpoint(folder / "other", intermediate_size=160)
    evaluate = {
        "perplexity": [str(folder / "text.txt")],
        "windows": 2,
        "sequence_length": 32,
    }
    base = base_of(folder, evaluate=evaluate)
    base["prune"] = {"method": "maw", "sparsity": 0.5, "round_to": 32}
    return sweep_of(
        folder,
        **{
            "base": base,
            "models": [str(folder / "model"), str(folder / "other")],
            "sparsities": [0, 0.5],
            "budgets": ["9bpw"],
            "schemes": ["q4_0", "q8_0"],
        }
        | changes,
    )


def test_models_sparsities_budgets_and_schemes_are_all_combined(folder: Path) -> None:
    data = compress.sweep(wide_sweep(folder, fits=["200KB", "1B"])).data
    points = {point["name"]: point for point in data["points"]}
    assert len(points) == 2 * 2 * (1 + 2)
    whole, pruned = points["q8_0-model-0"], points["q8_0-model-0.5"]
    assert pruned["bytes"] < whole["bytes"] and pruned["kl"] > whole["kl"]
    assert whole["settings"] == {
        "model.path": str(folder / "model"),
        "prune.sparsity": 0,
    }
    originals = {point["original"]["bytes"] for point in points.values()}
    assert len(originals) == 2
    text = compress.sweep(wide_sweep(folder, fits=["200KB", "1B"])).text()
    assert "200KB: take " in text and "1B: no point is that small" in text
    best = min(
        (p for p in points.values() if p["bytes"] <= 200_000),
        key=lambda p: float(p["bits_per_byte"]),
    )
    assert f"200KB: take {best['name']} (" in text


def test_points_that_prune_alike_share_the_pruned_model(folder: Path) -> None:
    changes = {"models": [], "sparsities": [0.5], "budgets": []}
    points = compress.sweep(wide_sweep(folder, **changes)).data["points"]
    places = [Path(point["workdir"]) / "pruned" for point in points]
    (first, *others) = [
        {f.name: f.stat().st_ino for f in place.glob("*.safetensors")}
        for place in places
    ]
    assert first and others == [first]


def test_a_scheme_without_a_measure_is_told_before_work(folder: Path) -> None:
    with pytest.raises(CompressError, match=r"schemes: q4_0: .*evaluate\.perplexity"):
        compress.sweep(sweep_of(folder, schemes=["q4_0"]))
    assert not (folder / "sweep").exists()


def test_an_option_of_the_search_makes_no_second_point_of_a_scheme(
    folder: Path,
) -> None:
    changes = {"models": [], "sparsities": [], "budgets": [], "schemes": ["q8_0"]}
    data = compress.sweep(
        wide_sweep(folder, **changes, set={"allocate.method": ["ilp", "greedy"]})
    ).data
    assert len(data["points"]) == 1


def test_speed_is_measured_in_llamacpp(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llama_cpp")
    monkeypatch.setattr(sweep_speed, "_QUIET", math.inf)  # however busy it is here
    changes = {"models": [], "sparsities": [0], "budgets": []}
    config = wide_sweep(folder, **changes, export=True, speed=8, fits=["1GB"])
    found = compress.sweep(config)
    for point in found.data["points"]:
        ratio = point["tokens_per_second"] / point["original_tokens_per_second"]
        assert ratio > 0 and point["times_original"] > 0
    assert found.data["is_complete"]
    assert "tokens/s" in (folder / "sweep/sweep.html").read_text()
    assert re.search(r"1GB: take .* tokens/s \(x[\d.]+ the original's\)", found.text())
    (original,) = (folder / "sweep/originals").glob("*/export/gguf/*.gguf")
    assert original.stat().st_size > max(p["bytes"] for p in found.data["points"])

    with monkeypatch.context() as patch:
        patch.setattr(sweep_speed, "generation_speeds", None)  # nothing is timed
        assert compress.sweep(config).data["points"] == found.data["points"]


def test_a_speed_of_a_busy_machine_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("point/run/export/gguf/a.gguf", "b.gguf"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    run = SimpleNamespace(workdir=tmp_path / "point/run")
    model = SimpleNamespace(path=str(tmp_path / "b.gguf"))
    config = SimpleNamespace(run=run, model=model)
    point: Any = SimpleNamespace(name="point", config=config)
    loaded: Any = SimpleNamespace(workdir=tmp_path, speed=8)
    rates = [8.0, 10.0, 8.0, 20.0, 8.0, 12.0] + [8.0, 10.0, 8.0, 11.0, 8.0, 12.0]
    monkeypatch.setattr(
        sweep_speed, "generation_speeds", lambda *_, **__: [rates.pop(0)]
    )
    busy = sweep_speed.speed_of(point, loaded)
    assert busy["tokens_per_second"] == 12 and busy["times_original"] == 1.5
    assert "the machine was busy" in caplog.text
    quiet = sweep_speed.speed_of(point, loaded)
    assert quiet == sweep_speed.speed_of(point, loaded)  # no rate is left: it is kept
    assert quiet["tokens_per_second_spread"] == 2


def test_speed_without_llamacpp_is_refused_before_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_speed, "find_spec", lambda _: None)
    with pytest.raises(CompressError, match=r"compress-llm\[verify\]"):
        compress.sweep(wide_sweep(folder, export=True, speed=8))
    assert not (folder / "sweep").exists()


def test_speed_without_files_is_an_error_with_its_place(folder: Path) -> None:
    with pytest.raises(CompressError, match="set export: true"):
        compress.sweep(wide_sweep(folder, speed=8))
