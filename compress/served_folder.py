"""What the config of a folder asks a runtime to round besides the weights."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from compress.core.inputs import NVFP4_RANGE
from compress.evaluation.rounding import rounding_of
from compress.kvcache.cache import FakeQuantCache
from compress.kvcache.measure import rounded_cache
from compress.kvcache.names import CachePair
from compress.model.coded_source import CodedSource
from compress.model.loading import ModelHandle
from compress.model.streaming import Rewrite

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Served:
    """Keywords for a :class:`~compress.model.streaming.StreamedModel`.

    Attributes:
        rounding: What inputs of layers are replaced with.
        new_cache: Maker of the key-value cache; ``None`` leaves it exact.
        prompt: Virtual tokens ``[n, C]`` before every window.
    """

    rounding: dict[str, Rewrite] = field(default_factory=dict)
    new_cache: Callable[[], FakeQuantCache] | None = None
    prompt: Tensor | None = None

    @property
    def is_more_than_weights(self) -> bool:
        """Whether anything but weights is rounded."""
        return bool(self.rounding) or self.new_cache is not None


def served_as(handle: ModelHandle) -> Served:
    """Return what a checkpoint's config says; nothing where it is dense or GGUF."""
    source = handle.source
    if not isinstance(source, CodedSource):
        return Served()
    amax = {
        name: NVFP4_RANGE / multiplier
        for name in source.schemes
        if (multiplier := source.input_multiplier(name))
    }
    inputs = {name: scheme.inputs for name, scheme in source.schemes.items()}
    return Served(rounding_of(inputs, amax), _cache(handle, source))


def _cache(
    handle: ModelHandle, source: CodedSource
) -> Callable[[], FakeQuantCache] | None:
    scheme = source.cache_scheme
    if scheme is None:
        return None
    is_fp8 = (scheme.get("num_bits"), scheme.get("type")) == (8, "float")
    if not is_fp8 or scheme.get("dynamic") or not source.cache_scales:
        _log.warning(
            "the key-value cache is evaluated exact: only FP8 with stored scales is "
            "simulated, and the config says %s",
            dict(scheme),
        )
        return None
    scales = {name: source.read(name).float() for name in source.cache_scales}
    return rounded_cache(handle.description, CachePair.parse("fp8"), scales)
