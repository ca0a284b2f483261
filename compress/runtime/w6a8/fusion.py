"""Norms, projections and gated MLPs of a model as few calls: q/k/v, gate/up, SiLU.

A decoder block computes ``attention(norm(x))`` and ``mlp(norm(x))``. Attention asks its
input for nothing but its leading dimensions, and for its products with q, k and v. So
the norm's place is given to a module that returns these products already, side by side
(:class:`NormedLinear`), and q, k and v become cuts of it (:class:`Rows`). No module
keeps anything between calls, no code of transformers is changed; ``torch.compile`` and
CUDA graphs see a plain chain of operations. The MLP's place is given to
:class:`GatedDown`, which starts from gate and up.

The state has the names and tensors that it had: each :class:`Rows` writes its codes as
the layer it stands for.

Exactness: an output's sum does not depend on other rows of the weight, so in plain
torch, and in every kernel that splits columns alike, results are those of the single
layers bit for bit. Compiled kernels may split columns otherwise for more rows, which
adds the same numbers in another order.

Limits: what hooks of a norm, or of q, k, v, gate and up, see is no longer what it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compress.core import compressed_tensors as ct
from compress.core.errors import CheckpointError
from compress.core.tensors import QuantizedTensor
from compress.runtime.w6a8.fused import rms_norm_linear, silu_mul_linear
from compress.runtime.w6a8.linear import W6A8Linear


class StackedLinear(W6A8Linear):
    """Rows of several layers as one; stores nothing, which its parts do.

    Args:
        layers: Of one scheme and one number of columns, all with a bias or none.
    """

    def __init__(self, layers: Sequence[W6A8Linear]) -> None:
        biases: list[Tensor] = [x.bias for x in layers if x.bias is not None]
        super().__init__(
            joined([layer.quantized() for layer in layers]),
            torch.cat(biases) if biases else None,
        )
        sizes = [layer.out_features for layer in layers]
        self.cuts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]

    def parts(self) -> list[Rows]:
        """Return what takes the places of the layers."""
        return [
            Rows(self, a, b) for a, b in zip(self.cuts, self.cuts[1:], strict=False)
        ]

    def set_rows_(self, start: int, tensor: QuantizedTensor) -> None:
        """Put other codes and scales in the place of some rows."""
        whole = self.quantized()
        stop = start + tensor.shape[0]
        device = whole.codes.device
        whole.codes[start:stop] = tensor.codes.to(device)
        whole.scale[start:stop] = tensor.scale.to(device)
        self._hold(whole, device)

    def _save_to_state_dict(
        self, destination: Any, prefix: str, keep_vars: bool
    ) -> None:
        return

    def _load_from_state_dict(self, *_arguments: Any) -> None:
        return


class Rows(nn.Module):
    """Some rows of a stacked layer, in the place of a layer of their own.

    Args:
        whole: The stacked layer.
        start: First row.
        stop: Row after the last.
    """

    def __init__(self, whole: StackedLinear, start: int, stop: int) -> None:
        super().__init__()
        self._whole = (whole,)  # a tuple: no child, which another module has
        self.start, self.stop = start, stop
        self.in_features, self.out_features = whole.in_features, stop - start

    @property
    def whole(self) -> StackedLinear:
        """The stacked layer."""
        return self._whole[0]

    @property
    def bias(self) -> Tensor | None:
        """The bias of the rows."""
        bias = self.whole.bias
        return None if bias is None else bias[self.start : self.stop]

    def forward(self, products: Tensor) -> Tensor:
        """Return the part ``[..., out]`` of the stacked layer's result ``[..., N]``."""
        return products[..., self.start : self.stop]

    def quantized(self) -> QuantizedTensor:
        """Return codes and scales ``[out, in]``, exactly as they were given."""
        return self.whole.rows(self.start, self.stop)

    def extra_repr(self) -> str:
        """Say what is cut."""
        return (
            f"rows {self.start} to {self.stop} of {self.whole.out_features}, "
            f"{self.whole.scheme.name}"
        )

    def _save_to_state_dict(
        self, destination: Any, prefix: str, keep_vars: bool
    ) -> None:
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias.detach().clone()
        stored = ct.layout_of(self.whole.scheme).encode(self.quantized())
        for suffix, tensor in stored.items():
            destination[prefix + suffix] = tensor.to(self.whole.tiles.device)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_messages: list[str],
    ) -> None:
        scheme, shape = self.whole.scheme, (self.out_features, self.in_features)
        layout = ct.layout_of(scheme)
        suffixes = list(layout.tensors(scheme, shape))
        if self.bias is not None:
            suffixes.append("bias")
        stored = {
            s: state_dict[prefix + s] for s in suffixes if prefix + s in state_dict
        }
        missing_keys.extend(prefix + s for s in suffixes if s not in stored)
        bias = stored.pop("bias", None)
        if bias is not None and self.bias is not None:
            with torch.no_grad():
                self.bias.copy_(bias)
        if not stored:
            return
        try:
            self.whole.set_rows_(self.start, layout.decode(stored, scheme, shape))
        except CheckpointError as error:
            raise CheckpointError(f"{prefix.rstrip('.')}: {error}") from error


class NormedLinear(nn.Module):
    """A norm and the layers that read it, in the norm's place.

    Args:
        norm: An RMS norm of transformers.
        stacked: The layers.
        plus_one: Whether the norm multiplies by ``1 + weight``.
    """

    def __init__(self, norm: Any, stacked: StackedLinear, *, plus_one: bool) -> None:
        super().__init__()
        eps = epsilon(norm)
        assert eps is not None
        self.weight: nn.Parameter = norm.weight
        self.eps, self.plus_one, self.stacked = eps, plus_one, stacked

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the products ``[..., N]`` of the norm of ``[..., K]``."""
        products: Tensor = rms_norm_linear(
            hidden_states,
            self.weight,
            self.eps,
            self.plus_one,
            *self.stacked.operands(),
        )
        return products


class GatedDown(nn.Module):
    """What follows gate and up in an MLP: ``down(activation(gate) * up)``.

    Args:
        parts: Cuts of gate and up by the names that the MLP had for them.
        down: The last layer, and its name.
        activation: The MLP's.
    """

    def __init__(
        self, parts: dict[str, Rows], down: tuple[str, nn.Module], activation: nn.Module
    ) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.add_module(*down)
        self._down = down[0]
        self.activation = activation
        last = down[1]
        self._fuses = (
            isinstance(last, W6A8Linear)
            and last.input_group is not None
            and is_silu(activation)
        )

    def forward(self, gate_up: Tensor) -> Tensor:
        """Return ``[..., H]``.

        Args:
            gate_up: Products of gate and up, ``[..., 2 I]``.
        """
        down: Any = self.get_submodule(self._down)
        if not self._fuses:
            gate, up = gate_up.chunk(2, -1)
            result: Tensor = down(self.activation(gate) * up)
            return result
        result = silu_mul_linear(gate_up, *down.operands())
        return result


class GatedMLP(GatedDown):
    """A whole gated MLP whose input no norm precedes, such as an expert."""

    def __init__(
        self,
        stacked: StackedLinear,
        parts: dict[str, Rows],
        down: tuple[str, nn.Module],
        activation: nn.Module,
    ) -> None:
        super().__init__(parts, down, activation)
        self.stacked = stacked

    def forward(self, inputs: Tensor) -> Tensor:
        """Return ``down(activation(gate(inputs)) * up(inputs))`` ``[..., H]``."""
        return super().forward(self.stacked(inputs))


def joined(tensors: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """Return the rows of all tensors as one; schemes and columns must be the same."""
    return QuantizedTensor(
        torch.cat([tensor.codes for tensor in tensors]),
        torch.cat([tensor.scale for tensor in tensors]),
        None,
        tensors[0].scheme,
    )


def agree(layers: Sequence[nn.Module]) -> bool:
    """Whether layers can be one: W6A8 of the same scheme, width, place and bias."""
    found = [layer for layer in layers if isinstance(layer, W6A8Linear)]
    if not found or len(found) < len(layers) or found[0].input_group is None:
        return False
    kinds = {(x.scheme, x.in_features, x.bias is None, x.tiles.device) for x in found}
    return len(kinds) == 1


def epsilon(norm: Any) -> float | None:
    """Return what an RMS norm adds to the mean of squares; ``None`` of others."""
    if not type(norm).__name__.endswith("RMSNorm") or norm.weight is None:
        return None
    value = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return None if value is None else float(value)


def is_silu(activation: Any) -> bool:
    """Whether a module is ``x * sigmoid(x)``."""
    return isinstance(activation, nn.SiLU) or type(activation).__name__ == (
        "SiLUActivation"
    )
