"""Bit packing against numpy's packbits, for any shape and any width."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from compress.core.packing import pack_codes, packed_words, unpack_codes

BITS = st.integers(1, 8)


def random_codes(rows: int, columns: int, bits: int, seed: int) -> NDArray[np.uint8]:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 1 << bits, (rows, columns), dtype=np.uint8)


def packed_by_numpy(codes: NDArray[np.uint8], bits: int) -> NDArray[np.int32]:
    """Write each code's bits one after the other, low bit first, into words."""
    stream = (codes[..., None] >> np.arange(bits)) & 1
    stream = stream.reshape(len(codes), -1)
    stream = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    packed = np.packbits(stream.astype(np.uint8), axis=1, bitorder="little")
    return np.ascontiguousarray(packed).view("<i4")


@settings(deadline=None)
@given(BITS, st.integers(1, 4), st.integers(1, 140), st.integers(0, 1 << 30))
def test_packing_places_bits_as_numpy_does(
    bits: int, rows: int, columns: int, seed: int
) -> None:
    codes = random_codes(rows, columns, bits, seed)
    packed = pack_codes(torch.from_numpy(codes), bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (rows, packed_words(columns, bits))
    assert np.array_equal(packed.numpy(), packed_by_numpy(codes, bits))


@settings(deadline=None)
@given(BITS, st.integers(1, 4), st.integers(1, 140), st.integers(0, 1 << 30))
def test_unpacking_is_the_inverse_of_packing(
    bits: int, rows: int, columns: int, seed: int
) -> None:
    codes = torch.from_numpy(random_codes(rows, columns, bits, seed))
    unpacked = unpack_codes(pack_codes(codes, bits), bits, columns)
    assert unpacked.dtype == torch.uint8
    assert torch.equal(unpacked, codes)
