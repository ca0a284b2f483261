"""The ``pack-quantized`` layout of compressed-tensors: what a coded layer becomes.

A layer ``P`` of ``[R, C]`` codes is stored as ``P.weight_packed`` (codes plus
``2**(bits-1)``, bit-packed along the row), ``P.weight_scale``, ``P.weight_zero_point``
(integer zero points only, packed along the rows dimension) and ``P.weight_shape``.
Writer, reader and size estimate all use this one description. Pure arithmetic, no I/O.

Source: compressed-tensors 0.20, ``compressors/pack_quantized``; the tests compare with
that library's own packer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compress.core.artifact import TensorInfo
from compress.core.errors import CheckpointError, PlanError
from compress.core.packing import pack_codes, packed_words, unpack_codes
from compress.core.scheme import SCALE_BITS, Scheme, Zero
from compress.core.tensors import QuantizedTensor

QUANT_METHOD = "compressed-tensors"
FORMAT = "pack-quantized"
SUFFIXES = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
# pack_codes works in int64: rows are packed in runs of about this many codes so that a
# large embedding does not need eight bytes a weight at once.
_RUN = 1 << 23


def stored_tensors(scheme: Scheme, shape: tuple[int, int]) -> dict[str, TensorInfo]:
    """Describe what a layer of ``shape`` (rows, columns) is stored as, by suffix.

    Storage types are float types or ``int32`` and ``int64``.

    Raises:
        PlanError: The scheme has a float minimum, which the format cannot hold.
    """
    if not scheme.is_integer or scheme.rank:
        raise PlanError(f"{FORMAT} holds integers only, not {scheme.name}")
    if scheme.zero is Zero.OFFSET:
        raise PlanError(
            f"{FORMAT} holds no float minimum ({scheme.name}); "
            f"use {_integer_zero(scheme).name} or a symmetric scheme"
        )
    rows, columns = shape
    groups = columns // scheme.group_of(columns)
    tensors = {
        "weight_packed": TensorInfo(
            (rows, packed_words(columns, scheme.bits)), "int32"
        ),
        "weight_scale": TensorInfo((rows, groups), scheme.scale_dtype),
    }
    if scheme.zero is Zero.INTEGER:
        zeros = (packed_words(rows, scheme.bits), groups)
        tensors["weight_zero_point"] = TensorInfo(zeros, "int32")
    return {**tensors, "weight_shape": TensorInfo((2,), "int64")}


def encode(tensor: QuantizedTensor) -> dict[str, Tensor]:
    """Return the stored tensors of a layer, by suffix; see :func:`stored_tensors`."""
    bits = tensor.scheme.bits
    stored = {
        "weight_packed": _pack(tensor.codes, bits),
        "weight_scale": tensor.scale.contiguous(),
    }
    if tensor.zero is not None:
        stored["weight_zero_point"] = _pack(tensor.zero.t(), bits).t().contiguous()
    return {**stored, "weight_shape": torch.tensor(tensor.shape, dtype=torch.int64)}


def decode(stored: Mapping[str, Tensor], scheme: Scheme) -> QuantizedTensor:
    """Return the layer that :func:`encode` stored.

    Args:
        stored: By suffix, with the shapes and types of :func:`stored_tensors`.
        scheme: What the config says about the layer.

    Raises:
        CheckpointError: Tensors are missing or disagree with the scheme.
    """
    if "weight_shape" not in stored or stored["weight_shape"].numel() != 2:
        raise CheckpointError("weight_shape is missing or does not hold two sizes")
    rows, columns = (int(size) for size in stored["weight_shape"])
    if rows < 1 or columns < 1 or columns % scheme.group_of(columns):
        raise CheckpointError(
            f"weight_shape [{rows}, {columns}] cannot be {scheme.name}"
        )
    for suffix, info in stored_tensors(scheme, (rows, columns)).items():
        found = tuple(stored[suffix].shape) if suffix in stored else "missing"
        if found != info.shape:
            raise CheckpointError(
                f"{suffix} is {found}; {scheme.name} of [{rows}, {columns}] "
                f"needs {info.shape}"
            )
    zero = None
    if scheme.zero is Zero.INTEGER:
        packed = stored["weight_zero_point"].t()
        zero = _unpack(packed, scheme.bits, rows).t().contiguous()
    codes = _unpack(stored["weight_packed"], scheme.bits, columns)
    return QuantizedTensor(codes, stored["weight_scale"], zero, scheme)


def weight_arguments(scheme: Scheme) -> dict[str, Any]:
    """Return the ``weights`` entry of a config group for ``scheme``."""
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.zero is Zero.NONE,
        "strategy": "group" if scheme.group_size else "channel",
        "group_size": scheme.group_size,
        "dynamic": False,
        "actorder": None,
    }


def scheme_of_arguments(arguments: Mapping[str, Any], scale_dtype: str) -> Scheme:
    """Return the scheme that a config group's ``weights`` entry describes.

    Raises:
        CheckpointError: It is no integer grid in groups or channels.
    """
    bits, kind = arguments.get("num_bits", 0), arguments.get("type", "int")
    group = arguments.get("group_size")
    strategy = arguments.get("strategy") or ("group" if group else None)
    if group == -1:  # how the library spells "the whole row"
        strategy = "channel"
    fits = kind == "int" and strategy in ("group", "channel")
    if not fits or bits not in range(2, 9) or scale_dtype not in SCALE_BITS:
        raise CheckpointError(
            f"weights of {bits} bits, type {kind!r}, strategy {strategy!r}, scales "
            f"{scale_dtype!r} are not supported; integer groups or channels of 2 to 8 "
            "bits are"
        )
    if strategy == "group" and (not isinstance(group, int) or group < 1):
        raise CheckpointError(f"group_size {group!r} is not a number of columns")
    zero = Zero.NONE if arguments.get("symmetric", True) else Zero.INTEGER
    return Scheme(int(bits), group if strategy == "group" else None, zero, scale_dtype)


def _integer_zero(scheme: Scheme) -> Scheme:
    return Scheme(scheme.bits, scheme.group_size, Zero.INTEGER, scheme.scale_dtype)


def _pack(codes: Tensor, bits: int) -> Tensor:
    rows, columns = codes.shape
    packed = torch.empty(rows, packed_words(columns, bits), dtype=torch.int32)
    step = max(1, _RUN // columns)
    for start in range(0, rows, step):
        run = codes[start : start + step].to(torch.int16) + (1 << (bits - 1))
        packed[start : start + step] = pack_codes(run, bits)
    return packed


def _unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    rows = words.shape[0]
    codes = torch.empty(rows, columns, dtype=torch.int8)
    step = max(1, _RUN // columns)
    for start in range(0, rows, step):
        run = unpack_codes(words[start : start + step], bits, columns)
        codes[start : start + step] = run.to(torch.int16) - (1 << (bits - 1))
    return codes
