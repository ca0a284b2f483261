"""Codes packed byte by byte: the inverse, and a slow bit string to compare with."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.core.packing import pack_bytes, packed_bytes, unpack_bytes


def bit_string(row: list[int], bits: int) -> list[int]:
    total = sum(code << (i * bits) for i, code in enumerate(row))
    return list(total.to_bytes(-(-len(row) * bits // 8), "little"))


@given(
    bits=st.integers(1, 16),
    rows=st.integers(1, 4),
    columns=st.integers(1, 41),
    seed=st.integers(0, 2**16),
)
def test_bytes_are_the_bit_string_and_unpack_again(
    bits: int, rows: int, columns: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(1 << bits, (rows, columns), generator=generator)
    packed = pack_bytes(codes, bits)
    assert packed.shape == (rows, packed_bytes(columns, bits))
    assert packed.tolist() == [bit_string(row, bits) for row in codes.tolist()]
    assert torch.equal(unpack_bytes(packed, bits, columns).long(), codes)


@pytest.mark.parametrize("bits", [3, 11])
def test_many_rows_are_packed_in_runs_without_a_seam(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = torch.randint(1 << bits, (50, 37))
    whole = pack_bytes(codes, bits)
    monkeypatch.setattr("compress.core.packing._CODES_AT_ONCE", 7 * 37)
    assert torch.equal(pack_bytes(codes, bits), whole)
    assert torch.equal(unpack_bytes(whole, bits, 37).long(), codes)
