"""Reads importance matrices of llama.cpp, in the GGUF and in the older binary flavour.

The older one has no magic number: int32 entries; for each int32 length, name, int32
calls, int32 values, and float32 values that were multiplied by the calls; then, since
2024, int32 chunks, int32 length and the name of the dataset.

Source: llama.cpp ``tools/imatrix/imatrix.cpp``, ``tools/quantize/quantize.cpp``.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from compress.core.errors import CheckpointError
from compress.export.gguf_reader import Floats, GGUFFile, open_gguf
from compress.export.imatrix import COUNTS, SUMS, Importance, ImportanceMatrix

_LEAST_ENTRY_BYTES = 4 + 1 + 4 + 4 + 4


def read_imatrix(path: Path) -> ImportanceMatrix:
    """Return an importance matrix; of the older flavour each entry is one row.

    Raises:
        CheckpointError: The file is missing, is none, is damaged or holds numbers that
            are negative or not finite; the message says at which byte.
    """
    try:
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
        if is_gguf:
            return _of_gguf(open_gguf(path))
        return _Binary(path, path.read_bytes()).read()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read: {error.strerror}") from error


def _of_gguf(file: GGUFFile) -> ImportanceMatrix:
    names = [name.removesuffix(SUMS) for name in file.tensors if name.endswith(SUMS)]
    if not names:
        kind = file.get("general.type", "unknown")
        raise CheckpointError(
            f"{file.path}: no importance matrix: it holds no tensor *{SUMS} "
            f"(general.type is {kind!r}); give what llama-imatrix wrote"
        )
    entries = {}
    for name in names:
        sums, counts = (
            _plain(file, name + SUMS),
            _plain(file, name + COUNTS).reshape(-1),
        )
        if len(sums) != len(counts):
            raise _damaged(
                file.path,
                file.tensors[name + COUNTS].offset,
                f"{name} has {len(sums)} rows and {len(counts)} counts",
            )
        entries[name] = Importance(sums, counts)
    return ImportanceMatrix(
        entries,
        tuple(map(str, file.get("imatrix.datasets", ()))),
        int(file.get("imatrix.chunk_count", 0)),
        int(file.get("imatrix.chunk_size", 0)),
    )


def _plain(file: GGUFFile, name: str) -> Floats:
    if name not in file.tensors:
        raise CheckpointError(f"{file.path}: importance matrix lacks tensor {name}")
    tensor = file.tensors[name]
    if tensor.type != "f32":
        raise _damaged(file.path, tensor.offset, f"{name} is {tensor.type}, not f32")
    values = file.read_values(name)
    _check(file.path, tensor.offset, name, values)
    return values


def _check(path: Path, offset: int, name: str, values: Floats) -> None:
    good = np.isfinite(values) & (values >= 0)
    if not good.all():
        first = int(np.flatnonzero(~good.reshape(-1))[0])
        raise _damaged(
            path, offset + 4 * first, f"{name} holds {values.reshape(-1)[first]}"
        )


def _damaged(path: Path, offset: int, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: damaged importance matrix at byte {offset}: {what}; "
        "make it again with llama-imatrix"
    )


class _Binary:
    """Position in a file of the older flavour."""

    def __init__(self, path: Path, data: bytes) -> None:
        self._path, self._data, self._at = path, data, 0

    def read(self) -> ImportanceMatrix:
        count = self._number("the number of entries")
        if not 0 < count <= len(self._data) // _LEAST_ENTRY_BYTES:
            raise _damaged(
                self._path,
                0,
                f"it starts neither with 'GGUF' nor with a number of entries ({count} "
                f"in {len(self._data)} bytes)",
            )
        entries = dict(self._entry() for _ in range(count))
        if self._at == len(self._data):  # before 2024
            return ImportanceMatrix(entries, (), 0, 0)
        chunks = self._number("the number of chunks")
        dataset = self._text("the dataset")
        return ImportanceMatrix(entries, (dataset,), chunks, 0)

    def _entry(self) -> tuple[str, Importance]:
        start = self._at
        name = self._text("a name")
        calls = self._number(f"calls of {name!r}")
        size = self._number(f"the number of values of {name!r}")
        if not name or calls < 0 or size < 1:
            what = f"entry {name!r} has {calls} calls and {size} values"
            raise _damaged(self._path, start, what)
        at = self._at
        data = self._take(4 * size, f"values of {name!r}")
        values = np.frombuffer(data, "<f4").astype(np.float32)
        _check(self._path, at, name, values)
        counts = np.array([max(calls, 1)], np.float32)
        return name, Importance(values[None], counts)

    def _number(self, what: str) -> int:
        return int(struct.unpack("<i", self._take(4, what))[0])

    def _text(self, what: str) -> str:
        return self._take(self._number(what), what).decode("utf-8", errors="replace")

    def _take(self, size: int, what: str) -> bytes:
        left = len(self._data) - self._at
        if not 0 <= size <= left:
            raise _damaged(self._path, self._at, f"{what} takes {size} of {left} bytes")
        self._at += size
        return self._data[self._at - size : self._at]
