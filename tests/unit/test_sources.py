"""Dense tensors from folders and from memory, and what is wrong with damaged files."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from export_fixtures import StateDictSource
from safetensors.torch import save_file
from torch import nn

from compress.core.artifact import TensorInfo
from compress.core.errors import CheckpointError
from compress.core.families import family_of
from compress.model.sources import (
    ModuleSource,
    ResidentSource,
    SafetensorsSource,
    SnapshotSource,
    check_finite,
    in_model_order,
    read_header,
)

STATE = {
    "a.weight": torch.arange(12.0).view(3, 4),
    "b.weight": torch.arange(6).view(2, 3).to(torch.bfloat16),
    "c.bias": torch.ones(5, dtype=torch.float16),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two shards and their index."""
    shards = {
        "model-1.safetensors": ["a.weight"],
        "model-2.safetensors": list(STATE)[1:],
    }
    for shard, names in shards.items():
        save_file({name: STATE[name] for name in names}, tmp_path / shard)
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def set_index(folder: Path, content: str) -> None:
    (folder / "model.safetensors.index.json").write_text(content)


def test_shards_read_as_one_model(folder: Path) -> None:
    source = SafetensorsSource(folder)
    assert source.tensors()["b.weight"] == TensorInfo((2, 3), "bfloat16")
    assert set(source.tensors()) == set(STATE)
    for name, tensor in STATE.items():
        assert torch.equal(source.read(name), tensor)
        assert source.read(name).dtype == tensor.dtype


def test_a_single_file_needs_no_index(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "weights.safetensors")
    assert set(SafetensorsSource(tmp_path).tensors()) == set(STATE)


def test_what_is_read_belongs_to_the_caller(folder: Path) -> None:
    source = SafetensorsSource(folder)
    source.read("a.weight").zero_()
    assert torch.equal(source.read("a.weight"), STATE["a.weight"])


def test_an_unknown_tensor_is_missing(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="tensor d is missing"):
        SafetensorsSource(folder).read("d")


@pytest.mark.parametrize("kept", [0, 5, 40, -1])
def test_a_truncated_file_is_refused_at_once(folder: Path, kept: int) -> None:
    shard = folder / "model-2.safetensors"
    shard.write_bytes(shard.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors: truncated"):
        SafetensorsSource(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shard model-1\.safetensors is missing"):
        SafetensorsSource(folder)


def test_an_index_stays_in_its_folder(folder: Path) -> None:
    set_index(folder, json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    with pytest.raises(CheckpointError, match="leaves the folder"):
        SafetensorsSource(folder)


@pytest.mark.parametrize("content", ["{", "{}", '{"weight_map": 3}', "[]"])
def test_a_damaged_index_is_refused(folder: Path, content: str) -> None:
    set_index(folder, content)
    with pytest.raises(CheckpointError, match="not a shard index"):
        SafetensorsSource(folder)


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    save_file(STATE, folder / "model-1.safetensors")
    with pytest.raises(CheckpointError, match="is in both"):
        SafetensorsSource(folder)


def test_pickles_are_refused(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"only pickled weights.*safetensors first"
    ):
        SafetensorsSource(tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        SafetensorsSource(tmp_path)


def forged(path: Path, header: object, data: bytes = b"") -> Path:
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ([], "damaged safetensors header"),
        ({"a": {}}, "damaged safetensors header"),
        ({"a": 3}, "damaged safetensors header"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "disagree"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}, "disagree"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}}, "truncated"),
    ],
)
def test_forged_headers_are_refused(
    tmp_path: Path, header: object, message: str
) -> None:
    path = forged(tmp_path / "x.safetensors", header, b"1234")
    with pytest.raises(CheckpointError, match=message):
        read_header(path)


def test_a_module_is_read_with_its_tied_weight_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 2, bias=False), "b": nn.Linear(3, 2)})
    model["b"].weight = model["a"].weight
    source = ModuleSource(model)
    assert list(source.tensors()) == ["a.weight", "b.bias"]
    source.read("a.weight").zero_()
    assert float(model["a"].weight.detach().abs().max()) > 0


def test_a_snapshot_keeps_what_was() -> None:
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    source = SnapshotSource(ModuleSource(model))
    nn.init.zeros_(model.weight)
    assert torch.equal(source.read("weight"), before)


def test_a_resident_source_reads_once() -> None:
    inner = StateDictSource(STATE)
    source = ResidentSource(inner)
    source.read("a.weight").zero_()
    assert torch.equal(source.read("a.weight"), STATE["a.weight"])
    assert inner.reads == ["a.weight"]
    assert source.tensors() == inner.tensors()


def test_values_that_are_not_finite_are_counted() -> None:
    tensor = torch.ones(4, 4)
    tensor[0, 0], tensor[1, 1] = float("nan"), float("-inf")
    with pytest.raises(
        CheckpointError, match="x has 2 NaN or infinite values out of 16"
    ):
        check_finite(tensor, "x")


def test_tensors_come_in_the_order_of_the_model() -> None:
    names = [
        "model.embed_tokens.weight",
        "model.layers.2.self_attn.q_proj.weight",
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.2.input_layernorm.weight",
        "model.layers.10.mlp.up_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    ]
    info = TensorInfo((1,), "float32")
    found = in_model_order({n: info for n in sorted(names)}, family_of("llama"))
    assert list(found) == names


def test_names_outside_the_known_layout_are_kept() -> None:
    info = TensorInfo((1,), "float32")
    odd = {"model.layers.x.weight": info, "v": info}
    assert set(in_model_order(odd, family_of("llama"))) == set(odd)
