"""A linear layer that holds 6-bit codes and rounds its inputs to int8, or not at all.

Codes are held as tiles (``tiles.py``); the state has the tensors of compressed-tensors
files, made again from them exactly, so a saved model is one that other engines read.
Inputs are rounded as the scheme says: a scale a token, a scale for each group of
columns, or not at all. In the last case the weight is decoded in each pass, which
saves memory and not time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from compress.core import compressed_tensors as ct
from compress.core.errors import CheckpointError
from compress.core.scheme import Scheme
from compress.core.tensors import TORCH_DTYPES, QuantizedTensor
from compress.runtime.w6a8.ops import w6_decode, w6a8_linear
from compress.runtime.w6a8.tiles import TiledWeight


class W6A8Linear(nn.Module):
    """A linear layer ``[out, in]`` of 6-bit weights and inputs of 8 or of all bits.

    Inference only. Casting the model to another type changes the bias alone.

    Args:
        tensor: Codes and scales; its scheme says what inputs are rounded to.
        bias: ``[out]`` or ``None``.

    Raises:
        SchemeError: Of no kind that is computed with; see ``tiles.obstacle``.
    """

    tiles: Tensor
    scale_bits: Tensor

    def __init__(self, tensor: QuantizedTensor, bias: Tensor | None) -> None:
        super().__init__()
        self.scheme: Scheme = tensor.scheme
        self.out_features, self.in_features = tensor.shape
        self._hold(tensor, tensor.codes.device)
        self.bias: nn.Parameter | None = None
        if bias is not None:
            self.bias = nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def input_group(self) -> int | None:
        """Columns of inputs that share a scale; ``None`` if inputs are not rounded."""
        inputs = self.scheme.inputs
        return None if inputs is None else inputs.group_size or self.in_features

    def forward(self, inputs: Tensor) -> Tensor:
        """Return ``inputs @ weight.T + bias`` ``[..., out]`` in the inputs' type."""
        group = self.scheme.group_of(self.in_features)
        shape = self.out_features, self.in_features
        if self.input_group is None:
            weight = w6_decode(self.tiles, self._scales(), *shape, group, inputs.dtype)
            bias = None if self.bias is None else self.bias.to(inputs.dtype)
            return nn.functional.linear(inputs, weight, bias)
        result: Tensor = w6a8_linear(inputs, *self.operands())
        return result

    def operands(
        self,
    ) -> tuple[Tensor, Tensor, Tensor | None, int, int, int, int]:
        """Return what operations on inputs in 8 bits take of the layer.

        Returns:
            Tiles, scales, bias, rows, columns, and the columns that share a scale, of
            the weight and of the inputs.
        """
        assert self.input_group is not None
        sizes = self.out_features, self.in_features
        group = self.scheme.group_of(self.in_features)
        return (self.tiles, self._scales(), self.bias, *sizes, group, self.input_group)

    def quantized(self) -> QuantizedTensor:
        """Return codes and scales ``[out, in]``, exactly as they were given."""
        shape = (self.out_features, self.in_features)
        group = self.scheme.group_of(self.in_features)
        tiled = TiledWeight(self.tiles, self._scales(), shape, group)
        return tiled.quantized(self.scheme)

    def rows(self, start: int, stop: int) -> QuantizedTensor:
        """Return codes and scales of some rows, exactly as they were given."""
        panel = self.scale_bits.shape[1] // len(self.tiles)  # rows that lie together
        first = start // panel
        tiled = TiledWeight(
            self.tiles[first : -(-stop // panel)],
            self._scales()[:, first * panel :],
            (stop - first * panel, self.in_features),
            self.scheme.group_of(self.in_features),
        )
        found = tiled.quantized(self.scheme)
        skipped = start - first * panel
        return QuantizedTensor(
            found.codes[skipped:], found.scale[skipped:], None, self.scheme
        )

    def extra_repr(self) -> str:
        """Say what is held."""
        return f"{self.out_features}x{self.in_features}, {self.scheme.name}"

    def _hold(self, tensor: QuantizedTensor, device: torch.device) -> None:
        tiled = TiledWeight.from_quantized(tensor)
        self.register_buffer("tiles", tiled.tiles.to(device), persistent=False)
        # As integers, which no cast of the model touches.
        bits = tiled.scales.view(torch.int16).to(device)
        self.register_buffer("scale_bits", bits, persistent=False)

    def _scales(self) -> Tensor:
        return self.scale_bits.view(TORCH_DTYPES[self.scheme.scale_dtype])

    def _save_to_state_dict(
        self, destination: Any, prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        stored = ct.layout_of(self.scheme).encode(self.quantized())
        for suffix, tensor in stored.items():
            destination[prefix + suffix] = tensor.to(self.tiles.device)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        *others: Any,
    ) -> None:
        layout = ct.layout_of(self.scheme)
        shape = (self.out_features, self.in_features)
        names = [prefix + suffix for suffix in layout.tensors(self.scheme, shape)]
        stored = {
            name.removeprefix(prefix): state_dict.pop(name)
            for name in names
            if name in state_dict
        }
        if stored:
            try:
                tensor = layout.decode(stored, self.scheme, shape)
            except CheckpointError as error:
                raise CheckpointError(f"{prefix.rstrip('.')}: {error}") from error
            self._hold(tensor, self.tiles.device)
        else:
            missing_keys.extend(names)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, *others
        )
