"""Scheme: grid, bits, group size and kind of zero point, as one name.

Names read ``int<bits>[-g<columns>][-asym|-offset]``: ``int4-g64`` is symmetric with a
scale for each 64 columns, ``int8`` has one scale a row, ``int4-g128-asym`` adds an
integer zero point, ``int4-g32-offset`` a float minimum. The simple GGUF types are names
of the same schemes (``q4_0`` is ``int4-g32``, ``q4_1`` is ``int4-g32-offset``), so that
one plan can be written to both kinds of file.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from compress.core.errors import SchemeError

_NAME = re.compile(r"int([2-8])(?:-g(\d+))?(?:-(asym|offset))?")
SCALE_BITS = {"float16": 16, "bfloat16": 16, "float32": 32}


class Zero(str, Enum):
    """How a grid is placed: around zero, by an integer code, or by a float minimum."""

    NONE = "none"  # value = code * scale
    INTEGER = "asym"  # value = (code - zero) * scale
    OFFSET = "offset"  # value = code * scale + zero


GGUF_SCHEMES: dict[str, tuple[int, Zero]] = {
    "q4_0": (4, Zero.NONE),
    "q5_0": (5, Zero.NONE),
    "q8_0": (8, Zero.NONE),
    "q4_1": (4, Zero.OFFSET),
    "q5_1": (5, Zero.OFFSET),
}


@dataclass(frozen=True)
class Scheme:
    """An integer grid with a scale for each run of columns.

    Attributes:
        bits: Nominal bits of a code, 2 to 8.
        group_size: Columns that share a scale; ``None`` means the whole row.
        zero: Kind of zero point.
        scale_dtype: Storage type of scales and float minima.
    """

    bits: int
    group_size: int | None
    zero: Zero = Zero.NONE
    scale_dtype: str = "float16"

    @classmethod
    def parse(cls, name: str) -> Scheme:
        """Return the scheme that ``name`` stands for.

        Raises:
            SchemeError: The name is unknown; the message lists the nearest.
        """
        key = name.strip().lower()
        if key in GGUF_SCHEMES:
            bits, zero = GGUF_SCHEMES[key]
            return cls(bits, 32, zero)
        match = _NAME.fullmatch(key)
        if match is None or match[2] == "0":
            known = [f"int{b}-g{g}" for b in range(2, 9) for g in (32, 64, 128)]
            near = difflib.get_close_matches(key, known + list(GGUF_SCHEMES), n=3)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise SchemeError(
                f"unknown scheme {name!r}{hint} Schemes are int2..int8 with an "
                "optional -gN and -asym or -offset, and "
                f"{', '.join(GGUF_SCHEMES)}; 'dense' keeps a layer as it is"
            )
        scheme = cls(
            int(match[1]), int(match[2]) if match[2] else None, Zero(match[3] or "none")
        )
        if scheme.zero is Zero.OFFSET and scheme.bits == 8:
            raise SchemeError(f"scheme {name!r}: an offset grid has at most 7 bits")
        return scheme

    @property
    def name(self) -> str:
        """Canonical name, without the storage type of the scales."""
        group = f"-g{self.group_size}" if self.group_size else ""
        zero = "" if self.zero is Zero.NONE else f"-{self.zero.value}"
        return f"int{self.bits}{group}{zero}"

    @property
    def lowest(self) -> int:
        """Smallest code: negative, except on an offset grid."""
        return 0 if self.zero is Zero.OFFSET else -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        """Largest code."""
        return self.lowest + (1 << self.bits) - 1

    def with_scales(self, dtype: str) -> Scheme:
        """Return the same scheme with scales stored as ``dtype``."""
        return replace(self, scale_dtype=dtype)

    def group_of(self, columns: int) -> int:
        """Return how many columns share a scale in a row of ``columns``."""
        return self.group_size or columns

    def check_columns(self, columns: int, layer: str) -> None:
        """Raise unless the groups tile a row of ``columns``.

        Raises:
            SchemeError: With the layer's name and the group sizes that do divide.
        """
        if columns % self.group_of(columns):
            fitting = [g for g in (16, 32, 64, 96, 128, 192, 256) if columns % g == 0]
            remedy = f"use {' or '.join(map(str, fitting))}" if fitting else "use none"
            raise SchemeError(
                f"group_size {self.group_size} does not divide the {columns} columns "
                f"of {layer}; {remedy}, or one scale a row (int{self.bits})"
            )

    def bits_per_weight(self, columns: int) -> float:
        """Bits of codes, scales and zero points for each weight of a row."""
        scale = SCALE_BITS[self.scale_dtype]
        extra = {Zero.NONE: 0, Zero.INTEGER: self.bits, Zero.OFFSET: scale}[self.zero]
        return self.bits + (scale + extra) / self.group_of(columns)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that :meth:`from_dict` reads back."""
        return {"name": self.name, "scale_dtype": self.scale_dtype}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Scheme:
        """Return the scheme that :meth:`to_dict` described."""
        dtype = data.get("scale_dtype", "float16")
        if dtype not in SCALE_BITS:
            raise SchemeError(f"unknown scale_dtype {dtype!r}; use {list(SCALE_BITS)}")
        return cls.parse(data["name"]).with_scales(dtype)
