"""LayerStatistics: what calibration measured at the input of a layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LayerStatistics:
    """Second moments of the inputs that one or more linear layers share.

    Attributes:
        hessian: float32 ``[C, C]``, the sum over tokens of ``2 x x^T``.
        tokens: How many tokens the sum runs over.
        held_out: The same sum over tokens kept apart, for choices that would overfit
            if they were judged on ``hessian``; ``None`` when nothing was kept.
    """

    hessian: Tensor
    tokens: int
    held_out: Tensor | None = None

    @property
    def columns(self) -> int:
        """Width of the input."""
        return self.hessian.shape[0]
