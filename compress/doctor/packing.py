"""Integers of 3, 5, 6 or 7 bits as compressed-tensors packed them before 0.18.

A word of 32 bits held ``32 // b`` codes, its top bits unused; since then codes form a
dense stream that straddles words. Newer loaders fail on the shapes, or read noise. Rows
so short that both layouts take as many words (``b = 3``: some up to 150 columns) look
sound here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.core.compressed_tensors import QUANT_METHOD
from compress.core.errors import CheckpointError
from compress.core.foreign import parse_json
from compress.core.packing import pack_codes, packed_words
from compress.doctor.faults import Fault
from compress.model.quantized_config import config_groups, group_of, quantization_of
from compress.model.sources import SafetensorsSource, read_header, weight_files
from compress.workdir import write_atomically

KIND = "padded-packing"
_FORMAT, _ODD = "pack-quantized", (3, 5, 6, 7)
_PACKED, _SHAPE, _ZERO = "weight_packed", "weight_shape", "weight_zero_point"
_INDEX = "model.safetensors.index.json"
_WORD = 32


@dataclass(frozen=True)
class _Packed:
    """A tensor in the old layout.

    Attributes:
        name: Of the tensor.
        bits: Of a code.
        count: Codes in a row, or in a column of zero points.
    """

    name: str
    bits: int
    count: int

    @property
    def is_zero(self) -> bool:
        """Whether it is packed along its first dimension."""
        return self.name.endswith(_ZERO)


def find(folder: Path) -> list[Fault]:
    """Return a fault for each file with such tensors."""
    found = []
    for file, old in _files(folder):
        text = (
            f"{len(old)} tensors of {old[0].bits} bits, such as {old[0].name}, are "
            "packed as compressed-tensors before 0.18 did: newer loaders cannot read "
            "them"
        )
        found.append(Fault(KIND, file.name, text))
    return found


def mend(folder: Path) -> None:
    """Write the files again with dense packing; memory for one file at a time."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    for file, old in list(_files(folder)):
        tensors = load_file(file)
        for one in old:
            tensors[one.name] = _dense(tensors[one.name], one)
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        temporary = file.with_name(f"{file.name}.part")
        try:
            save_file(tensors, temporary, metadata)
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
    _correct_size(folder)


def _files(folder: Path) -> Iterator[tuple[Path, list[_Packed]]]:
    """Yield each weight file that has tensors in the old layout, with these."""
    quantization = quantization_of(folder)
    if not quantization or quantization.get("quant_method") != QUANT_METHOD:
        return
    bits_of = _bits(folder)
    source = SafetensorsSource(folder)
    for file in weight_files(folder):
        old = []
        for name, info in read_header(file).items():
            layer, _, leaf = name.rpartition(".")
            bits = bits_of(layer) if leaf in (_PACKED, _ZERO) else None
            if bits is None or f"{layer}.{_SHAPE}" not in source.tensors():
                continue
            rows, columns = source.read(f"{layer}.{_SHAPE}").tolist()
            count = columns if leaf == _PACKED else rows
            present = info.shape[1] if leaf == _PACKED else info.shape[0]
            one = _Packed(name, bits, count)
            if present == _padded_words(one) != packed_words(count, bits):
                old.append(one)
        if old:
            yield file, old


def _bits(folder: Path) -> Callable[[str], int | None]:
    """Return a function from a layer to the bits of its codes, if they are odd."""
    try:
        groups = config_groups(folder)
    except CheckpointError:  # a kind that we do not read: nothing is known of it
        return lambda layer: None

    def bits(layer: str) -> int | None:
        group = group_of(layer, groups)
        if group is None or group.format != _FORMAT:
            return None
        number = int(group.entry["weights"].get("num_bits", 0))
        return number if number in _ODD else None

    return bits


def _padded_words(one: _Packed) -> int:
    return -(-one.count // (_WORD // one.bits))


def _dense(words: Tensor, one: _Packed) -> Tensor:
    """Return padded words as dense ones."""
    rows = words.t() if one.is_zero else words
    places = torch.arange(_WORD // one.bits) * one.bits
    spread = (rows.unsqueeze(-1) >> places) & ((1 << one.bits) - 1)
    codes = spread.flatten(1)[:, : one.count].to(torch.uint8)
    packed = pack_codes(codes, one.bits)
    return packed.t().contiguous() if one.is_zero else packed


def _correct_size(folder: Path) -> None:
    """Bring the total in the index of the shards up to date."""
    path = folder / _INDEX
    if not path.is_file():
        return
    index: dict[str, Any] = parse_json(path.read_text("utf-8"))
    if isinstance(index.get("metadata"), Mapping) and "total_size" in index["metadata"]:
        headers = [read_header(file) for file in weight_files(folder)]
        infos = [info for header in headers for info in header.values()]
        total = sum(i.elements * getattr(torch, i.dtype).itemsize for i in infos)
        index["metadata"]["total_size"] = total
        write_atomically(path, f"{json.dumps(index, indent=2)}\n".encode())
