"""Number grids: the values that codes stand for, before a scale is applied.

A grid rounds numbers to its nearest *levels* (kept as float32, so that arithmetic on
them needs no decoding) and translates levels to stored codes and back. Everything above
- scales, error feedback, searches - sees only this, so every method works on every
grid.

* :class:`IntegerGrid`: whole numbers; code and level are the same.
* :class:`FloatGrid`: sign, exponent and mantissa of a few bits (``e2m1`` is FP4). A
  code is the bit pattern, sign first, as in the OCP microscaling and FP8
  specifications.
* :class:`TableGrid`: levels from a list; a code is an index.

Source: OCP Microscaling Formats v1.0 (2023) for E2M1, E2M3, E3M2; Micikevicius et al.
(2022), "FP8 Formats for Deep Learning", for E4M3 and E5M2; Wu et al. (2023),
"ZeroQuant-FP", for E3M0 (bias 3 here: 0 and +-2^-3 to 2^3); ggml's ``kvalues_iq4nl``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from compress.core.scheme import FLOAT_FORMATS, IQ4

_EXPONENT_BITS_OF_FLOAT32 = 0x7F800000


class Grid(ABC):
    """The values of a code, in units of the scale.

    Attributes:
        bits: Bits of a code.
        lowest: Smallest level.
        highest: Largest level.
        code_dtype: Type that codes are held in.
        reach: The level that the largest magnitude of a group is mapped to.
    """

    bits: int
    lowest: float
    highest: float
    code_dtype: torch.dtype
    reach: float

    @abstractmethod
    def round_(self, values: Tensor) -> Tensor:
        """Round float32 ``values`` to levels, ties to even, in place; returns them."""

    @abstractmethod
    def to_codes(self, levels: Tensor) -> Tensor:
        """Return the codes of levels, in ``code_dtype``."""

    @abstractmethod
    def to_levels(self, codes: Tensor) -> Tensor:
        """Return the float32 levels of codes."""


@dataclass(frozen=True)
class IntegerGrid(Grid):
    """Whole numbers from ``lowest`` to ``lowest + 2**bits - 1``."""

    bits: int
    lowest: int
    code_dtype = torch.int8

    @property
    def highest(self) -> int:  # type: ignore[override]
        """Largest level."""
        return self.lowest + (1 << self.bits) - 1

    @property
    def reach(self) -> float:  # type: ignore[override]
        """Half the span: clips the largest value by up to half a step, as others do."""
        return ((1 << self.bits) - 1) / 2

    def round_(self, values: Tensor) -> Tensor:
        """Round to whole numbers, ties to even, and clamp, in place."""
        return values.round_().clamp_(self.lowest, self.highest)

    def to_codes(self, levels: Tensor) -> Tensor:
        """Return int8 codes: the levels themselves."""
        return levels.to(torch.int8)

    def to_levels(self, codes: Tensor) -> Tensor:
        """Return the codes as float32."""
        return codes.float()


@dataclass(frozen=True)
class FloatGrid(Grid):
    """Small floating-point numbers.

    Attributes:
        exponent_bits: Bits of the exponent.
        mantissa_bits: Bits of the mantissa.
        least_exponent: Exponent of the smallest normal number; below it numbers are
            spaced evenly down to zero.
        highest: Largest level.
    """

    exponent_bits: int
    mantissa_bits: int
    least_exponent: int
    highest: float
    code_dtype = torch.uint8

    @property
    def bits(self) -> int:  # type: ignore[override]
        """Bits of a code, the sign among them."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def lowest(self) -> float:  # type: ignore[override]
        """Smallest level."""
        return -self.highest

    @property
    def reach(self) -> float:  # type: ignore[override]
        """The largest level."""
        return self.highest

    def _binade(self, values: Tensor) -> Tensor:
        """Return the power of two at or below each magnitude, at least the smallest."""
        # float32 keeps it in its exponent bits: exact, and faster than a logarithm.
        power = (values.view(torch.int32) & _EXPONENT_BITS_OF_FLOAT32).view(
            torch.float32
        )
        return power.clamp_(min=2.0**self.least_exponent)

    def round_(self, values: Tensor) -> Tensor:
        """Round to the nearest number, ties to the even mantissa, and clamp."""
        values.clamp_(self.lowest, self.highest)
        step = self._binade(values).mul_(2.0**-self.mantissa_bits)
        return values.div_(step).round_().mul_(step)

    def to_codes(self, levels: Tensor) -> Tensor:
        """Return uint8 bit patterns: sign, exponent, mantissa."""
        magnitude = levels.abs()
        binade = self._binade(magnitude)
        steps = magnitude / binade * 2.0**self.mantissa_bits
        exponent = torch.log2(binade) - self.least_exponent
        index = steps + exponent * 2.0**self.mantissa_bits
        sign = torch.signbit(levels).to(torch.uint8) << (self.bits - 1)
        return index.round().to(torch.uint8) | sign

    def to_levels(self, codes: Tensor) -> Tensor:
        """Return the float32 numbers of bit patterns."""
        return _table(self).to(codes.device)[codes.int()]


@cache
def _table(grid: FloatGrid) -> Tensor:
    """Return the float32 level of each bit pattern."""
    index = torch.arange(1 << (grid.bits - 1))
    width = 1 << grid.mantissa_bits
    field, mantissa = index // width, (index % width).float() / width
    exponent = (field - 1).clamp(min=0) + grid.least_exponent
    normal = (field > 0).float()
    positive = (normal + mantissa) * torch.exp2(exponent.float())
    return torch.cat([positive, -positive])


@dataclass(frozen=True)
class TableGrid(Grid):
    """Any whole numbers as levels.

    Attributes:
        values: The levels, smallest first; code ``i`` stands for ``values[i]``.
    """

    values: tuple[float, ...]
    code_dtype = torch.int8

    @property
    def bits(self) -> int:  # type: ignore[override]
        """Bits of a code."""
        return (len(self.values) - 1).bit_length()

    @property
    def lowest(self) -> float:  # type: ignore[override]
        """Smallest level."""
        return self.values[0]

    @property
    def highest(self) -> float:  # type: ignore[override]
        """Largest level."""
        return self.values[-1]

    @property
    def reach(self) -> float:  # type: ignore[override]
        """The largest magnitude that both signs have."""
        return min(-self.values[0], self.values[-1])

    def round_(self, values: Tensor) -> Tensor:
        """Round to the nearest level, ties upwards as ggml does, in place.

        Between two halves of whole numbers all round alike, so that a table of these
        answers; it is twenty times as fast as a search by ``bucketize``.
        """
        table = _nearest_levels(self.values, values.device)
        halves = values.clamp_(self.lowest, self.highest).mul_(2).floor_()
        places = halves.sub_(2 * self.lowest).int()
        places.clamp_(0, len(table) - 1)  # for NaN
        return values.copy_(table.index_select(0, places.flatten()).view_as(values))

    def to_codes(self, levels: Tensor) -> Tensor:
        """Return int8 indices."""
        return torch.bucketize(levels, self._middles(levels)).to(torch.int8)

    def to_levels(self, codes: Tensor) -> Tensor:
        """Return the float32 levels of indices."""
        return torch.tensor(self.values, device=codes.device)[codes.int()]

    def _middles(self, like: Tensor) -> Tensor:
        table = torch.tensor(self.values, device=like.device)
        return (table[1:] + table[:-1]) / 2


@cache
def _nearest_levels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return the level nearest to ``values[0] + i / 2`` at place ``i``."""
    table = torch.tensor(values)
    halves = torch.arange(2 * int(values[-1] - values[0]) + 1) / 2 + values[0]
    places = torch.bucketize(halves, (table[1:] + table[:-1]) / 2, right=True)
    return table[places].to(device)


_IQ4_LEVELS = (
    *(-127, -104, -83, -65, -49, -35, -22, -10),
    *(1, 13, 25, 38, 53, 69, 89, 113),
)

FLOAT_GRIDS = {name: FloatGrid(*numbers) for name, numbers in FLOAT_FORMATS.items()}
"""By name. FP4 is ``e2m1``, FP6 ``e2m3``, FP8 ``e4m3``."""

NAMED_GRIDS: dict[str, Grid] = {
    **FLOAT_GRIDS,
    IQ4: TableGrid(tuple(map(float, _IQ4_LEVELS))),
}
"""Float grids, and that of ggml's IQ4 types."""
