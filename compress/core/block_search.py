"""Searches for the scale of a group of weights, all groups at once.

Each takes weights as ``[n, ...]``, the ``n`` members of a group first, and returns one
number for each group. All minimise a weighted squared error over a list of starting
scales, after each of which codes are rounded and the scale (with the minimum) is fitted
to them by least squares.

Source: ggml's ``ggml-quants.c``: ``make_qkx3_quants`` (:func:`with_minimum`),
``make_qx_quants`` (:func:`around_zero`), ``make_qp_quants`` (:func:`whole_numbers`) and
``make_q3_quants`` (:func:`by_coordinates`). Differs: codes whose product with the
weights is negative move as well in ``by_coordinates``.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from compress.core.levels import Grid

_TINY = 1e-30
_CLEARLY = 1 + 1e-6
"""Sums that differ by less are equal but for rounding: the first one stays."""
_PASSES = 5


def with_minimum(
    x: Tensor,
    weights: Tensor,
    highest: int,
    *,
    inverses: Iterable[float],
    absolute: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return scales and minima (0 or less) for codes from 0 to ``highest``.

    Args:
        x: float32 ``[n, ...]``.
        weights: Broadcasts against ``x``.
        highest: Largest code.
        inverses: How many steps the range is divided into, one for each start.
        absolute: Judge by the absolute error instead of its square.
    """
    low, high = x.amin(0).clamp_(max=0), x.amax(0)
    weights = weights.expand_as(x)
    total, sum_x = weights.sum(0), (weights * x).sum(0)

    def lost(scale: Tensor, minimum: Tensor, codes: Tensor) -> Tensor:
        error = torch.addcmul(minimum - x, codes, scale)
        size = error.abs_() if absolute else error.square_()
        result: Tensor = size.mul_(weights).sum(0)
        return result

    scale = (high - low).clamp(min=_TINY) / highest
    codes = ((x - low) / scale).round_().clamp_(0, highest)
    least = lost(scale, low, codes)
    for steps in inverses:
        inverse = steps / (high - low).clamp_(min=_TINY)
        codes = ((x - low) * inverse).round_().clamp_(0, highest)
        weighted = weights * codes
        ones, squares = weighted.sum(0), (weighted * codes).sum(0)
        mixed = weighted.mul_(x).sum(0)
        determinant = total * squares - ones * ones
        solvable = determinant > 0
        determinant = torch.where(solvable, determinant, torch.ones_like(ones))
        found = (total * mixed - sum_x * ones) / determinant
        minimum = (squares * sum_x - ones * mixed) / determinant
        positive = minimum > 0
        found = torch.where(positive, mixed / squares.clamp(min=_TINY), found)
        minimum = minimum.clamp_(max=0)
        loss = lost(found, minimum, codes)
        better = solvable & (loss < least)
        least = torch.where(better, loss, least)
        scale = torch.where(better, found, scale)
        low = torch.where(better, minimum, low)
    return torch.where(high <= low, torch.zeros_like(scale), scale), low


def around_zero(
    x: Tensor, weights: Tensor, grid: Grid, *, reaches: Iterable[float]
) -> tuple[Tensor, Tensor]:
    """Return scales, of either sign, on a grid around zero, and where the extreme lay.

    Codes of the search are ``grid.round_(x * reach / extreme)``, with the weight of
    largest magnitude for ``extreme``; the scale fits them. The second result is this
    ``reach / extreme``, 0 where all weights are.

    Args:
        x: float32 ``[n, ...]``.
        weights: Broadcasts against ``x``.
        grid: The levels.
        reaches: Where on the grid the weight of largest magnitude may lie.
    """
    extreme = x.gather(0, x.abs().argmax(0, keepdim=True)).squeeze(0)
    empty = extreme == 0
    extreme = torch.where(empty, torch.ones_like(extreme), extreme)
    scale, inverse = torch.zeros_like(extreme), torch.zeros_like(extreme)
    best = torch.zeros_like(extreme)
    for reach in reaches:
        tried = reach / extreme
        levels = grid.round_(x * tried)
        weighted = weights * levels
        squares = weighted.mul(levels).sum(0).clamp_(min=_TINY)
        found = weighted.mul_(x).sum(0) / squares
        explained = found * found * squares
        better = explained > best * _CLEARLY
        best = torch.where(better, explained, best)
        scale = torch.where(better, found, scale)
        inverse = torch.where(better, tried, inverse)
    nothing = torch.zeros_like(scale)
    return torch.where(empty, nothing, scale), torch.where(empty, nothing, inverse)


def by_coordinates(x: Tensor, lowest: int, highest: int) -> Tensor:
    """Return scales, of either sign, after codes were improved one by one.

    Weights are the squares of ``x`` ``[n, ...]``; codes start with the weight of
    largest magnitude at ``lowest``.
    """
    weights = x.square()
    extreme = x.gather(0, x.abs().argmax(0, keepdim=True)).squeeze(0)
    extreme = torch.where(extreme == 0, torch.ones_like(extreme), extreme)
    codes = (x * (lowest / extreme)).round_().clamp_(lowest, highest)
    return _improved(x, weights, codes, lowest, highest)


def whole_numbers(x: Tensor, weights: Tensor, highest: int) -> tuple[Tensor, Tensor]:
    """Return the scale of numbers 0 or more, and their codes ``0..highest``.

    Args:
        x: float32 ``[n, ...]``, 0 or more.
        weights: As ``x``.
        highest: Largest code.
    """
    largest = x.amax(0).clamp(min=_TINY)
    best, least = torch.zeros_like(x), torch.full_like(largest, torch.inf)
    for tenth in (0, -4, -3, -2, -1, 1, 2, 3, 4):
        inverse = (highest + 0.1 * tenth) / largest
        codes = (x * inverse).round_().clamp_(max=highest)
        lost = (codes / inverse - x).square_().mul_(weights).sum(0)
        better = lost < least
        least = torch.where(better, lost, least)
        best = torch.where(better, codes, best)
    return _improved(x, weights, best, 0, highest), best


def _improved(
    x: Tensor, weights: Tensor, codes: Tensor, lowest: int, highest: int
) -> Tensor:
    """Improve ``codes`` in place, one member at a time; return the fitted scale."""
    mixed = (weights * x * codes).sum(0)
    squares = (weights * codes * codes).sum(0)
    for _ in range(_PASSES):
        moved = False
        for i in range(x.shape[0]):
            w, old = weights[i], codes[i]
            mixed_rest, squares_rest = mixed - w * x[i] * old, squares - w * old * old
            usable = (mixed_rest != 0) & (squares_rest > 0)
            safe = torch.where(usable, mixed_rest, torch.ones_like(mixed_rest))
            new = (x[i] * squares_rest / safe).round_().clamp_(lowest, highest)
            mixed_new = mixed_rest + w * x[i] * new
            squares_new = squares_rest + w * new * new
            gains = mixed_new.square() * squares > mixed.square() * squares_new
            better = usable & (new != old) & (squares_new > 0) & gains
            mixed = torch.where(better, mixed_new, mixed)
            squares = torch.where(better, squares_new, squares)
            codes[i] = torch.where(better, new, old)
            moved = moved or bool(better.any())
        if not moved:
            break
    empty = squares <= 0
    fitted = mixed / torch.where(empty, torch.ones_like(squares), squares)
    return torch.where(empty, torch.zeros_like(fitted), fitted)
