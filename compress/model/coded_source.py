"""CodedSource: a checkpoint with codes, read as if it were dense."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.core.artifact import TensorSource
from compress.core.scheme import Scheme
from compress.core.tensors import QuantizedTensor


class CodedSource(TensorSource):
    """Tensors of a checkpoint of which some are codes.

    A coded layer appears as one float32 tensor ``NAME.weight`` of its original shape,
    so that no rounding is added to what the codes say; others appear as stored.

    Attributes:
        cache_scales: Names of the stored scales of the key-value cache.
    """

    cache_scales: tuple[str, ...] = ()

    @property
    @abstractmethod
    def schemes(self) -> Mapping[str, Scheme]:
        """Scheme of each coded layer, by module name, in the order of the files."""

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

    quantization = quantization_of(folder) or {}
    if quantization.get("quant_method") in METHODS:
        return TableSource(folder)
    return PackedSource(folder)
