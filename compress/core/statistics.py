"""What calibration measured at the inputs of layers."""

from __future__ import annotations

from collections.abc import Mapping
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
        counts: int64 ``[V]``, how often each token came; of embedding and head only,
            whose rows are tokens.
    """

    hessian: Tensor
    tokens: int
    drift: Tensor | None = None
    counts: Tensor | None = None

    @property
    def columns(self) -> int:
        """Width of the input."""
        return self.hessian.shape[0]


@dataclass(frozen=True)
class InputSquares:
    """Squared inputs of the linear layers of the dense model: half of ``diag(H)``.

    Attributes:
        sums: float32 ``[C]`` on the CPU, the sum of ``x^2`` over tokens, by module
            name; zeros for an expert that no token was sent to.
        tokens: How many tokens each sum runs over.
        sources: Names of the calibration texts.
        windows: Sequences of calibration text.
        window_tokens: Tokens of a sequence.
    """

    sums: Mapping[str, Tensor]
    tokens: Mapping[str, int]
    sources: tuple[str, ...]
    windows: int
    window_tokens: int
