"""One byte a weight: ``int-quantized``, ``float-quantized`` and ``mxfp8-quantized``.

``weight`` is int8 or float8 E4M3 ``[R, C]``; there is no ``weight_shape``. Integer zero
points are plain int8, as ``weight_scale``. The three formats differ in the type of the
codes and of the scales only. Other tools also keep integers of fewer bits so (a byte
each: llm-compressor's W6A8); we read them, and write them packed.

Source: compressed-tensors 0.20, ``compressors/naive_quantized`` and ``mxfp8``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compress.core.artifact import TensorInfo
from compress.core.compressed_tensors.layout import Layout
from compress.core.errors import CheckpointError
from compress.core.scheme import Scheme, Zero
from compress.core.tensors import QuantizedTensor

_NAN = 0x7F  # E4M3's two NaNs, whatever the sign


class PlainCodes(Layout):
    """Codes as they are, a byte each."""

    @property
    def codes(self) -> str:
        """Suffix of the codes: they take the weight's place."""
        return "weight"

    def columns(self, width: int) -> int:
        """Return ``width``: a column is an element."""
        return width

    def code_tensors(
        self, scheme: Scheme, shape: tuple[int, int]
    ) -> dict[str, TensorInfo]:
        """Describe codes, and zero points if there are some."""
        dtype = "int8" if scheme.is_integer else "float8_e4m3fn"
        tensors = {"weight": TensorInfo(shape, dtype)}
        if scheme.zero is Zero.INTEGER:
            groups = (shape[0], shape[1] // scheme.group_of(shape[1]))
            tensors["weight_zero_point"] = TensorInfo(groups, "int8")
        return tensors

    def encode_codes(self, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """Return the codes; bit patterns of E4M3 become its numbers."""
        codes = tensor.codes.contiguous()
        if not tensor.scheme.is_integer:
            codes = codes.view(torch.float8_e4m3fn)
        stored = {"weight": codes}
        if tensor.zero is not None:
            stored["weight_zero_point"] = tensor.zero.contiguous()
        return stored

    def decode_codes(
        self, stored: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]
    ) -> tuple[Tensor, Tensor | None]:
        """Return int8 codes, or uint8 bit patterns of E4M3.

        Raises:
            CheckpointError: A weight is NaN, or has more bits than the scheme.
        """
        codes = stored["weight"]
        if scheme.is_integer:
            low, high = (int(value) for value in codes.aminmax())
            if low < scheme.lowest or high > scheme.highest:
                raise CheckpointError(
                    f"weight holds codes from {low} to {high}, {scheme.name} has "
                    f"{scheme.lowest} to {scheme.highest}"
                )
        else:
            codes = codes.view(torch.uint8)
            bad = int(((codes & _NAN) == _NAN).sum())
            if bad:
                raise CheckpointError(f"weight holds {bad} codes that are NaN")
        zero = stored["weight_zero_point"] if scheme.zero is Zero.INTEGER else None
        return codes, zero
