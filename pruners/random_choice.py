"""Neurons by lot: what every criterion has to beat."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.core.contracts import Options, Pruner
from compress.core.neurons import GatedMLP, NeuronStatistics


class RandomOptions(Options):
    """Options of ``random``.

    Attributes:
        seed: Of the lots; the same neurons for the same seed and block.
    """

    seed: int = Field(default=0, ge=0)


class Random(Pruner):
    """See the module."""

    name: ClassVar[str] = "random"
    summary: ClassVar[str] = "neurons by lot, the baseline"
    source: ClassVar[str] = "baseline"
    Options: ClassVar[type[Options]] = RandomOptions
    needs_activations: ClassVar[bool] = False
    budgets: ClassVar[str] = "uniform"
    options: RandomOptions

    def scores(self, mlp: GatedMLP, statistics: NeuronStatistics | None) -> Tensor:
        """Return uniform numbers of a generator for this block."""
        seed = self.options.seed * 1_000_003 + mlp.block
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(mlp.neurons, generator=generator).to(mlp.down.device)
