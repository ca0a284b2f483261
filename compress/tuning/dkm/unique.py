"""The distinct values of weights in 16 bits, and how many weights have each.

A 16-bit float has at most 65,536 values, and a layer's weights use a few thousand of
them. All that k-means computes for a weight depends on its value alone.

Source: Cho et al. (2023), "eDKM: an efficient and accurate train-time weight clustering
for large language models", arXiv 2309.00964, section 2.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.core.codebooks import from_stored, to_stored

_SHORT = 1 << 16


@dataclass(frozen=True)
class Unique:
    """Distinct values of each group, padded to the same number.

    Attributes:
        values: ``[G, U]`` ascending; zeros behind the last.
        mass: ``[G, U]`` sum of importances of the weights with that value, or their
            number; 0 behind the last.
        first: int64 ``[G, U]`` place in its group of a weight with that value.
        stored: ``[G, n]`` place of each weight in ``values``: int16 in two's
            complement, or int32 where there are more than 65,536.
    """

    values: Tensor
    mass: Tensor
    first: Tensor
    stored: Tensor

    @property
    def inverse(self) -> Tensor:
        """Place of each weight in ``values``, int64 ``[G, n]``."""
        return from_stored(self.stored)


@torch.no_grad()
def unique_values(weights: Tensor, importances: Tensor | None = None) -> Unique:
    """Return the distinct values of each group.

    Waits for the device once, to learn how many there are.

    Args:
        weights: ``[G, n]``, any float type; not changed.
        importances: ``[G, n]``, not negative.
    """
    ordered, order = weights.sort(dim=1)
    steps = torch.zeros(weights.shape, dtype=torch.int64, device=weights.device)
    steps[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    rank = steps.cumsum_(1)
    count = int(rank[:, -1].max()) + 1
    shape = (len(weights), count)
    values = weights.new_zeros(shape).scatter_(1, rank, ordered)
    first = torch.zeros(shape, dtype=torch.int64, device=weights.device)
    first.scatter_(1, rank, order)
    inverse = torch.empty_like(rank).scatter_(1, order, rank)
    each = torch.ones_like(weights) if importances is None else importances
    mass = each.new_zeros(shape).scatter_add_(1, inverse, each)
    stored = to_stored(inverse, 16) if count <= _SHORT else inverse.int()
    return Unique(values, mass, first, stored)
