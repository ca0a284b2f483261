"""A weight matrix and statistics of its inputs, with what methods stumble over."""

from __future__ import annotations

import torch

from compress.core.scales import TORCH_DTYPES
from compress.core.statistics import LayerStatistics

ROWS, COLUMNS = 48, 128


def make_weight(dtype: str = "float32") -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    weight[0] = 0  # a row without a range
    weight[1, 3] = 40  # an outlier
    return weight.to(TORCH_DTYPES[dtype])


def make_statistics(*, with_drift: bool = True) -> LayerStatistics:
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(300, COLUMNS, generator=generator)
    inputs[:, 5] = 0  # a dead channel
    gap = 0.05 * torch.randn(300, COLUMNS, generator=generator)
    drift = 2 * gap.T @ inputs if with_drift else None
    return LayerStatistics(2 * inputs.T @ inputs, 300, drift)
