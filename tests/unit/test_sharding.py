"""Streamed safetensors files, read back by the safetensors library."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from compress.core.artifact import TensorInfo
from compress.core.errors import CheckpointError, ExportError
from compress.export.sharding import (
    Entry,
    parse_size,
    plan_shards,
    read_tensor,
    write_shards,
)


def mixed_tensors() -> dict[str, Tensor]:
    """Tensors whose sizes would misalign one another if they were written in order."""
    return {
        "a": torch.randn(3, 5).half(),
        "shape": torch.tensor([3, 5]),
        "b": torch.randn(7).bfloat16(),
        "codes": torch.randint(-100, 100, (3, 3), dtype=torch.int32),
        "c": torch.randn(2, 2),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(1.5),
    }


def entries_of(tensors: dict[str, Tensor]) -> list[Entry]:
    return [
        Entry(n, TensorInfo(tuple(t.shape), str(t.dtype).removeprefix("torch.")))
        for n, t in tensors.items()
    ]


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), ("4096", 4096), ("2kb", 2000)],
)
def test_sizes_are_read_with_decimal_and_binary_units(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "5 apples", "-3GB", "GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="write it like 5GB"):
        parse_size(text)


def test_a_single_file_reads_back_with_the_library(tmp_path: Path) -> None:
    tensors = mixed_tensors()
    shards = plan_shards(entries_of(tensors), 10**6)
    files = write_shards(tmp_path, shards, tensors.items())
    assert [path.name for path in files] == ["model.safetensors"]
    loaded = load_file(files[0])
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    with safe_open(files[0], framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_offsets_are_multiples_of_the_element_size(tmp_path: Path) -> None:
    (shard,) = plan_shards(entries_of(mixed_tensors()), 10**6)
    offsets, width = shard.offsets(), {"int64": 8, "int32": 4, "float32": 4}
    for entry in shard.entries:
        assert offsets[entry.name] % width.get(entry.info.dtype, 2) == 0
    assert len(shard.header()) % 8 == 0


def test_shards_keep_to_the_limit_and_the_index_finds_all(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(10) for i in range(7)}
    tensors["large"] = torch.randn(100)
    shards = plan_shards(entries_of(tensors), 100)
    *files, index_path = write_shards(tmp_path, shards, tensors.items())
    assert [path.name for path in files] == [
        f"model-{i:05d}-of-00005.safetensors" for i in range(1, 6)
    ]
    assert all(s.data_bytes <= 100 or len(s.entries) == 1 for s in shards)
    index = json.loads(index_path.read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    for name, tensor in tensors.items():
        found = load_file(tmp_path / index["weight_map"][name])[name]
        assert torch.equal(found, tensor)
        assert torch.equal(read_tensor(tmp_path, name), tensor)


def test_only_one_tensor_is_alive_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def produce() -> Iterator[tuple[str, Tensor]]:
        for i in range(6):
            assert all(reference() is None for reference in alive)
            tensor = torch.full((64,), float(i))
            alive.append(weakref.ref(tensor))
            pair = (f"t{i}", tensor)
            del tensor
            yield pair
            del pair

    entries = [Entry(f"t{i}", TensorInfo((64,), "float32")) for i in range(6)]
    # A generator's own local keeps the pair until it is resumed, so check from there.
    pairs = produce()
    write_shards(tmp_path, plan_shards(entries, 600), pairs)
    assert len(alive) == 6


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("x", torch.zeros(4)), ("w", torch.zeros(5)), ("w", torch.zeros(4).half())],
)
def test_a_tensor_that_was_not_planned_is_an_error(
    tmp_path: Path, name: str, tensor: Tensor
) -> None:
    shards = plan_shards([Entry("w", TensorInfo((4,), "float32"))], 10**6)
    with pytest.raises(ExportError, match="w as float32"):
        write_shards(tmp_path, shards, [(name, tensor)])


def test_a_full_disk_is_an_export_error_with_the_file(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    (tmp_path / "model.safetensors").symlink_to("/dev/full")
    shards = plan_shards([Entry("w", TensorInfo((4,), "float32"))], 10**6)
    with pytest.raises(ExportError, match="model.safetensors: cannot write: No space"):
        write_shards(tmp_path, shards, [("w", torch.zeros(4))])


def test_reading_what_is_not_there_names_file_and_tensor(tmp_path: Path) -> None:
    shards = plan_shards([Entry("w", TensorInfo((4,), "float32"))], 10**6)
    write_shards(tmp_path, shards, [("w", torch.zeros(4))])
    with pytest.raises(CheckpointError, match="cannot read other"):
        read_tensor(tmp_path, "other")
