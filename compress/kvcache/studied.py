"""Forms of the cache that no flag of an engine selects, for comparison.

* ``kivi4``, ``kivi2``: keys in groups of 32 tokens of one channel, values in groups of
  32 channels of one token; ``s = (max - min) / (2^b - 1)`` and the minimum are float16,
  ``q = round((x - min) / s)``. The last tokens, which fill no group, stay exact.
* ``rot4``: a Hadamard rotation of each head, then ``q4_0``; as exact attention does not
  see a rotation of both queries and keys, the values are turned back here.

Sources: Liu et al. (2024), "KIVI", arXiv 2402.02750, section 3; Ashkboos et al. (2024),
"QuaRot", arXiv 2404.00456, section 4.2. Differs: no window of recent tokens stays exact
(KIVI keeps 128), so these are upper bounds of KIVI's loss; rotation is followed by
symmetric groups of 32. Limits: one pass over whole windows only. A group's scale is
made of all its tokens, also for queries inside of the group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.kvcache.blocks import BLOCK, fake_quantize_blocks
from compress.transforms.orthogonal import sylvester

_KIVI_BITS = {"kivi4": 4, "kivi2": 2}
_ROTATED = {"rot4": "q4_0"}


def fake_quantize_studied(states: Tensor, kind: str, *, is_keys: bool) -> Tensor:
    """Return float32 keys or values ``[..., T, size]`` as one of these forms has them.

    Args:
        states: Any float type; 32 divides ``size``.
        kind: ``kivi4``, ``kivi2`` or ``rot4``.
        is_keys: What they are.
    """
    if kind in _ROTATED:
        return fake_quantize_rotated(states, _ROTATED[kind])
    return fake_quantize_kivi(states, _KIVI_BITS[kind], is_keys=is_keys)


def fake_quantize_kivi(states: Tensor, bits: int, *, is_keys: bool) -> Tensor:
    """Return float32 keys or values ``[..., T, size]`` after a trip through groups.

    Args:
        states: Any float type; 32 divides ``size``.
        bits: Of a code.
        is_keys: Group tokens of a channel; otherwise channels of a token.
    """
    x = states.float()
    if not is_keys:
        return _grouped(x, bits)
    whole = x.shape[-2] // BLOCK * BLOCK
    old, recent = x[..., :whole, :], x[..., whole:, :]
    turned = _grouped(old.transpose(-1, -2), bits).transpose(-1, -2)
    return torch.cat([turned, recent], dim=-2)


def fake_quantize_rotated(states: Tensor, kind: str) -> Tensor:
    """Return float32 states ``[..., size]`` rounded in a rotated head.

    Args:
        states: Any float type; ``size`` is a power of two that 32 divides.
        kind: A type of blocks.
    """
    rotation = sylvester(states.shape[-1]).to(states.device, torch.float32)
    rounded = fake_quantize_blocks(states.float() @ rotation, kind)
    turned: Tensor = rounded @ rotation.T
    return turned


def _grouped(x: Tensor, bits: int) -> Tensor:
    groups = x.reshape(*x.shape[:-1], -1, BLOCK)
    low = groups.amin(-1, keepdim=True)
    scale = (groups.amax(-1, keepdim=True) - low) / (2**bits - 1)
    codes = torch.where(scale == 0, 0.0, (groups - low) / scale).round_()
    found: Tensor = (codes * scale.half().float() + low.half().float()).flatten(-2)
    return found
