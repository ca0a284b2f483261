"""Scale folding: channels that are fed large values get larger weights.

``s = max|x|^p / mean(max|x|^p)``, ``p`` 1/2, over the channels of an input: a norm's
gain is divided by ``s`` and the columns behind it are multiplied, which evens out what
the weights of a group matter, and what a group of inputs spans where a runtime rounds
these.

Source: RAMP, "Scale Folding". Differs: nothing at norms; ``power`` may be another than
RAMP's 1/2, and ``places`` may add the pairs ``v -> o`` and ``up -> down``, which are as
exact. Limits: looks at inputs only, never
at what rounding does; ``awq`` does.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from compress.core.contracts import Options
from compress.transforms.contract import Choice, Inputs, Reader, Scaling
from compress.transforms.places import Place

_LEAST = 1e-2
"""Smallest scale, beside a mean of 1: a channel that is hardly fed stays bounded."""


class ScaleFoldingOptions(Options):
    """Options of ``scale_folding``.

    Attributes:
        places: Where scales are moved: behind norms (``norm``), from v to o
            (``value``), from up to down (``neuron``).
        power: Of the largest inputs: how much of their spread goes into the weights.
            RAMP has 0.5.
    """

    places: tuple[Literal["norm", "value", "neuron"], ...] = Field(
        default=("norm",), min_length=1
    )
    power: float = Field(default=0.5, gt=0, le=1)


class ScaleFolding(Scaling):
    """Scales from the largest inputs alone."""

    name = "scale_folding"
    summary = "channel scales from the largest inputs (RAMP)"
    source = "RAMP, Scale Folding"
    Options: ClassVar[type[Options]] = ScaleFoldingOptions
    options: ScaleFoldingOptions

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of places that it treats."""
        return self.options.places

    def choose(self, place: Place, inputs: Inputs, readers: list[Reader]) -> Choice:
        """Return the scales of one place."""
        spans = place.gather(inputs.largest, torch.amax) ** self.options.power
        if not bool(spans.any()):
            return Choice(None, {"skipped": "its inputs are all zero"})
        scale = (spans / spans.mean()).clamp(min=_LEAST)
        spread = float(scale.max() / scale.min())
        return Choice(scale, {"spread": spread})
