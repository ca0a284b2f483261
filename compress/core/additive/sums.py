"""What codes and tables of one matrix stand for, and the transpose of that.

Here rows are divided by their scale: a run of ``g`` columns is ``sum_m C[m, code_m]``.
Decoding is linear in the tables; :func:`gathered` is its transpose, which turns a
gradient of values into a gradient of tables.
"""

from __future__ import annotations

import torch
from torch import Tensor

_VALUES_AT_ONCE = {"cpu": 1 << 22, "cuda": 1 << 26}


def values_at_once(device: torch.device) -> int:
    """Return how many float32 a temporary tensor may hold on a device."""
    return _VALUES_AT_ONCE.get(device.type, 1 << 24)


def decoded(codes: Tensor, tables: Tensor) -> Tensor:
    """Return float32 ``[R, C]``.

    Args:
        codes: int64 ``[R, J, M]``.
        tables: float32 ``[M, K, g]``.
    """
    total = tables[0][codes[..., 0]]
    for m in range(1, len(tables)):
        total += tables[m][codes[..., m]]
    return total.flatten(1)


def gathered(values: Tensor, codes: Tensor, entries: int) -> Tensor:
    """Return the sum of all runs that point to each entry, float32 ``[M, K, g]``.

    Sums are taken in float64, so that the order in which a GPU adds does not show.

    Args:
        values: float32 ``[R, C]``.
        codes: int64 ``[R, J, M]``.
        entries: ``K``.
    """
    rows, groups, count = codes.shape
    vector = values.shape[1] // groups
    total = values.new_zeros(count, entries * vector, dtype=torch.float64)
    inner = torch.arange(vector, device=values.device)
    step = max(1, values_at_once(values.device) // values.shape[1])
    for start in range(0, rows, step):
        part = values[start : start + step].double().flatten()
        for m in range(count):
            places = codes[start : start + step, :, m].reshape(-1, 1) * vector + inner
            total[m].scatter_add_(0, places.flatten(), part)
    return total.view(count, entries, vector).float()


def row_losses(error: Tensor, hessian: Tensor) -> Tensor:
    """Return ``e H e^T`` of each row of ``error`` ``[R, C]``, float32 ``[R]``."""
    return ((error @ hessian) * error).sum(1)


def diagonal_blocks(hessian: Tensor, size: int) -> Tensor:
    """Return the blocks ``[J, g, g]`` on the diagonal of ``[C, C]``, a copy."""
    count = len(hessian) // size
    index = torch.arange(count, device=hessian.device)
    return hessian.view(count, size, count, size)[index, :, index]
