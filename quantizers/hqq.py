"""HQQ: zero points by half-quadratic splitting, from the weights alone.

For each group the scale is held and the zero point is chosen so that
``|W - Q|_p^p`` with ``p < 1`` is small: such a norm forgives the few large weights, and
lets the many small ones decide. Splitting off the error ``E`` of the large ones gives
two steps, each in closed form, that are repeated ``rounds`` times:

    E <- shrink(W - Q, beta),   shrink(x) = sign(x) max(|x| - |x|^(p-1) / beta, 0)
    m <- mean(W - E - q s)      the group's minimum; beta <- 1.01 beta

Source: Badri and Shaji (2023), "Half-Quadratic Quantization of Large Machine Learning
Models", and the ``hqq`` package, whose constants are used. With weights of usual size
and ``beta = 10`` the shrinkage gives 0, so that ``m`` is the mean of what rounding
leaves: groups lose no mean, and that is what makes the method work, because inputs have
means too. Differs:

* several widths of the range are started from, and of all that was met the best is
  kept for each group, by ``|e|^2 + bias (sum e)^2``;
* the minimum is fitted to the final codes once more;
* integer zero points are rounded in every round and judged as rounded; grids without a
  zero point, where nothing can be split, take the scale that is best by that measure.

Limits: it knows nothing of the inputs; with text at hand ``gptq`` is far better.
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
_BETA, _GROWTH = 10.0, 1.01


class HQQOptions(Options):
    """Options of ``hqq``.

    Attributes:
        norm: The exponent ``p``.
        rounds: Of the two steps, for each start.
        bias: Weight of the squared sum of a group's errors against the sum of their
            squares when candidates are compared.
    """

    norm: float = Field(default=0.7, gt=0, le=1)
    rounds: int = Field(default=20, ge=1, le=1000)
    bias: float = Field(default=0.1, ge=0)


class HQQ(Quantizer):
    """Half-quadratic zero points on any grid; needs no data."""

    name = "hqq"
    summary = "half-quadratic zero points; needs no data"
    source = "Badri and Shaji 2023 (HQQ)"
    Options: ClassVar[type[Options]] = HQQOptions
    options: HQQOptions

    def schemes(self) -> tuple[str, ...]:
        """Names of schemes an allocator may choose, most bits first."""
        return tuple(f"int{bits}-g64-offset" for bits in (7, 6, 5, 4, 3, 2))

    def supports(self, scheme: Scheme) -> bool:
        """Whether this quantizer can produce ``scheme``: any."""
        return True

    def quantize(
        self, weight: Tensor, scheme: Scheme, statistics: LayerStatistics | None
    ) -> QuantizedTensor:
        """Return codes of ``weight`` ``[R, C]``; uses no statistics."""
        groups = grids.as_groups(weight, scheme)
        if scheme.zero is Zero.NONE:
            parameters = grids.search_parameters(groups, scheme, bias=self.options.bias)
            levels = grids.encode(groups, parameters, scheme)
        else:
            levels, parameters = self._half_quadratic(groups, scheme)
        coded = grids.assemble(levels.view(weight.shape), parameters, scheme)
        return low_rank.correct(weight, coded)

    def _half_quadratic(
        self, groups: Tensor, scheme: Scheme
    ) -> tuple[Tensor, GridParameters]:
        """Return the best levels ``[R, G, g]`` of all starts and rounds."""
        best, parameters = torch.empty_like(groups), None
        least = torch.full(groups.shape[:2], torch.inf, device=groups.device)
        for factor in _STARTS:
            start = grids.range_parameters(groups, scheme, factor)
            for levels, found in self._rounds(groups, scheme, start):
                error = grids.decode_groups(levels, found, scheme).sub_(groups)
                loss = error.square().sum(-1)
                loss += self.options.bias * error.sum(-1).square()
                better = loss < least
                least = torch.where(better, loss, least)
                best = torch.where(better.unsqueeze(-1), levels, best)
                parameters = _chosen(better, found, parameters)
        assert parameters is not None
        return best, parameters

    def _rounds(
        self, groups: Tensor, scheme: Scheme, start: GridParameters
    ) -> Iterator[tuple[Tensor, GridParameters]]:
        """Yield levels and parameters of every round from one start."""
        scale, zero, beta = start.scale, start.zero, _BETA
        for _ in range(self.options.rounds):
            parameters = GridParameters(scale, zero)
            levels = grids.encode(groups, parameters, scheme)
            yield levels, parameters
            rest = groups - levels * scale.unsqueeze(-1)
            if scheme.zero is Zero.OFFSET:
                # The best minimum of these very codes.
                yield (
                    levels,
                    GridParameters(scale, _stored(rest.mean(-1), scale, scheme)),
                )
            gap = groups - grids.decode_groups(levels, parameters, scheme)
            rest -= _shrink(gap, self.options.norm, beta)
            zero = _stored(rest.mean(-1), scale, scheme)
            beta *= _GROWTH


def _shrink(values: Tensor, norm: float, beta: float) -> Tensor:
    """Return the proximal point of ``|x|^p``, in the package's approximation."""
    size = values.abs()
    least = torch.finfo(size.dtype).tiny  # 0 to a negative power is not wanted
    kept = size - size.clamp(min=least).pow(norm - 1) / beta
    return kept.clamp_(min=0).copysign_(values)


def _stored(minimum: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    """Return a group's minimum as the scheme stores it."""
    if scheme.zero is Zero.OFFSET:
        return grids.round_to_storage(minimum, scheme)
    return torch.round(-minimum / scale).clamp(scheme.lowest, scheme.highest)


def _chosen(
    better: Tensor, found: GridParameters, best: GridParameters | None
) -> GridParameters:
    if best is None:
        return found
    assert found.zero is not None and best.zero is not None
    return GridParameters(
        torch.where(better, found.scale, best.scale),
        torch.where(better, found.zero, best.zero),
    )
