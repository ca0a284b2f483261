"""Writes a GGUF file with one tensor in memory at a time."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.core.errors import ExportError
from compress.export.gguf_blocks import Bytes
from compress.export.gguf_reader import MetadataValue

_U32, _I32, _F32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9


@dataclass(frozen=True)
class TensorRow:
    """A tensor to write: GGUF name, lower-case type, torch shape and bytes."""

    name: str
    type: str
    shape: tuple[int, ...]
    size_bytes: int


def whole(value: int) -> MetadataValue:
    """Return ``value`` as GGUF's unsigned 32-bit integer."""
    return MetadataValue(int(value), _U32)


def real(value: float) -> MetadataValue:
    """Return ``value`` as GGUF's 32-bit float."""
    return MetadataValue(float(value), _F32)


def boolean(value: bool) -> MetadataValue:
    """Return ``value`` as GGUF's bool."""
    return MetadataValue(bool(value), _BOOL)


def text(value: str) -> MetadataValue:
    """Return ``value`` as a GGUF string."""
    return MetadataValue(value, _STRING)


def texts(values: Sequence[str]) -> MetadataValue:
    """Return ``values`` as a GGUF array of strings."""
    return MetadataValue(list(values), _ARRAY, _STRING)


def wholes(values: Sequence[int]) -> MetadataValue:
    """Return ``values`` as a GGUF array of signed 32-bit integers."""
    return MetadataValue(list(values), _ARRAY, _I32)


def reals(values: Sequence[float]) -> MetadataValue:
    """Return ``values`` as a GGUF array of 32-bit floats."""
    return MetadataValue(list(values), _ARRAY, _F32)


def write_gguf(
    path: Path,
    metadata: Mapping[str, MetadataValue],
    *,
    rows: Sequence[TensorRow],
    data: Iterable[Bytes],
) -> None:
    """Write a GGUF file of version 3.

    Args:
        path: A file that does not exist yet.
        metadata: Empty arrays, which the format's own library refuses, are left out.
        rows: The tensor table, in order.
        data: Bytes of each tensor in the same order; consumed one at a time.

    Raises:
        ExportError: The file cannot be written, for instance because the disk is full.
    """
    writer = _writer(metadata, rows)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for row, part in zip(rows, data, strict=True):
            assert part.nbytes == row.size_bytes, f"{row.name}: {part.nbytes} bytes"
            writer.write_tensor_data(part.reshape(math.prod(part.shape)))
    except OSError as error:
        raise ExportError(
            f"{path}: cannot write: {error.strerror or error}; "
            "free some space and continue with --resume, or choose another folder"
        ) from error
    finally:
        writer.close()


def file_bytes(
    metadata: Mapping[str, MetadataValue], *, rows: Sequence[TensorRow]
) -> int:
    """Return the size of the file that :func:`write_gguf` would write."""
    import gguf

    writer = _writer(metadata, rows)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header.gguf"
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        header = path.stat().st_size
    sizes = [header, *(row.size_bytes for row in rows)]
    pad = gguf.GGUFWriter.ggml_pad
    return sum(int(pad(size, gguf.GGUF_DEFAULT_ALIGNMENT)) for size in sizes)


def _writer(metadata: Mapping[str, MetadataValue], rows: Sequence[TensorRow]) -> Any:
    """Return a writer that knows metadata and tensor table."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(None, "")
    writer.kv_data[0].clear()  # the architecture, which an importance matrix has not
    for key, entry in metadata.items():
        if key == "general.alignment":
            continue
        if entry.item_type is not None and not entry.value:
            continue
        item = None if entry.item_type is None else gguf.GGUFValueType(entry.item_type)
        kind = gguf.GGUFValueType(entry.type)
        writer.add_key_value(key, entry.value, kind, sub_type=item)
    for row in rows:
        kind = gguf.GGMLQuantizationType[row.type.upper()]
        writer.add_tensor_info(
            row.name, row.shape, np.dtype(np.float32), row.size_bytes, raw_dtype=kind
        )
    return writer
