"""Transforms in whole runs: files, resuming, implied ones, and the Python call."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_fixtures import config_of, digests, save_checkpoint, windows, write_text

import compress
from compress.core.errors import ConfigError, PlanError

TESTS = Path(__file__).resolve().parents[1]
BOTH = [{"format": "safetensors"}, {"format": "gguf", "embedding": "bf16"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("transforms")
    model = folder / "tiny"
    save_checkpoint(model, tie_word_embeddings=True, dtype=torch.bfloat16)
    write_text(folder)
    return folder


def config(folder: Path, workdir: str | Path, **changes: Any) -> dict[str, Any]:
    return config_of(folder / "tiny", folder / "text.txt", folder / workdir, **changes)


def test_a_rotated_model_is_in_both_files_what_it_is_in_memory(folder: Path) -> None:
    settings = config(
        folder,
        "rotated",
        transforms=["rotation"],
        export=BOTH,
        run={"verify": True},
    )
    report = compress.run(settings).report
    assert report["one_plan_two_files"]["identical"]
    for export in report["exports"].values():
        assert export["verify"]["passed"], export
    written = json.loads(
        (folder / "rotated/export/safetensors/config.json").read_text()
    )
    assert written["tie_word_embeddings"] is False
    head = 512 * 64 * 2  # bytes of the head that the original did not have
    plain = compress.run(config(folder, "plain", export=BOTH[:1])).report
    sizes = report["size_bytes"], plain["size_bytes"]
    assert sizes[0]["base"] == sizes[1]["base"]
    grown = sizes[0]["safetensors"] - sizes[1]["safetensors"]
    assert head <= grown < head + 1024
    assert any("untied" in warning for warning in report["warnings"])
    predicted = report["predicted"]["size_bytes"]["safetensors"]
    assert 0 <= sizes[0]["safetensors"] - predicted < 8192


def test_a_dense_run_with_a_transform_is_measured(folder: Path) -> None:
    settings = config(folder, "dense", transforms=["rotation"], quantize=None)
    metrics = compress.run(settings).report["metrics"]
    # Embedding, head and matrices were rounded to bfloat16 once more.
    assert 0 < metrics["compressed"]["kl"] < 1e-3


def test_a_method_brings_its_transform_unless_it_is_listed(folder: Path) -> None:
    method = {"method": "awq"}
    own = compress.run(config(folder, "implied", quantize=method)).report
    assert [entry["name"] for entry in own["transforms"]] == ["awq"]
    listed = [{"name": "awq", "steps": 3}, "scale_folding"]
    other = compress.run(
        config(folder, "listed", quantize=method, transforms=listed)
    ).report
    names = [entry["name"] for entry in other["transforms"]]
    assert names == ["awq", "scale_folding"]
    assert other["transforms"][0]["options"]["steps"] == 3
    page = (folder / "implied/report.md").read_text()
    assert "## Transforms" in page and "| awq | neuron |" in page.replace("\\", "")


def test_awq_helps_rounding(folder: Path) -> None:
    scheme = {"method": "rtn", "scheme": "int3-g32"}
    plain = compress.run(config(folder, "rtn3", quantize=scheme)).report
    scaled = compress.run(
        config(folder, "awq3", quantize={**scheme}, transforms=["awq"])
    ).report
    errors = [
        sum(layer["weight_error"] for layer in report["layers"])
        for report in (plain, scaled)
    ]
    assert errors[0] != errors[1]
    gains = [p["gain"] for p in scaled["transforms"][0]["places"]]
    assert min(gains) >= 0 and max(gains) > 0.05


def test_a_run_killed_at_any_write_ends_with_the_same_files(
    folder: Path, tmp_path: Path
) -> None:
    settings = config(
        folder,
        "unused",
        transforms=["rotation", "scale_folding", {"name": "awq", "steps": 3}],
    )
    path = tmp_path / "config.json"
    path.write_text(json.dumps(settings))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    command = [sys.executable, str(TESTS / "killed_runs.py"), str(path), str(tmp_path)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout.splitlines()[-1])
    expected = digests(tmp_path / "whole" / "export")
    left = {name for outcome in outcomes for name in outcome["left"]}
    assert "transforms.safetensors.part" in left  # killed while scales were written
    for number, outcome in enumerate(outcomes, 1):
        assert outcome["resumed"] == 0, number
        assert outcome["files"] == expected, number


def test_other_transforms_cannot_be_resumed_into(folder: Path) -> None:
    compress.run(config(folder, "begun", transforms=["scale_folding"], evaluate=None))
    for changed in ([], ["smoothquant"], [{"name": "scale_folding", "places": ["v"]}]):
        with pytest.raises(ConfigError):
            compress.run(config(folder, "begun", transforms=changed), resume=True)
    with pytest.raises(ConfigError, match="transforms changed"):
        compress.run(
            config(folder, "begun", transforms=["rotation", "scale_folding"]),
            resume=True,
        )


def test_a_template_of_the_original_is_refused(folder: Path) -> None:
    compress.run(config(folder, "gguf", quantize=None, export=BOTH[1:]))
    (template,) = (folder / "gguf/export/gguf").glob("*.gguf")
    export = [{"format": "gguf", "template": str(template)}]
    settings = config(folder, "no", transforms=["scale_folding"], export=export)
    with pytest.raises(PlanError, match="weights before scale_folding"):
        compress.run(settings)


@pytest.mark.parametrize("transforms", [["rotation"], [{"name": "awq", "steps": 4}]])
def test_a_model_in_memory_is_transformed_as_a_whole(
    transforms: list[Any], folder: Path
) -> None:
    from transformers import AutoModelForCausalLM

    path = folder / "tiny"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    probe = windows(2, 24, 512)
    with torch.no_grad():
        before = model(probe).logits
    coded = compress.quantize(
        model,
        "int8-g32",
        method="rtn",
        calibration=windows(8, 32),
        transforms=transforms,
    )
    with torch.no_grad():
        after = model(probe).logits
    # 8 bits move logits a little; a norm or a head left behind would move them a lot.
    assert float((after - before).std()) < 0.05 * float(before.std())
    out = folder / f"memory {len(str(transforms))}"
    coded.save(out)
    loaded = compress.load(out)
    with torch.no_grad():
        assert torch.allclose(loaded(probe).logits, after, atol=1e-4)
