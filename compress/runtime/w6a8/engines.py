"""Which code computes a call: compiled kernels, Triton's, or plain torch.

Compiled kernels come first. Without nvcc, or where it fails, kernels in Triton do the
same on the same tiles, since torch brings Triton along for CUDA on Linux. Each refusal
is logged once, with its reason; nothing becomes slow in silence.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING

import torch

from compress.core.errors import KernelError
from compress.runtime.w6a8.abi import DTYPES, Kernels, kernels_of

if TYPE_CHECKING:
    from compress.runtime.w6a8.triton_calls import TritonKernels

_LOG = logging.getLogger(__name__)


def engine_for(
    device: torch.device, dtype: torch.dtype
) -> Kernels | TritonKernels | None:
    """Return what computes with inputs; ``None`` is plain torch. Say why, once.

    Args:
        device: Of the inputs.
        dtype: Likewise.
    """
    compiled = available(device, dtype)
    if isinstance(compiled, Kernels):
        return compiled
    if not may_run(device, dtype):
        say_slow(str(compiled))
        return None
    found = triton_kernels(_index(device))
    if isinstance(found, KernelError):
        say_slow(f"{compiled}; in Triton: {found}")
        return None
    _say_triton(str(compiled))
    return found


def triton_engine(device: torch.device, dtype: torch.dtype) -> TritonKernels | None:
    """Return Triton's kernels, for what is not compiled; ``None`` is plain torch.

    Args:
        device: Of the inputs.
        dtype: Likewise.
    """
    if not may_run(device, dtype):
        return None
    found = triton_kernels(_index(device))
    if isinstance(found, KernelError):
        _say_decoded(str(found))
        return None
    return found


def available(device: torch.device, dtype: torch.dtype) -> Kernels | KernelError:
    """Return the compiled kernels for inputs, or why there are none.

    Args:
        device: Of the inputs.
        dtype: Likewise.
    """
    if device.type != "cuda":
        return KernelError(f"the model is on {device.type}, the kernels need CUDA")
    if torch.version.hip is not None:
        return KernelError("this is torch for ROCm, the kernels need CUDA")
    if dtype not in DTYPES:
        return KernelError(f"inputs are {dtype}, not float32, float16 or bfloat16")
    return kernels_of(_index(device))


def may_run(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device and a type are such as kernels take, compiled or not."""
    return device.type == "cuda" and torch.version.hip is None and dtype in DTYPES


@cache
def triton_kernels(device: int) -> TritonKernels | KernelError:
    """Return Triton's kernels for a CUDA device, tried out, or why there are none.

    Args:
        device: Its index.
    """
    if torch.cuda.get_device_capability(device) < (8, 0):
        return KernelError("compute capability 8.0 (Ampere) is the least")
    try:
        from compress.runtime.w6a8.triton_calls import TritonKernels
    except ImportError as error:
        return KernelError(f"Triton is not installed: {error}")
    try:
        found = TritonKernels()
        found.probe(torch.device("cuda", device))
    # Triton has errors of its own for a missing C compiler, of ptxas and of LLVM.
    except Exception as error:
        return KernelError(f"{type(error).__name__}: {error}")
    return found


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@cache
def say_slow(reason: str) -> None:
    """Warn once for each reason that layers are computed in plain torch."""
    _LOG.warning("W6A8 layers are computed in plain torch, which is slow: %s", reason)


@cache
def _say_decoded(reason: str) -> None:
    """Warn once for each reason that decoding has no kernel."""
    _LOG.warning(
        "W6A8 layers with exact inputs are decoded in plain torch: no Triton: %s",
        reason,
    )


@cache
def _say_triton(reason: str) -> None:
    _LOG.warning("W6A8 layers are computed by Triton, not by compiled code: %s", reason)
