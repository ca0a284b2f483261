"""A palette in training: weights that learn, and tables that follow them.

A loop takes ``weight(share)`` as the weight of a layer, where ``share`` is how much of
the training is done, steps an optimizer on ``parameters()``, and calls ``advance_()``.
The softness falls with the share. ``snap_()`` then freezes the codes; from there on the
parameters are the tables, which the loop may tune. ``result()`` is what is stored.

    ``soft``: master weights -> rounded to bf16 -> soft k-means -> soft weights
    ``snapped``: tables[codes]

Source: Cho et al. (2022), DKM, arXiv 2108.12659; Cho et al. (2023), eDKM, arXiv
2309.00964, for training in the domain of distinct values. Differs: master weights are
float32; temperature follows the gap and falls; see ``assignment`` and
``table_domain``. Palettes of single numbers keep some 2 bytes a weight for backward.
Vectors need plain DKM, ``n K`` numbers in each of ``2 T`` tensors, kept on the host
where training is on a GPU: for small layers or tables.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.core.codebooks import to_stored
from compress.core.errors import CompressError, SchemeError
from compress.core.tensors import TORCH_DTYPES, QuantizedTensor
from compress.tuning.dkm.assignment import (
    annealed,
    entries,
    hard_values,
    soft_tables,
    soft_values,
    softness,
    temperature,
)
from compress.tuning.dkm.saved import SavedOnHost
from compress.tuning.dkm.snap import snap
from compress.tuning.dkm.table_domain import cluster, rounded


@dataclass(frozen=True)
class Schedule:
    """How soft the weights are, from the first step to the last.

    With 3 bits the gap of a palette is about half a standard deviation, so that the
    softness at the end is ``0.44 sqrt(0.002) / 2``, 1 %: what snapping then changes.

    Attributes:
        first: Alpha at the start, the width of the blur in gaps between entries.
        last: Alpha at the end.
        iterations: Rounds of soft k-means in a forward.
    """

    first: float = 0.5
    last: float = 0.002
    iterations: int = 3


class TrainablePalette:
    """The weight of one layer under a palette, while it is trained.

    Args:
        weight: ``[R, C]`` dense weight to start from, any float type.
        start: The same weight under the palette; gives tables, scales and scheme.
        schedule: How soft it is, and when.
        importances: ``[R, C]`` of the weights, not negative; equal if left out. Of
            vectors the mean counts.
        name: Of the layer, for errors.

    Raises:
        SchemeError: The scheme is no palette with one table.
    """

    def __init__(
        self,
        weight: Tensor,
        start: QuantizedTensor,
        *,
        schedule: Schedule | None = None,
        importances: Tensor | None = None,
        name: str = "weight",
    ) -> None:
        scheme, codebook = start.scheme, start.scheme.codebook
        if (
            codebook is None
            or start.tables is None
            or codebook.positional
            or codebook.count != 1
        ):
            raise SchemeError(
                f"{name} has scheme {scheme.name}: differentiable k-means trains "
                "palettes with one table, such as palette3 or palette-2x6"
            )
        if weight.shape != start.shape:
            raise SchemeError(
                f"{name} is {list(weight.shape)} but its palette {list(start.shape)}"
            )
        self._start, self._schedule = start, schedule or Schedule()
        self._vector, self._name = codebook.vector, name
        self._block = scheme.rows_of_scale(len(weight))
        self._scale = start.scale.float() if codebook.scaled else None
        self._master = nn.Parameter(weight.detach().float().clone())
        self._tables = start.tables[:, 0].float()  # [G, K, g]
        self._next = self._tables
        self._share = 0.0
        self._codes: Tensor | None = None  # [G, n], after the snap
        self._importances = self._grouped_importances(importances)

    def parameters(self) -> list[nn.Parameter]:
        """Return what an optimizer changes: master weights, after the snap tables."""
        if self._codes is None:
            return [self._master]
        assert isinstance(self._tables, nn.Parameter)
        return [self._tables]

    def weight(self, share: float = 1.0) -> Tensor:
        """Return the weight of the layer, float32 ``[R, C]``, differentiable.

        Changes nothing that a second forward of the same step sees, so that gradient
        checkpoints are safe.

        Args:
            share: Of the training that is done, 0 to 1; decides how soft it is.
        """
        if self._codes is not None:
            return self._ungrouped(entries(self._tables, self._codes))
        self._share = share
        soft, self._next = self._soft(self._values(self._master))
        return self._ungrouped(soft)

    def advance_(self) -> None:
        """Let the next step start from the tables that this step's forward found."""
        if self._codes is None:
            self._tables = self._next

    @torch.no_grad()
    def softness(self) -> float:
        """Return the relative change that snapping makes now; 0 after the snap.

        Waits for the device.
        """
        if self._codes is not None:
            return 0.0
        values = self._values(self._master)
        soft, tables = self._soft(values)
        return float(softness(soft, hard_values(values, tables), values))

    @torch.no_grad()
    def snap_(self) -> None:
        """Fix the codes; parameters are the tables from here on.

        The master weights are let go.

        Raises:
            CompressError: Weights are not finite.
        """
        assert self._codes is None
        values = self._values(self._master)
        soft, tables = self._soft(values)
        if not bool(torch.isfinite(soft).all()):
            raise CompressError(
                f"{self._name}: weights are not finite after training with "
                "differentiable k-means; lower the learning rate"
            )
        dtype = TORCH_DTYPES[self._start.scheme.scale_dtype]
        stored, self._codes = snap(
            values, tables, soft, dtype=dtype, importances=self._importances
        )
        self._tables = nn.Parameter(stored.float())
        self._importances = None
        del self._master, self._next

    @torch.no_grad()
    def result(self) -> QuantizedTensor:
        """Return the palette as it is stored; after the snap only.

        Tables are sorted again, since tuning may have changed their order.
        """
        assert self._codes is not None, "snap_() comes first"
        start, scheme = self._start, self._start.scheme
        order = self._tables[..., 0].argsort(1)
        place = torch.empty_like(order)
        count = torch.arange(order.shape[1], device=order.device)
        place.scatter_(1, order, count.expand_as(order))
        tables = self._tables.gather(1, order.unsqueeze(-1).expand_as(self._tables))
        codes = place.gather(1, self._codes)
        rows, columns = start.shape
        codes = codes.view(-1, columns // self._vector)[:rows].contiguous()
        return QuantizedTensor(
            to_stored(codes, scheme.bits),
            start.scale,
            None,
            scheme,
            start.notes,
            tables=tables.unsqueeze(1).to(TORCH_DTYPES[scheme.scale_dtype]),
        )

    def _soft(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return soft values ``[G, n, g]`` and their tables, without gradient."""
        schedule = self._schedule
        alpha = annealed(schedule.first, schedule.last, self._share)
        tables, iterations = self._tables, schedule.iterations
        tau = temperature(tables, alpha)
        if self._vector == 1:
            soft, after = cluster(
                values.squeeze(-1),
                tables.squeeze(-1),
                tau,
                iterations=iterations,
                importances=self._importances,
            )
            return soft.unsqueeze(-1), after.unsqueeze(-1)
        on_host = SavedOnHost() if values.device.type != "cpu" else nullcontext()
        with on_host:
            after = soft_tables(
                values,
                tables,
                tau,
                iterations=iterations,
                importances=self._importances,
            )
            return soft_values(values, after, tau), after.detach()

    def _values(self, weight: Tensor) -> Tensor:
        """Return what is clustered, of bf16 values, ``[G, n, g]``."""
        values = weight if self._scale is None else weight / self._scale
        return self._grouped(rounded(values))

    def _grouped(self, weight: Tensor) -> Tensor:
        short = -len(weight) % self._block
        padded = nn.functional.pad(weight, (0, 0, 0, short)) if short else weight
        return padded.reshape(len(self._tables), -1, self._vector)

    def _ungrouped(self, values: Tensor) -> Tensor:
        rows, columns = self._start.shape
        weight = values.reshape(-1, columns)[:rows]
        return weight if self._scale is None else weight * self._scale

    def _grouped_importances(self, importances: Tensor | None) -> Tensor | None:
        """Return importances of runs of columns; rows that fill a group have none."""
        rows, columns = self._start.shape
        if importances is None:
            if rows % self._block == 0:
                return None
            importances = torch.ones(rows, columns, device=self._master.device)
        grouped = self._grouped(importances.detach().float()).mean(-1)
        # Means of 1, so that sums of many stay in the range of float32.
        mean = grouped.mean(1, keepdim=True)
        return grouped / mean.clamp_min(torch.finfo(mean.dtype).tiny)
