"""Mixtures of experts, from YAML to files that stock transformers opens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_fixtures import KINDS, save_mixture
from pipeline_fixtures import (
    call,
    config_of,
    digests,
    windows,
    write_config,
    write_text,
)

import compress
from compress.core.errors import PlanError

WINDOWS = windows()


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a mixture, a text, and a whole run of a YAML file."""
    folder = tmp_path_factory.mktemp(kind)
    save_mixture(folder / "tiny", kind)
    write_text(folder)
    path = write_config(folder / "run.yaml", config(folder, "whole"))
    result = call("run", path)
    assert result.exit_code == 0, result.output
    return folder


def config(folder: Path, workdir: str, **changes: Any) -> dict[str, Any]:
    sections: dict[str, Any] = {
        "calibration": {"samples": 16},
        "run": {"verify": True},
        **changes,
    }
    return config_of(folder / "tiny", folder / "text.txt", folder / workdir, **sections)


def report(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / "whole/report.json").read_text("utf-8"))
    return data


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(window[None]).logits for window in WINDOWS])


def test_the_report_counts_experts(folder: Path) -> None:
    about = report(folder)
    experts = about["experts"]
    assert experts["count"] == 8
    assert experts["coded_layers"] == 24
    rows = [row for row in about["layers"] if ".experts." in row["name"]]
    few = [row for row in rows if row["notes"]]
    assert experts["rounded_layers"] == len(few)
    assert 0 < experts["fewest_tokens"] <= experts["most_tokens"] < 16 * 32
    assert all((row["tokens"] < 64) == bool(row["notes"]) for row in rows)
    warned = [w for w in about["warnings"] if "layers of experts" in w]
    assert bool(warned) == bool(few)
    text = (folder / "whole/report.md").read_text("utf-8")
    note = f"{len(few)} of 24 layers of experts had too few and were rounded"
    assert note in " ".join(text.split())


def test_stock_transformers_runs_the_codes(folder: Path) -> None:
    entry = report(folder)["exports"]["safetensors"]
    assert entry["codes"] == {"layers": 32, "identical": True}
    assert entry["verify"]["passed"]
    # float32 scales: transformers decodes exactly what we decode
    assert entry["verify"]["kl"] < 1e-9


def test_load_gives_the_model_that_was_measured(folder: Path) -> None:
    ours = compress.load(folder / "whole/export/safetensors")
    dense = compress.load(folder / "tiny")
    assert ours.model.layers[0].mlp.experts.gate_up_proj.shape == (4, 192, 64)
    found = compress.evaluate(
        folder / "whole/export/safetensors",
        base=folder / "tiny",
        texts=[str(folder / "text.txt")],
        windows=2,
        sequence_length=32,
    )["texts"][str(folder / "text.txt")]["kl"]
    assert found == pytest.approx(report(folder)["metrics"]["compressed"]["kl"])
    p, q = logits(dense).log_softmax(-1), logits(ours).log_softmax(-1)
    assert 0 < float((p.exp() * (p - q)).sum(-1).mean()) < 0.5


def test_inspect_lists_experts(folder: Path) -> None:
    result = call("inspect", folder / "whole")
    assert result.exit_code == 0
    assert ".experts.3." in result.output
    assert result.output.count("int4-g32") == 32


def test_the_plan_shows_experts_in_a_row(folder: Path) -> None:
    result = call("run", folder / "run.yaml", "--dry-run", "--set", "run.workdir=x")
    assert result.exit_code == 0
    rows = [line for line in result.output.splitlines() if "experts.*." in line]
    assert len(rows) == 3
    assert all(row.split()[0] == "8" for row in rows)


def test_a_resumed_run_writes_the_same_bytes(folder: Path) -> None:
    shutil.copytree(folder / "whole", folder / "cut")
    for lost in ("blocks/0001.safetensors", "report.json"):
        (folder / "cut" / lost).unlink()
    for lost in ("export", "results"):
        shutil.rmtree(folder / "cut" / lost)
    compress.run(config(folder, "cut"), resume=True)
    assert digests(folder / "cut/export") == digests(folder / "whole/export")


def test_an_override_reaches_single_experts_and_needs_the_dense_form(
    folder: Path,
) -> None:
    overrides = {r"re:.*layers\.1\..*experts\.2\.": {"scheme": "int8-g32"}}
    quantize = {"overrides": overrides}
    with pytest.raises(PlanError, match="decodes all experts with one scheme"):
        compress.run(config(folder, "mixed", quantize=quantize))
    export = [{"format": "safetensors", "dense": True}]
    settings = config(folder, "mixed", quantize=quantize, export=export)
    result = compress.run(settings)
    eight = [r for r in result.report["layers"] if r["scheme"] == "int8-g32"]
    assert len(eight) == 3
    entry = result.report["exports"]["safetensors"]
    assert entry["verify"]["passed"]
    assert "codes" not in entry
    written = json.loads((folder / "mixed/export/safetensors/config.json").read_text())
    assert "quantization_config" not in written


def test_a_model_in_memory_is_quantized_in_place(folder: Path) -> None:
    model = compress.load(folder / "tiny")
    before = logits(model)
    coded = compress.quantize(model, "int4-g32", calibration=windows(16, 32))
    assert not torch.equal(logits(model), before)
    coded.save(folder / "memory")
    assert torch.equal(logits(compress.load(folder / "memory")), logits(model))
