"""A compressed model as a dense one: codes decoded, for readers that know no codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from compress.core.artifact import CompressedModel, TensorInfo, TensorSource
from compress.core.plan import Plan


def decoded(artifact: CompressedModel) -> CompressedModel:
    """Return the same model with an empty plan; its tensors are decoded when read."""
    return replace(
        artifact, plan=Plan(artifact.plan.model, {}), source=_Decoded(artifact)
    )


class _Decoded(TensorSource):
    def __init__(self, artifact: CompressedModel) -> None:
        self._artifact = artifact

    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._artifact.source.tensors()

    def read(self, name: str) -> Tensor:
        layer = name.removesuffix(".weight")
        if layer != name and layer in self._artifact.plan.layers:
            return self._artifact.quantized(layer).dequantize()
        return self._artifact.source.read(name)
