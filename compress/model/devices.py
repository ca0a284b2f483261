"""Where a model runs, and in which arithmetic."""

from __future__ import annotations

import torch

from compress.core.errors import ConfigError
from compress.core.scales import TORCH_DTYPES


def choose_device(wanted: str) -> str:
    """Return the device for ``auto``, or ``wanted`` if it is there.

    Raises:
        ConfigError: There is no CUDA device.
    """
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"run.device: {wanted} is not available; use cpu or auto")
    return wanted


def choose_dtype(wanted: str, stored: str, device: str) -> torch.dtype:
    """Return the arithmetic of calibration.

    Args:
        wanted: ``float32``, ``bfloat16``, or ``auto``: bfloat16 where the checkpoint
            has no more than 16 bits and the device multiplies them in hardware.
        stored: Storage type of the checkpoint.
        device: As :func:`choose_device` returned it.
    """
    if wanted != "auto":
        return TORCH_DTYPES[wanted]
    halves = stored in ("float16", "bfloat16") and _multiplies_bfloat16(device)
    return torch.bfloat16 if halves else torch.float32


def numbers_at_once(device: str) -> int:
    """Return how many numbers of distributions ``[n, V]`` one pass should go over.

    On a CPU as many as its cache holds of a few such tensors, since memory that is
    taken anew for each costs more than the arithmetic; elsewhere as many as keep it
    busy.

    Args:
        device: Its type.
    """
    return 1 << 20 if device == "cpu" else 1 << 25


def _multiplies_bfloat16(device: str) -> bool:
    """Whether a device has fast bfloat16 products; on a CPU, whether it has AMX.

    AVX-512 has them too, but without AMX they ran at 0.65 of float32's speed.
    """
    if device.startswith("cuda"):
        major, _ = torch.cuda.get_device_capability(device)
        return major >= 8
    if device != "cpu":
        return False
    if hasattr(torch.cpu, "get_capabilities"):  # torch 2.12
        return bool(torch.cpu.get_capabilities().get("amx_bf16", False))
    return bool(torch.cpu._is_amx_tile_supported())
