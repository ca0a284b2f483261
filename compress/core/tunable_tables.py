"""Codes of tables: palettes of values or vectors, and sums of several tables.

A unit is ``g`` columns of a row. Its value is ``s sum_m C[m, code_m]`` with ``s`` the
scale of the row, if rows have one. Trained are tables and scales; the gradient of a
table is the sum of those of the units that point to each entry:

    dL/dC[m, k] = sum over units with code_m = k of s dL/dw
    dL/ds = sum over the row of <dL/dw, sum_m C[m, code_m]>

For new codes a target is divided by ``s``, which a unit shares; then the nearest entry
is the ``k`` of largest ``<x, C_k> - |C_k|^2 / 2``. Several tables are visited in a
given order, each choosing the entry nearest to what the others leave, with ``beam``
candidates kept; the first candidate is the present code, so errors do not rise.

Source: Egiazarian et al. (2024), AQLM, arXiv 2401.06118; Malinovskii et al. (2024),
PV-Tuning, arXiv 2405.14852, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from compress.core.codebooks import from_stored, to_stored
from compress.core.tensors import QuantizedTensor
from compress.core.tunable import TunableCodes


class TableCodes(TunableCodes):
    """Codes that point to tables of the matrix's own."""

    def __init__(self, tensors: Sequence[QuantizedTensor], device: Any) -> None:
        super().__init__(tensors, device)
        codebook = self.scheme.codebook
        assert codebook is not None
        self.vector, self._count = codebook.vector, codebook.count
        codes = torch.stack([tensor.codes for tensor in tensors])
        self.codes = codes.view(len(tensors), -1, self._count).to(self.device)
        self._train("tables", [_given(tensor.tables) for tensor in tensors])
        if codebook.scaled:
            self._train("scale", [tensor.scale for tensor in tensors])
        self._plain = tensors[0].scale  # one, where rows have no scale

    def settle_(self) -> None:
        """Do nothing: whatever is in a table can be pointed to."""

    def decode(self) -> Tensor:
        """Return float32 values ``[B, R, C]``, differentiable in the numbers."""
        values: Tensor = _Lookup.apply(  # type: ignore[no-untyped-call]
            self._stored("tables"), self.codes, self._runs(None)
        )
        values = values.view(self.shape)
        if "scale" in self._parameters:
            values = values * self._stored("scale")
        return values

    def _rows(self, units: Tensor | None) -> Tensor:
        """Return the row of each unit, ``[B, n]`` (``[1, n]`` for all)."""
        return self._all_or(units) // (self.shape[2] // self.vector)

    def _runs(self, units: Tensor | None) -> Tensor:
        """Return the run that each unit reads the tables of, as :meth:`_rows`."""
        book = self.scheme.codebook
        if book is not None and book.positional:
            return self._all_or(units) % (self.shape[2] // self.vector)
        return self._rows(units) // self.scheme.rows_of_scale(self.shape[1])

    def _is_in_runs(self, units: Tensor | None) -> bool:
        """Whether units lie run by run, equally many of each."""
        runs = self._parameters["tables"].shape[1]
        book = self.scheme.codebook
        is_positional = book is not None and book.positional
        is_even = units is None and self.shape[1] % runs == 0
        return runs == 1 or (is_even and not is_positional)

    def _all_or(self, units: Tensor | None) -> Tensor:
        if units is None:
            return torch.arange(self.units, device=self.device).unsqueeze(0)
        return units

    def _factor(self, rows: Tensor) -> Tensor | None:
        """Return the scales ``[B, n, 1]`` of rows, if rows have scales."""
        if "scale" not in self._parameters:
            return None
        scale = self._stored("scale").detach()
        rows = rows.expand(len(scale), -1)
        return scale.gather(1, rows.unsqueeze(-1))

    @torch.no_grad()
    def values(self, codes: Tensor, units: Tensor | None) -> Tensor:
        """Return float32 ``[B, n, g]`` that codes mean at units."""
        tables = self._stored("tables").detach()
        first = _first(tables, self._runs(units)).expand(codes.shape[:2])
        total = _summed(tables, from_stored(codes), first)
        scale = self._factor(self._rows(units))
        return total if scale is None else total * scale

    @torch.no_grad()
    def project(
        self,
        target: Tensor,
        units: Tensor | None,
        *,
        beam: int = 1,
        order: Sequence[int] = (0,),
    ) -> Tensor:
        """Return the codes of the nearest sums of entries."""
        wanted = self._parts(target, units)
        scale = self._factor(self._rows(units))
        if scale is not None:
            wanted = wanted / torch.where(scale == 0, torch.ones_like(scale), scale)
        tables = self._stored("tables").detach()
        if self._count == self.vector == 1 and self._is_in_runs(units):
            found = _nearest_numbers(tables, wanted.squeeze(-1))
            return to_stored(found.unsqueeze(-1), self.scheme.bits)
        runs = self._runs(units).expand(wanted.shape[:2])
        search = _Search(tables, beam, tuple(order)[: self._count])
        codes = from_stored(self.chosen(units))
        entries = tables.shape[3]
        # One table for all rows is multiplied with; else each unit gathers its own.
        each = entries * (1 if tables.shape[1] == 1 else 1 + self.vector)
        step = self._room(each * beam * len(wanted))
        found = torch.empty_like(codes)
        for start in range(0, wanted.shape[1], step):
            part = slice(start, start + step)
            found[:, part] = search(wanted[:, part], codes[:, part], runs[:, part])
        return to_stored(found, self.scheme.bits)

    @torch.no_grad()
    def result(self) -> list[QuantizedTensor]:
        """Return the stored form of each matrix, on the CPU."""
        count, rows, _ = self.shape
        codes = self.codes.view(count, rows, -1).cpu()
        tables = self._finite("tables")
        scale = self._finite("scale") if "scale" in self._parameters else None
        return [
            QuantizedTensor(
                codes[i].clone(),
                self._plain.clone() if scale is None else scale[i].clone(),
                None,
                self.scheme,
                self.notes[i],
                tables=tables[i].clone(),
            )
            for i in range(count)
        ]


class _Search:
    """Finds codes for units, from table to table.

    Args:
        tables: float32 ``[B, T, M, K, g]``.
        beam: Candidates that are kept.
        order: Of the tables.
    """

    def __init__(self, tables: Tensor, beam: int, order: Sequence[int]) -> None:
        self._tables, self._beam, self._order = tables, beam, order
        self._half_norms = 0.5 * tables.square().sum(-1)  # [B, T, M, K]

    def __call__(self, wanted: Tensor, codes: Tensor, runs: Tensor) -> Tensor:
        """Return codes ``[B, n, M]`` for ``[B, n, g]``, beginning with ``codes``."""
        if self._tables.shape[2] == self._tables.shape[4] == 1:
            return self._nearest_number(wanted.squeeze(-1), runs).unsqueeze(-1)
        first = _first(self._tables, runs)
        best = codes.unsqueeze(2)  # [B, n, candidates, M]
        for table in self._order:
            batch, count, kept, tables = best.shape
            others = _summed(
                self._tables,
                best.reshape(batch, count * kept, tables),
                first.repeat_interleave(kept, 1),
                without=table,
            ).view(batch, count, kept, -1)
            rest = wanted.unsqueeze(2) - others
            gain = self._gains(rest, table, runs)  # [B, n, candidates, K]
            entries = gain.shape[-1]
            if self._beam == 1:  # what the one candidate has in common drops out
                top = gain.flatten(2).argmax(2, keepdim=True)
            else:
                gain -= 0.5 * rest.square().sum(-1, keepdim=True)
                most = min(self._beam, kept * entries)
                top = gain.flatten(2).topk(most, dim=2).indices
            parent = (top // entries).unsqueeze(-1).expand(-1, -1, -1, tables)
            best = best.gather(2, parent)
            best[..., table] = top % entries
        return best[:, :, 0]

    def _nearest_number(self, wanted: Tensor, runs: Tensor) -> Tensor:
        """Return the places ``[B, n]`` of the numbers nearest to ``[B, n]``."""
        between, order = _midpoints(self._tables)
        number = torch.arange(len(order), device=order.device).unsqueeze(1)
        place = (wanted.unsqueeze(-1) > between[number, runs]).sum(-1)
        return order[number, runs, place]

    def _gains(self, rest: Tensor, table: int, runs: Tensor) -> Tensor:
        """Return ``<x, C_k> - |C_k|^2 / 2``, ``[B, n, candidates, K]``."""
        own, norms = self._tables[:, :, table], self._half_norms[:, :, table]
        if own.shape[1] == 1:
            flat = rest.flatten(1, 2) @ own[:, 0].transpose(1, 2)
            flat -= norms
            return flat.view(*rest.shape[:3], -1)
        number = torch.arange(len(own), device=own.device).unsqueeze(1)
        products = rest @ own[number, runs].transpose(2, 3)
        return products - norms[number, runs].unsqueeze(2)


def _midpoints(tables: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the nearest number changes, and the places of numbers in order.

    Args:
        tables: float32 ``[B, T, 1, K, 1]``.

    Returns:
        float32 ``[B, T, K - 1]``, rising, and int64 ``[B, T, K]``.
    """
    numbers, order = tables[:, :, 0, :, 0].sort(2)
    return (numbers[..., 1:] + numbers[..., :-1]) / 2, order


def _nearest_numbers(tables: Tensor, wanted: Tensor) -> Tensor:
    """Return the places of the numbers nearest to units that lie run by run.

    Args:
        tables: float32 ``[B, T, 1, K, 1]``.
        wanted: float32 ``[B, n]``, ``n / T`` neighbouring ones for each run.

    Returns:
        int64 ``[B, n]``.
    """
    between, order = _midpoints(tables)
    parts = wanted.reshape(*between.shape[:2], -1).contiguous()
    places = torch.searchsorted(between, parts)
    return order.gather(2, places).view(wanted.shape)


def _first(tables: Tensor, runs: Tensor) -> Tensor:
    """Return where the tables of runs begin among all entries, ``[B, n]``."""
    count, of_matrix, of_run, entries, _ = tables.shape
    number = torch.arange(count, device=runs.device).unsqueeze(1)
    return (number * of_matrix + runs) * (of_run * entries)


def _summed(
    tables: Tensor, places: Tensor, first: Tensor, *, without: int | None = None
) -> Tensor:
    """Return sums of entries, in the order of tables.

    Args:
        tables: float32 ``[B, T, M, K, g]``.
        places: int64 ``[B, n, M]``.
        first: int64 ``[B, n]`` of :func:`_first`.
        without: A table that is left out.

    Returns:
        float32 ``[B, n, g]``.
    """
    entries, vector = tables.shape[3:]
    flat = tables.reshape(-1, vector)
    total = None
    for m in range(places.shape[2]):
        if m != without:
            part = flat[first + m * entries + places[..., m]]
            total = part if total is None else total + part
    if total is None:
        return flat.new_zeros(*places.shape[:2], vector)
    return total


class _Lookup(torch.autograd.Function):
    """Sums of entries ``[B, U, g]`` for codes of all units."""

    @staticmethod
    def forward(ctx: Any, tables: Tensor, codes: Tensor, runs: Tensor) -> Tensor:
        ctx.save_for_backward(codes, runs)
        ctx.size = tables.shape
        return _summed(tables, from_stored(codes), _first(tables, runs))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        codes, runs = ctx.saved_tensors
        found = gradient.new_zeros(ctx.size)
        flat = found.view(-1, ctx.size[-1])
        first = _first(found, runs)
        places = from_stored(codes)
        for m in range(codes.shape[2]):
            index = (first + m * ctx.size[3] + places[..., m]).flatten()
            flat.index_add_(0, index, gradient.reshape(len(index), -1))
        return found, None, None


def _given(values: Tensor | None) -> Tensor:
    assert values is not None
    return values
