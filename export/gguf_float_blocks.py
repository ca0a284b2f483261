"""GGUF's blocks of four-bit floats: codes and scales to bytes and back, without loss.

The layouts (``u`` are E2M1 bit patterns):

=====  ==========  =====================================================
MXFP4  32 columns  E8M0 exponent, byte j = u[j] | u[j+16] << 4
NVFP4  64 columns  four E4M3 scales; for each of these 8 bytes: byte j =
                   u[j] | u[j+8] << 4
=====  ==========  =====================================================

An NVFP4 matrix has one more number, by which the runtime multiplies its product: a
float32 tensor of its own, ``NAME.scale`` beside ``NAME.weight``, with an entry for each
expert where several are stacked. It is the inverse of our outer scale. llama.cpp loads
it for every architecture, but not every graph applies it: in an MLP only llama's and
qwen3's do, and these multiply a bias as well.

Source: ggml's ``ggml-common.h`` and llama.cpp's ``llama-model.cpp``; checked against
``gguf.quants`` and llama.cpp in the tests.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from compress.core.scheme_names import FLOAT_SCHEMES
from compress.core.tensors import QuantizedTensor

Bytes = npt.NDArray[np.uint8]

_COLUMNS = {"mxfp4": 32, "nvfp4": 64}
# Architectures whose graphs apply factors, tried with llama-cpp-python 0.3.36.
_WITH_ATTENTION = frozenset({"llama", "deci", "qwen2", "qwen3", "qwen3moe"})
_WITH_MLP = frozenset({"llama", "qwen3", "qwen3moe"})


def block_columns(kind: str) -> int:
    """Columns of a block of the type ``kind``."""
    return _COLUMNS[kind]


def block_bytes(kind: str) -> int:
    """Bytes of a block of the type ``kind``."""
    columns = _COLUMNS[kind]
    return columns // 2 + columns // _group(kind)


def pack(tensor: QuantizedTensor, kind: str) -> Bytes:
    """Return the bytes ``[R, row_bytes]`` of codes of the type ``kind``."""
    rows, columns = tensor.shape
    blocks, group = rows * columns // _COLUMNS[kind], _group(kind)
    u = tensor.codes.cpu().view(blocks, -1, group)
    nibbles = u[..., : group // 2] | (u[..., group // 2 :] << 4)
    scale = tensor.scale.cpu().view(torch.uint8).view(blocks, -1)
    packed = torch.cat([scale, nibbles.reshape(blocks, -1)], dim=1)
    return packed.view(rows, -1).numpy()


def unpack(data: Bytes, kind: str, outer: Tensor | None = None) -> QuantizedTensor:
    """Return what :func:`pack` packed.

    Args:
        data: uint8 ``[R, row_bytes]``.
        kind: ``mxfp4`` or ``nvfp4``.
        outer: Outer scale float32 ``[1]``, of ``nvfp4`` only; one if left out.
    """
    scheme, group = FLOAT_SCHEMES[kind], _group(kind)
    rows, scales = data.shape[0], _COLUMNS[kind] // group
    blocks = torch.from_numpy(np.ascontiguousarray(data)).view(-1, block_bytes(kind))
    nibbles = blocks[:, scales:].reshape(len(blocks), scales, group // 2)
    codes = torch.cat([nibbles & 0x0F, nibbles >> 4], dim=-1).view(rows, -1)
    scale = blocks[:, :scales].reshape(rows, -1)
    if kind == "mxfp4":
        return QuantizedTensor(codes, scale, None, scheme)
    scale = scale.view(torch.float8_e4m3fn)
    outer = torch.ones(1) if outer is None else outer
    return QuantizedTensor(codes, scale, None, scheme, outer=outer)


def scale_name(target: str) -> str:
    """Return the name of the tensor that multiplies the product of ``target``."""
    return f"{target.removesuffix('.weight')}.scale"


def applies_factor(architecture: str, target: str, *, biased: bool) -> bool:
    """Whether llama.cpp multiplies a product by the factor of its matrix.

    Args:
        architecture: GGUF's name.
        target: GGUF name of the matrix.
        biased: Whether a bias is added to the product.
    """
    block, _, rest = target.partition(".")
    if block != "blk":  # embedding and head
        return False
    if ".attn_" in rest:
        return architecture in _WITH_ATTENTION
    return architecture in _WITH_MLP and not biased


def scale_bytes(matrices: Sequence[QuantizedTensor]) -> Bytes:
    """Return the float32 factors of matrices, uint8 ``[1, 4 * count]``."""
    outer = [matrix.outer for matrix in matrices if matrix.outer is not None]
    assert len(outer) == len(matrices), "nvfp4 has an outer scale"
    factors = torch.cat([1 / each.cpu().float().view(1) for each in outer])
    return factors.view(torch.uint8).view(1, -1).numpy()


def outer_of(factor: np.float32) -> Tensor:
    """Return the outer scale float32 ``[1]`` of a factor in a file."""
    return 1 / torch.tensor([float(factor)], dtype=torch.float32)


def _group(kind: str) -> int:
    group = FLOAT_SCHEMES[kind].group_size
    assert group is not None
    return group
