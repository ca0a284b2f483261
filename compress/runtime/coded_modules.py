"""Modules of a transformers model that hold codes and decode them in each pass.

A weight is decoded in float32 and rounded once to the type of the computation, as
``compress.load`` does it, so that both compute the same numbers. Tables and scales keep
the type that they are stored in whatever the model is cast to. Nothing is trained here:
codes, tables and scales are buffers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from compress.core import palette_format
from compress.core.errors import CheckpointError
from compress.core.scheme import Scheme
from compress.core.table_products import products
from compress.core.tensors import TORCH_DTYPES


class CodedWeight(nn.Module):
    """A matrix as codes, in the place of a module that had it as ``weight``.

    Attributes:
        scheme: What the codes mean.
        shape: Rows and columns.
    """

    def __init__(
        self, original: nn.Module, scheme: Scheme, shape: tuple[int, int]
    ) -> None:
        """Make empty buffers of the right sizes on the device of the weight.

        Args:
            original: What is replaced; its weight may be on the meta device.
            scheme: From the config.
            shape: Likewise; must be that of the weight.

        Raises:
            CheckpointError: The config is of another model.
        """
        super().__init__()
        weight = original.get_parameter("weight")
        if tuple(weight.shape) != shape:
            raise CheckpointError(
                f"the codes are of a {list(shape)} matrix, the model has "
                f"{list(weight.shape)}; config.json is of another model"
            )
        self.scheme, self.shape = scheme, shape
        self._original = (original,)  # a tuple: no child, and not in the state
        for suffix, info in palette_format.tensors(scheme, shape).items():
            dtype = TORCH_DTYPES.get(info.dtype, torch.uint8)
            empty = torch.empty(info.shape, dtype=dtype, device=weight.device)
            self.register_buffer(suffix, empty)
        # Follows the model's type, which ids of an embedding do not tell.
        self.register_buffer("_type", weight.new_empty(0), persistent=False)

    @property
    def original(self) -> Any:
        """The module that was replaced."""
        return self._original[0]

    def stored(self) -> dict[str, Tensor]:
        """Return codes, tables and scales by suffix."""
        names = palette_format.tensors(self.scheme, self.shape)
        return {suffix: self.get_buffer(suffix) for suffix in names}

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """Return the weight ``[R, C]`` in ``dtype``."""
        return palette_format.decode_values(
            self.stored(), self.scheme, self.shape, dtype=dtype
        )

    def check(self, name: str) -> None:
        """Raise unless what was loaded is what the config says, and finite.

        Raises:
            CheckpointError: With the name of the tensor.
        """
        infos = palette_format.tensors(self.scheme, self.shape)
        for suffix, tensor in self.stored().items():
            if tensor.is_meta or tuple(tensor.shape) != infos[suffix].shape:
                raise CheckpointError(f"{name}.{suffix} was not loaded")
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise CheckpointError(f"{name}.{suffix} has NaN or infinite values")

    def dense(self) -> nn.Module:
        """Return the replaced module with the decoded weight, in the model's type."""
        weight = self.decoded(self.get_buffer("_type").dtype)
        frozen = nn.Parameter(weight, requires_grad=False)
        self.original.register_parameter("weight", frozen)
        return self.original  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """Say what is held."""
        return f"{self.shape[0]}x{self.shape[1]}, {self.scheme.name}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move all, and cast only what is not part of the codes."""
        kept = {name: tensor.dtype for name, tensor in self.stored().items()}
        before = self.stored()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, dtype in kept.items():
            moved = self.get_buffer(name)
            if moved.dtype != dtype:
                self._buffers[name] = before[name].to(moved.device)
        return self


class CodedLinear(CodedWeight):
    """A linear layer ``[out, in]`` that decodes its weight in each pass."""

    def __init__(
        self, original: nn.Linear, scheme: Scheme, shape: tuple[int, int]
    ) -> None:
        super().__init__(original, scheme, shape)
        self.in_features, self.out_features = original.in_features, shape[0]
        self.bias = original.bias

    def forward(self, inputs: Tensor) -> Tensor:
        """Return ``inputs @ weight.T + bias``."""
        return nn.functional.linear(inputs, self.decoded(inputs.dtype), self.bias)

    def dense(self) -> nn.Module:
        """Return the linear layer with the decoded weight."""
        original = super().dense()
        original.register_parameter("bias", self.bias)
        return original


class TableHead(CodedLinear):
    """A head that looks logits up in its tables, and never has its weight decoded."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Return ``inputs @ weight.T + bias``, summed in float32."""
        found = products(inputs, self.stored(), self.scheme).to(inputs.dtype)
        return found if self.bias is None else found + self.bias


class CodedEmbedding(CodedWeight):
    """An embedding that decodes the rows it is asked for."""

    def __init__(
        self, original: nn.Embedding, scheme: Scheme, shape: tuple[int, int]
    ) -> None:
        super().__init__(original, scheme, shape)
        self.num_embeddings, self.embedding_dim = shape
        # Gemma 3 multiplies inside its embedding.
        self._multiplier: float | None = getattr(original, "scalar_embed_scale", None)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows ``[..., C]`` of ``ids``, in the model's type."""
        dtype = self.get_buffer("_type").dtype
        rows = palette_format.decode_rows(
            self.stored(), self.scheme, self.shape, ids.reshape(-1).long(), dtype=dtype
        ).view(*ids.shape, -1)
        if self._multiplier is None:
            return rows
        return rows * torch.full((), self._multiplier, dtype=dtype, device=rows.device)

    def dense(self) -> nn.Module:
        """Return the embedding with the decoded weight."""
        original = super().dense()
        if self._multiplier is not None:
            scale = torch.tensor(
                self._multiplier, device=self.get_buffer("codes").device
            )
            original.register_buffer("embed_scale", scale, persistent=False)
        return original


class TiedHead(nn.Module):
    """A head that multiplies by the weight of a coded embedding, and stores nothing."""

    def __init__(self, original: nn.Linear, embedding: CodedEmbedding) -> None:
        super().__init__()
        self.in_features, self.out_features = original.in_features, embedding.shape[0]
        self._parts = original, embedding  # a tuple: no children

    def forward(self, inputs: Tensor) -> Tensor:
        """Return ``inputs @ embedding.T``."""
        return nn.functional.linear(inputs, self.embedding.decoded(inputs.dtype))

    @property
    def embedding(self) -> CodedEmbedding:
        """The embedding that has the weight."""
        return self._parts[1]

    def dense(self, weight: nn.Parameter) -> nn.Module:
        """Return the linear layer that was replaced, with the embedding's weight."""
        original, _ = self._parts
        original.register_parameter("weight", weight)
        return original


class TiedTableHead(TiedHead):
    """A tied head that looks logits up in the tables of the embedding."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Return ``inputs @ embedding.T``, summed in float32."""
        embedding = self.embedding
        found = products(inputs, embedding.stored(), embedding.scheme)
        return found.to(inputs.dtype)


def replace_coded_(model: nn.Module, layers: palette_format.Layers) -> None:
    """Put coded modules in the places of linear layers and embeddings.

    Args:
        model: Usually without weights.
        layers: Scheme and shape by module name.

    Raises:
        CheckpointError: The model has no such layer, or one of another shape.
    """
    for name, (scheme, shape) in layers.items():
        try:
            original = model.get_submodule(name)
        except AttributeError as error:
            raise CheckpointError(
                f"config.json says that {name} has codes; the model has no such layer"
            ) from error
        if not isinstance(original, (nn.Linear, nn.Embedding)):
            raise CheckpointError(
                f"{name} has codes; a {type(original).__name__} cannot hold them"
            )
        try:
            coded: CodedWeight
            if isinstance(original, nn.Linear):
                coded = CodedLinear(original, scheme, shape)
            else:
                coded = CodedEmbedding(original, scheme, shape)
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from error
        model.set_submodule(name, coded)


def decode_coded_(model: nn.Module) -> None:
    """Put ordinary modules back, with decoded weights in the model's type."""
    for name, module in list(model.named_modules()):
        if isinstance(module, CodedWeight):
            model.set_submodule(name, module.dense())
            if isinstance(module, CodedEmbedding):
                weight = model.get_submodule(name).get_parameter("weight")
                for place, head in list(model.named_modules()):
                    if isinstance(head, TiedHead) and head.embedding is module:
                        model.set_submodule(place, head.dense(weight))
