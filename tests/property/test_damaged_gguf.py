"""Damaged GGUF files and importance matrices: read, or refused with a place."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest
from gguf_fixtures import compressed, save_tokenizer
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from compress.core.errors import CheckpointError, CompressError
from compress.export.gguf import GGUFExporter
from compress.export.gguf_reader import open_gguf
from compress.export.imatrix import Importance, ImportanceMatrix, write_imatrix
from compress.export.imatrix_reader import read_imatrix
from compress.scoring import inspect

Damage: TypeAlias = Callable[[bytes], bytes]

NUMBERS = [0, 1, 7, 8, 9, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**60, 2**64 - 1]


def overwrite(share: float, data: bytes) -> Damage:
    """Return damage that puts ``data`` at a share of the file's length."""

    def apply(file: bytes) -> bytes:
        at = int(share * len(file))
        return file[:at] + data + file[at + len(data) :]

    return apply


def cut(share: float) -> Damage:
    return lambda file: file[: int(share * len(file))]


def drop(share: float, count: int) -> Damage:
    """Return damage that takes bytes out, so that all that follow move."""

    def apply(file: bytes) -> bytes:
        at = int(share * len(file))
        return file[:at] + file[at + count :]

    return apply


# Squared: most of what can go wrong is near the beginning.
places = st.floats(0, 1, exclude_max=True).map(lambda x: x * x)
pieces = st.one_of(
    st.binary(min_size=1, max_size=8),
    st.sampled_from(NUMBERS).map(lambda x: struct.pack("<Q", x)),
    st.sampled_from(NUMBERS).map(lambda x: struct.pack("<I", x % 2**32)),
)
damages = st.lists(
    st.one_of(
        st.builds(overwrite, places, pieces),
        st.builds(cut, places),
        st.builds(drop, places, st.integers(1, 16)),
    ),
    min_size=1,
    max_size=3,
)
many = settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that llama.cpp loads: two blocks, a tokenizer, coded layers."""
    folder = tmp_path_factory.mktemp("exported")
    save_tokenizer(folder)
    return GGUFExporter().write(compressed("llama", assets=folder), folder).files[0]


@pytest.fixture(scope="module")
def matrices(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An importance matrix in both flavours."""
    folder = tmp_path_factory.mktemp("matrix")
    values = np.arange(24, dtype="f4").reshape(2, 12)
    entries = {
        f"blk.{i}.ffn_down.weight": Importance(values, np.array([3, 4], "f4"))
        for i in range(3)
    }
    write_imatrix(folder / "x.gguf", ImportanceMatrix(entries, ("mix",), 2, 8))
    older = struct.pack("<i", len(entries))
    for name in entries:
        older += struct.pack(f"<i{len(name)}s", len(name), name.encode())
        older += struct.pack("<ii", 3, values.size) + values.tobytes()
    (folder / "x.dat").write_bytes(older + struct.pack("<ii3s", 2, 3, b"mix"))
    return folder / "x.gguf", folder / "x.dat"


def damaged(whole: Path, steps: list[Damage], folder: Path) -> Path:
    data = whole.read_bytes()
    for step in steps:
        data = step(data)
    path = folder / "damaged.gguf"
    path.write_bytes(data)
    return path


@many
@given(steps=damages)
def test_a_damaged_model_is_inspected_or_refused(
    steps: list[Damage], exported: Path, tmp_path: Path
) -> None:
    path = damaged(exported, steps, tmp_path)
    try:
        inspect(path)
        file = open_gguf(path)
        for name in file.tensors:
            file.read_values(name)
    except CompressError as error:
        assert str(path) in str(error)


@many
@given(steps=damages, flavour=st.sampled_from([0, 1]))
def test_a_damaged_importance_matrix_is_read_or_refused(
    steps: list[Damage], flavour: int, matrices: tuple[Path, Path], tmp_path: Path
) -> None:
    path = damaged(matrices[flavour], steps, tmp_path)
    try:
        matrix = read_imatrix(path)
    except CompressError as error:
        assert str(path) in str(error)
    else:
        for entry in matrix.entries.values():
            means = entry.means()
            assert (np.isfinite(means) & (means >= 0)).all()


@many
@given(share=places)
@example(share=0.0)
def test_every_cut_is_refused_at_a_byte(
    share: float, exported: Path, tmp_path: Path
) -> None:
    path = damaged(exported, [cut(share)], tmp_path)
    with pytest.raises(CheckpointError, match=r"damaged\.gguf: .*\bbytes? \d+"):
        inspect(path)


def number(code: str, value: int) -> bytes:
    return struct.pack(f"<{code}", value)


def key(kind: int) -> bytes:
    return number("Q", 1) + b"k" + number("I", kind)


HUGE = 1 << 36
NO_TENSOR, ONE_KEY = number("Q", 0), number("Q", 1)
# What follows the version, and where the number is that goes too far.
CLAIMS = {
    "tensors": (number("Q", HUGE // 32) + NO_TENSOR, 8),
    "more tensors than bytes": (number("Q", HUGE) + NO_TENSOR, 8),
    "keys": (NO_TENSOR + number("Q", HUGE // 32), 16),
    "a key": (NO_TENSOR + ONE_KEY + number("Q", HUGE // 2), 24),
    "a text": (NO_TENSOR + ONE_KEY + key(8) + number("Q", HUGE // 2), 45),
    "numbers": (
        NO_TENSOR + ONE_KEY + key(9) + number("I", 0) + number("Q", HUGE // 2),
        41,
    ),
    "texts": (
        NO_TENSOR + ONE_KEY + key(9) + number("I", 8) + number("Q", HUGE // 64),
        41,
    ),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_what_a_huge_file_claims_is_not_believed(name: str, tmp_path: Path) -> None:
    claim, place = CLAIMS[name]
    path = tmp_path / "huge.gguf"
    with path.open("wb") as file:
        file.write(b"GGUF" + number("I", 3) + claim)
        file.truncate(HUGE)  # takes no room on the disk
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=f"byte {place}: "):
        inspect(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_the_same_bytes_are_not_two_tensors(exported: Path, tmp_path: Path) -> None:
    tensors = list(open_gguf(exported).tensors.values())
    start = min(tensor.offset for tensor in tensors)
    first, second, *_ = tensors
    data = exported.read_bytes()
    at = data.index(second.name.encode())
    at = data.index(number("Q", second.offset - start), at)
    data = data[:at] + number("Q", first.offset - start) + data[at + 8 :]
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"byte {first.offset}, inside"):
        inspect(path)
