"""load: our output and plain folders as ordinary transformers models."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from export_fixtures import dense_logits, linears, make_artifact
from safetensors.torch import load_file, save_file

from compress.core.errors import CheckpointError
from compress.export.safetensors import SafetensorsExporter, SafetensorsOptions
from compress.runtime.load import load

WINDOWS = torch.arange(24).view(2, 12)


def write(folder: Path, scheme: str | None, size: str = "5GB", **options):
    artifact = make_artifact(linears(scheme) if scheme else lambda _: None, **options)
    SafetensorsExporter(SafetensorsOptions(max_shard_size=size)).write(artifact, folder)
    return artifact


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scheme", [None, "int4-g32", "int3-asym"])
def test_logits_are_those_of_the_decoded_weights(scheme, tied, tmp_path: Path) -> None:
    artifact = write(tmp_path, scheme, "20KB", tied=tied)
    model = load(tmp_path)
    with torch.inference_mode():
        found = torch.stack([model(w[None]).logits[0] for w in WINDOWS])
    assert torch.allclose(found, dense_logits(artifact, WINDOWS), atol=1e-5)
    head, embedding = model.lm_head.weight, model.model.embed_tokens.weight
    assert (head is embedding) == tied


def test_the_model_is_ready_to_generate_and_to_save(tmp_path: Path) -> None:
    write(tmp_path, "int4-g32", dtype="bfloat16")
    model = load(str(tmp_path), dtype=None)
    assert not model.training
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == 2
    assert not any(p.is_meta for p in (*model.parameters(), *model.buffers()))
    model.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "quantization_config" not in config


def test_the_compressed_tensors_library_is_not_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "int4-g32")
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    assert load(tmp_path).dtype == torch.float32


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    write(tmp_path, None)
    (tmp_path / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled.*save the model as safetensors"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["nothing", "model.gguf"])
def test_what_is_no_folder_is_refused(name: str, tmp_path: Path) -> None:
    if name.endswith("gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="not a folder"):
        load(tmp_path / name)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: cannot read"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", "no_such_model", "cannot build this model"),
        ("vocab_size", 50, r"embed_tokens\.weight is \[96, 64\]"),
        ("num_hidden_layers", 3, r"lacks 9 weights.*model\.layers\.2"),
    ],
)
def test_a_config_of_another_model_is_refused(
    key: str, value: object, message: str, tmp_path: Path
) -> None:
    write(tmp_path, "int4-g32")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_other_quantizations_are_refused(tmp_path: Path) -> None:
    write(tmp_path, None)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="quant_method 'awq'; only"):
        load(tmp_path)


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "int4-g32")
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        load(tmp_path)


def test_tensors_that_the_model_does_not_have_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, None)
    path = tmp_path / "model.safetensors"
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file({**load_file(path), **extra}, path)
    assert load(tmp_path).dtype == torch.float32
    assert (
        "rotary_emb.inv_freq is in the checkpoint but not in the model" in caplog.text
    )
