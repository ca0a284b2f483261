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
    # 32 codes fill exactly `bits` words: pad to whole runs, then place the 32 positions
    # one after the other, vectorised over everything else.
    runs = -(-columns // _WORD)
    padded = torch.zeros(rows, runs * _WORD, dtype=torch.int64, device=codes.device)
    padded[:, :columns] = codes
    padded = padded.view(rows, runs, _WORD)
    words = torch.zeros(rows, runs, bits, dtype=torch.int64, device=codes.device)
    for i in range(_WORD):
        word, shift = divmod(i * bits, _WORD)
        words[:, :, word] |= padded[:, :, i] << shift
        if shift + bits > _WORD:
            words[:, :, word + 1] |= padded[:, :, i] >> (_WORD - shift)
    words &= 0xFFFFFFFF
    words -= (words >> 31) << 32  # two's complement of the int32 word
    packed = words.view(rows, runs * bits)[:, : packed_words(columns, bits)]
    return packed.to(torch.int32).contiguous()


def unpack_codes(words: Tensor, bits: int, columns: int) -> Tensor:
    """Return the codes that :func:`pack_codes` packed.

    Args:
        words: int32 ``[R, ceil(columns * bits / 32)]``.
        bits: 1 to 8.
        columns: Codes in a row.

    Returns:
        uint8 ``[R, columns]``.
    """
    rows, width = words.shape
    runs = -(-columns // _WORD)
    padded = torch.zeros(rows, runs * bits, dtype=torch.int64, device=words.device)
    padded[:, :width] = words.to(torch.int64) & 0xFFFFFFFF
    padded = padded.view(rows, runs, bits)
    codes = torch.empty(rows, runs, _WORD, dtype=torch.uint8, device=words.device)
    mask = (1 << bits) - 1
    for i in range(_WORD):
        word, shift = divmod(i * bits, _WORD)
        value = padded[:, :, word] >> shift
        if shift + bits > _WORD:
            value = value | (padded[:, :, word + 1] << (_WORD - shift))
        codes[:, :, i] = (value & mask).to(torch.uint8)
    return codes.view(rows, runs * _WORD)[:, :columns].contiguous()
