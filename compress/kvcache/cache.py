"""Caches of transformers that round what passes through them, or keep it to measure.

Keys arrive after their rotary embedding. ``update`` returns rounded keys and values of
*all* tokens, those of the call itself included: a prefill that attends to exact keys,
as that of transformers' ``QuantizedCache`` does, shows no loss at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from compress.core.artifact import ModelDescription
from compress.core.errors import ConfigError
from compress.core.families import interleaves_rotary
from compress.kvcache.blocks import BLOCK, fake_quantize_blocks
from compress.kvcache.names import EXACT, FP8, STUDY, CachePair, CacheType
from compress.kvcache.scales import fake_quantize_fp8
from compress.kvcache.studied import fake_quantize_studied

Rounding = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""From keys and values ``[B, heads, T, size]`` of a block to those that are stored."""


def scale_names(model: ModelDescription, block: int) -> tuple[str, str]:
    """Return the names of the tensors that hold the scales of keys and of values."""
    attention = f"{model.family.block(block)}.self_attn"
    return f"{attention}.k_scale", f"{attention}.v_scale"


@dataclass(frozen=True)
class CacheRounding:
    """Rounds keys and values as an engine stores them.

    Attributes:
        model: Whose cache it is.
        pair: Storage types.
        scales: Static scales by tensor name, for FP8.
    """

    model: ModelDescription
    pair: CachePair
    scales: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that the types fit the model.

        Raises:
            ConfigError: Blocks do not tile a head, or FP8 scales are missing.
        """
        size = head_size(self.model)
        if size % BLOCK and any(t.group for t in (self.pair.keys, self.pair.values)):
            raise ConfigError(
                f"cache type {self.pair.name}: heads of {size} values do not split "
                f"into blocks of {BLOCK}; use {EXACT} or {FP8}"
            )
        rotated = "rot4" in (self.pair.keys.name, self.pair.values.name)
        if rotated and size & (size - 1):
            raise ConfigError(
                f"cache type rot4: heads of {size} values are no power of two, which "
                "the rotation needs; leave it out"
            )
        if self.pair.uses_fp8 and not self.scales:
            raise ConfigError(f"cache type {FP8} needs the scales of kv_cache.scheme")

    def __call__(
        self, keys: Tensor, values: Tensor, block: int
    ) -> tuple[Tensor, Tensor]:
        """Return rounded keys and values of a block, in their types."""
        if not self.model.has_attention(block):
            return keys, values  # nothing reads them
        k_scale, v_scale = scale_names(self.model, block)
        # llama.cpp pairs neighbours where transformers rotates halves: its blocks of
        # keys hold other channels than runs of 32 here would.
        turned = interleaves_rotary(self.model.gguf_architecture)
        paired = turned and self.pair.keys.runtime == "llama.cpp"
        rounded = self._round(
            _paired(keys) if paired else keys, self.pair.keys, k_scale
        )
        return (
            (_halved(rounded) if paired else rounded).to(keys.dtype),
            self._round(values, self.pair.values, v_scale, is_keys=False).to(
                values.dtype
            ),
        )

    def _round(
        self, states: Tensor, kind: CacheType, scale: str, *, is_keys: bool = True
    ) -> Tensor:
        if kind.name == EXACT:
            return states
        if kind.name == FP8:
            return fake_quantize_fp8(states, self.scales[scale])
        if kind.runtime == STUDY:
            return fake_quantize_studied(states, kind.name, is_keys=is_keys)
        return fake_quantize_blocks(states, kind.name)


def head_size(model: ModelDescription) -> int:
    """Return the width of an attention head."""
    config = model.config
    width = int(config["hidden_size"]) // int(config["num_attention_heads"])
    return int(config.get("head_dim") or width)


def head_count(model: ModelDescription) -> int:
    """Return the number of key-value heads."""
    config = model.config
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


def _paired(keys: Tensor) -> Tensor:
    """Reorder the channels of heads from halves to neighbouring pairs."""
    size = keys.shape[-1]
    return keys.reshape(*keys.shape[:-1], 2, size // 2).transpose(-1, -2).flatten(-2)


def _halved(keys: Tensor) -> Tensor:
    """Undo :func:`_paired`."""
    size = keys.shape[-1]
    return keys.reshape(*keys.shape[:-1], size // 2, 2).transpose(-1, -2).flatten(-2)


class FakeQuantCache(DynamicCache):  # type: ignore[misc]
    """A cache that stores rounded keys and values, also for ``generate``."""

    def __init__(self, rounding: Rounding) -> None:
        super().__init__()
        self._rounding = rounding

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *rest: Any,
        **more: Any,
    ) -> tuple[Tensor, Tensor]:
        """Round and store new states; return those of all tokens so far."""
        keys, values = self._rounding(key_states, value_states, layer_idx)
        stored: tuple[Tensor, Tensor] = super().update(
            keys, values, layer_idx, *rest, **more
        )
        return stored


class ObservingCache(DynamicCache):  # type: ignore[misc]
    """A cache that hands exact keys and values to a function."""

    def __init__(self, observe: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self._observe = observe

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *rest: Any,
        **more: Any,
    ) -> tuple[Tensor, Tensor]:
        """Show and store new states; return those of all tokens so far."""
        self._observe(key_states, value_states)
        stored: tuple[Tensor, Tensor] = super().update(
            key_states, value_states, layer_idx, *rest, **more
        )
        return stored


class Collected:
    """Keys and values of one block over all calls, on the CPU."""

    def __init__(self) -> None:
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def add(self, keys: Tensor, values: Tensor) -> None:
        """Keep the states of one call."""
        self._keys.append(keys.detach().float().cpu())
        self._values.append(values.detach().float().cpu())

    def take(self) -> tuple[Tensor, Tensor]:
        """Return keys and values ``[N, heads, T, size]``, and forget them."""
        states = torch.cat(self._keys), torch.cat(self._values)
        self._keys, self._values = [], []
        return states
