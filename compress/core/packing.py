"""Dense little-endian bit packing of codes, and its exact inverse.

Code ``i`` of a row takes bits ``[i*b, (i+1)*b)`` of the row's bit string; 32-bit words
are little-endian, codes may straddle two words and the tail is zero. This is the
``pack-quantized`` layout of compressed-tensors >= 0.18 (older releases left the top
bits of a word unused for 3, 5, 6 and 7 bits).
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 32
_RUN = 8  # codes of so many bytes fit a 64-bit word, whatever their bits
_CODES_AT_ONCE = 1 << 18  # fits a cache


def packed_words(columns: int, bits: int) -> int:
    """Return how many 32-bit words a row of ``columns`` codes takes."""
    return -(-columns * bits // _WORD)


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
