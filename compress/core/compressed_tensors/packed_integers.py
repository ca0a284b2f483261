"""``pack-quantized``: integers of 2 to 8 bits, packed into 32-bit words along the row.

A layer of ``[R, C]`` codes is ``weight_packed`` (codes plus ``2**(bits-1)``),
``weight_scale``, ``weight_zero_point`` (integer zero points only, packed along the rows
dimension) and ``weight_shape``. Pure arithmetic, no I/O.

Source: compressed-tensors 0.20, ``compressors/pack_quantized``; the tests compare with
that library's own packer.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compress.core.artifact import TensorInfo
from compress.core.compressed_tensors.layout import SCALE, Layout
from compress.core.packing import pack_codes, packed_words, unpack_codes
from compress.core.scheme import Scheme, Zero
from compress.core.tensors import QuantizedTensor

# pack_codes works in int64: rows are packed in runs of about this many codes so that a
# large embedding does not need eight bytes a weight at once.
_RUN = 1 << 23


class PackedIntegers(Layout):
    """Codes in a dense bit stream; see ``core/packing.py``."""

    @property
    def codes(self) -> str:
        """Suffix of the packed words."""
        return "weight_packed"

    def columns(self, width: int) -> None:
        """Return nothing: the words of a row leave the columns open."""

    def code_tensors(
        self, scheme: Scheme, shape: tuple[int, int]
    ) -> dict[str, TensorInfo]:
        """Describe packed codes, packed zero points and the shape."""
        rows, columns = shape
        words = packed_words(columns, scheme.bits)
        tensors = {"weight_packed": TensorInfo((rows, words), "int32")}
        if scheme.zero is Zero.INTEGER:
            groups = columns // scheme.group_of(columns)
            zeros = (packed_words(rows, scheme.bits), groups)
            tensors["weight_zero_point"] = TensorInfo(zeros, "int32")
        return {**tensors, "weight_shape": TensorInfo((2,), "int64")}

    def encode_codes(self, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """Return packed codes, packed zero points and the shape."""
        bits = tensor.scheme.bits
        stored = {"weight_packed": _pack(tensor.codes, bits)}
        if tensor.zero is not None:
            stored["weight_zero_point"] = _pack(tensor.zero.t(), bits).t().contiguous()
        shape = torch.tensor(tensor.shape, dtype=torch.int64)
        return {**stored, "weight_shape": shape}

    def decode_codes(
        self, stored: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]
    ) -> tuple[Tensor, Tensor | None]:
        """Return int8 codes and zero points; every bit pattern is a number."""
        rows, columns = shape
        zero = None
        if scheme.zero is Zero.INTEGER:
            packed = stored["weight_zero_point"].t()
            zero = _unpack(packed, scheme.bits, rows).t().contiguous()
            assert zero.shape == stored[SCALE].shape
        return _unpack(stored["weight_packed"], scheme.bits, columns), zero


def _pack(codes: Tensor, bits: int) -> Tensor:
    rows, columns = codes.shape
    packed = torch.empty(rows, packed_words(columns, bits), dtype=torch.int32)
    step = max(1, _RUN // columns)
    for start in range(0, rows, step):
        run = codes[start : start + step].to(torch.int16) + (1 << (bits - 1))
        packed[start : start + step] = pack_codes(run, bits)
    return packed


def _unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    rows = words.shape[0]
    codes = torch.empty(rows, columns, dtype=torch.int8)
    step = max(1, _RUN // columns)
    for start in range(0, rows, step):
        run = unpack_codes(words[start : start + step], bits, columns)
        codes[start : start + step] = run.to(torch.int16) - (1 << (bits - 1))
    return codes
