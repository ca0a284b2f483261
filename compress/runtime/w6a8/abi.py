"""The compiled kernels as Python calls; mirrors ``csrc/w6a8.h``."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from compress.core.errors import KernelError
from compress.runtime.w6a8.build import architecture, build

ABI = 3
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
Kernel = Literal["few", "hopper", "portable"]
_NAMES: dict[Kernel, str] = {
    "few": "w6a8_linear_few",
    "hopper": "w6a8_linear_hopper",
    "portable": "w6a8_linear",
}
FUNCTIONS = (
    "w6a8_abi",
    "w6a8_error",
    "w6a8_probe",
    "w6a8_rows_of_block",
    "w6a8_quantize",
    *_NAMES.values(),
)


class ValuesArguments(ctypes.Structure):
    """``struct W6A8Values``."""

    _fields_ = [
        ("inputs", c_void_p),
        ("norm", c_void_p),
        ("epsilon", c_float),
        ("kind", c_int32),
        ("columns", c_int32),
        ("dtype", c_int32),
    ]


class QuantizeArguments(ctypes.Structure):
    """``struct W6A8Quantize``."""

    _fields_ = [
        ("values", ValuesArguments),
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("tickets", c_void_p),
        ("rows", c_int64),
        ("padded", c_int32),
        ("group", c_int32),
        ("ticket_count", c_int32),
        ("device", c_int32),
        ("overlaps", c_int32),
    ]


class LinearArguments(ctypes.Structure):
    """``struct W6A8Linear``."""

    _fields_ = [
        ("inputs", c_void_p),
        ("input_scales", c_void_p),
        ("tiles", c_void_p),
        ("weight_scales", c_void_p),
        ("bias", c_void_p),
        ("outputs", c_void_p),
        ("partial", c_void_p),
        ("tickets", c_void_p),
        ("sums", c_void_p),
        ("tokens", c_int64),
        ("rows", c_int32),
        ("down", c_int32),
        ("across", c_int32),
        ("run", c_int32),
        ("weight_groups", c_int32),
        ("weight_scale_shift", c_int32),
        ("input_groups", c_int32),
        ("input_scale_shift", c_int32),
        ("scale_dtype", c_int32),
        ("output_dtype", c_int32),
        ("token_tile", c_int32),
        ("splits", c_int32),
        ("panels", c_int32),
        ("at_once", c_int32),
        ("tiles_of_block", c_int32),
        ("depth", c_int32),
        ("overlaps", c_int32),
        ("device", c_int32),
    ]


class Kernels:
    """An opened library.

    Args:
        path: From :func:`compress.runtime.w6a8.build.build`.

    Raises:
        KernelError: It cannot be opened, or is of another version.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise KernelError(f"{path} cannot be opened: {error}") from error
        self._library.w6a8_error.restype = ctypes.c_char_p
        for name in FUNCTIONS[4:]:
            getattr(self._library, name).argtypes = [c_void_p, c_void_p]
        found = self._library.w6a8_abi()
        if found != ABI:
            raise KernelError(f"{path} has interface {found}, not {ABI}; delete it")

    def probe(self, device: int) -> None:
        """Raise unless the driver and the device take the kernels.

        Raises:
            KernelError: With the reason, such as a driver older than the compiler.
        """
        self._check("w6a8_probe", self._library.w6a8_probe(device))

    def quantize(self, arguments: QuantizeArguments, stream: int) -> None:
        """Start the quantization of inputs on a stream.

        Raises:
            KernelError: The device refused.
        """
        self._call("w6a8_quantize", arguments, stream)

    def linear(self, arguments: LinearArguments, stream: int, kernel: Kernel) -> None:
        """Start a linear layer on a stream.

        Args:
            arguments: Of the call.
            stream: As an address.
            kernel: Which.

        Raises:
            KernelError: The device refused.
        """
        self._call(_NAMES[kernel], arguments, stream)

    def _call(self, name: str, arguments: ctypes.Structure, stream: int) -> None:
        code = getattr(self._library, name)(ctypes.byref(arguments), stream)
        self._check(name, code)

    def _check(self, name: str, code: int) -> None:
        if code:
            text = self._library.w6a8_error(code).decode()
            raise KernelError(f"{name}: CUDA error {code}, {text}")


@cache
def kernels_of(device: int) -> Kernels | KernelError:
    """Return the kernels for a CUDA device, or why there are none.

    Args:
        device: Its index.
    """
    try:
        capability = torch.cuda.get_device_capability(device)
        kernels = Kernels(build(architecture(capability)))
        kernels.probe(device)
        return kernels
    except ImportError as error:
        return KernelError(f"kernels are compiled on Linux only: {error}")
    except KernelError as error:
        return error
