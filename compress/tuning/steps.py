"""The arithmetic of a step: moments, relative sizes, and which codes may change.

Every tensor has the matrices of a stack first, ``[B, ...]``. Nothing here waits for the
device.

Source: Kingma and Ba (2015), Adam; You et al. (2020), LAMB, arXiv 1904.00962, for steps
relative to the size of what they change; Malinovskii et al. (2024), PV-Tuning, arXiv
2405.14852, section 3.2 and appendix, for the subspace of largest wishes and the trust
ratio.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compress.distributed.team import Team

_EPSILON = 1e-10  # gradients of a mean over tokens are small


def direction(
    gradient: Tensor,
    second: Tensor,
    *,
    beta: float,
    number: int,
    first: Tensor | None = None,
    first_beta: float = 0.0,
) -> Tensor:
    """Return Adam's direction, and update its moments in place.

    Args:
        gradient: float32.
        second: Running mean of its square.
        beta: Of ``second``.
        number: Steps before this one, which the means are corrected for.
        first: Running mean of the gradient; ``None`` takes the gradient itself.
        first_beta: Of ``first``.
    """
    second.mul_(beta).addcmul_(gradient, gradient, value=1 - beta)
    size = (second / (1 - beta ** (number + 1))).sqrt_().add_(_EPSILON)
    if first is None:
        return size.reciprocal_().mul_(gradient)
    first.mul_(first_beta).add_(gradient, alpha=1 - first_beta)
    return size.reciprocal_().mul_(first).div_(1 - first_beta ** (number + 1))


def relative(values: Tensor, change: Tensor, team: Team | None = None) -> Tensor:
    """Return ``|values| / |change|`` of each matrix; 1 where either is 0.

    Args:
        values: float32 ``[B, ...]``.
        change: As ``values``.
        team: The processes, if each has some rows of the matrices only.

    Returns:
        float32 ``[B, 1, ...]``.
    """
    lengths = torch.stack([_length(values), _length(change)])
    if team is not None:
        squares = lengths.square()
        team.add_([squares])
        lengths = squares.sqrt()
    own, other = lengths
    usable = (own > 0) & (other > 0)
    ratio = torch.where(usable, own / other, torch.ones_like(own))
    return ratio.view(-1, *[1] * (values.dim() - 1))


def _length(values: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(values.flatten(1), dim=1)
    return length


def selected(wishes: Tensor, share: float, *, ordered: bool) -> Tensor | None:
    """Return the units that want to move most.

    Args:
        wishes: float32 ``[B, U]``, how far each unit wants to move.
        share: Of the units of a matrix, rounded up.
        ordered: The first is to be the one that wants most, even if all are selected.

    Returns:
        int64 ``[B, n]``; ``None`` for all, in their own order.
    """
    count = math.ceil(share * wishes.shape[1])
    if count == wishes.shape[1] and not ordered:
        return None
    return wishes.topk(count, dim=1, sorted=ordered).indices


def trusted(change: Tensor, limit: Tensor) -> Tensor:
    """Return which changes are made: the longest run within a limit, and one at least.

    Args:
        change: float32 ``[B, n]``, squared length of the change of each unit.
        limit: float32 ``[B]``, largest squared length of all changes together.

    Returns:
        bool ``[B, n]``.
    """
    within = change.cumsum(1) <= limit.unsqueeze(1)
    within[:, 0] = True
    return within
