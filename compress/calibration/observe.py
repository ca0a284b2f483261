"""What static scales need to know: largest inputs of layers, keys and values of blocks.

One pass of the compressed model over calibration text, block by block, after all codes
are made. Keys and values of one block are in memory at a time, in float32.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.core.artifact import ModelDescription
from compress.core.errors import CalibrationError
from compress.kvcache.cache import Collected, ObservingCache, scale_names
from compress.kvcache.scales import ScaleRule
from compress.model.streaming import Rewrite, StreamedModel
from compress.progress import progress_bar

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Observed:
    """Figures of one calibration pass.

    Attributes:
        input_amax: Largest magnitude of the inputs of each layer that was asked for.
        kv_scales: Of keys and values of each block, by tensor name.
    """

    input_amax: dict[str, float]
    kv_scales: dict[str, Tensor]


def observe(
    build: Callable[..., StreamedModel],
    windows: Tensor,
    *,
    layers: Sequence[str] = (),
    rule: ScaleRule | None = None,
) -> Observed:
    """Run calibration text and return what it showed.

    Args:
        build: Returns the model; its keywords are ``rounding`` and ``new_cache`` of
            :class:`~compress.model.streaming.StreamedModel`.
        windows: int64 ``[N, T]`` tokens.
        layers: Full names of linears whose largest input is wanted.
        rule: How scales of the cache are chosen; ``None`` if none are wanted.

    Raises:
        CalibrationError: Inputs, keys or values are not finite, or no token reached any
            expert of a block whose largest input is wanted.
    """
    states, found, wanted = Collected(), Observed({}, {}), frozenset(layers)
    model = build(
        rounding={name: _spy(name, found.input_amax) for name in layers},
        new_cache=None if rule is None else lambda: ObservingCache(states.add),
    )
    activations = model.embed(windows)
    blocks = range(model.description.block_count)
    for index in progress_bar(blocks, desc="observe", unit="block", leave=False):
        with model.block(index):
            activations.hidden = model.run_block(index, activations)
        _fill_experts(model.description, index, wanted, found.input_amax)
        if rule is not None:
            seen, names = states.take(), scale_names(model.description, index)
            if model.description.has_attention(index):  # else stand-ins went by
                for name, tensor in zip(names, seen, strict=True):
                    found.kv_scales[name] = _finite(rule.scale_of(tensor), name)
    if model.description.family.head in layers:
        with model.head() as head:
            for hidden in activations.hidden:
                head(hidden)
    unseen = [name for name in layers if name not in found.input_amax]
    if unseen:
        raise CalibrationError(
            f"{unseen[0]} (and {len(unseen) - 1} more): no token of the calibration "
            "text reached this expert, nor another whose largest input is wanted, so "
            "the scale of its inputs is unknown; use more calibration text, or a "
            "scheme without static input scales"
        )
    return found


def _spy(name: str, table: dict[str, float]) -> Rewrite:
    """Return a function that notes the largest magnitude and changes nothing."""

    def handle(inputs: Tensor) -> Tensor:
        if not inputs.numel():  # an expert that no token of this call was sent to
            return inputs
        largest = _finite(inputs.abs().amax(), name)
        table[name] = max(table.get(name, 0.0), float(largest))
        return inputs

    return handle


def _fill_experts(
    model: ModelDescription,
    index: int,
    layers: frozenset[str],
    table: dict[str, float],
) -> None:
    """Give experts that no token reached the largest input of their siblings."""
    prefix = f"{model.family.block(index)}."
    seen: dict[str, float] = {}
    experts = [x for x in model.block_linears(index) if x.expert is not None]
    for linear in experts:
        amax = table.get(prefix + linear.path, 0.0)
        seen[linear.role] = max(seen.get(linear.role, 0.0), amax)
    for linear in experts:
        name = prefix + linear.path
        if name in layers and name not in table and seen[linear.role] > 0:
            _log.warning("%s: no token reached it; it takes its siblings' scale", name)
            table[name] = seen[linear.role]


def _finite(value: Tensor, name: str) -> Tensor:
    if not bool(torch.isfinite(value).all()):
        raise CalibrationError(
            f"{name}: what it is to scale is NaN or infinite; the checkpoint is "
            "damaged, or its activations do not fit the arithmetic"
        )
    return value
