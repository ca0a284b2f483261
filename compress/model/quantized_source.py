"""PackedSource: a ``pack-quantized`` checkpoint read as if it were dense.

Reading is independent of the compressed-tensors library and of transformers: codes are
unpacked and multiplied by their scales in float32, one tensor at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.core import pack_quantized
from compress.core.artifact import TensorInfo, TensorSource
from compress.core.errors import CheckpointError
from compress.core.scheme import Scheme
from compress.core.tensors import QuantizedTensor
from compress.model.sources import SafetensorsSource

_PACKED = ".weight_packed"


class PackedSource(TensorSource):
    """Tensors of a checkpoint whose linears are ``pack-quantized``.

    A coded layer appears as one float32 tensor ``NAME.weight`` of its original shape,
    so that no rounding is added to what the codes say; others appear as stored.
    """

    def __init__(self, folder: Path) -> None:
        """Read config and headers, and the original shapes; no weights.

        Raises:
            CheckpointError: The folder is damaged or quantized in another way.
        """
        groups = _config_groups(folder)
        self._folder = folder
        self._files = SafetensorsSource(folder)
        stored = self._files.tensors()
        self._schemes: dict[str, Scheme] = {}
        self._tensors: dict[str, TensorInfo] = {}
        for name, info in stored.items():
            layer = name.removesuffix(_PACKED)
            if layer != name:
                scheme = self._scheme(layer, groups)
                self._schemes[layer] = scheme
                self._tensors[f"{layer}.weight"] = self._info(layer, scheme)
            elif not name.endswith(tuple(f".{s}" for s in pack_quantized.SUFFIXES)):
                self._tensors[name] = info

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
            return self.codes(layer).dequantize()
        if name not in self._tensors:
            raise CheckpointError(f"{self._folder}: tensor {name} is missing")
        return self._files.read(name)

    def codes(self, layer: str) -> QuantizedTensor:
        """Return codes, scales and zero points of a layer, exactly as stored.

        Raises:
            CheckpointError: The layer has no codes, or they are damaged.
        """
        if layer not in self._schemes:
            raise CheckpointError(f"{self._folder}: {layer} has no codes")
        stored = {
            suffix: self._files.read(f"{layer}.{suffix}")
            for suffix in pack_quantized.SUFFIXES
            if f"{layer}.{suffix}" in self._files.tensors()
        }
        try:
            return pack_quantized.decode(stored, self._schemes[layer])
        except CheckpointError as error:
            raise CheckpointError(f"{self._folder}: {layer}: {error}") from error

    def _scheme(self, layer: str, groups: list[dict[str, Any]]) -> Scheme:
        arguments = _arguments_of(layer, groups)
        scales = self._files.tensors().get(f"{layer}.weight_scale")
        try:
            if arguments is None:
                raise CheckpointError("no config group of config.json targets it")
            if scales is None:
                raise CheckpointError("weight_scale is missing")
            return pack_quantized.scheme_of_arguments(arguments, scales.dtype)
        except CheckpointError as error:
            raise CheckpointError(f"{self._folder}: {layer}: {error}") from error

    def _info(self, layer: str, scheme: Scheme) -> TensorInfo:
        """Return the original shape, checked against the stored tensors' shapes."""
        sizes = [int(n) for n in self._files.read(f"{layer}.weight_shape").flatten()]
        stored = self._files.tensors()
        found = stored[f"{layer}{_PACKED}"].shape
        if len(sizes) == 2 and not sizes[1] % scheme.group_of(sizes[1]):
            expected = pack_quantized.stored_tensors(scheme, (sizes[0], sizes[1]))
            if all(
                f"{layer}.{suffix}" in stored
                and stored[f"{layer}.{suffix}"].shape == info.shape
                for suffix, info in expected.items()
            ):
                return TensorInfo((sizes[0], sizes[1]), "float32")
        raise CheckpointError(
            f"{self._folder}: {layer}: weight_shape {sizes} and the stored shapes "
            f"(codes {found}) are not {scheme.name}; the checkpoint is damaged"
        )


def packed_scheme(folder: Path) -> dict[str, Scheme]:
    """Return the scheme of each coded layer of a checkpoint; reads no weights.

    Raises:
        CheckpointError: The folder is not ``pack-quantized``.
    """
    return dict(PackedSource(folder).schemes)


def quantization_of(folder: Path) -> dict[str, Any] | None:
    """Return the ``quantization_config`` of a folder's config, if it has one.

    Raises:
        CheckpointError: There is no readable ``config.json``.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot read: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: not a model config")
    quantization = config.get("quantization_config")
    return dict(quantization) if quantization else None


def _config_groups(folder: Path) -> list[dict[str, Any]]:
    """Return the config groups, after checking that we can read the format."""
    quantization = quantization_of(folder)
    supported = (
        "only compressed-tensors pack-quantized without activation scales is read"
    )
    if quantization is None:
        raise CheckpointError(f"{folder}: config.json has no quantization_config")
    method, kind = quantization.get("quant_method"), quantization.get("format")
    if method != pack_quantized.QUANT_METHOD:
        raise CheckpointError(f"{folder}: quant_method {method!r}; {supported}")
    groups = list(quantization.get("config_groups", {}).values())
    for group in groups:
        if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
            raise CheckpointError(f"{folder}: preset config groups; {supported}")
        kind = group.get("format") or quantization.get("format")
        if kind != pack_quantized.FORMAT:
            raise CheckpointError(f"{folder}: format {kind!r}; {supported}")
        if group.get("input_activations") or group.get("output_activations"):
            raise CheckpointError(f"{folder}: quantized activations; {supported}")
    if not groups:
        raise CheckpointError(f"{folder}: format {kind!r}, no groups; {supported}")
    return groups


def _arguments_of(layer: str, groups: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the ``weights`` entry for a layer: exact names first, as the library."""
    exact = [g for g in groups if layer in g.get("targets", [])]
    patterns = [g for g in groups if _matches(layer, g.get("targets", []))]
    classes = [g for g in groups if "Linear" in g.get("targets", [])]
    for group in (*exact, *patterns, *classes):
        return dict(group["weights"])
    return None


def _matches(layer: str, targets: list[str]) -> bool:
    return any(t.startswith("re:") and re.match(t[3:], layer) for t in targets)
