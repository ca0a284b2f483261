"""llama.cpp's block types, quantized as its cache does and decoded again.

Runs of 32 values share a float16 scale, and ``_1`` types a float16 minimum. As in ggml:

* ``q8_0``: ``d = amax / 127``, ``q = round(x / d)``, ties away from zero;
* ``q4_0``, ``q5_0``: ``d = m / -8`` or ``m / -16`` with ``m`` the value of largest
  magnitude, sign included; ``q = floor(x / d + 8.5)`` or ``+ 16.5``, at most 15 or 31;
* ``q4_1``, ``q5_1``: ``d = (max - min) / 15`` or ``/ 31``,
  ``q = floor((x - min) / d + 0.5)``.

Codes come from the float32 scale, values from the one rounded to float16.

Source: ggml, ``quantize_row_q*_ref`` in ``ggml-quants.c``. Not simulated: kernels that
round the queries to 8 bits before the product with quantized keys, as those of CPUs do.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32
_SYMMETRIC = {"q4_0": 8, "q5_0": 16}
_WITH_MINIMUM = {"q4_1": 15, "q5_1": 31}


def fake_quantize_blocks(values: Tensor, kind: str) -> Tensor:
    """Return float32 values ``[..., n]`` after a trip through blocks of 32 along ``n``.

    Args:
        values: Any float type; 32 divides ``n``.
        kind: ``q8_0``, ``q5_1``, ``q5_0``, ``q4_1`` or ``q4_0``.
    """
    x = values.float().reshape(*values.shape[:-1], -1, BLOCK)
    if kind == "q8_0":
        result = _q8_0(x)
    elif kind in _SYMMETRIC:
        result = _signed(x, _SYMMETRIC[kind])
    else:
        result = _with_minimum(x, _WITH_MINIMUM[kind])
    return result.flatten(-2)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, 1 / scale)


def _half(scale: Tensor) -> Tensor:
    return scale.half().float()


def _q8_0(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 127
    scaled = x * _inverse(scale)
    codes = torch.floor(scaled.abs() + 0.5) * scaled.sign()  # C's roundf
    return codes * _half(scale)


def _signed(x: Tensor, half: int) -> Tensor:
    place = x.abs().argmax(-1, keepdim=True)
    scale = x.gather(-1, place) / -half
    codes = torch.floor(x * _inverse(scale) + (half + 0.5)).clamp(0, 2 * half - 1)
    return (codes - half) * _half(scale)


def _with_minimum(x: Tensor, most: int) -> Tensor:
    low = x.amin(-1, keepdim=True)
    scale = (x.amax(-1, keepdim=True) - low) / most
    codes = torch.floor((x - low) * _inverse(scale) + 0.5).clamp(0, most)
    return codes * _half(scale) + _half(low)
