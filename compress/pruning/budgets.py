"""How many neurons each block keeps, of a total that is given.

* ``uniform``: the same everywhere.
* ``cfsp``: by how far a block turns the residual stream. With ``d_l`` the mean of
  ``arccos(cos(h, h')) / pi`` over tokens, shares are ``sigmoid(13.1 (d_l - mean d))``;
  a share above the width is drawn to the mean. The gain is that of 128 x 1024 tokens in
  the released code, which sums over tokens, so that the text's length matters there.
* ``standardised``: one threshold on scores that have mean 0 and deviation 1 in each
  block (FLAP, arXiv 2312.11983, equation 6).
* ``effect``: one threshold on what neurons are worth to the predictions, in nats.
* ``measured``: each block's loss is measured at a ladder of widths with the method's
  own choice and repair; of all combinations of that total the least sum, exactly.
* ``learned``: thresholds trained on the KL of the whole model (see ``gates``).

Source: Wang et al., CFSP (arXiv 2409.13199), section 3.2; FLAP for ``standardised``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

Budgets = Literal["uniform", "cfsp", "standardised", "effect", "measured", "learned"]
BUDGETS: tuple[str, ...] = get_args(Budgets)
_GAIN = 13.1
FLOOR = 0.25
"""Share of its neurons that a block keeps at least."""
LEAST = 32
"""Neurons that a block keeps; a GGUF block of width 0 would lose its attention too."""


def cfsp_shares(distances: Sequence[float], keep: float) -> list[float]:
    """Return the share of its neurons that each block keeps; the mean is ``keep``.

    Args:
        distances: Mean angular distance of each block, in half turns.
        keep: In (0, 1].
    """
    s = cfsp_weights(distances)
    shares = keep * s / s.mean()
    if keep < 1 and shares.max() >= 1:
        mean = s.mean()
        factor = mean * (1 / keep - 1) / (s.max() - mean) / 1.05
        s = mean + factor * (s - mean)
        shares = keep * s / s.mean()
    found: list[float] = shares.tolist()
    return found


def cfsp_weights(distances: Sequence[float]) -> Tensor:
    """Return the importance of each block, float64 in (0, 1), before any budget."""
    d = torch.tensor(distances, dtype=torch.float64)
    return torch.sigmoid(_GAIN * (d - d.mean()))


def threshold_shares(scores: Sequence[Tensor], keep: float) -> list[float]:
    """Return shares by one threshold on the scores of all blocks.

    A block that would keep less than a quarter keeps that; the threshold moves up for
    the others.

    Args:
        scores: ``[I_l]`` for each block.
        keep: Share of all neurons.
    """
    limits = [max(1, round(FLOOR * len(s))) for s in scores]
    ordered = [s.double().sort(descending=True).values for s in scores]
    wanted = round(keep * sum(map(len, scores)))
    free = torch.cat([s[limit:] for s, limit in zip(ordered, limits, strict=True)])
    room = wanted - sum(limits)
    if room <= 0:
        return [keep] * len(scores)
    threshold = free.sort(descending=True).values[min(room, len(free)) - 1]
    return [
        (limit + int((s[limit:] >= threshold).sum())) / len(s)
        for s, limit in zip(ordered, limits, strict=True)
    ]


def standardised(scores: Tensor) -> Tensor:
    """Return scores with mean 0 and deviation 1."""
    wide = scores.double()
    return (wide - wide.mean()) / wide.std().clamp(min=1e-30)


def narrowest(unit: int) -> int:
    """Return how many units a block keeps at least."""
    return -(-LEAST // unit)


def deal(
    shares: Sequence[float], widths: Sequence[int], total: int, unit: int
) -> list[int]:
    """Return widths near given shares that add up to a total, by largest remainder.

    Each is a multiple of ``unit``, or the block's own width; none is below
    :data:`LEAST` unless its block was. Their sum is within half a unit of ``total``
    where that leaves room for it.

    Args:
        shares: Of each block's neurons.
        widths: Neurons that each block has.
        total: To keep.
        unit: What widths are multiples of.
    """
    limits = [-(-width // unit) for width in widths]
    floors = [min(narrowest(unit), limit) for limit in limits]
    ideal = [
        min(max(share * width / unit, float(floor)), float(limit))
        for share, width, floor, limit in zip(
            shares, widths, floors, limits, strict=True
        )
    ]
    counts = [int(x) for x in ideal]

    def size(block: int, count: int) -> int:
        return min(count * unit, widths[block])

    while True:
        missing = total - sum(size(b, count) for b, count in enumerate(counts))
        step = 1 if missing > 0 else -1
        able = [
            b
            for b, count in enumerate(counts)
            if floors[b] <= count + step <= limits[b]
            and 2 * abs(missing) > abs(size(b, count + step) - size(b, count))
        ]
        if not able:
            return [size(b, count) for b, count in enumerate(counts)]
        best = max(able, key=lambda b: (step * (ideal[b] - counts[b]), -b))
        counts[best] += step


def least_loss(ladders: Sequence[Sequence[tuple[int, float]]], total: int) -> list[int]:
    """Return a width for each block with the least sum of losses, exactly.

    Args:
        ladders: For each block, pairs of width in units and loss.
        total: Largest sum of widths, in units.
    """
    best = {0: (0.0, ())}  # type: dict[int, tuple[float, tuple[int, ...]]]
    for ladder in ladders:
        after: dict[int, tuple[float, tuple[int, ...]]] = {}
        for used, (loss, chosen) in best.items():
            for width, more in ladder:
                sum_ = used + width
                if sum_ <= total and loss + more < after.get(sum_, (torch.inf,))[0]:
                    after[sum_] = (loss + more, (*chosen, width))
        best = after
    if not best:
        least = sum(min(width for width, _ in ladder) for ladder in ladders)
        raise ValueError(f"the narrowest widths add up to {least}, above {total}")
    return list(min(best.values(), key=lambda entry: entry[0])[1])
