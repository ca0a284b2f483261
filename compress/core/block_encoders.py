"""Scales of ggml's K and IQ4 types: which search, over which weights, for which type.

The error of a weight ``x`` counts ``sqrt(m + x^2)`` times the importance of its column,
with ``m`` the mean of squares around it, or by rules of its own where columns have none
known. Groups are searched first, then the numbers that a super-block of 256 columns
shares. Codes are rounded after that, by :func:`compress.core.grids.encode`, with the
scales as they are stored.

Source: ggml's ``quantize_q2_K`` to ``quantize_q6_K``, ``quantize_iq4_nl`` and
``quantize_iq4_xs``; the errors equal its own (``benchmarks/gguf_encoders.py``).
Differs: ``by_magnitude=False`` leaves the factor ``sqrt(m + x^2)`` out, which is better
where the importance is known and error feedback follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.core import block_search, super_scales
from compress.core.levels import IntegerGrid
from compress.core.scheme import IQ4, SUPER_COLUMNS, Scales, Scheme, Zero


@dataclass(frozen=True)
class _Affine:
    """A search of scale and minimum: where it starts, its step and their number."""

    start: float
    step: float
    count: int
    absolute: bool = False

    def inverses(self, highest: int) -> Sequence[float]:
        return [highest + self.start + self.step * i for i in range(self.count + 1)]


_INFORMED = _Affine(-0.9, 0.05, 36)
_BLIND = {
    2: _Affine(-0.5, 0.1, 15, absolute=True),
    4: _Affine(-1.0, 0.1, 20),
    5: _Affine(-0.5, 0.1, 15),
}
_TENTHS = (0, *range(-9, 0), *range(1, 10))


@dataclass(frozen=True)
class Found:
    """Wanted scales of a search.

    Attributes:
        scale: float32 ``[R, G]``.
        minimum: float32 ``[R, G]``, 0 or less; ``None`` on a grid around zero.
        outer: What a super-block shares, rounded to float16; see ``super_scales``.
            ``None`` if the scales are float16 themselves.
    """

    scale: Tensor
    minimum: Tensor | None
    outer: Tensor | None


def treats(scheme: Scheme) -> bool:
    """Whether the scheme is one of ggml's K or IQ4 types."""
    return scheme.scales is Scales.SUPER or scheme.grid == IQ4


def search(
    groups: Tensor,
    scheme: Scheme,
    importance: Tensor | None = None,
    *,
    by_magnitude: bool = True,
) -> Found:
    """Return the scales and minima of groups of rows.

    Args:
        groups: float32 ``[R, G, g]``.
        scheme: One that :func:`treats` knows.
        importance: float32 ``[G, g]``, of each column, or ``[G, g, g]``, of which the
            diagonal is used; ``None`` if it is not known.
        by_magnitude: Whether large weights count more than their importance says.
    """
    x = groups.permute(2, 0, 1).contiguous()  # the members of a group first
    weights = _of_columns(importance)
    if weights is not None:
        weights = weights.expand_as(x)
        if by_magnitude and scheme.bits != 6:
            weights = weights * (_mean_square(x, scheme) + x.square()).sqrt_()
    if scheme.zero is Zero.OFFSET:
        return _with_minimum(x, weights, scheme)
    return _around_zero(x, weights, scheme)


def fitted_range(
    groups: Tensor, scheme: Scheme, importance: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return scales and minima fitted to the codes of many starts, as for Q4_1.

    Args:
        groups: float32 ``[R, G, g]``.
        scheme: Has float minima.
        importance: As in :func:`search`; ``None`` weighs all alike.

    Returns:
        float32 ``[R, G]`` each, not rounded to storage.
    """
    x = groups.permute(2, 0, 1).contiguous()
    weights = _of_columns(importance)
    if weights is None:
        weights = x.new_ones(1)
    starts = _INFORMED.inverses(scheme.highest)
    return block_search.with_minimum(x, weights, scheme.highest, inverses=starts)


def _of_columns(importance: Tensor | None) -> Tensor | None:
    """Return the weight of each column as ``[g, 1, G]``, beside ``[g, R, G]``."""
    if importance is not None and importance.dim() == 3:
        importance = importance.diagonal(dim1=1, dim2=2)
    return None if importance is None else importance.float().T.unsqueeze(1)


def _mean_square(x: Tensor, scheme: Scheme) -> Tensor:
    """Return ``m`` ``[R, G]``: twice the mean over a block, once for two bits."""
    mean = x.square().mean(0)
    if scheme.scales is Scales.SUPER:
        count = SUPER_COLUMNS // x.shape[0]
        mean = mean.reshape(mean.shape[0], -1, count).mean(-1)
        mean = mean.repeat_interleave(count, 1)
    return mean if scheme.bits == 2 else 2 * mean


def _with_minimum(x: Tensor, weights: Tensor | None, scheme: Scheme) -> Found:
    rule = _BLIND[scheme.bits] if weights is None else _INFORMED
    used = weights
    if used is None:
        used = x.abs()
        if scheme.bits != 2:
            used = used + x.square().mean(0).sqrt_()
    scale, minimum = block_search.with_minimum(
        x,
        used,
        scheme.highest,
        inverses=rule.inverses(scheme.highest),
        absolute=rule.absolute,
    )
    if weights is None:
        return Found(scale, minimum, super_scales.fitted(scale, minimum, scheme))
    total = weights.sum(0)
    steps, rounded = [], []
    for values in (scale, -minimum):
        step, codes = block_search.whole_numbers(
            super_scales.by_super_block(values, scheme),
            super_scales.by_super_block(total, scheme),
            scheme.scale_codes[1],
        )
        steps.append(super_scales.to_half(step))
        rounded.append((codes * steps[-1]).movedim(0, -1).flatten(1))
    return Found(rounded[0], -rounded[1], torch.cat(steps, dim=1))


def _around_zero(x: Tensor, weights: Tensor | None, scheme: Scheme) -> Found:
    grid = scheme.levels
    if weights is None and scheme.bits == 3:
        scale = block_search.by_coordinates(x, scheme.lowest, scheme.highest)
    else:
        used = x.square() if weights is None else weights
        scale, _ = block_search.around_zero(x, used, grid, reaches=_reaches(scheme))
    if scheme.scales is not Scales.SUPER:
        return Found(scale.half().float(), None, None)
    if weights is None or scheme.bits != 3:
        return Found(scale, None, super_scales.fitted(scale, None, scheme))
    grouped = super_scales.by_super_block(scale, scheme)
    codes = IntegerGrid(6, scheme.scale_codes[0])
    fitted, inverse = block_search.around_zero(
        grouped,
        super_scales.by_super_block(weights.sum(0), scheme),
        codes,
        reaches=[codes.lowest - 0.1 * tenth for tenth in _TENTHS],
    )
    step = super_scales.to_half(fitted)
    rounded = codes.round_(grouped * inverse) * step
    return Found(rounded.movedim(0, -1).flatten(1), None, step)


def _reaches(scheme: Scheme) -> list[float]:
    """Return where the largest weight of a group is tried, the finest grid first.

    Under a large outlier all of them explain the same to the last bit of a float32, and
    the first one stays.
    """
    lowest = scheme.levels.lowest
    if scheme.grid == IQ4:
        steps = (*range(8), *range(-7, 0))
        return [*(lowest + step for step in steps), -lowest]
    return [lowest - 0.1 * tenth for tenth in _TENTHS]
