"""Static scales of an FP8 cache, and its rounding.

``x_hat = e4m3(clamp(x / s, -448, 448)) s``. The scale covers the largest magnitude that
calibration met (``amax / 448``), a percentile of the magnitudes, or the share of the
largest, from 0.5 to 1, whose rounding has the least squared error.

Source: vLLM's ``k_scale`` and ``v_scale``; compressed-tensors' ``kv_cache_scheme``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.core.levels import FLOAT_GRIDS

_E4M3 = FLOAT_GRIDS["e4m3"]
_SHARES = tuple(s / 20 for s in range(20, 9, -1))
_SMALLEST = 2.0**-126


@dataclass(frozen=True)
class ScaleRule:
    """How scales are chosen.

    Attributes:
        strategy: ``tensor``, one scale for keys and one for values of a block, or
            ``attn_head``, one for each head.
        choice: ``amax``, ``percentile`` or ``mse``.
        percentile: Of the magnitudes, for ``percentile``.
    """

    strategy: str = "tensor"
    choice: str = "amax"
    percentile: float = 99.99

    def scale_of(self, states: Tensor) -> Tensor:
        """Return the scale of keys or values of one block.

        Args:
            states: ``[N, heads, T, size]`` over all of calibration.

        Returns:
            float32 ``[1]``, or ``[heads, 1, 1]`` with ``attn_head``.
        """
        by_head = self.strategy == "attn_head"
        rows = states.float().transpose(0, 1)
        rows = rows.reshape(rows.shape[0] if by_head else 1, -1)
        scale = self._magnitude(rows).clamp(min=_SMALLEST) / _E4M3.highest
        if self.choice == "mse":
            scale = _least_error(rows, scale)
        return scale.view(-1, 1, 1) if by_head else scale.view(1)

    def _magnitude(self, rows: Tensor) -> Tensor:
        magnitudes = rows.abs()
        if self.choice != "percentile":
            return magnitudes.amax(1)
        count = rows.shape[1]
        rank = min(count, max(1, math.ceil(count * self.percentile / 100)))
        # Of the few largest the smallest: far cheaper than the kth smallest of all.
        return magnitudes.topk(count - rank + 1, 1).values[:, -1]


def fake_quantize_fp8(states: Tensor, scale: Tensor) -> Tensor:
    """Return float32 ``[..., heads, T, size]`` rounded to E4M3 under ``scale``."""
    scale = scale.to(states.device)
    return _E4M3.round_(states.float() / scale).mul_(scale)


def _least_error(rows: Tensor, scale: Tensor) -> Tensor:
    """Return, for each row, the share of its scale with the least squared error."""
    best, least = scale, torch.full_like(scale, math.inf)
    for share in _SHARES:
        tried = scale * share
        error = fake_quantize_fp8(rows, tried[:, None]).sub_(rows).square_().sum(1)
        better = error < least
        best, least = (
            torch.where(better, tried, best),
            torch.where(better, error, least),
        )
    return best
