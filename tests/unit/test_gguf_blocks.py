from __future__ import annotations

from typing import get_args

import gguf
import numpy as np
import pytest
import torch
from gguf_fixtures import random_codes

from compress.core.errors import ExportError
from compress.core.scheme import Scheme
from compress.core.scheme_names import GGUF_SCHEMES
from compress.export.gguf_blocks import (
    DENSE_BYTES,
    ENCODED_TYPES,
    StoredType,
    coded_type,
    encode_dense,
    ggml_type,
    pack_blocks,
    row_bytes,
    unpack_blocks,
)


@pytest.mark.parametrize("kind", GGUF_SCHEMES)
def test_gguf_decodes_packed_blocks_to_the_same_values(kind: str) -> None:
    tensor = random_codes(6, 96, Scheme.parse(kind), seed=1)
    packed = pack_blocks(tensor)
    values = gguf.quants.dequantize(packed, ggml_type(kind))
    assert np.array_equal(values, tensor.dequantize().numpy())


@pytest.mark.parametrize("kind", GGUF_SCHEMES)
def test_unpack_is_inverse_of_pack(kind: str) -> None:
    tensor = random_codes(5, 64, Scheme.parse(kind), seed=2)
    back = unpack_blocks(pack_blocks(tensor), kind)
    assert torch.equal(back.codes, tensor.codes)
    assert torch.equal(back.scale, tensor.scale)
    assert (back.zero is None) == (tensor.zero is None)
    if tensor.zero is not None and back.zero is not None:
        assert torch.equal(back.zero, tensor.zero)


@pytest.mark.parametrize("kind", GGUF_SCHEMES)
def test_row_bytes_is_what_ggml_uses(kind: str) -> None:
    block, size = gguf.GGML_QUANT_SIZES[ggml_type(kind)]
    assert row_bytes(kind, 96) == 96 // block * size


@pytest.mark.parametrize(
    "name", ["int4-g64", "int4", "int3-g32", "int6-g32", "int4-g32-asym"]
)
def test_other_grids_have_no_type(name: str) -> None:
    assert coded_type(Scheme.parse(name)) is None


def test_bfloat16_scales_have_no_type() -> None:
    assert coded_type(Scheme.parse("q4_0").with_scales("bfloat16")) is None


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", *GGUF_SCHEMES])
def test_encode_dense_is_what_gguf_encodes(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 64, generator=generator)
    expected = gguf.quants.quantize(weight.numpy(), ggml_type(kind)).view(np.uint8)
    assert np.array_equal(encode_dense(weight, kind, name="w"), expected)


def test_encode_dense_in_chunks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    whole = encode_dense(weight, "q8_0", name="w")
    monkeypatch.setattr("compress.export.gguf_blocks._CHUNK_ELEMENTS", 128)
    assert np.array_equal(encode_dense(weight, "q8_0", name="w"), whole)


def test_values_beyond_half_precision_are_refused() -> None:
    with pytest.raises(ExportError, match=r"w has weights beyond 65504.*bf16"):
        encode_dense(torch.full((1, 32), 1e5), "f16", name="w")


def test_nan_is_refused() -> None:
    with pytest.raises(ExportError, match="w has NaN"):
        encode_dense(torch.full((1, 32), torch.nan), "bf16", name="w")


def test_an_option_may_name_every_type_that_is_written() -> None:
    assert {*get_args(StoredType)} == {*ENCODED_TYPES, *DENSE_BYTES}
