"""Safetensors files written one tensor at a time, in shards with an index.

``safetensors.torch.save_file`` takes a whole shard as a dictionary of tensors, so its
memory grows with the shard. Here the layout is planned from shapes and types alone, the
header (eight bytes of length, then JSON) is written first, and each tensor goes to its
place as it arrives: one layer is in memory. The files are ordinary safetensors.

Inside a shard, tensors of wider types come first, as safetensors itself orders them:
offsets then are multiples of the element size, which readers that map the file need.

Source: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from pydantic import field_validator
from torch import Tensor

from compress.core.artifact import TensorInfo
from compress.core.contracts import Options
from compress.core.errors import CheckpointError, ExportError
from compress.core.foreign import MALFORMED, parse_json
from compress.core.sizes import parse_size as parse_size
from compress.core.tensors import TORCH_DTYPES

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_STORED = {
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "int16": ("I16", 2),
    "int32": ("I32", 4),
    "int64": ("I64", 8),
    "int8": ("I8", 1),
    "uint8": ("U8", 1),
    "float8_e4m3fn": ("F8_E4M3", 1),
}


class ShardOptions(Options):
    """Options of every exporter that writes shards.

    Attributes:
        max_shard_size: Largest file, such as ``5GB`` or ``500MiB``; a single tensor
            that is larger gets a file of its own.
    """

    max_shard_size: str = "5GB"

    @field_validator("max_shard_size", mode="before")
    @classmethod
    def _is_size(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if isinstance(value, str):
            parse_size(value)
        return value


@dataclass(frozen=True)
class Entry:
    """One tensor of a file, of a type that some format of ours stores."""

    name: str
    info: TensorInfo

    @property
    def size_bytes(self) -> int:
        """Bytes of data, without the header."""
        return self.info.elements * _STORED[self.info.dtype][1]


@dataclass(frozen=True)
class Shard:
    """One file and its tensors, in the order in which they are produced."""

    file: str
    entries: tuple[Entry, ...]

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.size_bytes for entry in self.entries)

    def offsets(self) -> dict[str, int]:
        """Return where each tensor's data starts, from the end of the header."""
        place: dict[str, int] = {}
        position = 0
        for entry in sorted(self.entries, key=lambda e: -_STORED[e.info.dtype][1]):
            place[entry.name] = position
            position += entry.size_bytes
        return place

    def header(self) -> bytes:
        """Return the bytes before the data; their number is a multiple of eight."""
        place = self.offsets()
        table: dict[str, object] = {"__metadata__": {"format": "pt"}}
        for entry in self.entries:
            start = place[entry.name]
            table[entry.name] = {
                "dtype": _STORED[entry.info.dtype][0],
                "shape": list(entry.info.shape),
                "data_offsets": [start, start + entry.size_bytes],
            }
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def plan_shards(entries: Sequence[Entry], max_shard_bytes: int) -> tuple[Shard, ...]:
    """Deal tensors to files in order; a file is larger only if one tensor is."""
    files: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if files[-1] and filled + entry.size_bytes > max_shard_bytes:
            files.append([])
            filled = 0
        files[-1].append(entry)
        filled += entry.size_bytes
    if len(files) == 1:
        return (Shard(SINGLE_NAME, tuple(files[0])),)
    names = [
        f"model-{number:05d}-of-{len(files):05d}.safetensors"
        for number in range(1, len(files) + 1)
    ]
    return tuple(
        Shard(name, tuple(part)) for name, part in zip(names, files, strict=True)
    )


def as_stored(name: str, tensor: Tensor, dtype: str) -> Tensor:
    """Return a dense tensor in the type that a file holds it in.

    Raises:
        ExportError: Values overflow that type.
    """
    if str(tensor.dtype) == f"torch.{dtype}":
        return tensor
    cast = tensor.to(TORCH_DTYPES[dtype])
    if not torch.equal(cast.isfinite(), tensor.isfinite()):
        raise ExportError(
            f"{name}: values up to {tensor.abs().max().item():.3g} do not fit {dtype}; "
            "set model.dtype to bfloat16 or float32"
        )
    return cast


def write_shards(
    folder: Path, shards: Sequence[Shard], tensors: Iterable[tuple[str, Tensor]]
) -> tuple[Path, ...]:
    """Write all files, and the index if there are several.

    Args:
        folder: Exists; files of the same names are replaced.
        shards: The plan of the files.
        tensors: Names and tensors, in the order of the plan; taken one at a time.

    Returns:
        The weight files, then the index.

    Raises:
        ExportError: A tensor is not the planned one, or the file cannot be written.
    """
    pending = iter(tensors)
    for shard in shards:
        _write_shard(folder / shard.file, shard, pending)
    files = [folder / shard.file for shard in shards]
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(shard.data_bytes for shard in shards)},
            "weight_map": {e.name: s.file for s in shards for e in s.entries},
        }
        files.append(folder / INDEX_NAME)
        with _writing(files[-1]):
            files[-1].write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    return tuple(files)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ExportError(
            f"{path}: cannot write: {error.strerror or error}; "
            "free some space and continue with --resume, or choose another folder"
        ) from error


def _write_shard(
    path: Path, shard: Shard, tensors: Iterator[tuple[str, Tensor]]
) -> None:
    header, place = shard.header(), shard.offsets()
    with ExitStack() as stack:
        with _writing(path):
            # Unbuffered: what a full disk refused is not tried again at closing.
            file = stack.enter_context(path.open("wb", buffering=0))
            _write_all(file, memoryview(header))
        for entry in shard.entries:
            data = _checked_bytes(path, entry, next(tensors, None))
            with _writing(path):
                file.seek(len(header) + place[entry.name])
                _write_all(file, data)
            del data  # before the next tensor is made: only one is in memory


def _write_all(file: FileIO, data: memoryview) -> None:
    """Write all of ``data``; one system call takes at most 2 GiB."""
    while data:
        data = data[file.write(data) :]


def _checked_bytes(
    path: Path, entry: Entry, produced: tuple[str, Tensor] | None
) -> memoryview:
    """Return the bytes of a tensor, which must be the planned one."""
    name, tensor = produced or ("nothing", torch.empty(0))
    found = TensorInfo(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
    if (name, found) != (entry.name, entry.info):
        raise ExportError(
            f"{path}: got {name} as {found.dtype} {list(found.shape)} where "
            f"{entry.name} as {entry.info.dtype} {list(entry.info.shape)} was planned; "
            "this is a bug of the quantizer or of the exporter, please report it"
        )
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return data.numpy().data


def _file_of(folder: Path, name: str) -> Path:
    """Return the file that should hold a tensor."""
    index = folder / INDEX_NAME
    if not index.is_file():
        return folder / SINGLE_NAME
    try:
        return folder / str(parse_json(index.read_text("utf-8"))["weight_map"][name])
    except (OSError, *MALFORMED) as error:
        raise CheckpointError(f"{index}: cannot find {name}: {error}") from error


def has_tensor(folder: Path, name: str) -> bool:
    """Whether a written folder holds a tensor.

    Raises:
        CheckpointError: The files are damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / SINGLE_NAME, framework="pt") as handle:
            return name in handle.keys()  # noqa: SIM118 - not a mapping
    except FileNotFoundError:
        pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder / SINGLE_NAME}: {error}") from error
    try:
        index = parse_json((folder / INDEX_NAME).read_text("utf-8"))
        return name in index["weight_map"]
    except (OSError, *MALFORMED) as error:
        raise CheckpointError(f"{folder / INDEX_NAME}: {error}") from error


def read_tensor(folder: Path, name: str) -> Tensor:
    """Return one tensor of a written folder.

    Raises:
        CheckpointError: There is no such tensor, or the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    file = _file_of(folder, name)
    try:
        with safe_open(file, framework="pt") as handle:
            # A copy: the original is a view of the mapped file.
            tensor: Tensor = handle.get_tensor(name).clone()
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: cannot read {name}: {error}") from error
    return tensor
