"""GGUF's blocks of 256 columns, and its tables of sixteen levels: to bytes and back.

The layouts of a block (little-endian; ``u`` are codes shifted to start at zero, ``s``
and ``m`` the whole numbers of scales and minima):

======  =====  ==================================================================
Q2_K    84 B   16 bytes s[j] | m[j] << 4, 2-bit plane of u, f16 d, f16 dmin
Q3_K    110 B  high bits of u, 2-bit plane of u, s + 32 in 12 bytes, f16 d
Q4_K    144 B  f16 d, f16 dmin, s and m in 12 bytes, nibbles of u
Q5_K    176 B  f16 d, f16 dmin, s and m in 12 bytes, high bits of u, nibbles of u
Q6_K    210 B  nibbles of u, 2-bit plane of u >> 4, 16 signed bytes s, f16 d
IQ4_XS  136 B  f16 d, high two bits of s + 32, low nibbles of s + 32, nibbles of u
IQ4_NL  18 B   f16 d, nibbles of u; a block of 32
======  =====  ==================================================================

* High bits: bit ``k`` of byte ``i`` belongs to ``u[32 k + i]``.
* A 2-bit plane: of each 128, bits ``2 k`` of byte ``i`` are of ``u[32 k + i]``.
* Nibbles: of each run of columns the first half is in the low nibbles, the second in
  the high ones. A run is 32 columns in IQ4, 64 in Q4_K and Q5_K, 128 in Q6_K.

Source: ggml's ``ggml-common.h`` and ``ggml-quants.c``; checked against ``gguf.quants``
in the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from compress.core.scheme import SUPER_COLUMNS, Scales, Scheme, Zero
from compress.core.scheme_names import K_SCHEMES
from compress.core.tensors import QuantizedTensor

Bytes = npt.NDArray[Any]  # of uint8; numpy types shifts of it as wider


class Fields(NamedTuple):
    """What a block holds, as numbers; one row for each block.

    Attributes:
        u: uint8 ``[N, 256]`` (32 in IQ4_NL), codes that start at zero.
        halves: bytes ``[N, 2]`` or ``[N, 4]``: ``d``, and ``dmin`` if there is one.
        scales: uint8 ``[N, G]``: the bytes of ``s``, or ``s + 32`` where these are
            signed and have 6 bits.
        minima: uint8 ``[N, G]``.
    """

    u: Bytes
    halves: Bytes
    scales: Bytes
    minima: Bytes


_EMPTY = np.empty((0, 0), np.uint8)


def block_columns(kind: str) -> int:
    """Columns of a block of the type ``kind``."""
    return SUPER_COLUMNS if K_SCHEMES[kind].scales is Scales.SUPER else 32


def block_bytes(kind: str) -> int:
    """Bytes of a block of the type ``kind``."""
    columns = block_columns(kind)
    return round(K_SCHEMES[kind].bits_per_weight(columns) * columns / 8)


def pack(tensor: QuantizedTensor, kind: str) -> Bytes:
    """Return the bytes ``[R, row_bytes]`` of codes of the type ``kind``."""
    rows, columns = tensor.shape
    blocks = columns // block_columns(kind)
    count = rows * blocks
    scheme = tensor.scheme
    shifted = tensor.codes.cpu().to(torch.int16) - scheme.lowest
    if scheme.grid != "int":
        shifted = tensor.codes.cpu()
    u = shifted.to(torch.uint8).numpy().reshape(count, -1)
    if scheme.scales is not Scales.SUPER:
        halves = _half_bytes(tensor.scale).reshape(count, 2)
        return _PACK[kind](Fields(u, halves, _EMPTY, _EMPTY)).reshape(rows, -1)
    assert tensor.outer is not None
    outer = tensor.outer
    if scheme.zero is Zero.OFFSET:  # d and dmin of a block side by side
        outer = outer.reshape(rows, 2, blocks).transpose(1, 2)
    halves = _half_bytes(outer).reshape(count, -1)
    shift = 32 if _is_shifted(scheme) else 0
    scale = (tensor.scale.cpu().to(torch.int16) + shift).to(torch.uint8)
    minima = _EMPTY
    if tensor.zero is not None:
        minima = tensor.zero.cpu().to(torch.uint8).numpy().reshape(count, -1)
    fields = Fields(u, halves, scale.numpy().reshape(count, -1), minima)
    return _PACK[kind](fields).reshape(rows, -1)


def unpack(data: Bytes, kind: str) -> QuantizedTensor:
    """Return what :func:`pack` packed into ``data`` ``[R, row_bytes]``."""
    scheme = K_SCHEMES[kind]
    rows = data.shape[0]
    fields = _UNPACK[kind](data.reshape(-1, block_bytes(kind)))
    codes = _tensor(fields.u, rows).to(torch.int16)
    if scheme.grid == "int":
        codes = codes + scheme.lowest
    halves = _tensor(fields.halves, rows).view(torch.float16)
    if scheme.scales is not Scales.SUPER:
        return QuantizedTensor(codes.to(torch.int8), halves, None, scheme)
    zero = None
    if scheme.zero is Zero.OFFSET:
        halves = halves.reshape(rows, -1, 2).transpose(1, 2).flatten(1)
        zero = _tensor(fields.minima, rows).to(torch.int8)
    scale = _tensor(fields.scales, rows).view(torch.int8)
    if _is_shifted(scheme):
        scale = scale - 32
    return QuantizedTensor(
        codes.to(torch.int8), scale, zero, scheme, outer=halves.contiguous()
    )


def _is_shifted(scheme: Scheme) -> bool:
    return scheme.zero is Zero.NONE and scheme.scale_codes[0] == -32


def _half_bytes(values: Tensor) -> Bytes:
    flat: Bytes = values.cpu().half().contiguous().view(torch.uint8).numpy()
    return flat


def _tensor(values: Bytes, rows: int) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values).reshape(rows, -1))


def _nibbles(u: Bytes, run: int) -> Bytes:
    pairs = (u & 15).reshape(len(u), -1, 2, run // 2)
    return (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(len(u), -1)


def _from_nibbles(data: Bytes, run: int) -> Bytes:
    halves = data.reshape(len(data), -1, 1, run // 2)
    return np.concatenate([halves & 15, halves >> 4], axis=2).reshape(len(data), -1)


def _planes(u: Bytes, bits: int) -> Bytes:
    """Pack ``bits`` low bits: of each run of ``8 / bits`` times 32, in 32 bytes."""
    parts = u.reshape(len(u), -1, 8 // bits, 32)
    packed = np.zeros((len(u), parts.shape[1], 32), np.uint8)
    for k in range(8 // bits):
        packed |= (parts[:, :, k] & ((1 << bits) - 1)) << (bits * k)
    return packed.reshape(len(u), -1)


def _from_planes(data: Bytes, bits: int) -> Bytes:
    parts = data.reshape(len(data), -1, 1, 32)
    mask = (1 << bits) - 1
    planes = [parts >> (bits * k) & mask for k in range(8 // bits)]
    return np.concatenate(planes, axis=2).reshape(len(data), -1)


def _sixes(s: Bytes, m: Bytes) -> Bytes:
    """Pack eight scales and eight minima of 6 bits into 12 bytes."""
    first = s[:, :4] | s[:, 4:] >> 4 << 6
    second = m[:, :4] | m[:, 4:] >> 4 << 6
    third = s[:, 4:] & 15 | (m[:, 4:] & 15) << 4
    return np.concatenate([first, second, third], axis=1)


def _from_sixes(data: Bytes) -> tuple[Bytes, Bytes]:
    first, second, third = data[:, :4], data[:, 4:8], data[:, 8:12]
    s = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=1)
    m = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=1)
    return s, m


def _joined(*parts: Bytes) -> Bytes:
    return np.concatenate(parts, axis=1)


def _pack_q2(f: Fields) -> Bytes:
    return _joined(f.scales | f.minima << 4, _planes(f.u, 2), f.halves)


def _unpack_q2(b: Bytes) -> Fields:
    s = b[:, :16]
    return Fields(_from_planes(b[:, 16:80], 2), b[:, 80:], s & 15, s >> 4)


def _pack_q3(f: Fields) -> Bytes:
    low = f.scales[:, :8] & 15 | (f.scales[:, 8:] & 15) << 4
    high = np.zeros((len(low), 4), np.uint8)
    for k in range(4):
        high |= (f.scales[:, 4 * k : 4 * k + 4] >> 4) << (2 * k)
    return _joined(_planes(f.u >> 2, 1), _planes(f.u, 2), low, high, f.halves)


def _unpack_q3(b: Bytes) -> Fields:
    low, high = b[:, 96:104], b[:, 104:108]
    tops = [high >> (2 * k) & 3 for k in range(4)]
    s = _joined(low & 15, low >> 4) | _joined(*tops) << 4
    u = _from_planes(b[:, 32:96], 2) | _from_planes(b[:, :32], 1) << 2
    return Fields(u, b[:, 108:], s, _EMPTY)


def _pack_q4(f: Fields) -> Bytes:
    return _joined(f.halves, _sixes(f.scales, f.minima), _nibbles(f.u, 64))


def _unpack_q4(b: Bytes) -> Fields:
    return Fields(_from_nibbles(b[:, 16:], 64), b[:, :4], *_from_sixes(b[:, 4:16]))


def _pack_q5(f: Fields) -> Bytes:
    sixes = _sixes(f.scales, f.minima)
    return _joined(f.halves, sixes, _planes(f.u >> 4, 1), _nibbles(f.u, 64))


def _unpack_q5(b: Bytes) -> Fields:
    u = _from_nibbles(b[:, 48:], 64) | _from_planes(b[:, 16:48], 1) << 4
    return Fields(u, b[:, :4], *_from_sixes(b[:, 4:16]))


def _pack_q6(f: Fields) -> Bytes:
    return _joined(_nibbles(f.u, 128), _planes(f.u >> 4, 2), f.scales, f.halves)


def _unpack_q6(b: Bytes) -> Fields:
    u = _from_nibbles(b[:, :128], 128) | _from_planes(b[:, 128:192], 2) << 4
    return Fields(u, b[:, 208:], b[:, 192:208], _EMPTY)


def _pack_iq4_xs(f: Fields) -> Bytes:
    low = f.scales[:, 0::2] & 15 | (f.scales[:, 1::2] & 15) << 4
    high = np.zeros((len(low), 2), np.uint8)
    for j in range(8):
        high[:, j // 4] |= (f.scales[:, j] >> 4) << (2 * (j % 4))
    return _joined(f.halves, high, low, _nibbles(f.u, 32))


def _unpack_iq4_xs(b: Bytes) -> Fields:
    high, low = b[:, 2:4], b[:, 4:8]
    s = np.empty((len(b), 8), np.uint8)
    s[:, 0::2], s[:, 1::2] = low & 15, low >> 4
    for j in range(8):
        s[:, j] |= (high[:, j // 4] >> (2 * (j % 4)) & 3) << 4
    return Fields(_from_nibbles(b[:, 8:], 32), b[:, :2], s, _EMPTY)


def _pack_iq4_nl(f: Fields) -> Bytes:
    return _joined(f.halves, _nibbles(f.u, 32))


def _unpack_iq4_nl(b: Bytes) -> Fields:
    return Fields(_from_nibbles(b[:, 2:], 32), b[:, :2], _EMPTY, _EMPTY)


_PACK: dict[str, Callable[[Fields], Bytes]] = {
    "q2_k": _pack_q2,
    "q3_k": _pack_q3,
    "q4_k": _pack_q4,
    "q5_k": _pack_q5,
    "q6_k": _pack_q6,
    "iq4_xs": _pack_iq4_xs,
    "iq4_nl": _pack_iq4_nl,
}
_UNPACK: dict[str, Callable[[Bytes], Fields]] = {
    "q2_k": _unpack_q2,
    "q3_k": _unpack_q3,
    "q4_k": _unpack_q4,
    "q5_k": _unpack_q5,
    "q6_k": _unpack_q6,
    "iq4_xs": _unpack_iq4_xs,
    "iq4_nl": _unpack_iq4_nl,
}
