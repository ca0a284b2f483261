"""A gated MLP as pruners see it, and what calibration measured of its neurons.

Neuron ``j`` is row ``j`` of gate and up, and column ``j`` of down. ``x`` is the input
of down: ``x_j = act(gate_j . h) * (up_j . h)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GatedMLP:
    """Weights of one MLP, or of one expert.

    Attributes:
        gate: float32 ``[I, H]``.
        up: float32 ``[I, H]``.
        down: float32 ``[H, I]``.
        name: Full path of the MLP, for messages.
        block: Number of the decoder block.
    """

    gate: Tensor
    up: Tensor
    down: Tensor
    name: str = "mlp"
    block: int = 0

    @property
    def neurons(self) -> int:
        """How many neurons there are."""
        return self.down.shape[1]


@dataclass(frozen=True)
class Wanted:
    """An output that a matrix is to give, as far as fitting it takes.

    Attributes:
        products: float64 ``[H, I]``, the mean over tokens of ``t x^T`` for the output
            ``t`` and the inputs ``x``.
        power: Mean of ``|t|^2``.
    """

    products: Tensor
    power: float


@dataclass(frozen=True)
class NeuronStatistics:
    """Moments of the inputs of one ``down`` matrix.

    Attributes:
        gram: float32 ``[I, I]``, the mean over tokens of ``x x^T``.
        mean: float32 ``[I]``, the mean of ``x``.
        peak: float32 ``[I]``, the largest ``|x|``.
        tokens: How many tokens these run over.
        effect: float32 ``[I]``, the mean of ``(x_j dL/dx_j)^2`` with ``L`` the log
            likelihood of tokens drawn from the model: twice the KL in nats that zeroing
            a neuron costs, to second order. ``None`` if no gradients were taken.
        wanted: What ``down`` is to give, where that is not its own output.
    """

    gram: Tensor
    mean: Tensor
    peak: Tensor
    tokens: int
    effect: Tensor | None = None
    wanted: Wanted | None = None

    @property
    def energy(self) -> Tensor:
        """Mean of ``x_j^2``, float32 ``[I]``."""
        return self.gram.diagonal()

    @property
    def variance(self) -> Tensor:
        """Variance of ``x_j``, float32 ``[I]``."""
        return (self.energy - self.mean.square()).clamp(min=0)


def keep_largest(scores: Tensor, keep: int, protected: Tensor | None = None) -> Tensor:
    """Return the ascending indices of the ``keep`` largest scores.

    Ties fall to the lower index. NaN is an error of whoever made the scores.

    Args:
        scores: Float ``[I]``.
        keep: How many.
        protected: Indices that are kept whatever their scores say.
    """
    assert bool(scores.isfinite().all()), "a score is NaN or infinite"
    ranked = scores.double().clone()
    if protected is not None:
        ranked[protected] = math.inf
    order = torch.sort(ranked, descending=True, stable=True).indices
    return order[:keep].sort().values


def loudest(statistics: NeuronStatistics, share: float = 0.001) -> Tensor:
    """Return the neurons with the largest ``|x|``, which a model hangs on.

    They make the massive activations that attention uses as a resting place; pruning
    one ruins a model, however rarely it is active.
    """
    count = math.ceil(share * len(statistics.peak))
    return statistics.peak.topk(count).indices
