"""Second moments of the inputs of linear layers, summed batch by batch.

Sums are float32 whatever the inputs are. With bfloat16 inputs the products run on
matrix units; a GPU sums them in float32, a CPU rounds each product to bfloat16, so that
there it is taken over a few thousand tokens at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.core.errors import CalibrationError
from compress.core.statistics import LayerStatistics
from compress.distributed.team import Team

_COLUMN_BLOCKS = 4
# An element of a sum over 32 thousand tokens is then off by 5e-4 of its size, which is
# nothing beside damping and shrinkage.
_TOKENS_ROUNDED_ONCE = 4096


def add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left^T right`` to a float32 matrix.

    Args:
        total: float32 ``[C, D]``.
        left: ``[T, C]``, float32 or bfloat16.
        right: ``[T, D]`` of the same type.
    """
    if left.dtype == torch.float32:
        total.addmm_(left.T, right)
    elif left.is_cuda:
        total.add_(torch.mm(left.T, right, out_dtype=torch.float32))
    else:
        total.add_(left.T @ right)


class Moments:
    """Sums over the tokens of one input, which one or more layers read."""

    def __init__(self) -> None:
        self.tokens = 0
        self._gram: Tensor | None = None
        self._drift: Tensor | None = None

    def add(self, inputs: Tensor, dense: Tensor | None = None) -> None:
        """Count some windows.

        Args:
            inputs: ``[B, T, C]``, what the layers see in the partly compressed model.
            dense: The same in the dense model; given always or never.
        """
        columns = inputs.shape[-1]
        x = inputs.reshape(-1, columns)
        y = None if dense is None else dense.reshape(-1, columns).to(x)
        if self._gram is None:
            self._gram = torch.zeros(columns, columns, device=x.device)
            self._drift = None if y is None else torch.zeros_like(self._gram)
        rounded = x.dtype != torch.float32 and not x.is_cuda
        size = _TOKENS_ROUNDED_ONCE if rounded else max(1, len(x))
        for start in range(0, len(x), size):
            run = slice(start, start + size)
            self._add(x[run], None if y is None else y[run])
        self.tokens += len(x)

    def _add(self, x: Tensor, y: Tensor | None) -> None:
        assert self._gram is not None
        width = -(-x.shape[1] // _COLUMN_BLOCKS)
        for start in range(0, x.shape[1], width):
            block = slice(start, start + width)  # what is right of it is its mirror
            add_product_(self._gram[start:, block], x[:, start:], x[:, block])
        if y is not None:
            assert self._drift is not None, "the dense inputs came late"
            add_product_(self._drift, y - x, x)

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
        gram, drift, self._gram, self._drift = self._gram, self._drift, None, None
        hessian = gram.tril_()
        hessian += hessian.tril(-1).T
        hessian *= 2
        # One bad activation makes a row of a sum bad, which is cheaper to look for.
        finite = hessian.diagonal().isfinite().all()
        if drift is not None:
            drift *= 2
            finite = finite & drift.isfinite().all()
        if not bool(finite):
            raise CalibrationError(
                f"inputs of {layer} are NaN or infinite; the checkpoint is damaged, or "
                "its activations do not fit the arithmetic"
            )
        return LayerStatistics(hessian, self.tokens, drift)
