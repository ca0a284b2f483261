"""QuantizedTensor: codes, scales and zero points of one weight matrix."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from compress.core.scheme import Scheme, Zero

TORCH_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}


def decode(codes: Tensor, scale: Tensor, zero: Tensor | None, kind: Zero) -> Tensor:
    """Return the float32 values of codes, computed as every loader computes them.

    Args:
        codes: Integers or whole floats, any shape.
        scale: Broadcasts against ``codes``.
        zero: As ``scale``; ``None`` only for a symmetric grid.
        kind: What ``zero`` means.
    """
    values, scale = codes.float(), scale.float()
    if zero is None:
        return values * scale
    if kind is Zero.INTEGER:
        return (values - zero.float()) * scale
    return values * scale + zero.float()


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight matrix as integers.

    Attributes:
        codes: int8 ``[R, C]``, in ``[scheme.lowest, scheme.highest]``.
        scale: ``[R, C / group]`` in the scheme's storage type.
        zero: ``None``, int8 codes, or float minima in the storage type; as ``scale``.
        scheme: What the numbers mean.
        notes: What a report should say about this layer, such as a fallback.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    scheme: Scheme
    notes: tuple[str, ...] = field(default=())

    @property
    def shape(self) -> tuple[int, int]:
        """Rows (outputs) and columns (inputs)."""
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return ``[R, C]`` values, computed in float32 and rounded to ``dtype``."""
        rows, columns = self.shape
        groups = self.codes.view(rows, self.scale.shape[1], -1)
        zero = None if self.zero is None else self.zero.unsqueeze(-1)
        values = decode(groups, self.scale.unsqueeze(-1), zero, self.scheme.zero)
        return values.view(rows, columns).to(dtype)

    def state(self) -> dict[str, Tensor]:
        """Return the tensors to store; ``scheme`` and ``notes`` travel beside them."""
        tensors = {"codes": self.codes, "scale": self.scale}
        return tensors if self.zero is None else {**tensors, "zero": self.zero}
