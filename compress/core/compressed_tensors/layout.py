"""Layout: what a coded layer becomes in a compressed-tensors checkpoint.

A layer ``P`` is a few tensors ``P.SUFFIX``: its codes, its scales, and sometimes zero
points or a global scale. A layout describes them from a scheme and a shape alone, makes
them from a :class:`QuantizedTensor`, and reads them back. Writer, reader and size
estimate use the same description. Scales are stored alike in all layouts:

======================  ====================================  =======================
scales                  ``weight_scale``                      beside it
======================  ====================================  =======================
a float each            of the scale's type                   -
powers of two           uint8, ``e`` means ``2**(e - 127)``   -
two levels (NVFP4)      float8 E4M3                           ``weight_global_scale``
ratios in a row         of the scale's type, written out      -
======================  ====================================  =======================

Inputs in two levels add ``input_global_scale``, made from the largest input that
calibration saw. All other input scales are made at run time.

Source: compressed-tensors 0.20, ``compressors``; the tests compare with that library.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.core.artifact import TensorInfo
from compress.core.errors import CheckpointError, ExportError
from compress.core.scheme import WHOLE, Scales, Scheme
from compress.core.tensors import TORCH_DTYPES, QuantizedTensor

SCALE = "weight_scale"
GLOBAL_SCALE = "weight_global_scale"
INPUT_SCALE = "input_global_scale"
_NO_EXPONENT = 255  # E8M0's NaN
_LARGEST = 448.0 * 6.0  # of E4M3 times that of FP4


@dataclass(frozen=True)
class Layout(ABC):
    """How one kind of codes is stored.

    Attributes:
        format: Its name in ``config.json``.
    """

    format: str

    @property
    @abstractmethod
    def codes(self) -> str:
        """Suffix of the tensor that holds the codes."""

    @abstractmethod
    def code_tensors(
        self, scheme: Scheme, shape: tuple[int, int]
    ) -> dict[str, TensorInfo]:
        """Describe codes and zero points of a layer of ``shape`` (rows, columns)."""

    @abstractmethod
    def encode_codes(self, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """Return codes and zero points as stored."""

    @abstractmethod
    def decode_codes(
        self, stored: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]
    ) -> tuple[Tensor, Tensor | None]:
        """Return codes and zero points of a layer.

        Raises:
            CheckpointError: A code stands for no number.
        """

    @abstractmethod
    def columns(self, width: int) -> int | None:
        """Return the columns of a row stored in ``width`` elements; ``None``: open."""

    def tensors(self, scheme: Scheme, shape: tuple[int, int]) -> dict[str, TensorInfo]:
        """Describe everything a layer of ``shape`` (rows, columns) is stored as."""
        codes = self.code_tensors(scheme, shape)
        shaped = codes.pop("weight_shape", None)
        return {
            **codes,
            **_scale_tensors(scheme, shape),
            **_input_tensors(scheme),
            **({} if shaped is None else {"weight_shape": shaped}),
        }

    def encode(
        self, tensor: QuantizedTensor, *, input_amax: float | None = None
    ) -> dict[str, Tensor]:
        """Return the stored tensors of a layer; see :meth:`tensors`.

        Args:
            tensor: The codes.
            input_amax: Largest magnitude of the layer's inputs; needed if these have
                scales in two levels.

        Raises:
            ExportError: Scales that are written out do not fit their type, or the
                largest input is needed and not known.
        """
        stored = {**self.encode_codes(tensor), **_encode_scales(tensor)}
        if _input_tensors(tensor.scheme):
            stored[INPUT_SCALE] = _input_scale(tensor.scheme, input_amax)
        return {suffix: stored[suffix] for suffix in self.tensors(*_kind(tensor))}

    def decode(
        self, stored: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]
    ) -> QuantizedTensor:
        """Return the layer that :meth:`encode` stored.

        Args:
            stored: By suffix.
            scheme: What the config says about the layer.
            shape: Rows and columns of the matrix.

        Raises:
            CheckpointError: Tensors are missing, of another shape or type than the
                scheme asks for, or hold codes or scales that are no numbers.
        """
        infos = {
            suffix: TensorInfo(tuple(t.shape), str(t.dtype).removeprefix("torch."))
            for suffix, t in stored.items()
        }
        self.check(infos, scheme, shape)
        scale, outer = _decode_scales(stored, scheme)
        codes, zero = self.decode_codes(stored, scheme, shape)
        return QuantizedTensor(codes, scale, zero, scheme, outer=outer)

    def check(
        self,
        infos: Mapping[str, TensorInfo],
        scheme: Scheme,
        shape: tuple[int, int],
    ) -> None:
        """Raise unless the stored tensors are those of ``scheme``.

        Raises:
            CheckpointError: With the first that is not.
        """
        rows, columns = shape
        if rows < 1 or columns < 1 or columns % scheme.group_of(columns):
            raise CheckpointError(f"[{rows}, {columns}] cannot be {scheme.name}")
        for suffix, info in self.tensors(scheme, shape).items():
            found = infos.get(suffix)
            if found != info:
                text = "missing" if found is None else _spelled(found)
                raise CheckpointError(
                    f"{suffix} is {text}; {scheme.name} of [{rows}, {columns}] needs "
                    f"{_spelled(info)}"
                )


def _kind(tensor: QuantizedTensor) -> tuple[Scheme, tuple[int, int]]:
    return tensor.scheme, tensor.shape


def _spelled(info: TensorInfo) -> str:
    return f"{info.dtype} {list(info.shape)}"


def _scale_tensors(scheme: Scheme, shape: tuple[int, int]) -> dict[str, TensorInfo]:
    rows, columns = shape
    groups = columns // scheme.group_of(columns)
    size: tuple[int, ...] = (math.ceil(rows / scheme.rows_of_scale(rows)), groups)
    if scheme.row_block == WHOLE and groups == 1:
        size = (1,)
    if scheme.scales is Scales.POWER:
        return {SCALE: TensorInfo(size, "uint8")}
    if scheme.scales is Scales.TWO_LEVEL:
        return {
            SCALE: TensorInfo(size, "float8_e4m3fn"),
            GLOBAL_SCALE: TensorInfo((1,), "float32"),
        }
    return {SCALE: TensorInfo(size, scheme.scale_dtype)}


def _input_tensors(scheme: Scheme) -> dict[str, TensorInfo]:
    two_level = scheme.inputs is not None and scheme.inputs.two_level
    return {INPUT_SCALE: TensorInfo((1,), "float32")} if two_level else {}


def _input_scale(scheme: Scheme, amax: float | None) -> Tensor:
    """Return the multiplier that maps ``amax`` to the largest number of both levels."""
    if amax is None or not (math.isfinite(amax) and amax > 0):
        raise ExportError(
            f"{scheme.name} needs the largest input of each layer, which calibration "
            f"measures; it is {'not known' if amax is None else amax}; use nvfp4 to "
            "leave the inputs alone"
        )
    return torch.tensor([_LARGEST / amax], dtype=torch.float32)


def _encode_scales(tensor: QuantizedTensor) -> dict[str, Tensor]:
    scheme, scale = tensor.scheme, tensor.scale
    if scheme.scales is Scales.RATIO:
        wanted = tensor.scales()
        scale = wanted.to(TORCH_DTYPES[scheme.scale_dtype])
        if not torch.equal(scale.float(), wanted):
            raise ExportError(
                f"a scale of {wanted[wanted > 0].min().item():.3g} does not fit "
                f"{scheme.scale_dtype}; set quantize.scale_dtype: bfloat16"
            )
    elif scheme.row_block == WHOLE and scale.shape[1] == 1:
        scale = scale.reshape(1)
    stored = {SCALE: scale.contiguous()}
    if scheme.scales is Scales.TWO_LEVEL:
        assert tensor.outer is not None
        stored[GLOBAL_SCALE] = tensor.outer.reshape(1).float().contiguous()
    return stored


def _decode_scales(
    stored: Mapping[str, Tensor], scheme: Scheme
) -> tuple[Tensor, Tensor | None]:
    scale, outer = stored[SCALE], stored.get(GLOBAL_SCALE)
    if scheme.scales is not Scales.TWO_LEVEL:
        outer = None
    if scheme.scales is Scales.POWER:
        bad = scale == _NO_EXPONENT
    else:
        bad = ~torch.isfinite(scale.float())
    if bool(bad.any()):
        raise CheckpointError(f"{SCALE} holds {int(bad.sum())} values that are NaN")
    if outer is not None and not bool((torch.isfinite(outer) & (outer > 0)).all()):
        raise CheckpointError(f"{GLOBAL_SCALE} is {outer.item()}, not above zero")
    return scale if scale.dim() == 2 else scale.reshape(1, 1), outer
