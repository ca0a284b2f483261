"""HQQ: zero points by half-quadratic splitting, from the weights alone.

For each group the zero point is chosen so that ``|W - Q|_p^p`` with ``p < 1`` is small:
such a norm forgives a few large errors. Splitting off their part ``E`` gives steps in
closed form, which are repeated:

    q <- round((W - m) / s)
    E <- shrink(W - Q, beta),   shrink(x) = sign(x) max(|x| - |x|^(p-1) / beta, 0)
    m <- mean(W - E - q s);   beta <- 1.01 beta

Source: Badri and Shaji (2023), "Half-Quadratic Quantization of Large Machine Learning
Models", and the ``hqq`` package, whose constants are used. With weights of usual size
and ``beta = 10`` the shrinkage is 0: what remains is least squares between codes and
``m``, after which a group's errors have no mean. That matters, since inputs have means:
scales searched without it have as small an error and a KL that is higher by a fifth.
Differs:

* several widths of the range are started from, with the scale held from each. Of all
  that was met, each group keeps what has the least squared error; to choose by the
  p-norm itself, or by p = 1, doubled the KL of SmolLM2-135M;
* integer zero points (``-asym``) are ``m`` rounded in every round, and judged so.

Limits: grids without a zero point have nothing to split (``rtn`` with ``search`` is
the data-free choice there). It knows nothing of the inputs; ``gptq`` is far better.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.core import grids, low_rank
from compress.core.contracts import Options, Quantizer
from compress.core.grids import GridParameters
from compress.core.scheme import Scheme, Zero
from compress.core.statistics import LayerStatistics
from compress.core.tensors import QuantizedTensor

_STARTS = tuple(1.05 - 0.05 * i for i in range(8))
_WEIGHTS_AT_ONCE = 1 << 20
_BETA, _GROWTH = 10.0, 1.01


class HQQOptions(Options):
    """Options of ``hqq``.

    Attributes:
        norm: The exponent ``p``.
        rounds: Of the steps, from each start.
    """

    norm: float = Field(default=0.7, gt=0, le=1)
    rounds: int = Field(default=20, ge=1, le=1000)


class HQQ(Quantizer):
    """Half-quadratic zero points on integer grids that have one; needs no data."""

    name = "hqq"
    summary = "half-quadratic zero points; needs no data"
    source = "Badri and Shaji 2023, Half-Quadratic Quantization"
    Options: ClassVar[type[Options]] = HQQOptions
    options: HQQOptions

    def schemes(self) -> tuple[str, ...]:
        """Names of schemes an allocator may choose, most bits first."""
        return tuple(f"int{bits}-g64-offset" for bits in (7, 6, 5, 4, 3, 2))

    def supports(self, scheme: Scheme) -> bool:
        """Whether this quantizer can produce ``scheme``: if it has a zero point."""
        return scheme.zero is not Zero.NONE

    def quantize(
        self, weight: Tensor, scheme: Scheme, statistics: LayerStatistics | None
    ) -> QuantizedTensor:
        """Return codes of ``weight`` ``[R, C]``; uses no statistics."""
        groups = grids.as_groups(weight, scheme)
        at_once = max(1, _WEIGHTS_AT_ONCE // max(1, groups[0].numel()))
        runs = torch.split(groups, at_once)
        found = [self._best(run, scheme) for run in runs]
        parameters = GridParameters(
            torch.cat([part.scale for part in found]),
            torch.cat([part.zero for part in found if part.zero is not None]),
        )
        levels = grids.encode(groups, parameters, scheme)
        coded = grids.assemble(levels.view(weight.shape), parameters, scheme)
        return low_rank.correct(weight, coded)

    def _best(self, groups: Tensor, scheme: Scheme) -> GridParameters:
        """Return the parameters of least squared error that all starts lead to."""
        best = grids.search_parameters(groups, scheme)
        levels = grids.encode(groups, best, scheme)
        least = (grids.decode_groups(levels, best, scheme) - groups).square().sum(-1)
        for factor in _STARTS:
            for found, error in self._rounds(groups, scheme, factor):
                better = error < least
                least = torch.where(better, error, least)
                best = _chosen(better, found, best)
        return best

    def _rounds(
        self, groups: Tensor, scheme: Scheme, factor: float
    ) -> Iterator[tuple[GridParameters, Tensor]]:
        """Yield the parameters and errors of every round, while an error falls.

        The start is ``factor`` times the range, about its middle.
        """
        low, high = groups.amin(-1), groups.amax(-1)
        width = (high - low) * factor
        scale = _usable(width / ((1 << scheme.bits) - 1), scheme)
        minimum = (low + high - width) / 2 - scheme.lowest * scale  # value of code 0
        beta, least = _BETA, torch.full_like(low, torch.inf)
        for _ in range(self.options.rounds):
            parameters = GridParameters(scale, _zero(minimum, scale, scheme))
            levels = grids.encode(groups, parameters, scheme)
            gap = groups - grids.decode_groups(levels, parameters, scheme)
            error = gap.square().sum(-1)
            yield parameters, error
            if not bool((error < least).any()):
                return
            least = torch.minimum(least, error)
            gap.sub_(_shrink(gap, self.options.norm, beta))
            minimum = _minimum(parameters, scheme) + gap.mean(-1)
            beta *= _GROWTH


def _minimum(parameters: GridParameters, scheme: Scheme) -> Tensor:
    """Return the value of code 0."""
    assert parameters.zero is not None
    if scheme.zero is Zero.OFFSET:
        return parameters.zero
    return -parameters.zero * parameters.scale


def _usable(scale: Tensor, scheme: Scheme) -> Tensor:
    """Return scales as stored; 1 where nothing is left of them."""
    stored = grids.round_to_storage(scale, scheme)
    return torch.where(stored == 0, 1.0, stored)


def _zero(minimum: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    """Return zero points as the scheme stores them."""
    if scheme.zero is Zero.OFFSET:
        return grids.round_to_storage(minimum, scheme)
    return torch.round(-minimum / scale).clamp(scheme.lowest, scheme.highest)


def _shrink(values: Tensor, norm: float, beta: float) -> Tensor:
    """Return the proximal point of ``|x|^p``, in the package's approximation."""
    size = values.abs()
    if float(size.max()) <= beta ** (1 / (norm - 2)):  # all shrink to 0
        return torch.zeros_like(values)
    tiny = torch.finfo(size.dtype).tiny  # 0 has no negative power
    kept = size - size.clamp(min=tiny).pow(norm - 1) / beta
    return kept.clamp_(min=0).copysign_(values)


def _chosen(
    better: Tensor, found: GridParameters, best: GridParameters
) -> GridParameters:
    assert found.zero is not None and best.zero is not None
    return GridParameters(
        torch.where(better, found.scale, best.scale),
        torch.where(better, found.zero, best.zero),
    )
