"""Palettes in soft training: weights that learn, and tables that follow them.

Matrices of one shape and scheme are clustered together. ``soft(share)`` makes their
values from the master weights, where ``share`` is how much of the soft training is
done; gradients of the values are taken back to the master weights by autograd; then
``advance_()`` lets the next step start from the tables that this one found. The
softness falls with the share. ``snap()`` returns tables and codes as they are stored.

    master weights (/ scale) -> rounded to bf16 -> soft k-means -> soft values (* scale)

Master weights start near the dense weights, where k-means finds the codes given and
leaves the tables: tables that were fitted by importance, under codes that follow error
feedback, would else be lost in the first step (permuted at 3 bits, KL 0.65: 1.1).
Scales of rows stay as they are.

Source: Cho et al. (2022), DKM, arXiv 2108.12659; Cho
et al. (2023), eDKM, arXiv 2309.00964, for training in the domain of distinct values.
Differs: master weights are float32; temperature follows the gap and falls; see
``assignment`` and ``table_domain``. Palettes of single numbers keep some 2 bytes a
weight for backward. Vectors hardly repeat and need plain DKM, ``n K`` numbers in each
of ``2 T`` tensors: they are computed again in backward, a few groups at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from compress.core.codebooks import to_stored
from compress.core.scheme import Scheme
from compress.core.tensors import TORCH_DTYPES, QuantizedTensor
from compress.tuning.dkm.assignment import (
    annealed,
    hard_values,
    soft_tables,
    soft_values,
    softness,
    temperature,
)
from compress.tuning.dkm.snap import at_rest, snap
from compress.tuning.dkm.table_domain import cluster, rounded

# Numbers in one map of vectors to entries; backward keeps 2 T maps of them. 256 MiB.
_MAP_AT_ONCE = 1 << 26


@dataclass(frozen=True)
class Schedule:
    """How soft the weights are, from the first step to the last.

    With 3 bits the gap of a palette is about half a standard deviation, so that the
    softness at the end is ``0.44 sqrt(0.002) / 2``, 1 %: what snapping then changes.

    Attributes:
        first: Alpha at the start, the width of the blur in gaps between entries.
        last: Alpha at the end.
        iterations: Rounds of soft k-means in a step.
    """

    first: float = 0.05
    last: float = 0.002
    iterations: int = 1


class SoftPalettes:
    """``B`` matrices ``[R, C]`` under palettes, while these are soft.

    Args:
        weights: ``[B, R, C]`` dense weights to start from, any float type.
        starts: The same weights under palettes with one table, of one scheme; their
            tables and scales are taken.
        schedule: How soft it is, and when.

    Attributes:
        master: float32 leaf ``[B, R, C]``.
        tables: float32 ``[B T, K, g]`` that the next step starts from.
    """

    def __init__(
        self, weights: Tensor, starts: Sequence[QuantizedTensor], schedule: Schedule
    ) -> None:
        self.scheme, device = starts[0].scheme, weights.device
        book = self.scheme.codebook
        assert book is not None and book.count == 1
        self._vector, self._schedule = book.vector, schedule
        self._block = self.scheme.rows_of_scale(weights.shape[1])
        self._scale: Tensor | None = None
        if book.scaled:
            scale = torch.stack([s.scale for s in starts]).to(device).float()
            # A row of zeros has the scale 0, and whatever it points to is 0.
            self._scale = scale
            self._divisor = torch.where(scale == 0, torch.ones_like(scale), scale)
        self.master = weights.detach().float().clone()
        tables = torch.stack([_given(s.tables) for s in starts]).to(device)
        self.tables = tables[:, :, 0].flatten(0, 1).float()
        self._next = self.tables
        self._importances = self._without_filling()
        decoded = torch.stack([s.dequantize() for s in starts]).to(device)
        rest = at_rest(
            self._values(),
            self.tables,
            self._values(decoded),
            importances=self._importances,
        )
        self.master = self._ungrouped(rest).requires_grad_()

    def soft(self, share: float) -> Tensor:
        """Return soft values, float32 ``[B, R, C]``, differentiable in the master.

        Args:
            share: Of the soft training that is done, 0 to 1; decides how soft it is.
        """
        values, self._next = self._soft(share)
        return self._ungrouped(values)

    def advance_(self) -> None:
        """Let the next step start from the tables that the last one found."""
        self.tables = self._next

    @torch.no_grad()
    def softness(self, share: float) -> float:
        """Return the relative change that snapping makes; waits for the device."""
        soft, tables = self._soft(share)
        values = self._values()
        return float(softness(soft, hard_values(values, tables), values))

    @torch.no_grad()
    def snap(self, share: float) -> tuple[Tensor, Tensor]:
        """Return tables and codes, as codes with tables hold them.

        Returns:
            float32 ``[B, T, 1, K, g]``, numbers of the storage type; codes ``[B, U,
            1]`` as stored.
        """
        soft, tables = self._soft(share)
        dtype = TORCH_DTYPES[self.scheme.scale_dtype]
        kept, codes = snap(
            self._values(), tables, soft, dtype=dtype, importances=self._importances
        )
        count, rows, columns = self.master.shape
        codes = codes.view(count, -1, columns // self._vector)[:, :rows]
        return (
            kept.float().view(count, -1, 1, *kept.shape[1:]),
            to_stored(codes.reshape(count, -1, 1), self.scheme.bits),
        )

    def state(self) -> dict[str, Tensor]:
        """Return all that training changes, by name; not copied."""
        return {"master": self.master.detach(), "soft_tables": self.tables}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Put back what :meth:`state` returned."""
        self.master.copy_(state["master"])
        self.tables = state["soft_tables"].to(self.tables.device)

    def _soft(self, share: float) -> tuple[Tensor, Tensor]:
        """Return soft values ``[G, n, g]`` and their tables, without gradient."""
        schedule, values = self._schedule, self._values()
        alpha = annealed(schedule.first, schedule.last, share)
        tau = temperature(self.tables, alpha)
        if self._vector > 1:
            return self._of_vectors(values, tau)
        soft, after = cluster(
            values.squeeze(-1),
            self.tables.squeeze(-1),
            tau,
            iterations=schedule.iterations,
            importances=self._importances,
        )
        return soft.unsqueeze(-1), after.unsqueeze(-1)

    def _of_vectors(self, values: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
        """Return soft values and tables of a few groups at a time."""
        count = values.shape[1]
        step = max(1, _MAP_AT_ONCE // map_numbers(count, self.scheme))
        found = []
        for start in range(0, len(values), step):
            part = slice(start, start + step)
            own = None if self._importances is None else self._importances[part]
            pair: Any = checkpoint(
                _plain,
                values[part],
                self.tables[part],
                tau[part],
                self._schedule.iterations,
                own,
                use_reentrant=False,
                preserve_rng_state=False,
            )
            found.append(pair)
        return torch.cat([a for a, _ in found]), torch.cat([b for _, b in found])

    def _values(self, weights: Tensor | None = None) -> Tensor:
        """Return what is clustered of the master, of bf16 values, ``[G, n, g]``."""
        weights = self.master if weights is None else weights
        values = weights if self._scale is None else weights / self._divisor
        return self._grouped(rounded(values))

    def _grouped(self, weights: Tensor) -> Tensor:
        short = -weights.shape[1] % self._block
        padded = nn.functional.pad(weights, (0, 0, 0, short)) if short else weights
        return padded.reshape(len(self.tables), -1, self._vector)

    def _ungrouped(self, values: Tensor) -> Tensor:
        count, rows, columns = self.master.shape
        weights = values.reshape(count, -1, columns)[:, :rows]
        return weights if self._scale is None else weights * self._scale

    def _without_filling(self) -> Tensor | None:
        """Return importances 0 for rows that fill the last group, if there are any."""
        if self.master.shape[1] % self._block == 0:
            return None
        return self._grouped(torch.ones_like(self.master))[..., 0].contiguous()


def map_numbers(count: int, scheme: Scheme) -> int:
    """Return the numbers in a map of ``count`` vectors to the entries of a table."""
    assert scheme.codebook is not None
    return count * scheme.codebook.vector << scheme.bits


def palette_problem(scheme: Scheme, shape: tuple[int, int]) -> str | None:
    """Return why a matrix cannot be in soft training, and what to take instead.

    Args:
        scheme: Of its codes.
        shape: ``R``, ``C``.
    """
    book = scheme.codebook
    if book is None or book.positional or book.count != 1:
        return (
            f"differentiable k-means trains palettes with one table, and {scheme.name} "
            "is none; use a scheme such as palette3 or palette-2x6, or method: pv"
        )
    rows, columns = shape
    group = min(rows, scheme.rows_of_scale(rows)) * columns // book.vector
    if book.vector > 1 and map_numbers(group, scheme) > 4 * _MAP_AT_ONCE:
        return (
            f"{scheme.name}: vectors of {rows} x {columns} weights that share a table "
            f"need maps of {map_numbers(group, scheme):.1e} numbers; use fewer rows a "
            "table, such as -r16, or method: pv"
        )
    return None


def _plain(
    values: Tensor,
    tables: Tensor,
    tau: Tensor,
    iterations: int,
    importances: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return soft values ``[G, n, g]`` by plain DKM, and tables without gradient."""
    after = soft_tables(
        values, tables, tau, iterations=iterations, importances=importances
    )
    return soft_values(values, after, tau), after.detach()


def _given(values: Tensor | None) -> Tensor:
    assert values is not None
    return values
