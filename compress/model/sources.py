"""Sources of dense tensors: a folder of safetensors, or a model already in memory."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.core.artifact import TensorInfo, TensorSource
from compress.core.errors import CheckpointError, NumericsError
from compress.core.families import Family
from compress.core.foreign import MALFORMED, parse_json

_DTYPES = {  # torch's name and bytes of the types whose sizes are checked
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
}
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "consolidated*.pth")


class SafetensorsSource(TensorSource):
    """Tensors of a Hugging Face folder, single file or sharded.

    Headers are checked against the file sizes at once, so that a truncated download is
    an error before any work. Each read opens the shard anew: a file kept open keeps the
    pages of every tensor ever read in the process's memory.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shard_of: dict[str, Path] = {}
        self._tensors: dict[str, TensorInfo] = {}
        for shard in weight_files(folder):
            for name, info in read_header(shard).items():
                if name in self._shard_of:
                    other = self._shard_of[name].name
                    raise CheckpointError(f"{name} is in both {other} and {shard.name}")
                self._shard_of[name] = shard
                self._tensors[name] = info

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Describe every tensor in the order of the files."""
        return self._tensors

    def read(self, name: str) -> Tensor:
        """Return one tensor on the CPU, in its storage type.

        Raises:
            CheckpointError: No such tensor, or the file cannot be read.
        """
        with self._shard(name) as file:
            tensor: Tensor = file.get_tensor(name).clone()
        return tensor

    def read_index(self, name: str, index: int) -> Tensor:
        """Return one entry along the first axis, without reading the others.

        Raises:
            CheckpointError: No such tensor, or the file cannot be read.
        """
        with self._shard(name) as file:
            tensor: Tensor = file.get_slice(name)[index].clone()
        return tensor

    @contextmanager
    def _shard(self, name: str) -> Iterator[Any]:
        from safetensors import SafetensorError, safe_open

        if name not in self._shard_of:
            raise CheckpointError(f"{self._folder}: tensor {name} is missing")
        try:
            with safe_open(self._shard_of[name], framework="pt") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._shard_of[name]}: {name}: {error}") from error


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of ``folder`` in order."""
    index = folder / _INDEX
    if index.is_file():
        try:
            names = parse_json(index.read_text("utf-8"))["weight_map"].values()
            unique = list(dict.fromkeys(map(str, names)))
        except MALFORMED as error:
            raise CheckpointError(f"{index}: not a shard index: {error}") from error
        for name in unique:
            if Path(name).name != name:
                raise CheckpointError(f"{index}: shard {name!r} leaves the folder")
            if not _is_file(folder / name):
                raise CheckpointError(f"{index}: shard {name} is missing from {folder}")
        return [folder / name for name in unique]
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    found = sorted(folder.glob("*.safetensors"))
    if found:
        return found
    pickles = [path.name for kind in _PICKLES for path in sorted(folder.glob(kind))]
    if pickles:
        raise CheckpointError(
            f"{folder} holds only pickled weights ({pickles[0]}), which can run code "
            "when they are opened; save the model as safetensors first"
        )
    raise CheckpointError(f"{folder}: no {_SINGLE} and no other *.safetensors file")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # no name that a file could have
        return False


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors that a safetensors file declares, after checking its size.

    Raises:
        CheckpointError: The file is truncated or its header is damaged.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > size - 8:
            raise CheckpointError(
                f"{path}: truncated or not safetensors: {size} bytes cannot hold "
                f"its header ({length} bytes declared); download it again"
            )
        raw = file.read(length)
    try:
        header: dict[str, Any] = parse_json(raw)
        header.pop("__metadata__", None)
        infos = {name: _info(path, name, entry) for name, entry in header.items()}
        end = max((int(e["data_offsets"][1]) for e in header.values()), default=0)
    except CheckpointError:
        raise
    except MALFORMED as error:
        raise CheckpointError(f"{path}: damaged safetensors header: {error}") from error
    if 8 + length + end != size:
        raise CheckpointError(
            f"{path}: truncated: the header describes {8 + length + end} bytes, the "
            f"file has {size}; download it again"
        )
    return infos


def _info(path: Path, name: str, entry: Mapping[str, Any]) -> TensorInfo:
    kind = entry["dtype"]
    shape = tuple(int(size) for size in entry["shape"])
    begin, end = entry["data_offsets"]
    if kind in _DTYPES:
        dtype, width = _DTYPES[kind]
        info = TensorInfo(shape, dtype)
        if info.elements * width != end - begin or begin < 0 or min((0, *shape)) < 0:
            raise CheckpointError(f"{path}: {name}: shape {shape} and offsets disagree")
        return info
    return TensorInfo(shape, str(kind).lower())


def in_model_order(
    tensors: Mapping[str, TensorInfo], family: Family
) -> dict[str, TensorInfo]:
    """Return the tensors as the model uses them, whatever order they were stored in.

    Embedding, block after block (linears as they run, then the rest by name), final
    norm, head. Files written from different sources of one model are then the same.
    """
    linears = (*family.block_linears(0), *family.block_linears(_experts_of(tensors)))
    paths = dict.fromkeys(linear.path for linear in linears)
    ranks = {path: rank for rank, path in enumerate(paths)}

    def place(name: str) -> tuple[int, int, int, str]:
        module = name.rpartition(".")[0]
        inside = module.removeprefix(f"{family.blocks}.")
        index, _, path = inside.partition(".")
        if inside != module and index.isdecimal():
            return 1, int(index), ranks.get(path, len(ranks)), name
        return {family.embedding: 0, family.head: 3}.get(module, 2), 0, 0, name

    return {name: tensors[name] for name in sorted(tensors, key=place)}


def _experts_of(tensors: Mapping[str, TensorInfo]) -> int:
    """Return the highest number after ``.experts.`` plus one; 0 without any."""
    found = (re.search(r"\.experts\.(\d+)\.", name) for name in tensors)
    return max((int(match[1]) + 1 for match in found if match), default=0)


class ModuleSource(TensorSource):
    """The parameters of a transformers model that is already in memory."""

    def __init__(self, model: nn.Module) -> None:
        # Drops the second name of tied weights, as save_pretrained does.
        self._parameters = dict(model.named_parameters(remove_duplicate=True))

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Describe every parameter in module order."""
        return {
            name: TensorInfo(tuple(p.shape), str(p.dtype).removeprefix("torch."))
            for name, p in self._parameters.items()
        }

    def read(self, name: str) -> Tensor:
        """Return a copy of one parameter on the CPU."""
        return self._parameters[name].detach().to("cpu", copy=True)

    def read_index(self, name: str, index: int) -> Tensor:
        """Return a copy of one entry of a parameter along its first axis."""
        return self._parameters[name].detach()[index].to("cpu", copy=True)


class ResidentSource(TensorSource):
    """Another source, kept in memory once read (``model.resident: true``)."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        self._read: dict[str, Tensor] = {}

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Describe the tensors of the wrapped source."""
        return self._source.tensors()

    def read(self, name: str) -> Tensor:
        """Return a copy of a tensor, from memory when it was read before."""
        if name not in self._read:
            self._read[name] = self._source.read(name)
        return self._read[name].clone()


def check_finite(tensor: Tensor, name: str) -> None:
    """Raise unless every value of a weight is finite.

    Raises:
        CheckpointError: With the tensor's name and the count of bad values.
    """
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise CheckpointError(
            f"{name} has {bad} NaN or infinite values out of {tensor.numel()}; "
            "the checkpoint is damaged, download or convert it again"
        )


def checked(outputs: Tensor, block: str) -> Tensor:
    """Return what a block computed, if all of it is finite.

    Raises:
        NumericsError: With the block's name.
    """
    if not bool(outputs.isfinite().all()):
        raise NumericsError(
            f"outputs of {block} are NaN or infinite; the checkpoint is damaged, or "
            f"its activations do not fit {outputs.dtype}"
        )
    return outputs


class SnapshotSource(TensorSource):
    """A copy of another source's tensors, taken at once.

    For a model in memory whose weights are about to be replaced.
    """

    def __init__(self, source: TensorSource) -> None:
        self._infos = dict(source.tensors())
        self._copies = {name: source.read(name) for name in self._infos}

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Describe the tensors as they were."""
        return self._infos

    def read(self, name: str) -> Tensor:
        """Return a copy of a tensor as it was."""
        return self._copies[name].clone()
