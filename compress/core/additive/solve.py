"""Additive codes of a matrix: alternates between codes, tables and scales.

Minimises ``tr((W - Q) H (W - Q)^T)`` over ``Q = s (sum_m C[m, code_m])``. It starts
from residual k-means on rows divided by their norm. A round searches codes, and fits
tables and scales to them. At the end, tables and scales are rounded to their storage
type and codes are searched once more for these.

Source: Egiazarian et al. (2024), "Extreme Compression of Large Language Models via
Additive Quantization", arXiv 2401.06118, algorithm 1; what differs is in the modules
that do the parts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.core.additive import fit, kmeans, search
from compress.core.additive.sums import decoded, row_losses

_TINY = 1e-30
_LEAST_NORM = 1e-9
_MANY_ENTRIES = 1 << 12
_KMEANS = {False: (256, 20), True: (32, 10)}
"""Points for each entry and iterations; True: more than 2^12 entries."""


@dataclass(frozen=True)
class Sums:
    """A matrix as sums of table entries.

    Attributes:
        tables: float32 ``[M, K, g]``.
        codes: int64 ``[R, J, M]``.
        scales: float32 ``[R]``.
    """

    tables: Tensor
    codes: Tensor
    scales: Tensor

    def values(self) -> Tensor:
        """Return float32 ``[R, C]``."""
        return decoded(self.codes, self.tables).mul_(self.scales.unsqueeze(1))


@dataclass(frozen=True)
class Effort:
    """How hard to try.

    Attributes:
        beam: Candidates of a row while codes are searched.
        rounds: At most.
        tolerance: A round that gains a smaller share is the last one.
        steps: Of conjugate gradients a round.
        seed: Of all that is drawn.
    """

    beam: int
    rounds: int
    tolerance: float
    steps: int
    seed: int


def run_order(hessian: Tensor, vector: int) -> Tensor:
    """Return runs of ``vector`` columns by falling mean ``diag(H)``, int64 ``[J]``."""
    means = hessian.diagonal().view(-1, vector).mean(1)
    return torch.argsort(means, descending=True, stable=True)


def columns_of(runs: Tensor, vector: int) -> Tensor:
    """Return the columns of runs, one after another, int64 ``[C]``."""
    inner = torch.arange(vector, device=runs.device)
    return (runs.unsqueeze(1) * vector + inner).flatten()


def solve(
    weight: Tensor,
    hessian: Tensor,
    factor: Tensor,
    runs: Tensor,
    *,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    effort: Effort,
) -> Sums:
    """Return a matrix as sums; tables and scales are numbers of ``dtype``.

    Args:
        weight: float32 ``[R, C]``.
        hessian: float32 ``[C, C]``, positive definite.
        factor: :func:`feedback.inverse_factor` of it, in the order of ``runs``.
        runs: int64 ``[J]``, the order in which error feedback takes runs of columns.
        shape: ``M``, ``K`` and ``g``.
        dtype: Storage type of tables and scales.
        effort: How hard to try.
    """
    visits = torch.Generator().manual_seed(effort.seed)
    state = first_sums(weight, hessian, shape=shape, seed=effort.seed)
    best, before = state, None
    for _ in range(effort.rounds):
        state = searched(
            state, weight, hessian, factor, runs, beam=effort.beam, generator=visits
        )
        state = fitted(state, weight, hessian, steps=effort.steps)
        loss = float(row_losses(weight - state.values(), hessian).sum())
        if before is None or loss < before:
            best = state
        if before is not None and loss > before * (1 - effort.tolerance):
            break
        before = loss
    return stored(
        best, weight, hessian, dtype=dtype, beam=effort.beam, generator=visits
    )


def first_sums(
    weight: Tensor, hessian: Tensor, *, shape: tuple[int, int, int], seed: int
) -> Sums:
    """Return tables and codes by residual k-means, with row norms as scales.

    A run of columns weighs as much as its mean ``diag(H)`` and the square of its row's
    scale.
    """
    count, entries, vector = shape
    rows = len(weight)
    scales = weight.norm(dim=1) + _LEAST_NORM
    points = (weight / scales.unsqueeze(1)).view(-1, vector)
    means = hessian.diagonal().view(-1, vector).mean(1)
    weights = scales.square().unsqueeze(1) * means
    weights = (weights / weights.mean().clamp(min=_TINY)).flatten()
    generator = torch.Generator(weight.device).manual_seed(seed)
    points_per_entry, iterations = _KMEANS[entries > _MANY_ENTRIES]
    tables, codes = kmeans.residual_tables(
        points,
        weights,
        count=count,
        entries=entries,
        points_per_entry=points_per_entry,
        iterations=iterations,
        generator=generator,
    )
    return Sums(tables, codes.view(rows, -1, count), scales)


def searched(
    state: Sums,
    weight: Tensor,
    hessian: Tensor,
    factor: Tensor,
    runs: Tensor,
    *,
    beam: int,
    generator: torch.Generator,
) -> Sums:
    """Return the same tables with better codes: of each row those that lose less.

    One candidate is the present codes, the other comes from error feedback; both after
    a pass of descent.
    """
    target = weight / state.scales.unsqueeze(1)
    fed = search.feedback(target, factor, runs, state.tables, beam=beam)
    both = [
        search.descend(
            target, hessian, state.tables, codes, beam=beam, generator=generator
        )
        for codes in (state.codes, fed)
    ]
    lost = [
        row_losses(target - decoded(codes, state.tables), hessian) for codes in both
    ]
    better = (lost[1] < lost[0])[:, None, None]
    return replace(state, codes=torch.where(better, both[1], both[0]))


def fitted(state: Sums, weight: Tensor, hessian: Tensor, *, steps: int) -> Sums:
    """Return the same codes with better tables and scales."""
    scales = state.scales
    tables = fit.fitted_tables(
        weight / scales.unsqueeze(1),
        scales.square(),
        hessian,
        state.codes,
        state.tables,
        iterations=steps,
    )
    values = decoded(state.codes, tables)
    scales = fit.fitted_scales(weight, hessian, values, scales)
    return Sums(tables, state.codes, scales)


def stored(
    state: Sums,
    weight: Tensor,
    hessian: Tensor,
    *,
    dtype: torch.dtype,
    beam: int,
    generator: torch.Generator,
) -> Sums:
    """Return tables and scales that ``dtype`` can hold, and codes for these."""
    tables, scales = fit.folded(state.tables, state.scales)
    tables = tables.to(dtype).float()
    values = decoded(state.codes, tables)
    scales = fit.fitted_scales(weight, hessian, values, scales).to(dtype).float()
    target = weight / torch.where(scales > 0, scales, 1.0).unsqueeze(1)
    codes = search.descend(
        target, hessian, tables, state.codes, beam=beam, generator=generator
    )
    return Sums(tables, codes, scales)
