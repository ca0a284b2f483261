"""TableSource: checkpoints of ``quant_method`` palette and aqlm, read as if dense.

Reading is independent of transformers and of the aqlm library. Shapes and types are
checked when a folder is opened, values when a layer is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.core import aqlm_format, palette_format
from compress.core.artifact import TensorInfo
from compress.core.errors import CheckpointError, SchemeError
from compress.core.scheme import Scheme
from compress.core.tensors import QuantizedTensor
from compress.model.coded_source import CodedSource
from compress.model.quantized_config import quantization_of

METHODS = (palette_format.QUANT_METHOD, aqlm_format.QUANT_METHOD)
"""The ``quant_method`` of folders that this module reads."""


class TableSource(CodedSource):
    """Tensors of a checkpoint whose matrices are codes that point to tables."""

    def __init__(self, folder: Path) -> None:
        """Read config and headers; no weights.

        Raises:
            CheckpointError: The folder is damaged or quantized in another way.
        """
        config = quantization_of(folder) or {}
        self._method = config.get("quant_method")
        if self._method not in METHODS:
            raise CheckpointError(
                f"{folder}: quant_method {self._method!r}; read are {list(METHODS)}"
            )
        super().__init__(folder)
        is_palette = self._method == palette_format.QUANT_METHOD
        suffixes = palette_format.SUFFIXES if is_palette else aqlm_format.SUFFIXES
        found = self._palette(config) if is_palette else self._additive(config)
        parts = {f"{layer}.{s}": layer for layer in found for s in suffixes}
        self._stored: dict[str, tuple[str, ...]] = {}
        for name, info in self._files.tensors().items():
            layer = parts.get(name)
            if layer is None:
                self._tensors[name] = info
            elif layer not in self._schemes:
                self._add(layer, *found[layer], suffixes)
        for layer in found:
            if layer not in self._schemes:
                raise CheckpointError(
                    f"{folder}: config.json says that {layer} has codes, and the files "
                    "have none; the checkpoint is damaged"
                )

    def codes(self, layer: str) -> QuantizedTensor:
        """Return codes, tables and scales of a layer, exactly as stored.

        Raises:
            CheckpointError: The layer has no codes, or they are damaged.
        """
        if layer not in self._schemes:
            raise CheckpointError(f"{self._folder}: {layer} has no codes")
        scheme, info = self._schemes[layer], self._tensors[f"{layer}.weight"]
        stored = {s: self._files.read(f"{layer}.{s}") for s in self._stored[layer]}
        try:
            if self._method == aqlm_format.QUANT_METHOD:
                return aqlm_format.decode(stored, scheme)
            rows, columns = info.shape
            return palette_format.decode(stored, scheme, (rows, columns))
        except CheckpointError as error:
            raise CheckpointError(f"{self._folder}: {layer}: {error}") from error

    def _add(
        self,
        layer: str,
        scheme: Scheme,
        shape: tuple[int, int],
        suffixes: tuple[str, ...],
    ) -> None:
        files = self._files.tensors()
        stored = {s: files[f"{layer}.{s}"] for s in suffixes if f"{layer}.{s}" in files}
        is_palette = self._method == palette_format.QUANT_METHOD
        check = palette_format.check if is_palette else aqlm_format.check
        try:
            if f"{layer}.weight" in files:
                raise CheckpointError("there are codes and a dense weight as well")
            check(stored, scheme, shape)
        except CheckpointError as error:
            raise CheckpointError(
                f"{self._folder}: {layer}: {error}; the checkpoint is damaged"
            ) from error
        self._schemes[layer] = scheme
        self._stored[layer] = tuple(stored)
        self._tensors[f"{layer}.weight"] = TensorInfo(shape, "float32")

    def _palette(self, config: Mapping[str, Any]) -> palette_format.Layers:
        try:
            return palette_format.layers_of(config)
        except CheckpointError as error:
            raise CheckpointError(f"{self._folder}/config.json: {error}") from error

    def _additive(self, config: Mapping[str, Any]) -> palette_format.Layers:
        """Find the coded layers by their tensors; the config only says what is not."""
        found: palette_format.Layers = {}
        files = self._files.tensors()
        marks = dict.fromkeys(
            name.rpartition(".")[0]
            for name in files
            if name.endswith((".codes", ".codebooks"))
        )
        for layer in marks:
            try:
                codes, tables = (
                    files.get(f"{layer}.{suffix}") for suffix in ("codes", "codebooks")
                )
                if codes is None or tables is None:
                    missing = "codes" if codes is None else "codebooks"
                    raise CheckpointError(f"{missing} is missing")
                if len(codes.shape) != 3:
                    raise CheckpointError(f"codes is {list(codes.shape)}")
                scheme = aqlm_format.scheme_of(config, tables.dtype)
                assert scheme.codebook is not None
                columns = codes.shape[1] * scheme.codebook.vector
                scheme.check_columns(columns, layer)
            except (CheckpointError, SchemeError) as error:
                raise CheckpointError(f"{self._folder}: {layer}: {error}") from error
            found[layer] = scheme, (codes.shape[0], columns)
        if not found:
            raise CheckpointError(f"{self._folder}: no layer has codes")
        return found
