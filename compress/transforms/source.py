"""TransformedSource: the tensors of a model after its transforms, made when read."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compress.core.artifact import ModelDescription, TensorInfo, TensorSource
from compress.core.tensors import TORCH_DTYPES
from compress.transforms.operations import Operation, Step

# Embedding and head are treated in runs of this many rows: they are as large as all
# the rest of a block together, and float32 would double that.
_ROWS = 8192


class TransformedSource(TensorSource):
    """Another source's tensors with operations applied.

    Tensors that change are computed in float32. Those named in ``exact`` stay so: they
    are coded next, and rounding twice would cost. The others are rounded to the model's
    type, in which an export stores them, so that what is measured is what is stored.
    """

    def __init__(
        self,
        source: TensorSource,
        dtype: str,
        *,
        steps: tuple[Step, ...] = (),
        exact: frozenset[str] = frozenset(),
    ) -> None:
        self._source, self._dtype, self._exact = source, dtype, exact
        self._steps = steps
        self._copies: dict[str, str] = {}
        self._operations: dict[str, list[Operation]] = {}
        for step in steps:
            self._copies |= step.copies
            for name, operations in step.operations.items():
                self._operations.setdefault(name, []).extend(operations)

    def then(self, step: Step) -> TransformedSource:
        """Return the source after one more transform."""
        return TransformedSource(
            self._source,
            self._dtype,
            steps=(*self._steps, step),
            exact=self._exact,
        )

    @property
    def changed(self) -> frozenset[str]:
        """Names of the tensors that differ from the original's, or are new."""
        return frozenset(self._operations) | frozenset(self._copies)

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Describe every tensor; copies come last."""
        stored = dict(self._source.tensors())
        for name, origin in self._copies.items():
            stored[name] = TensorInfo(stored[origin].shape, self._dtype)
        for name in self._operations:
            kind = "float32" if name in self._exact else self._dtype
            stored[name] = TensorInfo(stored[name].shape, kind)
        return stored

    def read(self, name: str) -> Tensor:
        """Return one tensor; float32 if it changes and is in ``exact``."""
        tensor = self._source.read(self._copies.get(name, name))
        operations = self._operations.get(name)
        if operations is None:
            return tensor
        dtype = torch.float32 if name in self._exact else TORCH_DTYPES[self._dtype]
        if not all(operation.rowwise for operation in operations):
            return _applied(tensor, operations).to(dtype)
        changed = torch.empty(tensor.shape, dtype=dtype)
        for start in range(0, len(tensor), _ROWS):
            rows = slice(start, start + _ROWS)
            changed[rows] = _applied(tensor[rows], operations)
        return changed


def _applied(tensor: Tensor, operations: list[Operation]) -> Tensor:
    changed = tensor.to(torch.float32, copy=True)
    for operation in operations:
        changed = operation.apply(changed)
    return changed


def untied(model: ModelDescription) -> ModelDescription:
    """Return the description with a head of its own, which starts as the embedding."""
    from dataclasses import replace

    if not model.tied:
        return model
    family = model.family
    head = {f"{family.head}.weight": model.tensors[f"{family.embedding}.weight"]}
    return replace(
        model,
        tied=False,
        config={**model.config, "tie_word_embeddings": False},
        tensors={**model.tensors, **head},
    )
