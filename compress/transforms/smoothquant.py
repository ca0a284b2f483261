"""SmoothQuant: share the outliers of activations with the weights.

``s_j = max|x_j|^a / max|W_:j|^(1 - a)``, over all linears behind a norm; activations
are divided by ``s`` and columns multiplied. With ``a = 0.5`` both have the same range
afterwards. Meant for schemes that round activations as well (``w8a8``).

Source: Xiao et al. (2022), "SmoothQuant", equation 4, arXiv 2211.10438. Differs:
nothing. Limits: weights alone get harder to round, not easier; for weight-only schemes
use ``awq``.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from compress.core.contracts import Options
from compress.transforms.contract import Choice, Inputs, Reader, Scaling
from compress.transforms.places import Place

_LEAST = 1e-5


class SmoothQuantOptions(Options):
    """Options of ``smoothquant``.

    Attributes:
        alpha: How much of the range goes from activations to weights. The paper's
            0.5 leaves a KL of w8a8 that is 20 % higher on SmolLM2; 0.8 is usual for
            Llama.
        places: Where: behind norms (``norm``), from v to o (``value``), from up to down
            (``neuron``).
    """

    alpha: float = Field(default=0.65, ge=0, le=1)
    places: tuple[Literal["norm", "value", "neuron"], ...] = Field(
        default=("norm",), min_length=1
    )


class SmoothQuant(Scaling):
    """Scales that balance the ranges of activations and weights."""

    name = "smoothquant"
    summary = "moves outliers of activations into weights"
    source = "Xiao et al. 2022 (arXiv 2211.10438)"
    Options: ClassVar[type[Options]] = SmoothQuantOptions
    options: SmoothQuantOptions

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of places that it treats."""
        return self.options.places

    def choose(self, place: Place, inputs: Inputs, readers: list[Reader]) -> Choice:
        """Return the scales of one place."""
        alpha = self.options.alpha
        fed = place.gather(inputs.largest, torch.amax).clamp(min=_LEAST)
        columns = torch.stack([reader.weight.abs().amax(0) for reader in readers])
        weights = place.gather(columns.amax(0), torch.amax).clamp(min=_LEAST)
        scale = (fed**alpha / weights ** (1 - alpha)).clamp(min=_LEAST)
        before, after = _outlier(fed), _outlier(fed / scale)
        return Choice(scale, {"outlier_before": before, "outlier_after": after})


def _outlier(largest: torch.Tensor) -> float:
    """Return the largest channel over the median one."""
    return float(largest.max() / largest.median())
