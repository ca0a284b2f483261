"""Reads GGUF files: metadata and tensor table at once, tensor bytes on request.

Every count, length, offset and size is checked against the file before it is used, so
that a cut or damaged file is an error with a place in it, found within the memory and
time that a large vocabulary takes. Data is read with plain file
reads: a memory map would count every page that was ever touched as ours.

Source: the GGUF specification (ggml ``docs/gguf.md``), versions 2 and 3.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from compress.core.errors import CheckpointError
from compress.export.gguf_blocks import Bytes
from compress.export.gguf_float_blocks import scale_name

Floats = npt.NDArray[np.float32]

_ALIGNMENT = 32
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    _BOOL: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_PLAIN: dict[str, type[np.generic]] = {
    "f32": np.float32,
    "f16": np.float16,
    "f64": np.float64,
}
_MAX_NAME_BYTES = 1 << 16
# Far beyond real headers (some 10 MB, 2 thousand tensors, a million items), and little
# enough to read by mistake: what is damaged may claim anything.
_MAX_HEADER_BYTES = 1 << 27
_MAX_KEYS, _MAX_TENSORS, _MAX_ITEMS = 1 << 16, 1 << 18, 1 << 22


@dataclass(frozen=True)
class MetadataValue:
    """A metadata value with its stored types, so that a copy keeps them.

    Attributes:
        value: A number, bool, string, or list of them.
        type: GGUF's number of the value's type.
        item_type: Type of the items of an array, else ``None``.
    """

    value: Any
    type: int
    item_type: int | None = None


@dataclass(frozen=True)
class StoredTensor:
    """One row of the tensor table.

    Attributes:
        name: GGUF name.
        type: Lower-case type name, such as ``q4_0``.
        shape: As torch has it: rows first.
        offset: Bytes from the start of the file.
        size_bytes: Bytes of the data.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


@dataclass(frozen=True)
class GGUFFile:
    """A GGUF file's metadata and tensor table; data stays on disk."""

    path: Path
    metadata: Mapping[str, MetadataValue]
    tensors: Mapping[str, StoredTensor]

    @property
    def architecture(self) -> str:
        """The ``general.architecture`` of the file."""
        return str(self.require("general.architecture"))

    def get(self, key: str, default: Any = None) -> Any:
        """Return a metadata value, or ``default``."""
        return self.metadata[key].value if key in self.metadata else default

    def require(self, key: str) -> Any:
        """Return a metadata value.

        Raises:
            CheckpointError: The file does not have it.
        """
        if key not in self.metadata:
            raise CheckpointError(f"{self.path}: GGUF metadata lacks {key!r}")
        return self.metadata[key].value

    def architecture_value(self, suffix: str, default: Any = None) -> Any:
        """Return ``<architecture>.<suffix>``, or ``default``."""
        return self.get(f"{self.architecture}.{suffix}", default)

    def read(self, name: str, *, start: int = 0, count: int | None = None) -> Bytes:
        """Return the bytes of rows of a tensor as uint8 ``[count, row_bytes]``."""
        rows = math.prod(self.tensors[name].shape[:-1])
        return self._bytes(name, start, rows - start if count is None else count)

    def factor(self, name: str, expert: int = 0) -> np.float32:
        """Return what the runtime multiplies products of a matrix by; 1 but for NVFP4.

        Args:
            name: GGUF name of the matrix.
            expert: Place in a stack.
        """
        if self.tensors[name].type != "nvfp4" or scale_name(name) not in self.tensors:
            return np.float32(1)
        return np.float32(self.read_values(scale_name(name)).reshape(-1)[expert])

    def read_values(
        self, name: str, *, start: int = 0, count: int | None = None
    ) -> Floats:
        """Return rows of a tensor as float32 ``[count, C]``; a vector is one row.

        Args:
            name: GGUF name.
            start: First row.
            count: Rows; all that follow if ``None``.

        Raises:
            CheckpointError: The type cannot be decoded.
        """
        import gguf

        tensor = self.tensors[name]
        rows = math.prod(tensor.shape[:-1])
        data = self._bytes(name, start, rows - start if count is None else count)
        # F32 and F16 are told apart by the dtype of the array, not by the enum.
        if tensor.type in _PLAIN:
            return data.view(_PLAIN[tensor.type]).astype(np.float32, copy=False)
        kind = gguf.GGMLQuantizationType[tensor.type.upper()]
        try:
            values: Floats = gguf.quants.dequantize(data, kind)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.path}: tensor {name} has type {tensor.type.upper()}, "
                "which cannot be decoded; convert the file to F16 or Q8_0"
            ) from error
        return values

    def _bytes(self, name: str, start: int, count: int) -> Bytes:
        tensor = self.tensors[name]
        width = tensor.size_bytes // math.prod(tensor.shape[:-1])
        offset = tensor.offset + start * width
        with self.path.open("rb") as file:
            data = np.fromfile(file, dtype=np.uint8, count=count * width, offset=offset)
        if len(data) != count * width:
            raise CheckpointError(
                f"{self.path}: tensor {name} ends after {len(data)} of "
                f"{count * width} bytes; the file changed while it was read"
            )
        return data.reshape(count, width)


def open_gguf(path: Path) -> GGUFFile:
    """Return the metadata and tensor table of a GGUF file.

    Raises:
        CheckpointError: The file is missing, no GGUF, cut short or damaged.
    """
    try:
        state = path.stat()
        return _open_as_it_is(path, state.st_size, state.st_mtime_ns)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read: {error.strerror}") from error


@lru_cache(maxsize=2)  # a header takes 0.2 s, mostly tokens, and is asked for by layer
def _open_as_it_is(path: Path, size: int, changed_ns: int) -> GGUFFile:
    with path.open("rb") as file:
        return _HeaderReader(path, file, size).read()


class _HeaderReader:
    """Position in the header of one file."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self._path, self._file, self._size = path, file, size
        self._at = 0  # where the number or text that was read last begins
        self._items = 0

    def read(self) -> GGUFFile:
        if self._file.read(4) != b"GGUF":
            raise CheckpointError(
                f"{self._path}: not a GGUF file (byte 0: it does not start with 'GGUF')"
            )
        version = self._number("I", "the version")
        if version not in (2, 3):
            raise CheckpointError(
                f"{self._path}: GGUF version {version} (byte {self._at}); this reads "
                "versions 2 and 3, little-endian"
            )
        tensor_count = self._number("Q", "the tensor count")
        self._check_count(tensor_count, 24, "tensor count", limit=_MAX_TENSORS)
        metadata_count = self._number("Q", "the metadata count")
        self._check_count(metadata_count, 13, "metadata count", limit=_MAX_KEYS)
        metadata: dict[str, MetadataValue] = {}
        alignment = _ALIGNMENT
        for _ in range(metadata_count):
            key, entry = self._entry()
            if key in metadata:
                raise self._damaged(f"{key!r} is there twice")
            if key == "general.alignment":
                alignment = self._alignment(entry)
            metadata[key] = entry
        rows: dict[str, StoredTensor] = {}
        for _ in range(tensor_count):
            row = self._tensor_row(alignment)
            if row.name in rows:
                raise self._damaged(f"tensor {row.name!r} is listed twice")
            rows[row.name] = row
        return GGUFFile(self._path, metadata, self._placed(rows, alignment))

    def _placed(
        self, rows: Mapping[str, StoredTensor], alignment: int
    ) -> dict[str, StoredTensor]:
        """Return the tensors by their places in the file, each inside of it."""
        start = -(-self._file.tell() // alignment) * alignment
        tensors = {n: replace(t, offset=start + t.offset) for n, t in rows.items()}
        end, before = start, "the header"
        for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.size_bytes)):
            if tensor.offset + tensor.size_bytes > self._size:
                raise CheckpointError(
                    f"{self._path}: tensor {tensor.name} should take bytes "
                    f"{tensor.offset} to {tensor.offset + tensor.size_bytes}, but the "
                    f"file has {self._size}; it is cut short or damaged: fetch it again"
                )
            if tensor.offset < end:
                raise CheckpointError(
                    f"{self._path}: damaged GGUF header: tensor {tensor.name} begins "
                    f"at byte {tensor.offset}, inside {before}; fetch the file again"
                )
            end, before = tensor.offset + tensor.size_bytes, tensor.name
        return tensors

    def _alignment(self, entry: MetadataValue) -> int:
        value = entry.value
        if type(value) is not int or value < 8 or value & (value - 1):
            shown = str(value)[:40]
            raise self._damaged(f"general.alignment is {shown}, no power of two from 8")
        return int(value)

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self._path}: damaged GGUF header at byte {self._at}: {what}; "
            "fetch the file again"
        )

    def _check_count(
        self, count: int, least_bytes: int, what: str, *, limit: int = _MAX_ITEMS
    ) -> None:
        left = self._size - self._file.tell()
        if count * least_bytes > left:
            raise self._damaged(f"{what} {count} exceeds the {left} bytes left")
        if count > limit:
            raise self._damaged(f"{what} is {count}; no model has more than {limit}")

    def _take(self, count: int, what: str) -> bytes:
        self._at = self._file.tell()
        if self._at + count > min(self._size, _MAX_HEADER_BYTES) < self._size:
            raise self._damaged(f"{what} ends beyond {_MAX_HEADER_BYTES} bytes")
        data = self._file.read(count)
        if len(data) != count:
            raise CheckpointError(
                f"{self._path}: the file ends at byte {self._size} inside {what} of "
                "its header; it is cut short: fetch it again"
            )
        return data

    def _number(self, code: str, what: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(code), what))[0]

    def _string(self, what: str, *, limit: int | None = None) -> str:
        length = self._number("Q", what)
        if length > (limit or self._size - self._file.tell()):
            raise self._damaged(f"{what} claims {length} bytes")
        return self._take(length, what).decode("utf-8", errors="replace")

    def _entry(self) -> tuple[str, MetadataValue]:
        key = self._string("a metadata key", limit=_MAX_NAME_BYTES)
        kind = self._number("I", f"the type of {key!r}")
        if kind != _ARRAY:
            return key, MetadataValue(self._value(kind, key), kind)
        item_kind = self._number("I", f"the item type of {key!r}")
        count = self._number("Q", f"the length of {key!r}")
        self._items += count
        if self._items > _MAX_ITEMS:
            raise self._damaged(f"{key!r} has {count} items, more than any vocabulary")
        if item_kind in _SCALARS:
            width = struct.calcsize(_SCALARS[item_kind])
            self._check_count(count, width, f"length of {key!r}")
            data = self._take(count * width, key)
            items = list(struct.unpack(f"<{count}{_SCALARS[item_kind]}", data))
        elif item_kind == _STRING:
            self._check_count(count, 8, f"length of {key!r}")
            items = [self._string(key) for _ in range(count)]
        else:
            raise self._damaged(f"{key!r} is an array of type {item_kind}")
        return key, MetadataValue(items, kind, item_kind)

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._string(key)
        if kind not in _SCALARS:
            raise self._damaged(f"{key!r} has the unknown type {kind}")
        return self._number(_SCALARS[kind], key)

    def _tensor_row(self, alignment: int) -> StoredTensor:
        """Return a row of the table, its offset counted from the first tensor."""
        import gguf

        name = self._string("a tensor name", limit=_MAX_NAME_BYTES)
        dimensions = self._number("I", name)
        if not 1 <= dimensions <= 4:
            raise self._damaged(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(reversed([self._number("Q", name) for _ in range(dimensions)]))
        number = self._number("I", name)
        try:
            kind = gguf.GGMLQuantizationType(number)
        except ValueError:
            raise self._damaged(
                f"tensor {name!r} has the unknown type {number}"
            ) from None
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if 0 in shape or shape[-1] % block:
            raise self._damaged(f"tensor {name!r} has shape {list(shape)}")
        size_bytes = math.prod(shape) // block * size
        offset = self._number("Q", name)
        if offset % alignment:
            raise self._damaged(f"tensor {name!r} is not aligned to {alignment} bytes")
        return StoredTensor(name, kind.name.lower(), shape, offset, size_bytes)
