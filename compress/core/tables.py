"""Tables of a palette while they are fitted, and the nearest entry for a row.

With numbers (``g = 1``) the nearest entry is found between midpoints, by binary search.
With vectors all distances are taken, in any ``g x g`` metric.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

_DISTANCES_AT_ONCE = 1 << 24
_WEIGHTS_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Tables:
    """Tables of runs of rows.

    Attributes:
        entries: float32 ``[T, K, g]``; those of numbers (``g = 1``) ascend.
        block: Rows that share a table; the last run may be shorter.
    """

    entries: Tensor
    block: int

    @property
    def vector(self) -> int:
        """Columns of an entry."""
        return self.entries.shape[2]

    def owner(self, rows: slice) -> Tensor:
        """Return the table of each row, int64."""
        at = torch.arange(rows.start, rows.stop, device=self.entries.device)
        return at // self.block

    def runs(self, rows: int, columns: int) -> list[slice]:
        """Return runs of rows that are worked on at a time."""
        size = max(1, _WEIGHTS_AT_ONCE // columns)
        return [slice(s, min(s + size, rows)) for s in range(0, rows, size)]

    def values(self, codes: Tensor, rows: slice) -> Tensor:
        """Return float32 ``[R, n * g]`` for int64 codes ``[R, n]`` of some rows."""
        count = self.entries.shape[1]
        places = self.owner(rows).unsqueeze(1) * count + codes
        return self.entries.flatten(0, 1)[places].flatten(1)

    def search(self, rows: slice) -> Search:
        """Return what finds the nearest entries for some rows."""
        if self.vector == 1:
            return NumberSearch(self.entries[self.owner(rows), :, 0])
        return VectorSearch(self.entries, self.owner(rows))


class Search(ABC):
    """Finds the entry of its table nearest to a vector of each row."""

    @abstractmethod
    def __call__(self, wanted: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes int64 ``[R]`` and values ``[R, g]``.

        Args:
            wanted: float32 ``[R, g]``.
            metric: ``[g, g]``; ``|(wanted - entry) metric|`` is least.
        """


class NumberSearch(Search):
    """Between the midpoints of ascending numbers.

    Args:
        entries: float32 ``[R, K]``, the table of each row.
    """

    def __init__(self, entries: Tensor) -> None:
        self._entries = entries
        self._borders = ((entries[:, 1:] + entries[:, :-1]) / 2).contiguous()

    def __call__(self, wanted: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes and values of one number a row; any metric is the same."""
        codes = torch.searchsorted(self._borders, wanted.contiguous())
        return codes[:, 0], self._entries.gather(1, codes)

    def all(self, wanted: Tensor) -> Tensor:
        """Return codes ``[R, C]`` of many numbers of each row."""
        return torch.searchsorted(self._borders, wanted.contiguous())


class VectorSearch(Search):
    """Over all distances.

    Args:
        entries: float32 ``[T, K, g]``.
        owner: int64 ``[R]``, the table of each row.
    """

    def __init__(self, entries: Tensor, owner: Tensor) -> None:
        self._entries, self._owner = entries, owner

    def __call__(self, wanted: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes and values of one vector a row."""
        turned = self._entries @ metric  # [T, K, g]
        norms = turned.square().sum(2)
        x = wanted @ metric
        codes = torch.empty_like(self._owner)
        alone = len(turned) == 1
        size = turned.shape[1] * (1 if alone else turned.shape[2])
        at_once = max(1, _DISTANCES_AT_ONCE // size)
        for rows in torch.split(torch.arange(len(x), device=x.device), at_once):
            if alone:
                products = x[rows] @ turned[0].T
                codes[rows] = (norms[0] - 2 * products).argmin(1)
            else:
                own = self._owner[rows]
                products = torch.bmm(turned[own], x[rows].unsqueeze(2)).squeeze(2)
                codes[rows] = (norms[own] - 2 * products).argmin(1)
        return codes, self._entries[self._owner, codes]


def nearest(target: Tensor, tables: Tables, metric: Tensor) -> Tensor:
    """Return the codes of the nearest entries, int64 ``[R, C / g]``.

    Args:
        target: float32 ``[R, C]``.
        tables: Fixed.
        metric: ``[C]`` of columns; matters for vectors only.
    """
    vector = tables.vector
    codes = []
    for rows in tables.runs(*target.shape):
        search = tables.search(rows)
        if isinstance(search, NumberSearch):
            codes.append(search.all(target[rows]))
            continue
        runs = torch.split(target[rows], vector, 1), torch.split(metric.sqrt(), vector)
        found = [search(x, torch.diag(f))[0] for x, f in zip(*runs, strict=True)]
        codes.append(torch.stack(found, 1))
    return torch.cat(codes)
