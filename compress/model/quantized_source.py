"""PackedSource: a compressed-tensors checkpoint read as if it were dense.

Reading is independent of the compressed-tensors library and of transformers: codes are
unpacked and multiplied by their scales in float32, one tensor at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.core import compressed_tensors as ct
from compress.core.artifact import TensorInfo
from compress.core.errors import CheckpointError
from compress.core.scheme import Scheme
from compress.core.tensors import QuantizedTensor
from compress.model.coded_source import CodedSource
from compress.model.quantized_config import (
    ConfigGroup,
    config_groups,
    group_of,
    quantization_of,
)

__all__ = ["PackedSource", "packed_scheme", "quantization_of"]

_LOG = logging.getLogger(__name__)
_REORDERED = "weight_g_idx"
_MARKS = ("weight_packed", ct.SCALE)


class PackedSource(CodedSource):
    """Tensors of a checkpoint whose linears are coded, by compressed-tensors.

    A coded layer appears as one float32 tensor ``NAME.weight`` of its original shape,
    so that no rounding is added to what the codes say; others appear as stored. Scales
    of the key-value cache are no weights and do not appear; see :attr:`cache_scales`.
    """

    def __init__(self, folder: Path) -> None:
        """Read config and headers, and the original shapes; no weights.

        Raises:
            CheckpointError: The folder is damaged or quantized in another way.
        """
        groups = config_groups(folder)
        super().__init__(folder)
        stored = self._files.tensors()
        self._layouts: dict[str, ct.Layout] = {}
        self.cache_scales = tuple(
            name for name in stored if name.endswith(_dotted(ct.CACHE_SUFFIXES))
        )
        for name in stored:
            layer, _, suffix = name.rpartition(".")
            if suffix in _MARKS and layer not in self._schemes:
                self._add(layer, groups)
        for name, info in stored.items():
            layer, _, suffix = name.rpartition(".")
            if suffix == "weight" and layer in self._schemes:
                self._tensors[name] = self._info(layer)
            elif layer in self._schemes and suffix in ct.SUFFIXES:
                if suffix == self._layouts[layer].codes:
                    self._tensors[f"{layer}.weight"] = self._info(layer)
            elif name not in self.cache_scales:
                self._tensors[name] = info
        self._warn_of_static_inputs(groups)

    def codes(self, layer: str) -> QuantizedTensor:
        """Return codes, scales and zero points of a layer, exactly as stored.

        Raises:
            CheckpointError: The layer has no codes, or they are damaged.
        """
        if layer not in self._schemes:
            raise CheckpointError(f"{self._folder}: {layer} has no codes")
        scheme, layout = self._schemes[layer], self._layouts[layer]
        shape = self._tensors[f"{layer}.weight"].shape
        rows, columns = shape
        stored = {
            suffix: self._files.read(f"{layer}.{suffix}")
            for suffix in layout.tensors(scheme, (rows, columns))
        }
        try:
            return layout.decode(stored, scheme, (rows, columns))
        except CheckpointError as error:
            raise CheckpointError(f"{self._folder}: {layer}: {error}") from error

    def input_multiplier(self, layer: str) -> float | None:
        """Return what the inputs of a layer are multiplied by, if that is stored."""
        name = f"{layer}.{ct.INPUT_SCALE}"
        if name not in self._files.tensors():
            return None
        return float(self._files.read(name).float())

    @property
    def cache_scheme(self) -> Mapping[str, Any] | None:
        """The ``kv_cache_scheme`` of the config."""
        scheme = (quantization_of(self._folder) or {}).get("kv_cache_scheme")
        return dict(scheme) if scheme else None

    def _add(self, layer: str, groups: list[ConfigGroup]) -> None:
        """Find out what a layer with codes is."""
        group, stored = group_of(layer, groups), self._files.tensors()
        scales = stored.get(f"{layer}.{ct.SCALE}")
        try:
            if group is None:
                raise CheckpointError("no config group of config.json targets it")
            if scales is None:
                raise CheckpointError(f"{ct.SCALE} is missing")
            if f"{layer}.{_REORDERED}" in stored:
                raise CheckpointError(f"{_REORDERED}: reordered columns are not read")
            layout = ct.layout_named(group.format)
            if f"{layer}.{layout.codes}" not in stored:
                raise CheckpointError(f"{layout.codes} is missing")
            scheme = ct.scheme_of_group(group.entry, group.format, scales.dtype)
        except CheckpointError as error:
            raise CheckpointError(f"{self._folder}: {layer}: {error}") from error
        self._schemes[layer], self._layouts[layer] = scheme, layout

    def _info(self, layer: str) -> TensorInfo:
        """Return the original shape, checked against the stored tensors' shapes."""
        scheme, layout = self._schemes[layer], self._layouts[layer]
        stored = {
            suffix: self._files.tensors()[f"{layer}.{suffix}"]
            for suffix in ("weight", *ct.SUFFIXES)
            if f"{layer}.{suffix}" in self._files.tensors()
        }
        try:
            rows, columns = self._shape(layer, layout, stored)
            layout.check(stored, scheme, (rows, columns))
        except CheckpointError as error:
            raise CheckpointError(
                f"{self._folder}: {layer}: {error}; the checkpoint is damaged"
                f"{_old_packing(scheme)}"
            ) from error
        return TensorInfo((rows, columns), "float32")

    def _shape(
        self, layer: str, layout: ct.Layout, stored: Mapping[str, TensorInfo]
    ) -> tuple[int, int]:
        codes = stored[layout.codes].shape
        if len(codes) != 2:
            raise CheckpointError(f"{layout.codes} is {list(codes)}, not a matrix")
        columns = layout.columns(codes[1])
        if columns is not None:
            return codes[0], columns
        shape = stored.get("weight_shape")
        if shape is None or shape.elements != 2:
            raise CheckpointError("weight_shape is missing or does not hold two sizes")
        rows, width = (int(n) for n in self._files.read(f"{layer}.weight_shape"))
        return rows, width

    def _warn_of_static_inputs(self, groups: list[ConfigGroup]) -> None:
        arguments: list[Mapping[str, Any]] = [
            group.entry.get("input_activations") or {} for group in groups
        ]
        if any(entry.get("dynamic") is False for entry in arguments):
            _LOG.warning(
                "%s: its static input scales are not applied, inputs stay as they are",
                self._folder,
            )


def _dotted(suffixes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f".{suffix}" for suffix in suffixes)


def _old_packing(scheme: Scheme) -> str:
    if not scheme.is_integer or scheme.bits in (2, 4, 8):
        return ""
    return (
        f", or was written by compressed-tensors before 0.18, which packed "
        f"{scheme.bits} bits in another way: `compress doctor` mends that"
    )


def packed_scheme(folder: Path) -> dict[str, Scheme]:
    """Return the scheme of each coded layer of a checkpoint; reads no weights.

    Raises:
        CheckpointError: The folder is not a compressed-tensors checkpoint.
    """
    return dict(PackedSource(folder).schemes)
