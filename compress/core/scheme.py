"""Scheme: which values a weight may take, and how scales are shared and stored.

A scheme has a number grid (integers or small floats), a run of columns and of rows that
share a scale, a way of storing scales, and, where a runtime rounds the inputs of the
layer too, what these are rounded to. Names are parsed and made in ``scheme_names``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from compress.core.errors import SchemeError

if TYPE_CHECKING:
    from compress.core.levels import Grid  # needs torch, which a config does not

SCALE_BITS = {"float16": 16, "bfloat16": 16, "float32": 32}
INTEGER = "int"
IQ4 = "iq4"
"""The grid of ggml's IQ4 types: sixteen levels, denser near zero."""
CODEBOOK = "codebook"
"""No grid of its own: codes are places in tables that are stored with the matrix."""
SUPER_COLUMNS = 256
"""Columns that share the float16 of ``SUPER`` scales."""
WHOLE = -1
"""As ``row_block``: all rows share one scale."""


class FloatFormat(NamedTuple):
    """A small floating-point format: sign, exponent, mantissa.

    Attributes:
        exponent_bits: Bits of the exponent.
        mantissa_bits: Bits of the mantissa.
        least_exponent: Of the smallest normal number.
        highest: Largest number.
    """

    exponent_bits: int
    mantissa_bits: int
    least_exponent: int
    highest: float

    @property
    def bits(self) -> int:
        """Bits of a number, the sign among them."""
        return 1 + self.exponent_bits + self.mantissa_bits


FLOAT_FORMATS = {
    "e2m1": FloatFormat(2, 1, 0, 6.0),
    "e3m0": FloatFormat(3, 0, -3, 8.0),
    "e2m3": FloatFormat(2, 3, 0, 7.5),
    "e3m2": FloatFormat(3, 2, -2, 28.0),
    "e4m3": FloatFormat(4, 3, -6, 448.0),
    "e5m2": FloatFormat(5, 2, -14, 57344.0),
}
"""Float grids by name; what they mean is in ``levels``."""


class Zero(str, Enum):
    """How a grid is placed: around zero, by an integer code, or by a float minimum."""

    NONE = "none"  # value = level * scale
    INTEGER = "asym"  # value = (level - zero) * scale
    OFFSET = "offset"  # value = level * scale + zero


class Scales(str, Enum):
    """How scales are stored.

    ``FREE`` scales have any value of a float type. ``POWER`` scales are powers of two,
    stored as their exponent in 8 bits (E8M0). ``RATIO`` scales are a float for each row
    over two to the power of a 4-bit shift (ZeroQuant-FP's M2). ``TWO_LEVEL`` scales are
    E4M3 numbers under one float32 for the matrix (NVFP4). ``SUPER`` scales are whole
    numbers under a float16 for each 256 columns, and so are minima, under another
    (ggml's K types).
    """

    FREE = "free"
    POWER = "pow2"
    RATIO = "ratio"
    TWO_LEVEL = "two_level"
    SUPER = "super"


_SUPER_BITS = {2: 4, 3: 6, 4: 6, 5: 6, 6: 8}  # of a scale, by bits of a code
_EXTRA_BITS = {Scales.POWER: 8, Scales.RATIO: 4, Scales.TWO_LEVEL: 8}


@dataclass(frozen=True)
class InputScheme:
    """What a runtime rounds the inputs of a layer to, with scales made as it goes.

    Attributes:
        grid: ``int8``, ``int6``, ``int4``, or a float grid such as ``e4m3``.
        group_size: Columns that share a scale; ``None`` means the whole token.
        two_level: Scales are E4M3 numbers under one float32, as in NVFP4.
    """

    grid: str
    group_size: int | None = None
    two_level: bool = False

    @property
    def bits(self) -> int:
        """Bits of a code."""
        if self.grid in FLOAT_FORMATS:
            return FLOAT_FORMATS[self.grid].bits
        return int(self.grid.removeprefix(INTEGER))


@dataclass(frozen=True)
class Codebook:
    """Tables of vectors that codes point to, instead of a grid.

    A run of ``vector`` neighbouring columns of a row is the sum of one entry of each of
    ``count`` tables, times the row's scale if rows have one. With vectors of one number
    this is a palette; with several tables it is additive quantization (AQLM); with
    tables of each run of columns it is product quantization.

    Attributes:
        count: Tables that are summed, ``M``.
        vector: Columns that one code stands for, ``g``.
        scaled: Whether each row has a scale.
        positional: Whether each run of columns has tables of its own, which all rows
            share, instead of each block of rows.
    """

    count: int = 1
    vector: int = 1
    scaled: bool = False
    positional: bool = False


@dataclass(frozen=True)
class Scheme:
    """A grid with a scale for each run of columns, or tables of a matrix's own.

    Attributes:
        bits: Nominal bits of a code, 2 to 8; of a place in a table, 1 to 16.
        group_size: Columns that share a scale; ``None`` means the whole row.
        zero: Kind of zero point; integers only.
        scale_dtype: Storage type of ``FREE`` scales, float minima, ``RATIO`` rows and
            tables.
        grid: ``int``, ``iq4``, ``codebook``, or the name of a float grid.
        scales: How scales are stored.
        row_block: Rows that share a scale, or tables; :data:`WHOLE` means all of them.
        rank: Columns of a low-rank correction in 8 bits (LoRC); 0 means none.
        inputs: What the inputs are rounded to at run time; ``None`` leaves them.
        codebook: Of the grid ``codebook``.
    """

    bits: int
    group_size: int | None
    zero: Zero = Zero.NONE
    scale_dtype: str = "float16"
    grid: str = INTEGER
    scales: Scales = Scales.FREE
    row_block: int = 1
    rank: int = 0
    inputs: InputScheme | None = None
    codebook: Codebook | None = None

    @classmethod
    def parse(cls, name: str) -> Scheme:
        """Return the scheme that ``name`` stands for.

        Raises:
            SchemeError: The name is unknown; the message lists the nearest.
        """
        from compress.core.scheme_names import parse

        return parse(name)

    @property
    def name(self) -> str:
        """Canonical name, without the storage type of the scales."""
        from compress.core.scheme_names import name_of

        return name_of(self)

    @property
    def is_integer(self) -> bool:
        """Whether codes are whole numbers."""
        return self.grid == INTEGER

    @cached_property
    def levels(self) -> Grid:
        """The number grid."""
        from compress.core.levels import NAMED_GRIDS, IntegerGrid

        if not self.is_integer:
            return NAMED_GRIDS[self.grid]
        return IntegerGrid(self.bits, self.lowest)

    @property
    def lowest(self) -> int:
        """Smallest code: negative, except on an offset or a float grid."""
        is_signed = self.is_integer and self.zero is not Zero.OFFSET
        return -(1 << (self.bits - 1)) if is_signed else 0

    @property
    def highest(self) -> int:
        """Largest code."""
        return self.lowest + (1 << self.bits) - 1

    @property
    def code_bits(self) -> float:
        """Bits of the codes of a weight, without scales and tables."""
        if self.codebook is None:
            return self.bits
        return self.bits * self.codebook.count / self.codebook.vector

    def with_scales(self, dtype: str) -> Scheme:
        """Return the same scheme with float scales stored as ``dtype``.

        ``SUPER`` scales are defined with float16 and keep it.
        """
        if self.scales is Scales.SUPER:
            return self
        return replace(self, scale_dtype=dtype)

    @property
    def scale_codes(self) -> tuple[int, int]:
        """Smallest and largest whole number that a ``SUPER`` scale can be.

        Grids around zero have signed scales, which decide on which side their one more
        level lies.
        """
        count = 1 << _SUPER_BITS[self.bits]
        if self.zero is Zero.NONE:
            return -count // 2, count // 2 - 1
        return 0, count - 1

    @property
    def weights(self) -> Scheme:
        """The same scheme without what it does to inputs."""
        return replace(self, inputs=None)

    def group_of(self, columns: int) -> int:
        """Return how many columns share a scale in a row of ``columns``."""
        return self.group_size or columns

    def rows_of_scale(self, rows: int) -> int:
        """Return how many rows share a scale in a matrix of ``rows``."""
        return rows if self.row_block == WHOLE else self.row_block

    @property
    def rows_are_independent(self) -> bool:
        """Whether rows of a matrix share nothing: no scale, table or correction."""
        own = self.scales in (Scales.FREE, Scales.SUPER) and self.row_block == 1
        return own and self.codebook is None and not self.rank

    def table_runs(self, rows: int, columns: int) -> int:
        """Return how many runs of rows, or of columns, have tables of their own."""
        if self.codebook is not None and self.codebook.positional:
            return columns // self.codebook.vector
        return math.ceil(rows / self.rows_of_scale(rows))

    def check_columns(self, columns: int, layer: str) -> None:
        """Raise unless the groups tile a row of ``columns``.

        Raises:
            SchemeError: With the layer's name and the group sizes that do divide.
        """
        if self.scales is Scales.SUPER and columns % SUPER_COLUMNS:
            raise SchemeError(
                f"{self.name} holds rows in runs of {SUPER_COLUMNS} columns, which do "
                f"not divide the {columns} columns of {layer}; use a scheme with "
                "groups of 32"
            )
        if self.codebook is not None and columns % self.codebook.vector:
            raise SchemeError(
                f"{self.name} codes {self.codebook.vector} columns at a time, which do "
                f"not divide the {columns} columns of {layer}"
            )
        if columns % self.group_of(columns):
            fitting = [g for g in (16, 32, 64, 96, 128, 192, 256) if columns % g == 0]
            remedy = f"use {' or '.join(map(str, fitting))}" if fitting else "use none"
            row = f"int{self.bits}" if self.is_integer else self.grid
            raise SchemeError(
                f"group_size {self.group_size} does not divide the {columns} columns "
                f"of {layer}; {remedy}, or one scale a row ({row})"
            )

    def check_rank(self, rows: int, columns: int, layer: str) -> None:
        """Raise if the low-rank correction has a higher rank than the matrix.

        Raises:
            SchemeError: With the layer's name and the largest rank that it has.
        """
        most = min(rows, columns)
        if self.rank > most:
            raise SchemeError(
                f"{layer} is {rows} x {columns}: a correction of rank {self.rank} is "
                f"more than the matrix has; use -lorc{most} or less"
            )

    def bits_per_weight(self, columns: int, rows: int | None = None) -> float:
        """Bits of codes, scales, zero points and corrections for each weight.

        Args:
            columns: Of a row.
            rows: Of the matrix; needed where rows share something.
        """
        if self.scales is Scales.SUPER:
            shared = 1 if self.zero is Zero.NONE else 2  # scales, or minima as well
            inner = _SUPER_BITS[self.bits] / self.group_of(columns)
            total = self.bits + shared * (inner + 16 / SUPER_COLUMNS)
            return total + self._rank_bits(columns, rows)
        free = SCALE_BITS[self.scale_dtype]
        if self.codebook is not None:
            return self._table_bits(self.codebook, columns, rows, free)
        scale = float(_EXTRA_BITS.get(self.scales, free))
        scale += {Zero.NONE: 0, Zero.INTEGER: self.bits, Zero.OFFSET: free}[self.zero]
        total = self.bits + scale / self.group_of(columns)
        if self.scales is Scales.RATIO:
            total += free / columns
        if rows is None:
            return total
        if self.row_block != 1:
            blocks = math.ceil(rows / self.rows_of_scale(rows)) / rows
            total = self.bits + blocks * scale / self.group_of(columns)
        if self.scales is Scales.TWO_LEVEL:
            total += 32 / (rows * columns)
        return total + self._rank_bits(columns, rows)

    def _table_bits(
        self, codebook: Codebook, columns: int, rows: int | None, free: int
    ) -> float:
        total = self.code_bits
        total += free / columns if codebook.scaled else 0.0
        if rows is None:
            return total
        tables = self.table_runs(rows, columns) * codebook.count
        entries = tables * (1 << self.bits) * codebook.vector
        return total + free * entries / (rows * columns)

    def _rank_bits(self, columns: int, rows: int | None) -> float:
        if not self.rank or rows is None:
            return 0.0
        return self.rank * (8 * (rows + columns) + 2 * 16) / (rows * columns)

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
