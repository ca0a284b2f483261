"""Scales as whole numbers under a float16 for each 256 columns: ggml's K types.

A group's scale is ``d * code`` and its minimum ``-dmin * code``, with ``d`` and
``dmin`` float16 numbers that the groups of a *super-block* of 256 columns share. Codes
have 4, 6 or 8 bits. Here ``outer`` holds them: ``[R, S]``, or ``[R, 2 S]`` with the
``dmin`` of a row after its ``d``.

Source: ggml's ``ggml-quants.c``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.core.scheme import SUPER_COLUMNS, Scheme, Zero

_LARGEST_HALF = 65504.0

EMPTY_SCALE = 1e-30
"""What a group with the scale 0 computes with: any level of it is as good as 0."""


def parts_of(outer: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Return ``d`` ``[R, S]``, and ``dmin`` on a grid with minima."""
    if scheme.zero is Zero.NONE:
        return outer, None
    count = outer.shape[1] // 2
    return outer[:, :count], outer[:, count:]


def to_half(values: Tensor) -> Tensor:
    """Return float32 numbers that float16 can hold, none of them infinite."""
    return values.clamp(-_LARGEST_HALF, _LARGEST_HALF).half().float()


def fitted(scale: Tensor, minimum: Tensor | None, scheme: Scheme) -> Tensor:
    """Return the ``outer`` that maps the largest of each super-block to a whole number.

    Args:
        scale: float32 ``[R, G]``, wanted scales.
        minimum: float32 ``[R, G]``, wanted minima, 0 or less; ``None`` without them.
        scheme: Has ``SUPER`` scales.
    """
    lowest, highest = scheme.scale_codes
    grouped = by_super_block(scale, scheme)
    if minimum is None:
        at = grouped.abs().argmax(0, keepdim=True)
        return to_half(grouped.gather(0, at).squeeze(0) / lowest)
    widest = grouped.amax(0), -by_super_block(minimum, scheme).amin(0)
    return to_half(torch.cat(widest, dim=1).clamp(min=0) / highest)


def codes_of(values: Tensor, step: Tensor, scheme: Scheme) -> Tensor:
    """Return the nearest whole numbers of ``values`` in units of ``step``.

    Args:
        values: float32 ``[R, G]``: scales, or minima with their sign turned.
        step: float32 ``[R, S]``: ``d`` or ``dmin``.
        scheme: Says which numbers there are.

    Returns:
        float32 ``[R, G]``; 0 where the step is.
    """
    wide = spread(step, scheme)
    safe = torch.where(wide == 0, torch.ones_like(wide), wide)
    codes = torch.round(values / safe).clamp(*scheme.scale_codes)
    return torch.where(wide == 0, torch.zeros_like(codes), codes)


def spread(step: Tensor, scheme: Scheme) -> Tensor:
    """Return ``[R, S]`` as ``[R, G]``, one for each group."""
    assert scheme.group_size is not None
    return step.float().repeat_interleave(SUPER_COLUMNS // scheme.group_size, dim=1)


def by_super_block(values: Tensor, scheme: Scheme) -> Tensor:
    """Return ``[R, G]`` as ``[G / S, R, S]``: the groups of a super-block first."""
    assert scheme.group_size is not None
    count = SUPER_COLUMNS // scheme.group_size
    return values.reshape(values.shape[0], -1, count).movedim(-1, 0)
