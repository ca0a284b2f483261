"""H made fit for solving: off-diagonal shrunk, damped until its inverse has a factor.

Source: the damping is that of Frantar et al. (2022), "GPTQ"; the shrinkage is the usual
cure for a covariance from few samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.core import feedback

LARGEST_DAMP = 1.0


def regularized(hessian: Tensor, shrink: float) -> Tensor:
    """Return H with its off-diagonal shrunk and never-fed columns given a diagonal.

    Args:
        hessian: float32 ``[C, C]``; not changed.
        shrink: Share by which the off-diagonal is reduced.
    """
    diagonal = hessian.diagonal().clone()
    dead = diagonal == 0
    shrunk = hessian * (1 - shrink)
    diagonal[dead] = diagonal[~dead].mean() if bool((~dead).any()) else 1.0
    shrunk.diagonal().copy_(diagonal)
    return shrunk


def damped_factor_(
    hessian: Tensor, order: Tensor, damp: float
) -> tuple[Tensor | None, tuple[str, ...]]:
    """Damp H until its inverse has a factor; return that and notes.

    Args:
        hessian: float32 ``[C, C]``; the damping is added to it.
        order: int64 ``[C]``; rows and columns of the factor are in this order.
        damp: Added to the diagonal, as a share of its mean. Multiplied by ten, up to
            1, while H is not positive definite; then there is no factor.
    """
    diagonal = hessian.diagonal().clone()
    tried = damp
    while tried <= LARGEST_DAMP:
        hessian.diagonal().copy_(diagonal + tried * diagonal.mean())
        factor = feedback.inverse_factor(hessian, order)
        if factor is not None:
            note = (f"damp raised to {tried:g}: the Hessian is near singular",)
            return factor, note if tried > damp else ()
        tried *= 10
    return None, ()


def drift_correction(
    weight: Tensor, drift: Tensor, factor: Tensor, order: Tensor
) -> Tensor:
    """Return ``W D H^-1``, which best gives the dense outputs from present inputs.

    Args:
        weight: float32 ``[R, C]``.
        drift: float32 ``[C, C]``, the sum of ``2 (y - x) x^T``.
        factor: Of the inverse of H, in the order of ``order``.
        order: int64 ``[C]``.
    """
    change = torch.empty_like(weight)
    change[:, order] = (weight @ drift)[:, order] @ factor.T @ factor
    return change
