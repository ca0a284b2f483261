"""Names of cache types and of pairs of them; no torch, so that a config can ask."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from compress.core.errors import ConfigError


@dataclass(frozen=True)
class CacheType:
    """A storage type of keys or values.

    Attributes:
        name: As the engines spell it.
        bits: Stored for each value, scales included.
        runtime: The engine whose rules are simulated.
        group: Values along the head dimension that share a scale; 0 means that the
            scale is static.
    """

    name: str
    bits: float
    runtime: str
    group: int = 32


EXACT = "f16"
FP8 = "fp8"
STUDY = "none"
"""Runtime of types that no engine has under a flag; measured for comparison."""
CACHE_TYPES = {
    kind.name: kind
    for kind in (
        CacheType(EXACT, 16.0, "any", 0),
        CacheType(FP8, 8.0, "vllm", 0),
        CacheType("q8_0", 8.5, "llama.cpp"),
        CacheType("q5_1", 6.0, "llama.cpp"),
        CacheType("q5_0", 5.5, "llama.cpp"),
        CacheType("q4_1", 5.0, "llama.cpp"),
        CacheType("q4_0", 4.5, "llama.cpp"),
        CacheType("kivi4", 5.0, STUDY),
        CacheType("kivi2", 3.0, STUDY),
        CacheType("rot4", 4.5, STUDY),
    )
}

DEFAULT_PAIRS = (
    "q8_0",
    "q8_0/q5_1",
    "q8_0/q4_0",
    "q5_1",
    "q4_1",
    "q4_0",
    "q4_0/f16",
    "f16/q4_0",
)
"""What a report measures: both alike, values smaller than keys, and each alone."""


@dataclass(frozen=True)
class CachePair:
    """What keys and what values are stored as."""

    keys: CacheType
    values: CacheType

    @classmethod
    def parse(cls, name: str) -> CachePair:
        """Return the pair of ``TYPE`` or ``KEYS/VALUES``, such as ``q8_0/q4_0``.

        Raises:
            ConfigError: A type is unknown.
        """
        keys, slash, values = name.partition("/")
        return cls(_type(keys), _type(values if slash else keys))

    @property
    def name(self) -> str:
        """``KEYS/VALUES``."""
        return f"{self.keys.name}/{self.values.name}"

    @property
    def bits(self) -> float:
        """Mean bits of a cached value."""
        return (self.keys.bits + self.values.bits) / 2

    @property
    def uses_fp8(self) -> bool:
        """Whether keys or values need static scales."""
        return FP8 in (self.keys.name, self.values.name)

    @property
    def runtime(self) -> str:
        """The engine that has both types: its name, ``any``, or :data:`STUDY`."""
        named = {t.runtime for t in (self.keys, self.values)} - {"any"}
        if not named:
            return "any"
        return named.pop() if len(named) == 1 else STUDY

    @property
    def is_for_llamacpp(self) -> bool:
        """Whether llama.cpp has both types."""
        return self.runtime in ("llama.cpp", "any")


STUDIED_PAIRS = (*DEFAULT_PAIRS, "kivi4", "rot4", "kivi2")
"""What ``compress kv`` measures: forms beside them that no flag selects."""


def bytes_a_token(pair: CachePair, *, blocks: int, heads: int, size: int) -> float:
    """Return the bytes that one token takes in the cache of all blocks.

    Args:
        pair: Storage types.
        blocks: Decoder blocks.
        heads: Key-value heads.
        size: Of a head.
    """
    return blocks * heads * size * (pair.keys.bits + pair.values.bits) / 8


def _type(name: str) -> CacheType:
    if name not in CACHE_TYPES:
        near = difflib.get_close_matches(name, CACHE_TYPES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"unknown cache type {name!r}{hint} Types are {', '.join(CACHE_TYPES)}, or "
            "two of them as KEYS/VALUES"
        )
    return CACHE_TYPES[name]
