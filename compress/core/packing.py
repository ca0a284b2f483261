"""Dense little-endian bit packing of codes, and its exact inverse.

Code ``i`` of a row takes bits ``[i*b, (i+1)*b)`` of the row's bit string; 32-bit words
are little-endian, codes may straddle two words and the tail is zero. This is the
``pack-quantized`` layout of compressed-tensors >= 0.18 (older releases left the top
bits of a word unused for 3, 5, 6 and 7 bits).
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.core.threads import on_threads

_WORD = 32
_RUN = 8  # codes of so many bytes fit a 64-bit word, whatever their bits
_CODES_AT_ONCE = 1 << 18  # fits a cache


def packed_words(columns: int, bits: int) -> int:
    """Return how many 32-bit words a row of ``columns`` codes takes."""
    return -(-columns * bits // _WORD)


@on_threads(1)
def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes along the last dimension.

    Args:
        codes: ``[R, C]`` integers in ``[0, 2**bits)``.
        bits: 1 to 8.

    Returns:
        int32 ``[R, ceil(C * bits / 32)]``.
    """
    rows, columns = codes.shape
    words = packed_words(columns, bits)
    packed = torch.empty(rows, words, dtype=torch.int32, device=codes.device)
    step = max(1, _CODES_AT_ONCE // max(1, columns))
    for start in range(0, rows, step):
        run = slice(start, start + step)
        packed[run] = _pack(codes[run], bits)[:, :words]
    return packed


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Return int32 words; their number is that of whole runs, rounded up."""
    rows, columns = codes.shape
    runs = -(-columns // _RUN)
    spaced = torch.zeros(rows, runs * _RUN, dtype=torch.uint8, device=codes.device)
    spaced[:, :columns] = codes
    dense = _moved(spaced.view(torch.int64), bits, 8, bits).view(torch.uint8)
    # The lowest bytes of each run, one after the other.
    size = -(-runs * bits // 4) * 4
    packed = torch.zeros(rows, size, dtype=torch.uint8, device=codes.device)
    filled = packed[:, : runs * bits].view(rows, runs, bits)
    filled.copy_(dense.view(rows, runs, _RUN)[:, :, :bits])
    return packed.view(torch.int32)


def _moved(runs: Tensor, bits: int, before: int, after: int) -> Tensor:
    """Return int64 runs of eight codes, each ``before`` bits wide, ``after`` wide.

    A run is a word in which the codes follow one another from the lowest bit on.
    """
    if before == after:
        return runs
    mask, total = (1 << bits) - 1, torch.zeros_like(runs)
    for i in range(_RUN):
        part = runs & (mask << (i * before))
        distance = i * (after - before)
        total |= part << distance if distance > 0 else part >> -distance
    return total


@on_threads(1)
def unpack_codes(words: Tensor, bits: int, columns: int) -> Tensor:
    """Return the codes that :func:`pack_codes` packed.

    Args:
        words: int32 ``[R, ceil(columns * bits / 32)]``.
        bits: 1 to 8.
        columns: Codes in a row.

    Returns:
        uint8 ``[R, columns]``.
    """
    rows = words.shape[0]
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=words.device)
    step = max(1, _CODES_AT_ONCE // max(1, columns))
    for start in range(0, rows, step):
        run = slice(start, start + step)
        codes[run] = _unpack(words[run], bits, columns)
    return codes


def _unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    rows, runs = words.shape[0], -(-columns // _RUN)
    given = words.contiguous().view(torch.uint8)
    size = max(given.shape[1], runs * bits)
    packed = torch.zeros(rows, size, dtype=torch.uint8, device=words.device)
    packed[:, : given.shape[1]] = given
    dense = torch.zeros(rows, runs * _RUN, dtype=torch.uint8, device=words.device)
    filled = packed[:, : runs * bits].view(rows, runs, bits)
    dense.view(rows, runs, _RUN)[:, :, :bits] = filled
    spaced = _moved(dense.view(torch.int64), bits, bits, 8)
    return spaced.view(torch.uint8)[:, :columns]


def packed_bytes(columns: int, bits: int) -> int:
    """Return how many bytes a row of ``columns`` codes takes."""
    return -(-columns * bits // 8)


@on_threads(1)
def pack_bytes(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes of up to 16 bits along the last dimension, byte by byte.

    The bit string is that of :func:`pack_codes`, cut after its last byte in use.

    Args:
        codes: ``[R, C]`` integers in ``[0, 2**bits)``.
        bits: 1 to 16.

    Returns:
        uint8 ``[R, ceil(C * bits / 8)]``.
    """
    rows, columns = codes.shape
    size = packed_bytes(columns, bits)
    if bits <= 8:
        words = pack_codes(codes, bits)
        return words.view(torch.uint8)[:, :size].contiguous()
    packed = torch.empty(rows, size, dtype=torch.uint8, device=codes.device)
    step = max(1, _CODES_AT_ONCE // max(1, columns))
    for start in range(0, rows, step):
        run = slice(start, start + step)
        packed[run] = _pack_wide(codes[run], bits)[:, :size]
    return packed


@on_threads(1)
def unpack_bytes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Return the codes that :func:`pack_bytes` packed.

    Args:
        packed: uint8 ``[R, ceil(columns * bits / 8)]``.
        bits: 1 to 16.
        columns: Codes in a row.

    Returns:
        ``[R, columns]``: uint8 up to 8 bits, else int32.
    """
    rows = packed.shape[0]
    dtype = torch.uint8 if bits <= 8 else torch.int32
    codes = torch.empty(rows, columns, dtype=dtype, device=packed.device)
    step = max(1, _CODES_AT_ONCE // max(1, columns))
    for start in range(0, rows, step):
        run = slice(start, start + step)
        unpack = _unpack if bits <= 8 else _unpack_wide
        codes[run] = unpack(packed[run], bits, columns)
    return codes


def _pack_wide(codes: Tensor, bits: int) -> Tensor:
    """Return uint8 runs of eight codes of more than 8 bits, each ``bits`` bytes."""
    rows, columns = codes.shape
    runs = -(-columns // _RUN)
    padded = torch.zeros(rows, runs * _RUN, dtype=torch.int32, device=codes.device)
    padded[:, :columns] = codes
    places = padded.view(rows, runs, _RUN)
    total = torch.zeros(rows, runs, bits + 1, dtype=torch.int32, device=codes.device)
    for i in range(_RUN):
        first, shift = divmod(i * bits, 8)
        moved = places[..., i] << shift  # at most 23 bits: three bytes
        for j in range(min(3, bits + 1 - first)):
            total[..., first + j] |= (moved >> (8 * j)) & 0xFF
    return total[..., :bits].to(torch.uint8).reshape(rows, runs * bits)


def _unpack_wide(packed: Tensor, bits: int, columns: int) -> Tensor:
    rows, runs = packed.shape[0], -(-columns // _RUN)
    padded = torch.zeros(rows, runs * bits + 2, dtype=torch.int32, device=packed.device)
    padded[:, : packed.shape[1]] = packed
    codes = torch.empty(rows, runs, _RUN, dtype=torch.int32, device=packed.device)
    for i in range(_RUN):
        first, shift = divmod(i * bits, 8)
        parts = [padded[:, first + j :: bits][:, :runs] << (8 * j) for j in range(3)]
        word = parts[0] | parts[1] | parts[2]
        codes[..., i] = (word >> shift) & ((1 << bits) - 1)
    return codes.view(rows, runs * _RUN)[:, :columns]
