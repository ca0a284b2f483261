"""Codes for given tables: error feedback for a start, and beam search in H's metric.

Both minimise ``(x - q) H (x - q)^T`` for each row ``x`` of a target that was divided by
the row's scale, with ``q`` a sum of table entries for each run of ``g`` columns.

:func:`feedback` takes the runs one after another, as GPTQ takes columns. With
``H^-1 = U^T U`` the cost of an error ``e`` in run ``j``, once later runs have made up
for it, is ``|e U_jj^-1|^2``; that is what an entry is chosen by.

:func:`descend` changes one code at a time. With ``E = x - q``, another entry that moves
run ``j`` by ``d`` changes the loss by ``d H_jj d^T - 2 d (E H)_j``. The ``beam`` best
candidates of a row are kept. With a beam of 1 it is coordinate descent.

Source: Frantar et al. (2022), "GPTQ", in the form with vectors of Liu et al. (2024),
"VPTQ", arXiv 2409.17066; Egiazarian et al. (2024), "AQLM", arXiv 2401.06118, section
3.2 and appendix. Differs: ``E H`` is computed for 128 columns at a time and kept up to
date inside of them only, so that nearly all work is large products; candidates are
narrowed to the best one after each 128 columns, where AQLM carries them along the row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.core.additive.sums import decoded, diagonal_blocks, values_at_once

_COLUMNS_AT_ONCE = 128


def feedback(
    target: Tensor, factor: Tensor, order: Tensor, tables: Tensor, *, beam: int
) -> Tensor:
    """Return codes int64 ``[R, J, M]`` by error feedback between runs of columns.

    Args:
        target: float32 ``[R, C]``.
        factor: float32 ``[C, C]``, upper, with ``U^T U`` the inverse of H; rows and
            columns in the order of ``order``.
        order: int64 ``[J]``, the order in which runs are taken.
        tables: float32 ``[M, K, g]``.
        beam: Candidates of a run while its tables are searched one after another.
    """
    rows, columns = target.shape
    count, entries, vector = tables.shape
    groups = columns // vector
    inverses = torch.linalg.solve_triangular(
        diagonal_blocks(factor, vector),
        torch.eye(vector, device=target.device).expand(groups, -1, -1),
        upper=True,
    )
    found = torch.empty(rows, groups, count, dtype=torch.int64, device=target.device)
    per_row = max(beam * entries, columns)
    step = max(1, values_at_once(target.device) // per_row)
    for start in range(0, rows, step):
        run = slice(start, start + step)
        work = target[run].view(-1, groups, vector)[:, order].flatten(1)
        found[run] = _fed_back_(work, factor, inverses, tables, beam)
    codes = torch.empty_like(found)
    codes[:, order] = found
    return codes


def _fed_back_(
    work: Tensor, factor: Tensor, inverses: Tensor, tables: Tensor, beam: int
) -> Tensor:
    """Return codes of rows ``[r, C]``, in the order of the factor; uses them up."""
    columns, vector = work.shape[1], tables.shape[2]
    width = max(1, _COLUMNS_AT_ONCE // vector) * vector
    codes = []
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        errors = torch.empty_like(work[:, start:stop])
        for first in range(start, stop, vector):
            own = slice(first, first + vector)
            inverse = inverses[first // vector]
            places, error = _nearest_sum(work[:, own] @ inverse, tables @ inverse, beam)
            codes.append(places)
            errors[:, first - start : first - start + vector] = error
            later = slice(first + vector, stop)
            work[:, later].addmm_(error, factor[own, later], alpha=-1)
        work[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
    return torch.stack(codes, dim=1)


def _nearest_sum(points: Tensor, tables: Tensor, beam: int) -> tuple[Tensor, Tensor]:
    """Return codes ``[r, M]`` of points ``[r, g]``, and what they leave over."""
    rows, vector = points.shape
    entries = tables.shape[1]
    left, places = points.unsqueeze(1), points.new_empty(rows, 1, 0, dtype=torch.int64)
    lost = points.new_zeros(rows, 1)
    for table in tables:
        scores = torch.addmm(
            table.square().sum(1), left.reshape(-1, vector), table.T, alpha=-2
        ).view(rows, -1, entries)
        if left.shape[1] > 1:
            scores += lost.unsqueeze(2)
        parent, code, lost = _best(scores, beam)
        left = _taken(left, parent) - table[code]
        places = torch.cat([_taken(places, parent), code.unsqueeze(2)], dim=2)
    best = lost.argmin(1, keepdim=True)
    return _taken(places, best)[:, 0], _taken(left, best)[:, 0]


def _best(scores: Tensor, beam: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return parents, codes and scores ``[r, B]`` of the best of ``[r, b, K]``."""
    entries = scores.shape[2]
    flat = scores.flatten(1)
    if beam == 1:
        values, index = flat.min(1, keepdim=True)
    else:
        values, index = flat.topk(min(beam, flat.shape[1]), largest=False, sorted=False)
    return index // entries, index % entries, values


def _taken(values: Tensor, index: Tensor) -> Tensor:
    """Return ``values`` ``[r, b, ...]`` at ``index`` ``[r, B]``."""
    shape = (*index.shape, *values.shape[2:])
    wide = index.view(*index.shape, *[1] * (values.dim() - 2)).expand(shape)
    return values.gather(1, wide)


def descend(
    target: Tensor,
    hessian: Tensor,
    tables: Tensor,
    codes: Tensor,
    *,
    beam: int,
    generator: torch.Generator,
) -> Tensor:
    """Return codes int64 ``[R, J, M]`` after one visit of each; no row's loss rises.

    Args:
        target: float32 ``[R, C]``.
        hessian: float32 ``[C, C]``, positive definite.
        tables: float32 ``[M, K, g]``.
        codes: int64 ``[R, J, M]`` to start from.
        beam: Candidates of a row.
        generator: On the CPU, for the order of visits.
    """
    rows, columns = target.shape
    _, entries, vector = tables.shape
    width = max(1, _COLUMNS_AT_ONCE // vector) * vector
    starts = list(range(0, columns, width))
    order = [starts[i] for i in torch.randperm(len(starts), generator=generator)]
    codes = codes.clone()
    error = target - decoded(codes, tables)
    step = max(1, values_at_once(target.device) // (beam * entries))
    for start in order:
        run = slice(start, min(start + width, columns))
        groups = slice(run.start // vector, run.stop // vector)
        own = hessian[run, run].contiguous()
        visits = _visits(groups.stop - groups.start, len(tables), generator)
        for first in range(0, rows, step):
            part = slice(first, first + step)
            pull = error[part] @ hessian[:, run]
            better = _descended(pull, own, tables, codes[part, groups], visits, beam)
            codes[part, groups] = better
            error[part, run] = target[part, run] - decoded(better, tables)
    return codes


def _visits(
    groups: int, count: int, generator: torch.Generator
) -> list[tuple[int, int]]:
    """Return runs and tables in the order of visits: a run's tables one by one."""
    visits = []
    for group in torch.randperm(groups, generator=generator).tolist():
        order = torch.randperm(count, generator=generator).tolist()
        visits += [(group, m) for m in order]
    return visits


def _descended(
    pull: Tensor,
    hessian: Tensor,
    tables: Tensor,
    codes: Tensor,
    visits: list[tuple[int, int]],
    beam: int,
) -> Tensor:
    """Return better codes ``[r, j, M]`` of a few columns.

    Args:
        pull: ``E H`` of these columns, ``[r, c]``; used up.
        hessian: Of these columns, ``[c, c]``.
        tables: ``[M, K, g]``.
        codes: ``[r, j, M]``.
        visits: Runs and tables in the order of visits.
        beam: Candidates of a row.
    """
    rows = len(pull)
    _, entries, vector = tables.shape
    blocks = diagonal_blocks(hessian, vector).unsqueeze(1)
    norms = ((tables @ blocks) * tables).sum(-1)  # [j, M, K]
    places, pull = codes.unsqueeze(1).contiguous(), pull.unsqueeze(1)
    change = pull.new_zeros(rows, 1)
    for group, m in visits:
        own = slice(group * vector, (group + 1) * vector)
        old, table = places[:, :, group, m], tables[m]
        towards = pull[..., own] + table[old] @ hessian[own, own]
        scores = torch.addmm(
            norms[group, m], towards.reshape(-1, vector), table.T, alpha=-2
        ).view(rows, -1, entries)
        present = scores.gather(2, old.unsqueeze(2))
        if beam == 1:  # rounding must not look like a gain
            better, new = scores.min(2)
            new = torch.where(better < present[..., 0], new, old)
        else:
            scores += change.unsqueeze(2) - present
            parent, new, change = _best(scores, beam)
            pull, places, old = (_taken(x, parent) for x in (pull, places, old))
        moved = (table[new] - table[old]).view(-1, vector)
        product = (moved @ hessian[own]).view(pull.shape)
        pull = pull - product
        places[:, :, group, m] = new
    best = change.argmin(1, keepdim=True)
    return _taken(places, best)[:, 0]
