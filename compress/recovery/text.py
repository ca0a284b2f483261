"""What recovery trains on: windows of the calibration sources, and their order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.calibration.data import SourceSpec, load_tokens
from compress.config.training_options import TrainingOptions


@dataclass(frozen=True)
class RecoveryText:
    """Windows to train on, and other windows of the same sources to judge by.

    Attributes:
        train: int64 ``[N, T]``.
        held_out: int64 ``[M, T]``; shares no window with ``train``.
        sources: Name and number of windows of each source, of both together.
        digest: Equal digests mean equal text.
    """

    train: Tensor
    held_out: Tensor
    sources: tuple[tuple[str, int], ...]
    digest: str


def load_recovery_text(
    spec: SourceSpec, tokenizer: Any, options: TrainingOptions
) -> RecoveryText:
    """Return the windows that options ask for; rows are mixed over all sources.

    Raises:
        CalibrationError: A source cannot be used, or is too short for its share.
    """
    found = load_tokens(
        spec,
        tokenizer,
        samples=options.samples + options.held_out,
        sequence_length=options.sequence_length,
        seed=options.seed,
    )
    held_out, train = torch.split(found.tokens, [options.held_out, options.samples])
    return RecoveryText(train, held_out, found.sources, found.digest)


@dataclass(frozen=True)
class Order:
    """Which windows a step takes: each epoch in an order of its own, without a rest.

    A function of the seed and the step alone, so that a run that goes on needs no state
    of a generator, and any number of processes agree.

    Attributes:
        count: Windows ``N`` there are.
        batch: Windows of one step, over all passes and processes.
        seed: Of the orders.
    """

    count: int
    batch: int
    seed: int

    def rows(self, step: int) -> Tensor:
        """Return int64 ``[batch]``, indices of windows."""
        places = torch.arange(step * self.batch, (step + 1) * self.batch)
        epochs = places // self.count
        rows = torch.empty_like(places)
        for epoch in sorted(set(epochs.tolist())):
            own = epochs == epoch
            rows[own] = self._permutation(epoch)[places[own] % self.count]
        return rows

    def _permutation(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.count, generator=generator)
