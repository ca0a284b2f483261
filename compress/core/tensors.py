"""QuantizedTensor: codes, scales and zero points of one weight matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compress.core import codebooks, scales
from compress.core.scales import TORCH_DTYPES as TORCH_DTYPES
from compress.core.scheme import WHOLE, Scheme, Zero


def decode(levels: Tensor, scale: Tensor, zero: Tensor | None, kind: Zero) -> Tensor:
    """Return the float32 values of levels, computed as every loader computes them.

    Args:
        levels: Numbers of the grid, any shape; for integers these are the codes.
        scale: Broadcasts against ``levels``.
        zero: As ``scale``; ``None`` only for a symmetric grid.
        kind: What ``zero`` means.
    """
    values, scale = levels.float(), scale.float()
    if zero is None:
        return values * scale
    if kind is Zero.INTEGER:
        return (values - zero.float()) * scale
    return values * scale + zero.float()


@dataclass(frozen=True)
class LowRank:
    """A correction ``left @ right`` of a weight matrix, each factor in 8 bits (LoRC).

    Attributes:
        left: int8 ``[R, r]``.
        left_scale: float16 ``[1, r]``.
        right: int8 ``[r, C]``.
        right_scale: float16 ``[r, 1]``.
    """

    left: Tensor
    left_scale: Tensor
    right: Tensor
    right_scale: Tensor

    def product(self) -> Tensor:
        """Return the float32 ``[R, C]`` that is added to the decoded codes."""
        left = self.left.float() * self.left_scale.float()
        return left @ (self.right.float() * self.right_scale.float())


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight matrix as codes.

    Attributes:
        codes: ``[R, C]``: int8 in ``[scheme.lowest, scheme.highest]``, uint8 bit
            patterns of a float grid, or int8 indices of ggml's table. With tables of
            its own ``[R, C / g * M]`` places in them, see ``core/codebooks.py``.
        scale: ``[R, C / group]`` as stored; see ``core/scales.py``. One row for each
            block of rows where these share scales. With tables ``[R, 1]`` if rows have
            scales, else ``[1, 1]`` of one.
        zero: ``None``, int8 codes, or float minima in the storage type (int8 under
            ``outer`` with ``SUPER`` scales); as ``scale``.
        scheme: What the numbers mean.
        notes: What a report should say about this layer, such as a fallback.
        outer: What the scales have in common, if anything; see ``core/scales.py``.
        low_rank: A correction that is added; only if the scheme has a rank, and then
            it may still be left out where it brings nothing.
        tables: ``[T, M, 2**bits, g]`` in the storage type: what codes point to, for
            each of ``T`` runs of ``row_block`` rows, or of ``g`` columns if they are
            positional; only with the grid ``codebook``.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    scheme: Scheme
    notes: tuple[str, ...] = field(default=())
    outer: Tensor | None = None
    low_rank: LowRank | None = None
    tables: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows (outputs) and columns (inputs)."""
        rows, width = self.codes.shape
        codebook = self.scheme.codebook
        if codebook is not None:
            width = width // codebook.count * codebook.vector
        return rows, width

    def scales(self) -> Tensor:
        """Return the float32 scales ``[R, C / group]``, one row for each row."""
        rows = self.codes.shape[0]
        return scales.from_stored(self.scale, self.scheme, self.outer, rows=rows)

    def zeros(self) -> Tensor | None:
        """Return the float32 zero points or minima ``[R, C / group]``, if any."""
        return scales.zeros_from_stored(self.zero, self.scheme, self.outer)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return ``[R, C]`` values, computed in float32 and rounded to ``dtype``."""
        rows, columns = self.shape
        if self.tables is not None:
            values = codebooks.decode(self.codes, self.tables, self.scheme)
            return (values * self.scale.float()).to(dtype)
        scale = self.scales()
        levels = self.scheme.levels.to_levels(self.codes)
        groups = levels.view(rows, scale.shape[1], -1)
        zeros = self.zeros()
        zero = None if zeros is None else zeros.unsqueeze(-1)
        values = decode(groups, scale.unsqueeze(-1), zero, self.scheme.zero)
        values = values.view(rows, columns)
        if self.low_rank is not None:
            values = values + self.low_rank.product()
        return values.to(dtype)

    def split_rows(self, sizes: list[int]) -> list[QuantizedTensor]:
        """Return the parts of a matrix that was stacked from several.

        Args:
            sizes: Rows of each part; a block of rows that shares scales must not
                straddle two parts (``scheme.row_block``).
        """
        block = self.scheme.rows_of_scale(self.shape[0])
        shared = self.scale.shape[0] == 1 and self.shape[0] > 1
        of_rows = 1 if self.tables is not None else block
        parts, start = [], 0
        for size in sizes:
            rows = slice(start, start + size)
            kept = (
                slice(0, 1)
                if shared
                else slice(start // of_rows, -(-rows.stop // of_rows))
            )
            tables = self.tables
            if tables is not None:
                tables = self._tables_of(rows).clone()
            outer = self.outer
            if outer is not None:  # a copy, since files hold no tensor twice
                outer = (outer[rows] if outer.dim() == 2 else outer).clone()
            low = self.low_rank
            if low is not None:
                left = low.left[rows].contiguous()
                low = LowRank(left, low.left_scale, low.right, low.right_scale)
            parts.append(
                QuantizedTensor(
                    self.codes[rows].contiguous(),
                    self.scale[kept].clone(),
                    None if self.zero is None else self.zero[kept].clone(),
                    self.scheme,
                    self.notes,
                    outer,
                    low,
                    tables,
                )
            )
            start += size
        return parts

    def _tables_of(self, rows: slice) -> Tensor:
        """Return the tables that some rows read."""
        book = self.scheme.codebook
        assert book is not None and self.tables is not None
        if book.positional:
            return self.tables
        block = self.scheme.rows_of_scale(self.shape[0])
        return self.tables[rows.start // block : -(-rows.stop // block)]

    def state(self) -> dict[str, Tensor]:
        """Return the tensors to store; ``scheme`` and ``notes`` travel beside them."""
        tensors = {"codes": self.codes, "scale": self.scale}
        if self.zero is not None:
            tensors["zero"] = self.zero
        if self.outer is not None:
            tensors["outer"] = self.outer
        if self.low_rank is not None:
            tensors |= {f"low_rank.{k}": v for k, v in vars(self.low_rank).items()}
        if self.tables is not None:
            tensors["tables"] = self.tables
        return tensors

    @classmethod
    def from_state(
        cls, tensors: Mapping[str, Tensor], scheme: Scheme, notes: tuple[str, ...] = ()
    ) -> QuantizedTensor:
        """Return the matrix that :meth:`state` described."""
        names = ("left", "left_scale", "right", "right_scale")
        low_rank = None
        if "low_rank.left" in tensors:
            low_rank = LowRank(*(tensors[f"low_rank.{name}"] for name in names))
        return cls(
            tensors["codes"],
            tensors["scale"],
            tensors.get("zero"),
            scheme,
            notes,
            tensors.get("outer"),
            low_rank,
            tensors.get("tables"),
        )


def join_rows(parts: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """Return the matrix whose parts :meth:`QuantizedTensor.split_rows` returned.

    Args:
        parts: From the first rows to the last, of one scheme without low rank; what all
            rows share is taken from the first.
    """
    first = parts[0]
    scheme, book = first.scheme, first.scheme.codebook
    whole = scheme.row_block == WHOLE
    shares_tables = whole or (book is not None and book.positional)
    shares_scale = (whole and book is None) or (book is not None and not book.scaled)

    def joined(tensors: Sequence[Tensor | None], shared: bool) -> Tensor | None:
        given = [tensor for tensor in tensors if tensor is not None]
        if not given or shared:
            return given[0] if given else None
        return torch.cat(given)

    scale = joined([part.scale for part in parts], shares_scale)
    assert scale is not None
    by_row = first.outer is not None and first.outer.dim() == 2
    return QuantizedTensor(
        torch.cat([part.codes for part in parts]),
        scale,
        joined([part.zero for part in parts], whole),
        scheme,
        first.notes,
        joined([part.outer for part in parts], not by_row),
        tables=joined([part.tables for part in parts], shares_tables),
    )
