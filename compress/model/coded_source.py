"""CodedSource: a checkpoint with codes, read as if it were dense."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.core.artifact import TensorInfo, TensorSource
from compress.core.errors import CheckpointError
from compress.core.foreign import refusing
from compress.core.scheme import Scheme
from compress.core.tensors import QuantizedTensor
from compress.model.sources import SafetensorsSource


class CodedSource(TensorSource):
    """Tensors of a checkpoint of which some are codes.

    A coded layer appears as one float32 tensor ``NAME.weight`` of its original shape,
    so that no rounding is added to what the codes say; others appear as stored.

    Attributes:
        cache_scales: Names of the stored scales of the key-value cache.
    """

    cache_scales: tuple[str, ...] = ()

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = SafetensorsSource(folder)
        self._schemes: dict[str, Scheme] = {}
        self._tensors: dict[str, TensorInfo] = {}

    @property
    def schemes(self) -> Mapping[str, Scheme]:
        """Scheme of each coded layer, by module name, in the order of the files."""
        return self._schemes

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Describe every tensor as :meth:`read` returns it."""
        return self._tensors

    def read(self, name: str) -> Tensor:
        """Return one tensor on the CPU: decoded float32, or dense as stored.

        Raises:
            CheckpointError: No such tensor, or the file is damaged.
        """
        layer = name.removesuffix(".weight")
        if name.endswith(".weight") and layer in self._schemes:
            with refusing(f"{self._folder}: {layer}"):
                return self.codes(layer).dequantize()
        if name not in self._tensors and name not in self.cache_scales:
            raise CheckpointError(f"{self._folder}: tensor {name} is missing")
        return self._files.read(name)

    @abstractmethod
    def codes(self, layer: str) -> QuantizedTensor:
        """Return codes, scales and zero points of a layer, exactly as stored.

        Raises:
            CheckpointError: The layer has no codes, or they are damaged.
        """

    def input_multiplier(self, layer: str) -> float | None:
        """Return what the inputs of a layer are multiplied by, if that is stored."""
        return None

    @property
    def cache_scheme(self) -> Mapping[str, Any] | None:
        """How the config wants the key-value cache quantized, if it does."""
        return None


def open_coded(folder: Path) -> CodedSource:
    """Open a folder whose config has a ``quantization_config``; reads no weights.

    Raises:
        CheckpointError: It is damaged, or quantized in a way that is not read.
    """
    from compress.model.quantized_config import quantization_of
    from compress.model.quantized_source import PackedSource
    from compress.model.table_source import METHODS, TableSource

    with refusing(f"{folder}/config.json"):
        quantization = quantization_of(folder) or {}
        if quantization.get("quant_method") in METHODS:
            return TableSource(folder)
        return PackedSource(folder)
