"""RAMP's terminal reward, for a budget that the user sets.

``r_q`` is ``10 (1 - P/P0)`` where the perplexity ``P`` is below that of the uniform
reference and ``-5 (P/P0 - 1)`` above; the ratio is ``exp(KL - KL0)``. ``r_b`` looks at
the mean bits ``b`` that were asked for: 0 up to ``B - 1/4``, falling to -1/2 at the
budget ``B``, and ``-1/2 - 20 (b - B)^2`` above. (The paper prints the last branch
without its -1/2, so that asking for slightly too much would pay; and B = 4.25.)
"""

from __future__ import annotations

import math

SLACK = 0.25
"""Bits below the budget from which asking for more costs."""

_LARGEST = 50.0  # of an exponent: exp(50) still squares to a float


def quality(kl: float, reference: float) -> float:
    """Return ``r_q`` of a KL against that of the reference, both nats a token."""
    ratio = math.exp(min(kl - reference, _LARGEST))
    return 10 * (1 - ratio) if ratio <= 1 else -5 * (ratio - 1)


def budget(bits: float, limit: float) -> float:
    """Return ``r_b`` of mean bits a weight, against the budget in the same unit."""
    if bits <= limit - SLACK:
        return 0.0
    if bits <= limit:
        return -2 * (bits - limit + SLACK)
    return -2 * SLACK - 20 * (bits - limit) ** 2
