"""Second moments of the inputs of linear layers, summed window by window.

The product of a window is float32 whatever the inputs are, and the sum over windows is
float64. A float64 holds a sum of float32 numbers exactly unless they differ by more
than 2^29, so that the sum does not depend on the order of windows, nor on how many
processes had a part of them: one code that flips would flip most of those behind it.

With bfloat16 inputs products run on matrix units; a GPU sums them in float32, a CPU
rounds each product to bfloat16, so that there it is taken over a few thousand tokens at
a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compress.core.errors import CalibrationError
from compress.core.statistics import LayerStatistics
from compress.distributed.team import Team

_COLUMN_BLOCKS = 4
# An element of a sum over 32 thousand tokens is then off by 5e-4 of its size, which is
# nothing beside damping and shrinkage.
_TOKENS_ROUNDED_ONCE = 4096


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left^T right``, float32 ``[C, D]``, or bfloat16 on a CPU.

    Args:
        left: ``[T, C]``, float32 or bfloat16.
        right: ``[T, D]`` of the same type.
    """
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left.T, right, out_dtype=torch.float32)
    return left.T @ right


class Moments:
    """Sums over the tokens of one input, which one or more layers read."""

    def __init__(self) -> None:
        self.tokens = 0
        self._gram: Tensor | None = None
        self._drift: Tensor | None = None

    def add(
        self,
        inputs: Tensor,
        dense: Tensor | None = None,
        *,
        sizes: Sequence[int] | None = None,
    ) -> None:
        """Count some windows.

        Args:
            inputs: ``[B, T, C]``, what the layers see in the partly compressed model.
            dense: The same in the dense model; given always or never.
            sizes: Tokens of each window where these differ; the inputs are then
                ``[n, C]``, one window behind the other.
        """
        columns = inputs.shape[-1]
        if sizes is None:
            length = inputs.shape[-2]
            sizes = [length] * (inputs.numel() // max(1, length * columns))
        x = inputs.reshape(-1, columns)
        y = None if dense is None else dense.reshape(-1, columns).to(x)
        if self._gram is None:
            kind = torch.float32 if x.device.type == "mps" else torch.float64
            self._gram = torch.zeros(columns, columns, dtype=kind, device=x.device)
            self._drift = None if y is None else torch.zeros_like(self._gram)
        rounded = x.dtype != torch.float32 and not x.is_cuda
        start = 0
        for size in sizes:
            stop, step = start + size, _TOKENS_ROUNDED_ONCE if rounded else size
            for first in range(start, stop, max(1, step)):
                run = slice(first, min(first + step, stop))
                self._add(x[run], None if y is None else y[run])
            start = stop
        self.tokens += len(x)

    def _add(self, x: Tensor, y: Tensor | None) -> None:
        assert self._gram is not None
        width = -(-x.shape[1] // _COLUMN_BLOCKS)
        for start in range(0, x.shape[1], width):
            block = slice(start, start + width)  # what is right of it is its mirror
            self._gram[start:, block] += product(x[:, start:], x[:, block])
        if y is not None:
            assert self._drift is not None, "the dense inputs came late"
            gap = y - x
            for start in range(0, x.shape[1], width):
                block = slice(start, start + width)
                self._drift[:, block] += product(gap, x[:, block])

    def join_(self, team: Team, *, owner: int | None = None) -> None:
        """Add up what all processes have counted, each on its own windows.

        Args:
            team: The processes.
            owner: The only one that can make statistics of it; by default all can.
        """
        assert self._gram is not None, "no input was counted"
        team.add_([self._gram], owner=owner)
        if self._drift is not None:
            team.add_([self._drift], owner=owner)
        self.tokens = sum(team.gather(self.tokens))

    def statistics(self, layer: str) -> LayerStatistics:
        """Return the statistics of all that was counted, once.

        Args:
            layer: Name for messages.

        Raises:
            CalibrationError: The inputs are not finite.
        """
        assert self._gram is not None, "no input was counted"
        hessian, self._gram = self._gram.float().tril_(), None
        hessian += hessian.tril(-1).T
        hessian *= 2
        # One bad activation makes a row of a sum bad, which is cheaper to look for.
        finite = hessian.diagonal().isfinite().all()
        drift = None
        if self._drift is not None:
            drift, self._drift = self._drift.float().mul_(2), None
            finite = finite & drift.isfinite().all()
        if not bool(finite):
            raise CalibrationError(
                f"inputs of {layer} are NaN or infinite; the checkpoint is damaged, or "
                "its activations do not fit the arithmetic"
            )
        return LayerStatistics(hessian, self.tokens, drift)
