"""Checksums of what is stored, so that damage is told from data.

CRC-32: quick, and made for what a failing disk or a torn write does. It keeps nobody
from changing a file on purpose.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor


def checksum(tensors: Mapping[str, Tensor]) -> int:
    """Return the CRC-32 of names, types, shapes and bytes of tensors on the CPU."""
    value = 0
    for name, tensor in sorted(tensors.items()):
        about = f"{name} {tensor.dtype} {tuple(tensor.shape)}\n"
        value = zlib.crc32(about.encode(), value)
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        value = zlib.crc32(data.numpy().data, value)
    return value


def sealed(text: str) -> str:
    """Return a text with its checksum before it."""
    return f"{zlib.crc32(text.encode()):08x} {text}"


def unsealed(text: str) -> str:
    """Return the text that :func:`sealed` was given.

    Raises:
        ValueError: It has changed since.
    """
    known, _, content = text.partition(" ")
    if known != f"{zlib.crc32(content.encode()):08x}":
        raise ValueError("its checksum is another one")
    return content
