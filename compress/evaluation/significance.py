"""Whether two models differ on the same items: intervals and tests of paired data.

Both models see the same windows and questions, so their difference on each is taken
first, and only its spread counts: far tighter than the two models' own errors suggest.

* Paired bootstrap: items are drawn with replacement, the mean difference is computed
  again, and the interval holds the middle 95 % of 4000 such means (percentile method).
* McNemar's test, exact: of the questions that just one model answers right, how likely
  a split as uneven as this is if either direction had probability one half.
* Holm's correction, where several tasks are tested at once.

Sources: Efron and Tibshirani (1993), "An Introduction to the Bootstrap", chapter 13;
McNemar (1947); Holm (1979), "A Simple Sequentially Rejective Multiple Test Procedure".

Limits: percentile intervals of few items are too narrow (their true coverage is about
90 % for ten), and below :data:`FEWEST` there is none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

FEWEST = 8
"""Items below which no interval is given."""

RESAMPLES = 4000
CONFIDENCE = 0.95
_INDICES_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Interval:
    """A figure, and where 95 % of its resampled values lie.

    Attributes:
        value: On the data itself.
        low: Lower end; NaN with too few items.
        high: Upper end; NaN with too few items.
    """

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether both ends have one sign."""
        return self.low > 0 or self.high < 0

    def to_dict(self) -> dict[str, float | bool | None]:
        """Return plain data; ends are ``None`` where there are none."""
        known = math.isfinite(self.low)
        return {
            "value": self.value,
            "low": self.low if known else None,
            "high": self.high if known else None,
            "significant": self.excludes_zero,
        }


def bootstrap(
    values: Sequence[Tensor], sizes: Sequence[Tensor] | None = None, *, seed: int = 0
) -> Interval:
    """Return the mean over strata of ``sum(values) / sum(sizes)``, with its interval.

    Items are drawn with replacement inside of their stratum, as many as it has.

    Args:
        values: For each stratum (a task, or one for all) float64 ``[N]``: of an item,
            the difference of two models, or the figure itself.
        sizes: What each is divided by, such as bytes; ones if absent.
        seed: Of the draws.
    """
    counts = sizes or [torch.ones_like(v) for v in values]
    pairs = [
        (v.double().cpu(), s.double().cpu())
        for v, s in zip(values, counts, strict=True)
    ]
    value = sum(float(v.sum() / s.sum()) for v, s in pairs) / len(pairs)
    if any(len(v) < FEWEST for v, _ in pairs):
        return Interval(value, math.nan, math.nan)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.zeros(RESAMPLES, dtype=torch.float64)
    for v, s in pairs:
        drawn += _resampled(v, s, generator) / len(pairs)
    tail = (1 - CONFIDENCE) / 2
    ends = torch.quantile(drawn, torch.tensor([tail, 1 - tail], dtype=torch.float64))
    return Interval(value, float(ends[0]), float(ends[1]))


def _resampled(values: Tensor, sizes: Tensor, generator: torch.Generator) -> Tensor:
    """Return the statistic of :data:`RESAMPLES` draws, float64 ``[RESAMPLES]``."""
    count = len(values)
    rows = max(1, _INDICES_AT_ONCE // count)
    parts = []
    for start in range(0, RESAMPLES, rows):
        shape = (min(rows, RESAMPLES - start), count)
        chosen = torch.randint(count, shape, generator=generator)
        parts.append(values[chosen].sum(1) / sizes[chosen].sum(1))
    return torch.cat(parts)


def mcnemar(lost: int, gained: int) -> float:
    """Return the exact two-sided p-value of McNemar's test.

    Args:
        lost: Questions that only the first model answers right.
        gained: Questions that only the second answers right.
    """
    total, few = lost + gained, min(lost, gained)
    tail = sum(math.comb(total, k) for k in range(few + 1))
    return min(1.0, float(Fraction(2 * tail, 1 << total)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values that may be held against one level though there are several."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, (len(p_values) - rank) * p_values[index])
        adjusted[index] = min(1.0, largest)
    return adjusted
