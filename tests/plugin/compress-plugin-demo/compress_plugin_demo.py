"""A quantizer and a pruner from outside.

The quantizer rounds to nearest with power-of-two scales: the scale of a group is the
power of two next above ``amax / highest``, so that multiplying by it is a shift.
Symmetric grids only. The pruner keeps the neurons with the longest columns of ``down``.
Written against the public contract alone: nothing of the toolkit but ``compress.core``
is imported.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from compress.core.contracts import Options, Pruner, Quantizer
from compress.core.neurons import GatedMLP, NeuronStatistics
from compress.core.scheme import Scheme, Zero
from compress.core.statistics import LayerStatistics
from compress.core.tensors import TORCH_DTYPES, QuantizedTensor


class PowerOfTwoOptions(Options):
    """Options of the quantizer.

    Attributes:
        shift: Exponent that is added to every scale.
    """

    shift: int = Field(default=0, ge=-4, le=4)


class PowerOfTwo(Quantizer):
    """Rounds to nearest; scales are powers of two."""

    name = "demo-power-of-two"
    summary = "round to nearest with power-of-two scales (demo of an outside plug-in)"
    source = "none; an example"
    Options = PowerOfTwoOptions

    def schemes(self) -> tuple[str, ...]:
        """Names of schemes an allocator may choose, most bits first."""
        return ("int8-g32", "int4-g32")

    def supports(self, scheme: Scheme) -> bool:
        """Whether the grid is a symmetric integer one."""
        return scheme.is_integer and scheme.zero is Zero.NONE and not scheme.rank

    def quantize(
        self, weight: Tensor, scheme: Scheme, statistics: LayerStatistics | None
    ) -> QuantizedTensor:
        """Return the codes of ``weight`` ``[R, C]``; ``statistics`` is not used."""
        assert isinstance(self.options, PowerOfTwoOptions)
        rows, columns = weight.shape
        groups = weight.float().reshape(rows, -1, scheme.group_of(columns))
        largest = groups.abs().amax(dim=-1).clamp(min=2.0**-14)
        exponent = torch.ceil(torch.log2(largest / scheme.highest)) + self.options.shift
        scale = torch.exp2(exponent.clamp(-14, 15))
        codes = torch.round(groups / scale.unsqueeze(-1))
        codes = codes.clamp(scheme.lowest, scheme.highest).to(torch.int8)
        stored = scale.to(TORCH_DTYPES[scheme.scale_dtype])
        return QuantizedTensor(codes.view(rows, columns), stored, None, scheme)


class Longest(Pruner):
    """Keeps the neurons whose columns of ``down`` are longest."""

    name = "demo-longest"
    summary = "longest columns of down (demo of an outside plug-in)"
    source = "none; an example"
    needs_activations = False
    budgets = "uniform"

    def scores(self, mlp: GatedMLP, statistics: NeuronStatistics | None) -> Tensor:
        """Return the norms of the columns."""
        norms: Tensor = mlp.down.norm(dim=0)
        return norms
