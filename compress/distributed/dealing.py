"""Which process codes which matrix.

A matrix of ``R`` rows and ``C`` columns costs about ``C^3 + R C^2``: a factor of its
Hessian, and the error feedback of each row. If whole matrices are dealt out, the
costliest first and each to whoever has least to do, a process gets all of that; if
rows are, each process needs the factor. Whichever ends sooner is taken.
"""

from __future__ import annotations

from collections.abc import Sequence


def deal(costs: Sequence[float], size: int) -> list[int]:
    """Return the process that each piece of work goes to.

    Args:
        costs: Of each piece, in any unit.
        size: How many processes there are.

    Source: Graham (1969), "Bounds on Multiprocessing Timing Anomalies": longest first;
    the last process ends at most a third later than it had to.
    """
    loads, owners = [0.0] * size, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += costs[index]
    return owners


def coders(
    shapes: Sequence[tuple[int, int]], divisible: Sequence[bool], size: int
) -> list[tuple[int, ...]]:
    """Return the processes that code each matrix, each an equal share of its rows.

    Args:
        shapes: ``R, C`` of matrices that can be coded at the same time.
        divisible: Whether the rows of each may be coded apart.
        size: How many processes there are.
    """
    fixed = [float(columns) ** 3 for _, columns in shapes]
    by_row = [float(rows) * columns**2 for rows, columns in shapes]
    whole = [a + b for a, b in zip(fixed, by_row, strict=True)]
    owners = deal(whole, size)
    loads = [0.0] * size
    for owner, cost in zip(owners, whole, strict=True):
        loads[owner] += cost
    split = [
        a + b / size if apart else a + b
        for a, b, apart in zip(fixed, by_row, divisible, strict=True)
    ]
    if max(loads, default=0.0) <= sum(split):
        return [(owner,) for owner in owners]
    everyone = tuple(range(size))
    return [
        everyone if apart else (owner,)
        for owner, apart in zip(owners, divisible, strict=True)
    ]
