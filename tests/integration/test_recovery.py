"""Calibration text to a recovered folder, which a run quantizes and exports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pipeline_fixtures import config_of, save_checkpoint, write_text
from safetensors.torch import load_file, save_file

from compress import run
from compress.config import recover_options
from compress.config.recover_section import RecoverSection
from compress.model.loading import open_model
from compress.recovery.recover import recover
from compress.recovery.text import load_recovery_text


def without_neurons(model: Path, target: Path, keep: int) -> Path:
    """Copy a tiny Llama with the first ``keep`` neurons of each block."""
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if "gate_proj" in name or "up_proj" in name:
            tensors[name] = tensor[:keep].contiguous()
        elif "down_proj" in name:
            tensors[name] = tensor[:, :keep].contiguous()
    target.mkdir()
    for file in model.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    config["intermediate_size"] = keep
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_recovered_folder_is_a_model_like_any_other(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    save_checkpoint(tmp_path / "model", dtype=dtype, initializer_range=0.15)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    keep = config["intermediate_size"] // 64 * 32
    student = without_neurons(tmp_path / "model", tmp_path / "student", keep)
    section = RecoverSection(
        options={
            "steps": 30,
            "samples": 60,
            "held_out": 8,
            "sequence_length": 32,
            "batch": 4,
            "rank": 8,
            "generated": 20,
        }
    )
    options = recover_options(section)
    teacher = open_model(str(tmp_path / "model"), cache=tmp_path / "cache")
    text_file = write_text(tmp_path)
    text = load_recovery_text(str(text_file), teacher.tokenizer(), options)
    record = recover(
        open_model(str(student), cache=tmp_path / "cache"),
        teacher,
        tmp_path / "recovered",
        text=text,
        options=options,
        device="cpu",
        state=tmp_path / "state",
    )
    assert record["kl_after"] < record["kl_before"]
    result = run(config_of(tmp_path / "recovered", text_file, tmp_path / "run"))
    assert (tmp_path / "run" / "export" / "safetensors" / "config.json").is_file()
    assert result.report["metrics"]["compressed"]["perplexity"] > 0
