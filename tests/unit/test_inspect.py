"""What ``compress inspect`` says of a checkpoint, without its weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from export_fixtures import linears, make_artifact
from gguf_fixtures import compressed, save_tokenizer
from pipeline_fixtures import save_checkpoint

from compress.core.errors import CheckpointError
from compress.export.gguf import GGUFExporter
from compress.export.safetensors import SafetensorsExporter
from compress.scoring import inspect


def test_a_dense_folder(tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path, tokenizer=False, dtype=torch.bfloat16)
    found = inspect(tmp_path)
    assert found.architecture == "llama"
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.size_bytes == (tmp_path / "model.safetensors").stat().st_size
    rows = {row["name"]: row for row in found.layers}
    row = rows["model.layers.1.mlp.down_proj.weight"]
    assert (row["shape"], row["scheme"], row["bits_per_weight"]) == (
        [64, 96],
        "bfloat16",
        16,
    )


def test_our_own_output(tmp_path: Path) -> None:
    artifact = make_artifact(linears("int3-g32-asym"), dtype="bfloat16")
    SafetensorsExporter().write(artifact, tmp_path)
    found = inspect(tmp_path)
    rows = {row["name"]: row for row in found.layers}
    row = rows["model.layers.0.self_attn.q_proj.weight"]
    assert (row["scheme"], row["shape"]) == ("int3-g32-asym", [64, 64])
    assert row["bits_per_weight"] == 3 + (16 + 3) / 32
    assert rows["model.embed_tokens.weight"]["scheme"] == "bfloat16"
    assert found.parameters == sum(
        info.elements for info in artifact.description.tensors.values()
    )
    assert "int3-g32-asym" in found.text()
    assert found.to_dict()["bits_per_weight"] == found.bits_per_weight


def test_a_gguf_file(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "assets")
    artifact = compressed("llama", assets=tmp_path / "assets")
    (path, *_) = GGUFExporter().write(artifact, tmp_path).files
    found = inspect(path)
    rows = {row["name"]: row for row in found.layers}
    assert found.architecture == "llama"
    assert found.size_bytes == path.stat().st_size
    assert rows["blk.0.attn_q.weight"]["scheme"] == "q4_0"
    assert rows["blk.0.attn_q.weight"]["bits_per_weight"] == 4.5
    assert rows["token_embd.weight"]["scheme"] == "q8_0"


@pytest.mark.parametrize("name", ["nothing", "nothing.gguf"])
def test_a_missing_checkpoint_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        inspect(tmp_path / name)


def test_a_work_directory_without_exports_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="without exports"):
        inspect(tmp_path)
