"""A quantizer of your own: one class, and one line that makes it known.

    python examples/custom_quantizer.py [MODEL]

shows the class at work on the layers of a model. To use it in a config, put it into a
package of yours whose ``pyproject.toml`` has

    [project.entry-points."compress.quantizers"]
    clipped = "your_package.custom_quantizer:Clipped"

and install that with ``pip install -e .``. From then on ``compress list`` shows it, and
``quantize: {method: clipped, scheme: int4-g64, options: {clip: 0.8}}`` runs it, with
the same checks of options and schemes that built-in methods have.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from compress.core import grids
from compress.core.contracts import Options, Quantizer
from compress.core.scheme import Scheme
from compress.core.statistics import LayerStatistics
from compress.core.tensors import QuantizedTensor


class ClippedOptions(Options):
    """Options of ``clipped``; a wrong key or value is reported with its line.

    Attributes:
        clip: Share of each group's range that the grid covers.
    """

    clip: float = Field(default=0.9, gt=0, le=1)


class Clipped(Quantizer):
    """Round to nearest on a grid that covers a fixed share of each group's range."""

    name = "clipped"
    summary = "round to nearest with a clipped range"
    source = "none; an example"
    Options: ClassVar[type[Options]] = ClippedOptions
    options: ClippedOptions

    def schemes(self) -> tuple[str, ...]:
        """Names of schemes to choose from, most bits first."""
        return ("int8-g32", "int4-g32", "int3-g32")

    def quantize(
        self, weight: Tensor, scheme: Scheme, statistics: LayerStatistics | None
    ) -> QuantizedTensor:
        """Return the codes of ``weight`` ``[R, C]``; ``statistics`` is not used."""
        groups = grids.as_groups(weight, scheme)  # [R, G, g]
        parameters = grids.range_parameters(groups, scheme, self.options.clip)
        codes = grids.encode(groups, parameters, scheme)
        return grids.assemble(codes.view(weight.shape), parameters, scheme)


def main(model: str, scheme_name: str = "int4-g32") -> dict[float, float]:
    """Return and print the relative squared error of all layers for some clips."""
    from compress.model.loading import open_model

    scheme = Scheme.parse(scheme_name)
    clips = (1.0, 0.9, 0.8, 0.7)
    lost, total = dict.fromkeys(clips, 0.0), 0.0
    with tempfile.TemporaryDirectory() as cache:
        handle = open_model(model, cache=Path(cache))
        for layer in handle.description.linears():
            weight = handle.source.read(f"{layer}.weight").float()
            total += float(weight.square().sum())
            for clip in clips:
                coded = Clipped(ClippedOptions(clip=clip)).quantize(
                    weight, scheme, None
                )
                lost[clip] += float((coded.dequantize() - weight).square().sum())
    errors = {clip: value / total for clip, value in lost.items()}
    for clip, error in errors.items():
        print(f"clip {clip:.1f}: relative squared error {error:.5f}")
    return errors


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "builtin:smollm2-135m")
