import torch
from pydantic import Field
from torch import Tensor

from compress.core.contracts import Options, Quantizer
from compress.core.scheme import Scheme, Zero
from compress.core.statistics import LayerStatistics
from compress.core.tensors import TORCH_DTYPES, QuantizedTensor


class PowerOfTwoOptions(Options):
    shift: int = Field(default=0, ge=-4, le=4, description="Added to every exponent.")


class PowerOfTwo(Quantizer):
    """Rounds to nearest under scales that are powers of two: scaling is a shift."""

    name = "demo-power-of-two"
    summary = "round to nearest with power-of-two scales (demo of an outside plug-in)"
    source = "none; an example"
    Options = PowerOfTwoOptions
    options: PowerOfTwoOptions

    def schemes(self) -> tuple[str, ...]:
        return ("int8-g32", "int4-g32")

    def supports(self, scheme: Scheme) -> bool:
        return scheme.is_integer and scheme.zero is Zero.NONE and not scheme.rank

    def quantize(
        self, weight: Tensor, scheme: Scheme, statistics: LayerStatistics | None
    ) -> QuantizedTensor:
        groups = weight.float().unflatten(1, (-1, scheme.group_of(weight.shape[1])))
        largest = groups.abs().amax(dim=-1, keepdim=True).clamp(min=2.0**-14)
        exponent = torch.log2(largest / scheme.highest).ceil() + self.options.shift
        scale = torch.exp2(exponent.clamp(-14, 15))
        codes = (groups / scale).round().clamp(scheme.lowest, scheme.highest)
        codes = codes.to(torch.int8).view_as(weight)
        stored = scale.squeeze(-1).to(TORCH_DTYPES[scheme.scale_dtype])
        return QuantizedTensor(codes, stored, None, scheme)
