"""Importance matrices: what is written, what is read, and what damage is told."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from moe_fixtures import expert_layer, opened, routed, save_mixture
from pipeline_fixtures import windows
from streaming_fixtures import WINDOWS, model_of

from compress.calibration.squares import measure_squares
from compress.core.errors import CheckpointError
from compress.core.statistics import InputSquares
from compress.export.gguf_layout import Placement
from compress.export.imatrix import (
    Importance,
    ImportanceMatrix,
    matrix_of,
    write_imatrix,
)
from compress.export.imatrix_reader import read_imatrix
from compress.model.streaming import StreamedModel

NAMES = ("blk.0.attn_q.weight", "blk.0.ffn_up_exps.weight")


@pytest.fixture
def matrix() -> ImportanceMatrix:
    first = Importance(np.array([[2.0, 8.0]], "f4"), np.array([4.0], "f4"))
    stacked = Importance(
        np.array([[1.0, 2.0], [0.0, 0.0]], "f4"), np.array([2.0, 0.0], "f4")
    )
    entries = dict(zip(NAMES, (first, stacked), strict=True))
    return ImportanceMatrix(entries, ("mix/prose", "a.txt"), 3, 16)


def legacy(*entries: tuple[bytes, int, list[float]], tail: bytes = b"") -> bytes:
    """Return a file of the older flavour."""
    data = struct.pack("<i", len(entries))
    for name, calls, values in entries:
        data += struct.pack(f"<i{len(name)}sii", len(name), name, calls, len(values))
        data += struct.pack(f"<{len(values)}f", *values)
    return data + tail


def test_the_gguf_package_reads_what_is_written(
    tmp_path: Path, matrix: ImportanceMatrix
) -> None:
    write_imatrix(tmp_path / "x.gguf", matrix)
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    assert reader.fields["general.type"].contents() == "imatrix"
    assert "general.architecture" not in reader.fields
    assert reader.fields["imatrix.datasets"].contents() == ["mix/prose", "a.txt"]
    assert reader.fields["imatrix.chunk_count"].contents() == 3
    assert reader.fields["imatrix.chunk_size"].contents() == 16
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    # ggml's order of dimensions: columns first.
    shapes = {name: list(map(int, t.shape)) for name, t in tensors.items()}
    assert shapes == {
        f"{NAMES[0]}.in_sum2": [2, 1],
        f"{NAMES[0]}.counts": [1, 1],
        f"{NAMES[1]}.in_sum2": [2, 2],
        f"{NAMES[1]}.counts": [1, 2],
    }
    assert tensors[f"{NAMES[0]}.in_sum2"].data.tolist() == [[2.0, 8.0]]
    assert tensors[f"{NAMES[1]}.counts"].data.tolist() == [[2.0], [0.0]]


def test_what_is_written_comes_back(tmp_path: Path, matrix: ImportanceMatrix) -> None:
    write_imatrix(tmp_path / "x.gguf", matrix)
    found = read_imatrix(tmp_path / "x.gguf")
    assert (found.datasets, found.chunks, found.chunk_tokens) == (
        *(("mix/prose", "a.txt"), 3, 16),
    )
    means = {name: entry.means().tolist() for name, entry in found.entries.items()}
    # An expert that no token reached: ones.
    assert means == {NAMES[0]: [[0.5, 2.0]], NAMES[1]: [[0.5, 1.0], [1.0, 1.0]]}


@pytest.mark.parametrize("tail", [b"", struct.pack("<ii4s", 7, 4, b"text")])
def test_the_older_flavour_is_read(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(legacy((b"blk.0.attn_q.weight", 4, [2.0, 8.0]), tail=tail))
    found = read_imatrix(path)
    assert found.entries[NAMES[0]].means().tolist() == [[0.5, 2.0]]
    assert found.datasets == (("text",) if tail else ())
    assert found.chunks == (7 if tail else 0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "byte 0: the number of entries takes 4 of 0 bytes"),
        (b"PK\x03\x04" + bytes(99), "byte 0: it starts neither with 'GGUF' nor"),
        (struct.pack("<ii", 1, 1 << 30) + bytes(40), "byte 8: a name takes 1073741824"),
        (struct.pack("<iii", 1, -1, 0) + bytes(40), "byte 8: a name takes -1 of"),
        (
            struct.pack("<ii1sii", 1, 1, b"a", 1, 1 << 29) + bytes(40),
            "byte 17: values of 'a' takes 2147483648 of 40",
        ),
        (legacy((b"a", 1, [1.0, float("nan")])), "byte 21: a holds nan"),
        (legacy((b"a", 1, [1.0, -1.0])), "byte 21: a holds -1.0"),
        (legacy((b"a", -1, [1.0])), "byte 4: entry 'a' has -1 calls"),
        (legacy((b"a", 1, [1.0]), tail=b"\x01"), "byte 21: the number of chunks takes"),
    ],
)
def test_damage_of_the_older_flavour_has_a_place(
    tmp_path: Path, data: bytes, message: str
) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        read_imatrix(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_numbers_that_are_not_finite_have_a_place(
    tmp_path: Path, matrix: ImportanceMatrix
) -> None:
    path = tmp_path / "x.gguf"
    matrix.entries[NAMES[1]].sums[0, 1] = np.inf
    write_imatrix(path, matrix)
    at = path.read_bytes().index(struct.pack("<f", np.inf))
    with pytest.raises(CheckpointError, match=f"byte {at}: .*in_sum2 holds inf"):
        read_imatrix(path)


def test_another_gguf_file_is_no_importance_matrix(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_type("model")
    writer.add_tensor("a.weight", np.ones((2, 2), "f4"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"no importance matrix.*'model'"):
        read_imatrix(tmp_path / "x.gguf")


def test_experts_of_one_tensor_have_a_row_each() -> None:
    squares = InputSquares(
        {"e.0": torch.tensor([1.0, 2.0]), "e.1": torch.tensor([3.0, 4.0])},
        {"e.0": 5, "e.1": 6},
        ("mix",),
        2,
        8,
    )
    placements = [
        Placement("e.0.weight", "exps", "f16", (2, 4, 2), 32, stack=("e.0", "e.1")),
        Placement("norm.weight", "norm", "f32", (2,), 8),
        Placement(None, "rope", "f32", (2,), 8),
    ]
    found = matrix_of(placements, squares)
    assert list(found.entries) == ["exps"]
    assert found.entries["exps"].sums.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert found.entries["exps"].counts.tolist() == [5.0, 6.0]


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_squares_are_those_of_transformers(kind: str) -> None:
    model, description, source = model_of(kind)
    expected: dict[str, torch.Tensor] = {}

    def watch(name: str, inputs: torch.Tensor) -> None:
        total = inputs.double().flatten(0, -2).square().sum(0)
        expected[name] = expected.get(name, torch.zeros(())) + total

    for name in description.linears():
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: watch(name, inputs[0])
        )
    with torch.no_grad():
        model(WINDOWS)
    found = measure_squares(
        StreamedModel(description, source), WINDOWS, sources=["mix"]
    )
    assert (found.sources, found.windows, found.window_tokens) == (("mix",), 3, 24)
    assert set(found.tokens.values()) == {WINDOWS.numel()}
    assert found.sums.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found.sums[name].double(), values, rtol=1e-4, atol=0)


def test_experts_count_the_tokens_that_the_router_sends(tmp_path: Path) -> None:
    model = save_mixture(tmp_path, "qwen3_moe", num_hidden_layers=1)
    handle = opened(tmp_path)
    tokens = windows()
    streamed = StreamedModel(handle.description, handle.source)
    found = measure_squares(streamed, tokens, sources=["mix"])
    states, chosen = routed(model, 0, tokens)
    for expert in range(int(chosen.max()) + 1):
        name = expert_layer("qwen3_moe", 0, expert, "up")
        mine = states[(chosen == expert).any(-1)]
        assert found.tokens[name] == len(mine)
        torch.testing.assert_close(
            found.sums[name], mine.square().sum(0), rtol=1e-4, atol=1e-6
        )
