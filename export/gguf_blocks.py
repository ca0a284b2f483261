"""GGUF's 32-column blocks: codes and scales to bytes and back, without loss.

A symmetric grid with 32 columns a group and float16 scales *is* ``Q4_0``, ``Q5_0`` or
``Q8_0``; with float minima it is ``Q4_1`` or ``Q5_1``. Writing such a layer rounds
nothing. The layouts (little-endian; ``u`` are codes shifted to start at zero):

=====  =====  ====================================================
Q4_0   18 B   f16 d, byte j = u[j] | u[j+16] << 4
Q4_1   20 B   f16 d, f16 m, nibbles as Q4_0
Q5_0   22 B   f16 d, u32 whose bit j is bit 4 of u[j], low nibbles
Q5_1   24 B   f16 d, f16 m, then as Q5_0
Q8_0   34 B   f16 d, 32 signed bytes
=====  =====  ====================================================

The K and IQ4 types are in :mod:`compress.export.gguf_super_blocks`, four-bit floats in
:mod:`compress.export.gguf_float_blocks`.

Source: ggml's ``ggml-common.h``; checked against ``gguf.quants`` in the tests.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from compress.core import grids
from compress.core.errors import ExportError
from compress.core.scheme import Scheme, Zero
from compress.core.scheme_names import FLOAT_SCHEMES, GGUF_SCHEMES, K_SCHEMES
from compress.core.tensors import QuantizedTensor
from compress.export import gguf_float_blocks, gguf_super_blocks

Bytes = npt.NDArray[np.uint8]

BLOCK = 32
# fmt: off
StoredType = Literal[
    "f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0",
    "q6_k", "q5_k", "q4_k", "q3_k", "q2_k", "iq4_nl", "iq4_xs",
]
# fmt: on
ENCODED_TYPES = (*GGUF_SCHEMES, *K_SCHEMES)
"""Types that weights can be rounded to while a file is written."""
CODED_TYPES = (*ENCODED_TYPES, *FLOAT_SCHEMES)
"""Types that hold the codes of a plan."""
DENSE_BYTES = {"f32": 4, "f16": 2, "bf16": 2}
DENSE_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_LARGEST_HALF = 65504.0
_CHUNK_ELEMENTS = 1 << 22  # 16 MiB of float32 while a dense matrix is encoded


def coded_type(scheme: Scheme) -> str | None:
    """Return the GGUF type that holds codes of ``scheme`` exactly, or ``None``."""
    for name, known in K_SCHEMES.items():
        if scheme == known:
            return name
    for name, known in FLOAT_SCHEMES.items():
        if scheme.with_scales(known.scale_dtype) == known:  # it has no float scales
            return name
    if scheme.group_size != BLOCK or scheme.scale_dtype != "float16":
        return None
    for name, (bits, zero) in GGUF_SCHEMES.items():
        if scheme == Scheme(bits, BLOCK, zero):
            return name
    return None


def block_columns(kind: str) -> int:
    """Columns of one block of the coded type ``kind``."""
    if kind in FLOAT_SCHEMES:
        return gguf_float_blocks.block_columns(kind)
    return gguf_super_blocks.block_columns(kind) if kind in K_SCHEMES else BLOCK


def block_bytes(kind: str) -> int:
    """Bytes of one block of the coded type ``kind``."""
    if kind in K_SCHEMES:
        return gguf_super_blocks.block_bytes(kind)
    if kind in FLOAT_SCHEMES:
        return gguf_float_blocks.block_bytes(kind)
    bits, zero = GGUF_SCHEMES[kind]
    return (2 if zero is Zero.NONE else 4) + BLOCK * bits // 8


def row_bytes(kind: str, columns: int) -> int:
    """Bytes of a row of ``columns`` values stored as ``kind``."""
    if kind in DENSE_BYTES:
        return columns * DENSE_BYTES[kind]
    return columns // block_columns(kind) * block_bytes(kind)


def holds_columns(kind: str, columns: int) -> bool:
    """Whether rows of ``columns`` values can be stored as ``kind``."""
    return kind in DENSE_BYTES or columns % block_columns(kind) == 0


def pack_blocks(tensor: QuantizedTensor) -> Bytes:
    """Return the block bytes of a coded matrix.

    Args:
        tensor: ``[R, C]`` codes of a scheme for which :func:`coded_type` names a type.

    Returns:
        uint8 ``[R, row_bytes]``.
    """
    kind = coded_type(tensor.scheme)
    assert kind is not None, f"{tensor.scheme} has no GGUF type; check() said so"
    if kind in K_SCHEMES:
        return gguf_super_blocks.pack(tensor, kind)
    if kind in FLOAT_SCHEMES:
        return gguf_float_blocks.pack(tensor, kind)
    rows, columns = tensor.shape
    codes = tensor.codes.cpu().numpy().reshape(rows * columns // BLOCK, BLOCK)
    parts = [_half_bytes(tensor.scale)]
    if tensor.zero is not None:
        parts.append(_half_bytes(tensor.zero))
    if kind == "q8_0":
        parts.append(codes.view(np.uint8))
    else:
        unsigned = (codes.astype(np.int16) - tensor.scheme.lowest).astype(np.uint8)
        if tensor.scheme.bits == 5:
            high = (unsigned >> 4).astype(np.uint8)
            parts.append(np.packbits(high, axis=1, bitorder="little"))
        low = (unsigned & 0x0F).astype(np.uint8)
        packed = low[:, : BLOCK // 2] | (low[:, BLOCK // 2 :] << 4)
        parts.append(packed.astype(np.uint8))
    return np.concatenate(parts, axis=1).reshape(rows, -1)


def unpack_blocks(
    data: Bytes, kind: str, outer: Tensor | None = None
) -> QuantizedTensor:
    """Return the codes, scales and minima that :func:`pack_blocks` wrote.

    Args:
        data: uint8 ``[R, row_bytes]``.
        kind: One of :data:`CODED_TYPES`.
        outer: Outer scale of an ``nvfp4`` matrix, float32 ``[1]``.
    """
    if kind in FLOAT_SCHEMES:
        return gguf_float_blocks.unpack(data, kind, outer)
    if kind in K_SCHEMES:
        return gguf_super_blocks.unpack(data, kind)
    scheme = Scheme.parse(kind)
    rows = data.shape[0]
    blocks = data.reshape(-1, block_bytes(kind))
    groups = len(blocks) // rows
    scale = _halves(blocks[:, :2], rows, groups)
    zero, start = None, 2
    if scheme.zero is Zero.OFFSET:
        zero, start = _halves(blocks[:, 2:4], rows, groups), 4
    body = blocks[:, start:]
    if kind == "q8_0":
        codes = body.view(np.int8)
    else:
        nibbles = body[:, -BLOCK // 2 :]
        unsigned = np.concatenate([nibbles & 0x0F, nibbles >> 4], axis=1)
        if scheme.bits == 5:
            high = np.unpackbits(body[:, :4], axis=1, bitorder="little")
            unsigned = unsigned | (high << 4)
        codes = (unsigned.astype(np.int16) + scheme.lowest).astype(np.int8)
    codes = codes.reshape(rows, groups * BLOCK)
    return QuantizedTensor(torch.from_numpy(codes.copy()), scale, zero, scheme)


def encode_dense(weight: Tensor, kind: str, *, name: str) -> Bytes:
    """Return ``weight`` as bytes of a GGUF type, rounded to nearest.

    Args:
        weight: ``[R, C]`` or ``[C]``, any float type.
        kind: A dense type, or one of :data:`ENCODED_TYPES`.
        name: For messages.

    Returns:
        uint8 ``[R, row_bytes]`` (``R`` is 1 for a vector).

    Raises:
        ExportError: The tensor is not finite, or exceeds what ``kind`` can store.
    """
    matrix = weight if weight.dim() == 2 else weight.reshape(1, -1)
    rows, columns = matrix.shape
    encoded = np.empty((rows, row_bytes(kind, columns)), dtype=np.uint8)
    step = max(1, _CHUNK_ELEMENTS // columns)
    for start in range(0, rows, step):
        chunk = matrix[start : start + step]
        if not bool(torch.isfinite(chunk).all()):
            raise ExportError(f"{name} has NaN or infinite weights; mend the model")
        encoded[start : start + step] = _encode_rows(chunk, kind, name)
    return encoded


def _encode_rows(chunk: Tensor, kind: str, name: str) -> Bytes:
    if kind == "bf16":
        return chunk.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    values = chunk.float()
    if kind == "f32":
        return values.contiguous().view(torch.uint8).numpy()
    # A block's scale is at most its largest value, so what fits f16 has a finite scale.
    if float(values.abs().max()) > _LARGEST_HALF:
        raise ExportError(
            f"{name} has weights beyond 65504, the range of the half precision that "
            f"{kind} is made of; use bf16"
        )
    if kind == "f16":
        return values.to(torch.float16).contiguous().view(torch.uint8).numpy()
    if kind in K_SCHEMES:
        return pack_blocks(_searched(values, K_SCHEMES[kind]))
    import gguf

    encoded: Bytes = gguf.quants.quantize(values.contiguous().numpy(), ggml_type(kind))
    return encoded


def _searched(values: Tensor, scheme: Scheme) -> QuantizedTensor:
    """Return codes as llama.cpp would choose them without an importance matrix."""
    groups = grids.as_groups(values, scheme)
    parameters = grids.search_parameters(groups, scheme)
    levels = grids.encode(groups, parameters, scheme)
    return grids.assemble(levels.view(values.shape), parameters, scheme)


def ggml_type(kind: str) -> Any:
    """Return gguf's enum member for our lower-case type name."""
    import gguf

    return gguf.GGMLQuantizationType[kind.upper()]


def _half_bytes(values: Tensor) -> Bytes:
    flat = values.cpu().to(torch.float16).contiguous().view(torch.uint8)
    return flat.numpy().reshape(-1, 2)


def _halves(data: Bytes, rows: int, groups: int) -> Tensor:
    values = torch.from_numpy(np.ascontiguousarray(data)).view(torch.float16)
    return values.reshape(rows, groups)
