"""FP4 and FP6: ``nvfp4-``, ``mxfp4-`` and ``mxfp6-pack-quantized``.

A code is a bit pattern, sign first. Two FP4 codes share a byte, the first in the low
half; four FP6 codes share three bytes, lowest bits first. ``weight_packed`` is uint8
``[R, C / 2]`` or ``[R, 3 C / 4]``. Every pattern is a number: these grids have no NaN.

The formats differ in their scales (``layout``). ``nvfp4-pack-quantized`` also holds FP4
under plain bfloat16 scales: its decompressor only divides by a global scale if there is
one. That is how ``fp4-gN`` is stored; transformers loads it, vLLM does not know it.

Source: compressed-tensors 0.20, ``compressors/nvfp4``, ``mxfp4`` and ``mxfp6``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.core.artifact import TensorInfo
from compress.core.compressed_tensors.layout import Layout
from compress.core.scheme import Scheme
from compress.core.tensors import QuantizedTensor


@dataclass(frozen=True)
class PackedFloats(Layout):
    """Codes of 4 or 6 bits in bytes, lowest bits first.

    Attributes:
        bits: Of a code.
    """

    bits: int

    @property
    def codes(self) -> str:
        """Suffix of the packed bytes."""
        return "weight_packed"

    def columns(self, width: int) -> int:
        """Return the columns that ``width`` bytes hold."""
        return width * 8 // self.bits

    def code_tensors(
        self, scheme: Scheme, shape: tuple[int, int]
    ) -> dict[str, TensorInfo]:
        """Describe the packed bytes."""
        size = (shape[0], shape[1] * self.bits // 8)
        return {"weight_packed": TensorInfo(size, "uint8")}

    def encode_codes(self, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """Return the codes, packed."""
        codes = tensor.codes
        if self.bits == 4:
            return {"weight_packed": codes[:, ::2] | (codes[:, 1::2] << 4)}
        a, b, c, d = (codes[:, i::4] for i in range(4))
        # Bytes hold a and the low bits of b, the rest of b and half of c, and so on.
        parts = (a | (b << 6), (b >> 2) | (c << 4), (c >> 4) | (d << 2))
        return {"weight_packed": torch.stack(parts, dim=-1).flatten(1)}

    def decode_codes(
        self, stored: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]
    ) -> tuple[Tensor, None]:
        """Return uint8 bit patterns."""
        packed = stored["weight_packed"]
        if self.bits == 4:
            parts = [packed & 0xF, packed >> 4]
        else:
            x, y, z = (packed[:, i::3] for i in range(3))
            first, second = x & 0x3F, (x >> 6) | ((y & 0xF) << 2)
            parts = [first, second, (y >> 4) | ((z & 3) << 4), z >> 2]
        return torch.stack(parts, dim=-1).flatten(1), None
