"""Tables of vectors: storing codes, and the values that codes and tables stand for.

A run of ``g`` neighbouring columns of a row is ``sum_m tables[t, m, code_m]``, with
``t`` the run of rows that it is in, or the run of columns where the tables are
positional. Codes of a run lie side by side, one for each of the ``M`` tables; they are
kept as uint8 up to 8 bits, and else as int16, in two's complement.

Source: Egiazarian et al. (2024), "Extreme compression of large language models via
additive quantization", arXiv 2401.06118, section 3; palettes are the case M = g = 1.
Positional tables are those of Jegou et al. (2011), "Product quantization for nearest
neighbor search".
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.core.scheme import Scheme

_VALUES_AT_ONCE = 1 << 24  # decoded in one step, which bounds the memory


def to_stored(codes: Tensor, bits: int) -> Tensor:
    """Return places in tables as they are kept.

    Args:
        codes: Any integer type, in ``[0, 2**bits)``.
        bits: 1 to 16.
    """
    if bits <= 8:
        return codes.to(torch.uint8)
    return (codes.int() & 0xFFFF).to(torch.int16)


def from_stored(codes: Tensor) -> Tensor:
    """Return int64 places in tables for what :func:`to_stored` returned."""
    places = codes.long()
    return places & 0xFFFF if codes.dtype == torch.int16 else places


def owners(scheme: Scheme, rows: int, columns: int, run: slice) -> Tensor:
    """Return the run ``t`` whose tables are read, int64 ``[R, 1]`` or ``[1, C / g]``.

    Args:
        scheme: Of tables.
        rows: Of the matrix.
        columns: Likewise.
        run: Rows that are asked for.
    """
    assert scheme.codebook is not None
    if scheme.codebook.positional:
        return torch.arange(columns // scheme.codebook.vector).unsqueeze(0)
    own = torch.arange(run.start, run.stop) // scheme.rows_of_scale(rows)
    return own.unsqueeze(1)


def decode(codes: Tensor, tables: Tensor, scheme: Scheme) -> Tensor:
    """Return the float32 values ``[R, C]`` of codes, without the scales of rows.

    Tables are summed in their order, in float32.

    Args:
        codes: ``[R, C / g * M]`` as stored.
        tables: ``[T, M, 2**bits, g]``, any float type.
        scheme: Says which rows or columns share tables.
    """
    assert scheme.codebook is not None
    count, vector = scheme.codebook.count, scheme.codebook.vector
    rows, width = codes.shape
    columns = width // count * vector
    flat = tables.float().reshape(-1, vector)  # [T * M * K, g]
    entries = tables.shape[2]
    values = torch.empty(rows, columns, device=codes.device)
    step = max(1, _VALUES_AT_ONCE // max(1, width * vector))
    for start in range(0, rows, step):
        run = slice(start, min(start + step, rows))
        places = from_stored(codes[run]).view(-1, width // count, count)
        first = owners(scheme, rows, columns, run).to(codes.device) * count * entries
        total = flat[first + places[..., 0]]
        for m in range(1, count):
            total = total + flat[first + m * entries + places[..., m]]
        values[run] = total.view(len(places), -1)
    return values
