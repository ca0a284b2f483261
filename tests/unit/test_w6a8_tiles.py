"""Tiles hold the codes where the specification says, and give them back exactly."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.core.compressed_tensors import layout_of
from compress.core.errors import SchemeError
from compress.core.scheme import Scheme
from compress.core.tensors import QuantizedTensor
from compress.runtime.w6a8.tiles import (
    TiledWeight,
    obstacle,
    pack_tiles,
    run_of,
    unpack_tiles,
)


def codes(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(-32, 32, (rows, columns), generator=generator)
    return drawn.to(torch.int8)


def weight(scheme: str, rows: int, columns: int, dtype: str) -> QuantizedTensor:
    parsed = Scheme.parse(scheme).with_scales(dtype)
    groups = columns // parsed.group_of(columns)
    generator = torch.Generator().manual_seed(1)
    scale = torch.rand(rows, groups, generator=generator) * 1e-6 + 1e-5  # subnormal/4
    return QuantizedTensor(
        codes(rows, columns), scale.to(getattr(torch, dtype)), None, parsed
    )


def fragment_words(tile: bytes, lane: int) -> list[list[int]]:
    """Unpack a lane's registers as the specification writes it, word by word."""
    at = [512 * i + 16 * lane + 4 * w for i in range(3) for w in range(4)]
    words = [int.from_bytes(tile[a : a + 4], "little") for a in at]
    nibbles, pairs = words[:8], words[8:]
    f0, c, full = 0xF0F0F0F0, 0x0C0C0C0C, 0xFFFFFFFF
    result = []
    for j in range(4):
        first, second, low = nibbles[2 * j], nibbles[2 * j + 1], pairs[j]
        result.append(
            [
                first & f0 | (low << 2) & c & full,
                (first << 4) & f0 & full | low & c,
                second & f0 | (low >> 2) & c,
                (second << 4) & f0 & full | (low >> 4) & c,
            ]
        )
    return result


def test_a_tile_unpacks_to_the_fragments_of_the_tensor_cores() -> None:
    q = codes(128, 256)
    tiles = pack_tiles(q)
    assert tiles.shape == (2, 2, 4, 1536)
    for down in range(8):
        for across in range(2):
            tile = bytes(tiles[down // 4, across, down % 4].tolist())
            for lane in range(32):
                r, c = divmod(lane, 4)
                for j, registers in enumerate(fragment_words(tile, lane)):
                    for i, register in enumerate(registers):
                        row = 16 * down + r + 8 * (i % 2)
                        column = 128 * across + 32 * j + 4 * c + 16 * (i // 2)
                        expected = q[row, column : column + 4].tolist()
                        signed = register.to_bytes(4, "little")
                        found = [(b - 256 if b > 127 else b) // 4 for b in signed]
                        assert found == expected


def test_every_code_survives_in_every_place() -> None:
    for code in range(-32, 32):
        q = torch.full((16, 128), code, dtype=torch.int8)
        assert torch.equal(unpack_tiles(pack_tiles(q), (16, 128)), q)
    ramp = (torch.arange(16 * 128).view(16, 128) * 37 % 64 - 32).to(torch.int8)
    assert torch.equal(unpack_tiles(pack_tiles(ramp), (16, 128)), ramp)


@given(st.integers(1, 50), st.integers(1, 300), st.integers(0, 9))
def test_any_shape_comes_back(rows: int, columns: int, seed: int) -> None:
    q = codes(rows, columns, seed)
    tiles = pack_tiles(q)
    assert torch.equal(unpack_tiles(tiles, (rows, columns)), q)
    down, across = tiles.shape[:2]
    whole = unpack_tiles(tiles, (64 * down, 128 * across))
    assert not whole[rows:].any() and not whole[:, columns:].any()


@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**32))
def test_any_bytes_are_codes(down: int, across: int, seed: int) -> None:
    data = random.Random(seed).randbytes(down * across * 4 * 1536)
    tiles = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    tiles = tiles.view(down, across, 4, 1536)
    q = unpack_tiles(tiles, (64 * down, 128 * across))
    assert q.min() >= -32 and q.max() <= 31
    assert torch.equal(pack_tiles(q), tiles)


@pytest.mark.parametrize("scheme", ["w6a8-g32", "w6a8-g128", "w6a8-g64-group", "int6"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_files_form_is_made_again(scheme: str, dtype: str) -> None:
    tensor = weight(scheme, 17, 128, dtype)
    layout = layout_of(tensor.scheme)
    stored = layout.encode(tensor)
    read = layout.decode(stored, tensor.scheme, tensor.shape)
    again = layout.encode(TiledWeight.from_quantized(read).quantized(tensor.scheme))
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[name], stored[name]) for name in stored)


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        ("int4-g32", "not 6-bit"),
        ("int6-g32-asym", "not 6-bit"),
        ("w6a8-g16", "groups of 16 columns"),
        ("w6a8-g96", "groups of 96 columns"),
    ],
)
def test_what_cannot_be_computed_is_refused_with_a_reason(
    scheme: str, reason: str
) -> None:
    problem = obstacle(Scheme.parse(scheme), (16, 192))
    assert problem is not None and reason in problem


def test_float32_scales_are_refused() -> None:
    tensor = weight("int6-g32", 16, 128, "float32")
    with pytest.raises(SchemeError, match="scales are float32"):
        TiledWeight.from_quantized(tensor)


def test_sums_stay_integers_as_long_as_no_scale_changes() -> None:
    assert run_of(None, None) == 128
    assert run_of(256, None) == 128
    assert run_of(128, 64) == 64
