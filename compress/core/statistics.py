"""LayerStatistics: what calibration measured at the input of a layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LayerStatistics:
    """Second moments of the inputs that one or more linear layers share.

    ``x`` is the input of the layer in the partly compressed model, ``y`` the input that
    the same layer sees for the same token in the dense model.

    Attributes:
        hessian: float32 ``[C, C]``, the sum over tokens of ``2 x x^T``.
        tokens: How many tokens the sums run over.
        drift: float32 ``[C, C]``, the sum of ``2 (y - x) x^T``; ``None`` when the dense
            model was not run beside the compressed one.
    """

    hessian: Tensor
    tokens: int
    drift: Tensor | None = None

    @property
    def columns(self) -> int:
        """Width of the input."""
        return self.hessian.shape[0]
