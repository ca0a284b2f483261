"""Codes on a grid, with scales and minima that are trained.

A unit is a single weight. Trained are the scales and float minima of groups, or, for
ggml's K types, the two float16 numbers of each super-block: the whole numbers under
them stay, and so do integer zero points, which no small step can move. A scale keeps
its sign and at least a part of its size, since a group without a scale is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from compress.core import grids, scales
from compress.core.scheme import Scales, Zero
from compress.core.tensors import QuantizedTensor, decode
from compress.core.tunable import TunableCodes, gathered

_LEAST_SHARE = 1 / 64  # of a scale, that training may leave of it


class GridCodes(TunableCodes):
    """Codes of a grid with scales of its own."""

    def __init__(self, tensors: Sequence[QuantizedTensor], device: Any) -> None:
        super().__init__(tensors, device)
        scheme = self.scheme
        codes = torch.stack([tensor.codes for tensor in tensors])
        self.codes = codes.view(len(tensors), -1, 1).to(self.device)
        count = 1 << scheme.bits
        kind = scheme.levels.code_dtype
        # Codes below zero are looked up from the end, as Python does.
        every = torch.arange(count) if scheme.lowest == 0 else _signed(count)
        self._levels = scheme.levels.to_levels(every.to(kind)).to(self.device)
        self._whole: Tensor | None = None  # scales of super-blocks
        self._zeros: Tensor | None = None  # whole zero points, or minima in units
        if scheme.scales is Scales.SUPER:
            self._whole = self._constant([tensor.scale for tensor in tensors])
            self._train("outer", [_given(tensor.outer) for tensor in tensors])
            self._scaled = "outer"
        else:
            self._train("scale", [tensor.scale for tensor in tensors])
            self._scaled = "scale"
        if scheme.zero is Zero.OFFSET and scheme.scales is Scales.FREE:
            self._train("zero", [_given(tensor.zero) for tensor in tensors])
        elif scheme.zero is not Zero.NONE:
            self._zeros = self._constant([_given(tensor.zero) for tensor in tensors])
        self._sign, self._floor = self._limits()

    def _constant(self, stored: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(stored)).to(self.device)

    def _limits(self) -> tuple[Tensor, Tensor]:
        """Return sign and least magnitude of each trained scale."""
        first = self._parameters[self._scaled].detach()
        size = first.abs()
        least = torch.finfo(self._scale_type).smallest_normal
        floor = (_LEAST_SHARE * size).clamp(min=least).minimum(size)
        return torch.where(first < 0, -1.0, 1.0), floor

    @property
    def _scale_type(self) -> torch.dtype:
        if self.scheme.scales is Scales.SUPER:
            return torch.float16
        return scales.TORCH_DTYPES[self.scheme.scale_dtype]

    @torch.no_grad()
    def settle_(self) -> None:
        """Keep the sign of scales, and a part of their size."""
        values = self._parameters[self._scaled]
        values.copy_((values * self._sign).maximum(self._floor) * self._sign)

    def _scales(self) -> tuple[Tensor, Tensor | None]:
        """Return scales ``[B, R, G]``, and zero points or minima."""
        count, rows, _ = self.shape
        scheme = self.scheme
        if scheme.scales is Scales.SUPER:
            outer = self._stored("outer", torch.float16).flatten(0, 1)
            assert self._whole is not None
            whole = self._whole.flatten(0, 1)
            scale = scales.from_stored(whole, scheme, outer, rows=count * rows)
            minima = None if self._zeros is None else self._zeros.flatten(0, 1)
            zero = scales.zeros_from_stored(minima, scheme, outer)
            return (
                scale.view(count, rows, -1),
                None if zero is None else zero.view(count, rows, -1),
            )
        scale = self._of_rows(self._stored("scale"))
        if "zero" in self._parameters:
            return scale, self._of_rows(self._stored("zero"))
        zero = None if self._zeros is None else self._of_rows(self._zeros.float())
        return scale, zero

    def _of_rows(self, values: Tensor) -> Tensor:
        block = self.scheme.rows_of_scale(self.shape[1])
        if block == 1:
            return values
        return values.repeat_interleave(block, 1)[:, : self.shape[1]]

    def _levels_of(self, codes: Tensor) -> Tensor:
        if self.scheme.is_integer:
            return codes.float()
        return self._levels[codes.long()]

    def decode(self) -> Tensor:
        """Return float32 values ``[B, R, C]``, differentiable in the numbers."""
        scale, zero = self._scales()
        levels = self._levels_of(self.codes).view(*scale.shape, -1)
        wide = None if zero is None else zero.unsqueeze(-1)
        values = decode(levels, scale.unsqueeze(-1), wide, self.scheme.zero)
        return values.view(self.shape)

    def _at(self, units: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return scale and zero point of units, ``[B, n, 1]``."""
        scale, zero = self._scales()
        count, rows, columns = self.shape
        size = columns // scale.shape[2]
        if units is None:

            def spread(values: Tensor) -> Tensor:
                wide = values.unsqueeze(-1).expand(-1, -1, -1, size)
                return wide.reshape(count, -1, 1)

        else:
            groups = units // columns * scale.shape[2] + units % columns // size

            def spread(values: Tensor) -> Tensor:
                return gathered(values.reshape(count, -1, 1), groups)

        return spread(scale), None if zero is None else spread(zero)

    @torch.no_grad()
    def project(
        self,
        target: Tensor,
        units: Tensor | None,
        *,
        beam: int = 1,
        order: Sequence[int] = (0,),
    ) -> Tensor:
        """Return the nearest codes; beam and order are for tables."""
        scale, zero = self._at(units)
        safe = torch.where(scale == 0, torch.ones_like(scale), scale)
        levels = grids.to_levels(self._parts(target, units), safe, zero, self.scheme)
        return self.scheme.levels.to_codes(levels)

    @torch.no_grad()
    def values(self, codes: Tensor, units: Tensor | None) -> Tensor:
        """Return float32 ``[B, n, 1]`` that codes mean at units."""
        scale, zero = self._at(units)
        return decode(self._levels_of(codes), scale, zero, self.scheme.zero)

    @torch.no_grad()
    def result(self) -> list[QuantizedTensor]:
        """Return the stored form of each matrix, on the CPU."""
        count, rows, columns = self.shape
        codes = self.codes.view(count, rows, columns).cpu()
        zeros = None if self._zeros is None else self._zeros.cpu()
        outer = None
        if self._whole is not None:
            scale = self._whole.cpu()
            outer = self._finite("outer", torch.float16)
        else:
            scale = self._finite("scale")
        if "zero" in self._parameters:
            zeros = self._finite("zero")
        return [
            QuantizedTensor(
                codes[i].clone(),
                scale[i].clone(),
                None if zeros is None else zeros[i].clone(),
                self.scheme,
                self.notes[i],
                None if outer is None else outer[i].clone(),
            )
            for i in range(count)
        ]


def _signed(count: int) -> Tensor:
    """Return codes around zero in the order of their two's complement."""
    half = count // 2
    return torch.cat([torch.arange(half), torch.arange(-half, 0)])


def _given(values: Tensor | None) -> Tensor:
    assert values is not None
    return values
