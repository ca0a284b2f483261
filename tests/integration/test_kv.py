"""``compress kv`` on a tiny checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_fixtures import call, save_checkpoint, write_text
from safetensors.torch import load_file

import compress
from compress import kvstudy
from compress.core.errors import ConfigError


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("kv")
    save_checkpoint(folder / "model", head_dim=32)
    return folder / "model", write_text(folder)


def study(ground: tuple[Path, Path], **options: Any) -> Any:
    model, text = map(str, ground)
    given = {"types": ["q8_0", "q8_0/q4_0", "q4_0", "kivi4", "rot4"], "windows": 2}
    given |= {"sequence_length": 64, "samples": 2, "text": text, "calibration": text}
    return compress.kv_study(model, **(given | options))


def test_a_study_has_bytes_distance_and_advice(
    ground: tuple[Path, Path], tmp_path: Path
) -> None:
    found = study(ground, folder=tmp_path, contexts=[1000], limit=10, tight_limit=1e-9)
    data = json.loads((tmp_path / "kv.json").read_text())
    assert data == found.to_dict()
    types = {entry["type"]: entry for entry in data["types"]}
    config = json.loads((ground[0] / "config.json").read_text())
    values = config["num_hidden_layers"] * config["num_key_value_heads"] * 32
    q8 = types["q8_0/q8_0"]
    assert q8["bytes_per_token"] == 2 * values * 8.5 / 8
    assert q8["cache_bytes"] == {"1000": q8["bytes_per_token"] * 1000}
    assert types["q4_0/q4_0"]["kl"] > types["q8_0/q4_0"]["kl"] > q8["kl"] > 0
    assert types["fp8/fp8"]["kl"] > 0 and len(q8["blocks"]) == len(
        types["kivi4/kivi4"]["blocks"]
    )
    # A step is 2 amax / 254 and an error uniform within half of it.
    assert all(0.001 < block["keys"] < 0.012 for block in q8["blocks"])
    assert data["recommended"]["llamacpp_flags"].startswith("--cache-type-k q4_0")
    assert data["recommended_tight"]["keys"] == "f16"
    assert data["recommended_vllm"]["vllm_flags"] == "--kv-cache-dtype auto"
    text = found.text()
    assert "vLLM: --kv-cache-dtype auto" in text and "study" in text
    assert "--cache-type-k q4_0" in (tmp_path / "kv.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"types": ["q9"]}, "unknown cache type 'q9'"),
        ({"types": ["fp8"]}, "fp8 is measured anyway"),
        ({"types": [], "fp8": False}, "nothing to measure"),
        ({"text": "nowhere.txt"}, "nowhere.txt"),
    ],
)
def test_what_cannot_be_studied_is_refused(
    ground: tuple[Path, Path], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        study(ground, **options)


def test_the_command_prints_a_table_or_json(ground: tuple[Path, Path]) -> None:
    model, text = ground
    words = ["kv", model, "--text", text, "--type", "q8_0", "--no-fp8"]
    words += ["--windows", "1", "--sequence-length", "64", "--context", "2048"]
    shown = call(*words)
    assert shown.exit_code == 0, shown.output
    assert "at 2,048" in shown.stdout and "llama.cpp: --cache-type-k" in shown.stdout
    data = json.loads(call(*words, "--json").stdout)
    assert [entry["type"] for entry in data["types"]] == ["q8_0/q8_0"]
    assert data["recommended_vllm"] is None
    assert call(*words, "--strategy", "row").exit_code == 2


def test_scales_are_stored_beside_untouched_weights(
    ground: tuple[Path, Path], tmp_path: Path
) -> None:
    model, text = ground
    options = {"calibration": str(text), "samples": 2, "sequence_length": 64}
    place = kvstudy.store_scales(model, tmp_path / "run", **options)
    before = load_file(model / "model.safetensors")
    after = load_file(place / "model.safetensors")
    scales = {name for name in after if name.endswith(("k_scale", "v_scale"))}
    assert (
        len(scales)
        == 2 * json.loads((model / "config.json").read_text())["num_hidden_layers"]
    )
    assert all(torch.equal(after[name], before[name]) for name in before)
    with pytest.raises(ConfigError, match="is quantized"):
        kvstudy.store_scales(place, tmp_path / "again", **options)
