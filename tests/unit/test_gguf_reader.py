from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from compress.core.errors import CheckpointError
from compress.export.gguf_reader import open_gguf


@pytest.fixture
def small_file(tmp_path: Path) -> Path:
    """A file written by gguf's own writer."""
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.name", "Größe")
    writer.add_float32("llama.rope.freq_base", 10000.0)
    writer.add_bool("a.flag", True)
    writer.add_array("a.words", ["x", "y z"])
    writer.add_array("a.numbers", [3, -4])
    values = np.arange(128, dtype=np.float32).reshape(2, 64)
    writer.add_tensor("half", values.astype(np.float16))
    packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("eight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata_equals_what_was_written(small_file: Path) -> None:
    file = open_gguf(small_file)
    keys = ["general.name", "a.flag", "a.words", "a.numbers"]
    found = [file.get(key) for key in keys]
    assert found == ["Größe", True, ["x", "y z"], [3, -4]]


def test_tensor_table_equals_that_of_the_gguf_package(small_file: Path) -> None:
    theirs = gguf.GGUFReader(small_file)
    ours = open_gguf(small_file).tensors
    expected = {
        t.name: (t.tensor_type.name.lower(), tuple(map(int, t.shape))[::-1], t.n_bytes)
        for t in theirs.tensors
    }
    assert {n: (t.type, t.shape, t.size_bytes) for n, t in ours.items()} == expected


@pytest.mark.parametrize("name", ["half", "eight"])
def test_rows_are_a_part_of_the_whole(small_file: Path, name: str) -> None:
    file = open_gguf(small_file)
    whole = file.read_values(name)
    assert np.array_equal(file.read_values(name, start=1, count=1), whole[1:])


def test_f16_values_come_back(small_file: Path) -> None:
    values = open_gguf(small_file).read_values("half")
    assert np.array_equal(values, np.arange(128, dtype=np.float32).reshape(2, 64))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.gguf: cannot read"):
        open_gguf(tmp_path / "gone.gguf")


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"PK\x03\x04 and more")
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        open_gguf(path)


def test_every_cut_is_an_error_that_names_the_file(small_file: Path) -> None:
    data = small_file.read_bytes()
    path = small_file.with_name("cut.gguf")
    for size in [*range(0, 400, 7), len(data) // 2, len(data) - 64]:
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            open_gguf(path)


def test_a_cut_in_the_data_names_the_tensor(small_file: Path) -> None:
    data = small_file.read_bytes()
    small_file.write_bytes(data[:-64])
    with pytest.raises(CheckpointError, match="tensor eight should take bytes"):
        open_gguf(small_file)


@pytest.mark.parametrize("position", [8, 16])
def test_absurd_counts_are_refused(small_file: Path, position: int) -> None:
    data = bytearray(small_file.read_bytes())
    data[position : position + 8] = struct.pack("<Q", 1 << 60)
    small_file.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged GGUF header"):
        open_gguf(small_file)


@pytest.mark.parametrize("value", [0, 48, "64", [64]])
def test_an_alignment_that_cannot_be_is_refused(tmp_path: Path, value: object) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_key_value(
        "general.alignment", value, gguf.GGUFValueType.get_type(value), None
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"byte \d+: general.alignment is "):
        open_gguf(tmp_path / "x.gguf")


def test_damaged_headers_never_raise_anything_else(small_file: Path) -> None:
    data = small_file.read_bytes()
    generator = np.random.default_rng(0)
    for index in range(300):
        damaged = bytearray(data)
        damaged[int(generator.integers(4, 450))] = int(generator.integers(256))
        path = small_file.with_name(f"{index}.gguf")
        path.write_bytes(damaged)
        try:
            open_gguf(path)
        except CheckpointError as error:
            assert str(path) in str(error)  # noqa: PT017
