"""A result that is far worse than the original is measured, and not exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pipeline_fixtures import call, config_of, save_checkpoint, write_config, write_text
from safetensors.torch import load_file, save_file

import compress
from compress.config.schema import RunSection
from compress.core.errors import CompressError
from compress.guarding import held_back
from compress.serving import Serving


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config whose result is measured to be twenty times worse than it is."""
    evaluate = Serving.evaluate

    def worse(self: Serving) -> dict[str, Any]:
        metrics = evaluate(self)
        for figures in metrics["compressed"].values():
            figures["perplexity"] *= 20
        return metrics

    monkeypatch.setattr(Serving, "evaluate", worse)
    save_checkpoint(tmp_path / "model")
    text = write_text(tmp_path)
    settings = config_of(tmp_path / "model", text, tmp_path / "run")
    return write_config(tmp_path / "run.yaml", settings)


def test_a_bad_result_is_held_back_and_force_exports_it(
    config: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    result = call("run", config)
    assert result.exit_code == 1
    assert "nothing was exported: perplexity on" in result.stdout
    assert "run.max_perplexity_ratio is 10." in result.stdout
    assert not (workdir / "export").exists()
    assert (workdir / "report.json").is_file()
    blocks = {p: p.stat().st_mtime_ns for p in (workdir / "blocks").iterdir()}
    again = call("run", config, "--resume")
    assert again.exit_code == 1
    forced = call("run", config, "--resume", "--force")
    assert forced.exit_code == 0, forced.output
    assert (workdir / "export" / "safetensors" / "model.safetensors").is_file()
    assert {p: p.stat().st_mtime_ns for p in blocks} == blocks


def test_without_a_limit_anything_is_exported(config: Path, tmp_path: Path) -> None:
    result = call("run", config, "--set", "run.max_perplexity_ratio=null")
    assert result.exit_code == 0, result.output


def test_layers_that_stay_dense_are_listed(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model")
    overrides = {"re:.*down_proj": {"scheme": "dense"}}
    settings = config_of(
        tmp_path / "model",
        write_text(tmp_path),
        tmp_path / "run",
        quantize={"overrides": overrides},
        evaluate=None,
    )
    report = compress.run(settings).report
    assert report["kept_dense"] == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert any("2 linear layers stay dense" in text for text in report["warnings"])


@pytest.mark.parametrize(
    ("after", "limit", "is_held"),
    [
        (99.0, 10.0, False),
        (101.0, 10.0, True),
        (float("nan"), 10.0, True),
        (float("inf"), 10.0, True),
        (101.0, None, False),
    ],
)
def test_the_limit_is_of_the_ratio(
    after: float, limit: float | None, is_held: bool
) -> None:
    metrics = {
        "base": {"a": {"perplexity": 10.0}, "b": {"perplexity": 10.0}},
        "compressed": {"a": {"perplexity": 10.0}, "b": {"perplexity": after}},
    }
    section = RunSection(max_perplexity_ratio=limit)
    assert (held_back(metrics, section) is not None) == is_held


def test_nothing_is_held_back_that_was_not_measured() -> None:
    assert held_back({"base": None, "compressed": None}, RunSection()) is None


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("gptq", r"inputs of model\.layers\.0\.mlp\.down_proj are NaN or infinite"),
        ("rtn", r"outputs of model\.layers\.0 are NaN or infinite"),
    ],
)
def test_activations_that_overflow_name_their_layer(
    method: str, words: str, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    state = load_file(file)
    for name in ("gate_proj", "up_proj"):
        state[f"model.layers.0.mlp.{name}.weight"] *= 1e30
    save_file(state, file, metadata={"format": "pt"})
    text = write_text(tmp_path)
    settings = config_of(
        tmp_path / "model", text, tmp_path / "run", quantize={"method": method}
    )
    with pytest.raises(CompressError, match=words):
        compress.run(settings)
    assert not (tmp_path / "run" / "export").exists()
