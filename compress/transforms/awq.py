"""AWQ: scale up the channels that matter, as far as rounding gains by it.

At each place, for ``a`` in ``0, 1/20, ... 19/20``, scales ``s = mean|x|^a``, or with
``duo`` ``mean|x|^a / w^(1-a)`` with ``w`` the mean over rows of ``|W|`` over its
group's largest, are tried: columns are multiplied by ``s``, rounded to nearest on the
grid that the plan gives them, and divided again. The scales of least output error
``tr(E H E^T)``, summed over all linears that read the channels, are folded into the
layer before. Where nothing beats ``s = 1`` the place is left alone.

Source: Lin et al. (2023), "AWQ", section 3.2, arXiv 2306.00978; duo-scaling is in the
authors' implementations. Differs: the error is that of the linears' outputs, in closed
form from second moments of all calibration tokens, not that of the block on a few; any
grid; ``v -> o`` under grouped-query attention too, with one scale for the query heads
that share a key-value head. Limits: the search rounds to nearest, so the scales suit
error feedback (``gptq``) only in part.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.core import grids
from compress.core.contracts import Options
from compress.core.scheme import Scheme
from compress.transforms.contract import Choice, Inputs, Reader, Scaling
from compress.transforms.places import Place


class AWQOptions(Options):
    """Options of ``awq``, the transform.

    Attributes:
        steps: How many exponents are tried, from 0 on, ``1 / steps`` apart.
        duo: Try scales that look at the weights as well.
        places: Where: behind norms (``norm``), from v to o (``value``), from up to down
            (``neuron``).
    """

    steps: int = Field(default=20, ge=2, le=100)
    duo: bool = True
    places: tuple[Literal["norm", "value", "neuron"], ...] = Field(
        default=("norm", "value", "neuron"), min_length=1
    )


class AWQ(Scaling):
    """Scales found by search on the plan's own grids."""

    name = "awq"
    summary = "channel scales searched for the least error after rounding"
    source = "Lin et al. 2023 (arXiv 2306.00978)"
    Options: ClassVar[type[Options]] = AWQOptions
    options: AWQOptions
    needs_hessian = True

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of places that it treats."""
        return self.options.places

    def choose(self, place: Place, inputs: Inputs, readers: list[Reader]) -> Choice:
        """Return the scales of least error, or none if 1 is best."""
        assert inputs.hessian is not None, "awq declares needs_hessian"
        coded = [(r.weight, r.scheme) for r in readers if r.scheme is not None]
        if not coded:
            return Choice(None, {"skipped": "no layer behind it is quantized"})
        ones = torch.ones(place.channels, device=inputs.mean.device)
        start = output_error(coded, place.spread(ones), inputs.hessian)
        least, chosen, facts = start, None, {"alpha": 0.0, "duo": False}
        for alpha, duo, scale in self._candidates(place, inputs, coded):
            error = output_error(coded, place.spread(scale), inputs.hessian)
            if error < least:
                least, chosen, facts = error, scale, {"alpha": alpha, "duo": duo}
        gain = 1 - least / start if start else 0.0
        return Choice(chosen, {**facts, "gain": gain})

    def _candidates(
        self, place: Place, inputs: Inputs, coded: list[tuple[Tensor, Scheme]]
    ) -> Iterator[tuple[float, bool, Tensor]]:
        fed = place.gather(inputs.mean, torch.mean)
        relative = torch.cat([_relative(weight, scheme) for weight, scheme in coded])
        weights = place.gather(relative.mean(0), torch.mean)
        steps = self.options.steps
        for index in range(steps):
            alpha = index / steps
            if index:
                yield alpha, False, normalized(fed**alpha)
            if self.options.duo:
                scale = fed**alpha / (weights ** (1 - alpha) + 1e-4)
                yield alpha, True, normalized(scale)


def normalized(scale: Tensor) -> Tensor:
    """Return scales whose largest and smallest multiply to one."""
    bounded = scale.clamp(min=1e-4)
    return bounded / (bounded.max() * bounded.min()).sqrt()


def output_error(
    coded: list[tuple[Tensor, Scheme]], columns: Tensor, hessian: Tensor
) -> float:
    """Return ``tr(E H E^T)``, summed over linears that are scaled and rounded.

    Args:
        coded: Weights float32 ``[R, C]`` and the scheme of each.
        columns: float32 ``[C]``, what columns are multiplied by before rounding.
        hessian: float32 ``[C, C]``.
    """
    total = 0.0
    for weight, scheme in coded:
        scaled = weight * columns
        groups = grids.as_groups(scaled, scheme)
        parameters = grids.range_parameters(groups, scheme)
        levels = grids.encode(groups, parameters, scheme)
        values = grids.decode_groups(levels, parameters, scheme)
        error = (values.view_as(weight) - scaled) / columns
        total += float(((error @ hessian) * error).sum())
    return total


def _relative(weight: Tensor, scheme: Scheme) -> Tensor:
    """Return ``|W|`` over the largest of its group, ``[R, C]``."""
    groups = grids.as_groups(weight, scheme).abs()
    largest = groups.amax(-1, keepdim=True).clamp(min=1e-12)
    return (groups / largest).view_as(weight)
