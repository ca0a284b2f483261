"""The second moment of a layer's inputs, made fit for solving with.

``H = 2 sum x x^T`` comes from few samples, has columns that were never fed, and may be
singular. What methods with error feedback share is here: shrinking the off-diagonal,
damping until an inverse has a factor, the order of columns, and the correction of a
target for what layers before lost.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compress.core import feedback

LARGEST_DAMP = 1.0
_NO_FACTOR = "rounded to nearest: the Hessian cannot be factored even with damp 1"


def regularized(hessian: Tensor, shrink: float) -> Tensor:
    """Return ``H`` with a smaller off-diagonal, and ones where no input ever was.

    Args:
        hessian: float32 ``[C, C]``; not changed.
        shrink: Share by which the off-diagonal is reduced. Columns with a zero diagonal
            get its mean.
    """
    diagonal = hessian.diagonal().clone()
    dead = diagonal == 0
    shrunk = hessian * (1 - shrink)
    diagonal[dead] = diagonal[~dead].mean() if bool((~dead).any()) else 1.0
    shrunk.diagonal().copy_(diagonal)
    return shrunk


Damped = tuple[Tensor | None, tuple[str, ...]]
"""A factor of the inverse, if there is one, and notes."""


def damp_(hessian: Tensor, order: Tensor, damp: float) -> Damped:
    """Damp ``H`` until its inverse has a factor; return that, or ``None``, and notes.

    Args:
        hessian: float32 ``[C, C]``.
        order: int64 ``[C]``, of rows and columns of the factor.
        damp: Added to the diagonal, as a share of its mean; multiplied by ten, up to 1,
            while that is not enough.
    """
    return damp_alike_([hessian], [order], damp)[0]


def damp_alike_(
    hessians: Sequence[Tensor], orders: Sequence[Tensor], damp: float
) -> list[Damped]:
    """Do what :func:`damp_` does to each of some Hessians of one size."""
    diagonals = [hessian.diagonal().clone() for hessian in hessians]
    found: list[Damped] = [(None, (_NO_FACTOR,))] * len(hessians)
    left, first = list(range(len(hessians))), damp
    while left and damp <= LARGEST_DAMP:
        for i in left:
            more = damp * diagonals[i].mean()
            hessians[i].diagonal().copy_(diagonals[i] + more)
        factors = feedback.inverse_factors(
            [hessians[i] for i in left], [orders[i] for i in left]
        )
        note = f"damp raised to {damp:g}: the Hessian is near singular"
        for i, factor in zip(left, factors, strict=True):
            if factor is not None:
                found[i] = factor, (note,) if damp > first else ()
        left = [i for i in left if found[i][0] is None]
        damp *= 10
    return found


def column_order(hessian: Tensor, *, act_order: bool, run: int = 1) -> Tensor:
    """Return the order in which columns are rounded, int64 ``[C]``.

    Args:
        hessian: float32 ``[C, C]``.
        act_order: By falling diagonal, instead of from left to right.
        run: Columns that stay together; they are ordered by their sum.
    """
    columns = torch.arange(len(hessian), device=hessian.device).view(-1, run)
    if not act_order:
        return columns.flatten()
    energy = hessian.diagonal().view(-1, run).sum(1)
    return columns[torch.argsort(energy, descending=True, stable=True)].flatten()


def add_drift_(target: Tensor, drift: Tensor, factor: Tensor, order: Tensor) -> None:
    """Move ``target`` ``[R, C]`` towards what gives the dense model's outputs.

    The least-squares correction is ``W D H^-1`` with ``D = 2 sum (y - x) x^T``.

    Args:
        target: float32 weights.
        drift: ``D``, times the share of the correction that is wanted.
        factor: Of ``H^-1``, in ``order``.
        order: int64 ``[C]``.
    """
    owed = (target @ drift)[:, order]
    target[:, order] += owed @ factor.T @ factor
