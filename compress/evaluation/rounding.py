"""What a runtime rounds besides the weights, as functions for a ``StreamedModel``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from compress.core.inputs import fake_quantize_inputs
from compress.core.scheme import InputScheme
from compress.model.streaming import Rewrite


def rounding_of(
    inputs: Mapping[str, InputScheme | None], input_amax: Mapping[str, float]
) -> dict[str, Rewrite]:
    """Return what each layer's inputs are replaced with, by layer name.

    Args:
        inputs: What each layer's inputs are rounded to; ``None`` leaves them.
        input_amax: Largest inputs in calibration, for two-level schemes.
    """
    return {
        name: partial(
            fake_quantize_inputs,
            scheme=scheme,
            amax=input_amax.get(name) if scheme.two_level else None,
        )
        for name, scheme in inputs.items()
        if scheme is not None
    }
