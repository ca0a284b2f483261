from __future__ import annotations

import logging
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf_fixtures import ROWS, compressed, random_state, save_tokenizer, tiny_config

from compress.core.artifact import CompressedModel
from compress.core.errors import CheckpointError
from compress.export.gguf import GGUFExporter, GGUFOptions
from compress.export.gguf_reader import open_gguf
from compress.model.gguf_config import read_gguf_config
from compress.model.gguf_source import GGUFSource
from compress.model.gguf_tokenizer import save_gguf_tokenizer

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    save_tokenizer(folder)
    return folder


def dense_file(
    model_type: str, assets: Path, folder: Path, **changes: Any
) -> tuple[Path, CompressedModel]:
    artifact = compressed(model_type, assets=assets, scheme=None, **changes)
    plugin = GGUFExporter(GGUFOptions(embedding="f16"))
    return plugin.write(artifact, folder).files[0], artifact


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_written_tensors_come_back_by_their_names(
    family: str, tied: bool, assets: Path, tmp_path: Path
) -> None:
    path, artifact = dense_file(family, assets, tmp_path, tie_word_embeddings=tied)
    source = GGUFSource(path)
    assert set(source.tensors()) == set(artifact.description.tensors)
    wrong = [
        name
        for name in source.tensors()
        if not torch.equal(source.read(name), artifact.source.read(name))
    ]
    assert wrong == []
    assert source.dtype == "float16"


def test_biases_of_llama_come_back(assets: Path, tmp_path: Path) -> None:
    changes = {"attention_bias": True, "mlp_bias": True}
    path, artifact = dense_file("llama", assets, tmp_path, **changes)
    name = "model.layers.1.self_attn.k_proj.bias"
    assert torch.equal(GGUFSource(path).read(name), artifact.source.read(name))
    assert set(GGUFSource(path).tensors()) == set(artifact.description.tensors)


def test_tensors_equal_those_of_transformers(assets: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    artifact = compressed("llama", assets=assets, scheme="q5_1")
    path = GGUFExporter(GGUFOptions()).write(artifact, tmp_path).files[0]
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float16
    )
    source = GGUFSource(path)
    theirs = dict(model.named_parameters())
    assert set(theirs) == set(source.tensors())
    wrong = [n for n, p in theirs.items() if not torch.equal(p, source.read(n))]
    assert wrong == []


def test_reading_in_runs_of_rows_is_the_same(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, artifact = dense_file("llama", assets, tmp_path)
    monkeypatch.setattr("compress.model.gguf_source._CHUNK_ELEMENTS", 640)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(GGUFSource(path).read(name), artifact.source.read(name))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_config_comes_back(family: str, assets: Path, tmp_path: Path) -> None:
    path, artifact = dense_file(family, assets, tmp_path)
    config = read_gguf_config(path)
    original = artifact.description.config
    keys = (
        "model_type vocab_size hidden_size intermediate_size num_hidden_layers "
        "num_attention_heads num_key_value_heads max_position_embeddings "
        "tie_word_embeddings rope_parameters eos_token_id hidden_act"
    ).split()
    assert {k: config[k] for k in keys} == {k: original[k] for k in keys}
    assert config["rms_norm_eps"] == pytest.approx(original["rms_norm_eps"], rel=1e-6)
    assert "quantization_config" not in config


@pytest.mark.parametrize("rope", [LLAMA3, YARN], ids=["llama3", "yarn"])
def test_rope_scaling_comes_back(
    rope: dict[str, Any], assets: Path, tmp_path: Path
) -> None:
    path, _ = dense_file("llama", assets, tmp_path, rope_parameters=rope)
    assert read_gguf_config(path)["rope_parameters"] == rope


def test_coarse_source_is_warned_about(
    assets: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    artifact = compressed("llama", assets=assets)
    path = GGUFExporter(GGUFOptions()).write(artifact, tmp_path).files[0]
    with caplog.at_level(logging.WARNING):
        GGUFSource(path)
    assert "holds Q4_0: already quantised" in caplog.text


def write_raw(path: Path, architecture: str, tensors: dict[str, Any]) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (
        ("block_count", 2),
        ("embedding_length", 64),
        ("feed_forward_length", 96),
        ("context_length", 256),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
        ("attention.key_length", 16),
        ("attention.value_length", 16),
        ("attention.sliding_window", 128),
        ("vocab_size", ROWS),
    ):
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-6)
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    path = tmp_path / "part.gguf"
    write_raw(path, "llama", {"token_embd.weight": np.zeros((ROWS, 64), np.float16)})
    with pytest.raises(CheckpointError, match=r"blk\.0\.attn_q\.weight .* is missing"):
        GGUFSource(path)


def test_a_strange_tensor_is_named(assets: Path, tmp_path: Path) -> None:
    path, artifact = dense_file("llama", assets, tmp_path)
    reader = gguf.GGUFReader(path)
    tensors = {t.name: t.data for t in reader.tensors}
    other = tmp_path / "other.gguf"
    write_raw(other, "llama", tensors | {"blk.0.extra": np.zeros(3, np.float32)})
    with pytest.raises(CheckpointError, match=r"such as blk\.0\.extra"):
        GGUFSource(other)


def test_a_factor_of_another_type_is_strange(assets: Path, tmp_path: Path) -> None:
    path, _ = dense_file("llama", assets, tmp_path)
    tensors = {t.name: t.data for t in gguf.GGUFReader(path).tensors}
    other = tmp_path / "other.gguf"
    factor = {"blk.0.attn_q.scale": np.ones(1, np.float32)}
    write_raw(other, "llama", tensors | factor)
    with pytest.raises(CheckpointError, match=r"such as blk\.0\.attn_q\.scale"):
        GGUFSource(other)


def test_truncated_file_is_refused(assets: Path, tmp_path: Path) -> None:
    path, _ = dense_file("llama", assets, tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="cut short or damaged"):
        GGUFSource(path)


def test_other_architectures_go_through_transformers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config("gemma2", tie_word_embeddings=True)
    state = random_state(config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA2, 2)
    tensors = {}
    for name, tensor in state.items():
        target = names.get_name(name, try_suffixes=(".weight",))
        assert target is not None
        # The converter stores what Gemma multiplies by, which is 1 + weight.
        vector = tensor.dim() == 1
        tensors[target] = (tensor.float() + 1 if vector else tensor).numpy()
    path = tmp_path / "gemma.gguf"
    write_raw(path, "gemma2", tensors)
    with caplog.at_level(logging.WARNING):
        source = GGUFSource(path)
    assert "gemma2 is read by transformers" in caplog.text
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(source.read(name), state[name])
    assert set(source.tensors()) == set(state)


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_tokenizer_comes_back(name: str, tmp_path: Path) -> None:
    from gguf_fixtures import TEXT
    from transformers import AutoTokenizer

    original = save_tokenizer(tmp_path, name)
    path, _ = dense_file("llama", tmp_path, tmp_path)
    folder = tmp_path / "back"
    folder.mkdir()
    save_gguf_tokenizer(path, folder)
    back = AutoTokenizer.from_pretrained(folder)
    text = TEXT + "<|user|>more"
    assert back(text)["input_ids"] == original(text)["input_ids"]
    assert back.decode(back(text)["input_ids"]) == original.decode(
        original(text)["input_ids"]
    )
    assert (back.eos_token, back.chat_template) == ("<|end|>", original.chat_template)


def test_a_merge_of_unknown_tokens_is_refused(assets: Path, tmp_path: Path) -> None:
    path, _ = dense_file("llama", assets, tmp_path)
    merge = open_gguf(path).require("tokenizer.ggml.merges")[-1].encode()
    data = path.read_bytes()
    at = data.rindex(merge)
    path.write_bytes(data[:at] + merge[::-1] + data[at + len(merge) :])
    with pytest.raises(CheckpointError, match=r"damaged tokenizer: .*vocabulary"):
        save_gguf_tokenizer(path, tmp_path)


@pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 4),
    reason="transformers takes heads that do not divide the width",
)
def test_a_config_that_cannot_be_is_refused(assets: Path, tmp_path: Path) -> None:
    path, _ = dense_file("llama", assets, tmp_path)
    data = path.read_bytes()
    key = b"llama.attention.head_count" + struct.pack("<I", 4)
    at = data.index(key) + len(key)
    path.write_bytes(data[:at] + struct.pack("<I", 7) + data[at + 4 :])
    with pytest.raises(CheckpointError, match=r"transformers refuses the config"):
        read_gguf_config(path)


def test_file_without_tokenizer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bare.gguf"
    write_raw(path, "llama", {"token_embd.weight": np.zeros((ROWS, 64), np.float16)})
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        save_gguf_tokenizer(path, tmp_path)
