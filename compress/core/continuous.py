"""The continuous parts of a coded matrix: scales, minima and tables, for training.

Codes are fixed. Values are computed as ``QuantizedTensor.dequantize`` computes them,
but from float32 leaves that gradients reach.

Source: Egiazarian et al. (2024), "AQLM", arXiv 2401.06118, section 3.4.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.core import codebooks
from compress.core.scheme import Scales
from compress.core.tensors import QuantizedTensor, decode


@dataclass(frozen=True)
class BlockTuning:
    """How the layers of a block are tuned together, once all of them are coded.

    Attributes:
        epochs: At most; fewer if ``patience`` of them bring nothing.
        learning_rate: Of Adam, as a share of the root mean square of each tensor.
        step_tokens: Tokens of a step, rounded to whole windows, at least one.
        patience: Epochs without a gain on held-out windows after which it ends.
        seed: Of the order of windows.
    """

    epochs: int
    learning_rate: float
    step_tokens: int = 8192
    patience: int = 3
    seed: int = 0


def is_tunable(tensor: QuantizedTensor) -> bool:
    """Whether a matrix has numbers of a float type beside its codes."""
    free = tensor.scheme.scales is Scales.FREE and tensor.scheme.row_block == 1
    return tensor.tables is not None or free


class Continuous:
    """Leaves of one matrix, and the values that they give.

    Args:
        tensor: One that :func:`is_tunable` says yes to.
    """

    def __init__(self, tensor: QuantizedTensor) -> None:
        self._tensor = tensor
        self._scale = _leaf(tensor.scale)
        self._tables = None if tensor.tables is None else _leaf(tensor.tables)
        minima = tensor.zero is not None and tensor.zero.is_floating_point()
        self._minima = (
            _leaf(tensor.zero) if minima and tensor.zero is not None else None
        )
        self._levels = self._places = torch.empty(0)
        if tensor.tables is None:
            levels = tensor.scheme.levels.to_levels(tensor.codes)
            self._levels = levels.view(len(levels), tensor.scale.shape[1], -1)
        else:
            self._places = _flat_places(tensor, tensor.tables)

    @property
    def leaves(self) -> list[Tensor]:
        """float32 tensors that want gradients; scales only where there are some."""
        is_one = self._tables is not None and self._scale.numel() == 1
        scale = None if is_one else self._scale
        return [x for x in (self._tables, scale, self._minima) if x is not None]

    def values(self) -> Tensor:
        """Return float32 ``[R, C]``, through which gradients flow to the leaves."""
        if self._tables is not None:
            flat = self._tables.view(-1, self._tables.shape[-1])
            runs = torch.nn.functional.embedding(self._places, flat).sum(2)
            return runs.flatten(1) * self._scale
        zero = self._tensor.zero if self._minima is None else self._minima
        wide = None if zero is None else zero.unsqueeze(-1)
        kind = self._tensor.scheme.zero
        values = decode(self._levels, self._scale.unsqueeze(-1), wide, kind).flatten(1)
        low_rank = self._tensor.low_rank
        return values if low_rank is None else values + low_rank.product()

    def stored(self) -> QuantizedTensor:
        """Return the matrix with its leaves rounded to their storage type."""
        old = self._tensor
        zero, tables = old.zero, old.tables
        if zero is not None and self._minima is not None:
            zero = self._minima.detach().to(zero.dtype)
        if tables is not None and self._tables is not None:
            tables = self._tables.detach().to(tables.dtype)
        scale = self._scale.detach().to(old.scale.dtype)
        return replace(old, scale=scale, zero=zero, tables=tables)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().float().clone().requires_grad_()


def _flat_places(tensor: QuantizedTensor, tables: Tensor) -> Tensor:
    """Return places ``[R, J, M]`` in tables of which all entries lie in one row."""
    _, count, entries, _ = tables.shape
    rows, columns = tensor.shape
    places = codebooks.from_stored(tensor.codes).view(rows, -1, count)
    device = places.device
    own = codebooks.owners(tensor.scheme, rows, columns, slice(0, rows)).to(device)
    first = own.unsqueeze(2) * count + torch.arange(count, device=device)
    return places + first * entries
