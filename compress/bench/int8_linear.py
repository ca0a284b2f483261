"""A linear layer in 8 bits by torch's own integer product, to compare with.

Weights have a scale a row, inputs a scale a token, rounded by our kernel where there
is one. ``torch._int_mm`` returns int32, and torch applies the scales afterwards: what a
library gives without kernels of its own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.runtime.w6a8.ops import quant_act

_LEAST_ROWS = 32  # torch._int_mm wants more than 16 on CUDA
_MOST = 127.0


class Int8Linear(nn.Module):
    """``inputs @ weight.T + bias`` with both in int8.

    Args:
        linear: Whose weight is rounded to nearest.
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(1) / _MOST).clamp(
            min=torch.finfo(torch.float32).tiny
        )
        codes = (weight / scale[:, None]).round_().clamp_(-_MOST, _MOST)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("codes", codes.to(torch.int8), persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.bias = linear.bias

    def forward(self, inputs: Tensor) -> Tensor:
        """Return ``[..., out]`` in the inputs' type."""
        rows = inputs.reshape(-1, self.in_features)
        filled = F.pad(rows, (0, 0, 0, max(0, _LEAST_ROWS - len(rows))))
        codes, scale = quant_act(filled, self.in_features)
        sums = torch._int_mm(codes[:, : self.in_features], self.codes.t())
        result: Tensor = sums[: len(rows)] * scale[: len(rows)] * self.scale
        if self.bias is not None:
            result = result + self.bias
        return result.to(inputs.dtype).view(*inputs.shape[:-1], self.out_features)


def with_int8_(model: Any) -> Any:
    """Put 8-bit layers in the places of a model's linear layers, but for its head.

    Args:
        model: Of transformers, dense; changed in place.

    Returns:
        The same model.
    """
    head = model.get_output_embeddings()
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not head:
            model.set_submodule(path, Int8Linear(module))
    return model
