"""Do layers that vLLM fuses share their outer scale?

vLLM stacks q, k and v, and gate and up. NVFP4 has one outer scale a matrix; of those
that are stacked vLLM keeps the largest and only warns, which changes the weights of the
others. Quantizing such layers as one matrix makes the scales equal; this looks at what
came out.
"""

from __future__ import annotations

from compress.core.artifact import ModelDescription
from compress.core.errors import ExportError
from compress.core.scheme import Scales
from compress.core.tensors import QuantizedTensor


class OuterScales:
    """Outer scales of two-level layers, seen as they are written."""

    def __init__(self, model: ModelDescription, *, strict: bool) -> None:
        """Prepare for a model.

        Args:
            model: Whose layers will be shown.
            strict: Raise at the first disagreement instead of keeping a note.
        """
        self._strict = strict
        self._inputs = {
            f"{model.family.block(index)}.{linear.path}": (index, linear.input)
            for index in range(model.block_count)
            for linear in model.block_linears(index)
        }
        self._seen: dict[tuple[int, str], tuple[str, float]] = {}
        self._split: list[str] = []

    def see(self, layer: str, tensor: QuantizedTensor) -> None:
        """Take note of a layer's outer scale.

        Raises:
            ExportError: It differs from that of a layer with the same input, and this
                was said to matter.
        """
        key = self._inputs.get(layer)
        if tensor.scheme.scales is not Scales.TWO_LEVEL or key is None:
            return
        assert tensor.outer is not None
        value = float(tensor.outer)
        first, expected = self._seen.setdefault(key, (layer, value))
        if value == expected:
            return
        message = (
            f"{first} and {layer} have outer scales {expected:.6g} and {value:.6g}"
        )
        if self._strict:
            raise ExportError(
                f"{message}; vLLM fuses them and keeps one, which would change the "
                "weights of the other; use a method that quantizes layers with one "
                "input as one matrix, or runtime: transformers"
            )
        self._split.append(message)

    def notes(self) -> tuple[str, ...]:
        """Return what a user of vLLM should know."""
        if not self._split:
            return ()
        return (
            f"{self._split[0]} (and {len(self._split) - 1} more pairs); vLLM fuses "
            "such layers and keeps one scale, which changes the weights; transformers "
            "does not.",
        )
