"""What the neurons that stay can take over from those that go.

With ``G`` the second moment of the inputs ``x`` of a matrix ``W [R, I]`` and ``S`` the
columns that stay, the best ``W'`` minimises ``E|W x - W' x_S|^2``. All in float64:
``G`` has a condition number beyond float32 as soon as activations are massive.

* :func:`least_squares`: ``W' = W_S + W_P G_PS (G_SS + ridge)^-1``, ridge towards
  ``W_S``; :func:`fitted` the same for an output that is not ``W x``.
* :func:`scaled_columns`: the best diagonal, ``W' = W_S diag(m)``, ridge towards one;
  Kwon et al. (arXiv 2204.09656), section 4.3, with the Gram matrix in closed form.
* :class:`Downdate`: the inverse of ``G_SS`` and the compensated ``W`` while columns go
  chunk by chunk, as in SlimGPT (arXiv 2412.18110).

A ridge is a share of the mean diagonal of ``G``. It has to be small: a few massive
activations dominate that mean. Where sums were rounded so that ``G`` plus that ridge is
not positive definite, :func:`factor` takes the next power of ten that is enough.
"""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 1e-4
"""Share of the mean diagonal: measured best between 1e-3 and 1e-5, flat there."""
_LARGEST_SCALE = 10.0


def with_ridge(gram: Tensor, ridge: float = RIDGE) -> Tensor:
    """Return float64 ``G + ridge * mean(diag G) * I``.

    Args:
        gram: ``[I, I]``.
        ridge: Share of the mean diagonal.
    """
    damped = gram.to(torch.float64, copy=True)
    mean = damped.diagonal().mean()
    # A dead block has no moments at all; any ridge is right for it.
    damped.diagonal().add_(torch.where(mean > 0, ridge * mean, torch.ones_like(mean)))
    return damped


def factor(gram: Tensor, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
    """Return float64 ``G`` with the ridge that it needs, and its Cholesky factor.

    Args:
        gram: ``[I, I]``, finite.
        ridge: Share of the mean diagonal to begin with.
    """
    while True:
        damped = with_ridge(gram, ridge)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed):
            return damped, lower
        ridge *= 10  # ends: with the trace on the diagonal any moments are definite


def least_squares(
    weight: Tensor, gram: Tensor, kept: Tensor, ridge: float = RIDGE
) -> Tensor:
    """Return float32 ``[R, len(kept)]``: the columns that stay, taking over the rest.

    Args:
        weight: ``[R, I]``.
        gram: ``[I, I]``, mean of ``x x^T``.
        kept: int64, ascending.
        ridge: Share of the mean diagonal of what stays.
    """
    wide, gone = weight.double(), complement(kept, weight.shape[1])
    missing = wide[:, gone] @ gram[gone][:, kept].double()
    return _moved(wide[:, kept], missing, gram[kept][:, kept], ridge)


def fitted(
    weight: Tensor,
    gram: Tensor,
    products: Tensor,
    kept: Tensor,
    ridge: float = RIDGE,
) -> Tensor:
    """Return float32 ``[R, len(kept)]``: what gives a wanted output ``t`` best.

    Args:
        weight: ``[R, I]``, towards which the ridge draws.
        gram: ``[I, I]``, mean of ``x x^T``.
        products: ``[R, I]``, mean of ``t x^T``.
        kept: int64, ascending.
        ridge: Share of the mean diagonal of what stays.
    """
    inside, wide = gram[kept][:, kept], weight[:, kept].double()
    missing = products[:, kept].double() - wide @ inside.double()
    return _moved(wide, missing, inside, ridge)


def _moved(weight: Tensor, missing: Tensor, gram: Tensor, ridge: float) -> Tensor:
    """Return float32 ``W + M (G + ridge)^-1``."""
    _, lower = factor(gram, ridge)
    found: Tensor = weight + torch.cholesky_solve(missing.T, lower).T
    return found.float()


def scaled_columns(
    weight: Tensor, gram: Tensor, kept: Tensor, ridge: float = RIDGE
) -> Tensor:
    """Return float32 ``[R, len(kept)]``: the columns that stay, each times a number.

    A solution with a number above ten is not believed: the columns stay as they are.
    """
    wide = weight.double()
    moments = (wide.T @ wide) * gram.double()
    small = with_ridge(moments[kept][:, kept], ridge)
    extra = small.diagonal() - moments.diagonal()[kept]
    scales = torch.linalg.solve(small, moments[kept].sum(1) + extra)
    if not bool((scales.abs() <= _LARGEST_SCALE).all()):
        scales = torch.ones_like(scales)
    found: Tensor = wide[:, kept] * scales
    return found.float()


def complement(kept: Tensor, count: int) -> Tensor:
    """Return the ascending indices below ``count`` that ``kept`` lacks."""
    gone = torch.ones(count, dtype=torch.bool, device=kept.device)
    gone[kept] = False
    return gone.nonzero()[:, 0]


class Downdate:
    """Columns that are left, with their compensated weights and inverse moments.

    Args:
        weight: ``[R, I]``.
        gram: ``[I, I]``.
        ridge: Share of the mean diagonal.

    Attributes:
        energy: float64 ``[I]``, the diagonal of ``G`` with its ridge.
        alive: int64 indices of the columns that are left, ascending.
        weight: float64 ``[R, len(alive)]``, what they must be now.
        inverse: float64, the inverse of ``G`` restricted to them.
    """

    def __init__(self, weight: Tensor, gram: Tensor, ridge: float = RIDGE) -> None:
        damped, lower = factor(gram, ridge)
        self.energy = damped.diagonal().clone()
        self.inverse = torch.cholesky_inverse(lower)
        self.weight = weight.double()
        self.alive = torch.arange(weight.shape[1], device=weight.device)
        scale = damped.diagonal().rsqrt()
        self._correlation = damped * scale * scale[:, None]

    def remove(self, chosen: Tensor) -> None:
        """Take columns away.

        Args:
            chosen: Positions in :attr:`alive`.
        """
        inverse, weight = self.inverse, self.weight
        left = complement(chosen, len(self.alive))
        across = inverse[chosen][:, left]
        solved = torch.linalg.solve(inverse[chosen][:, chosen], across)
        self.weight = weight[:, left] - weight[:, chosen] @ solved
        self.inverse = inverse[left][:, left] - across.T @ solved
        self.alive = self.alive[left]

    def lowest(self, scores: Tensor, count: int, limit: float = 0.9) -> Tensor:
        """Return positions of the ``count`` lowest scores, of twins only one.

        Two columns whose correlation exceeds ``limit`` stand in for one another; if
        both went at once, nobody would take over. An infinite score is never taken.
        Fewer may be returned, but one if any score is finite.
        """
        order = torch.sort(scores, stable=True).indices[: 2 * count]
        order = order[scores[order].isfinite()]
        ids = self.alive[order]
        close = (self._correlation[ids][:, ids].abs() > limit).cpu()
        taken: list[int] = []
        for place in range(len(order)):
            if len(taken) == count:
                break
            if not close[place, taken].any():
                taken.append(place)
        return order[taken]
