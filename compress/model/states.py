"""Hidden states of all windows between two blocks, and their way to the device.

On a GPU they lie in pinned memory of the host, unless they are few, and come and go
batch by batch on a stream of their own, while the block before or after is computed.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.model.spill import Room

BlockCall = dict[str, Any]
"""Keyword arguments of a block besides the hidden states; tensors have batch size 1."""

# Temporary tensors of a block that one batch may make, by kind of device. A CPU has
# no entry: there all windows are one batch, since a second pass costs more than memory.
_BATCH_BYTES = {"cuda": 1 << 30, "mps": 1 << 30}
# States of up to this size stay on the device.
HELD_BYTES = 1 << 29


@dataclass
class Activations:
    """Hidden states between two blocks, and what the next blocks must be called with.

    Attributes:
        hidden: ``[N, T, C]`` in the type of the model's arithmetic.
        calls: For each block, its other arguments; the same for all windows.
        pages: Of the file that ``hidden`` lies in, if it does.
    """

    hidden: Tensor
    calls: list[BlockCall]
    pages: mmap.mmap | None = None


def allocate(
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    room: Room | None = None,
) -> tuple[Tensor, mmap.mmap | None]:
    """Return a tensor for states that a device will work on, and pages of its file.

    Args:
        shape: ``N, T, C``.
        dtype: Of the states.
        device: Where blocks run.
        room: If the states shall lie in a file.
    """
    if room is not None:
        return room.empty(shape, dtype)
    size = torch.Size(shape).numel() * dtype.itemsize
    if device.type == "cpu" or size <= HELD_BYTES:
        return torch.empty(*shape, dtype=dtype, device=device), None
    return torch.empty(*shape, dtype=dtype, pin_memory=device.type == "cuda"), None


def batches(
    hidden: Tensor, config: Mapping[str, Any], device: str, room: Room | None = None
) -> list[slice]:
    """Return which windows go through a block together.

    Args:
        hidden: ``[N, T, C]``.
        config: Of the model, for the width of its MLP.
        device: Kind of device.
        room: Of the host, if it is short.
    """
    count, length, width = hidden.shape
    if device not in _BATCH_BYTES:
        size = count if room is None else room.windows
        return [slice(i, min(i + size, count)) for i in range(0, count, size)]
    inner = int(config.get("intermediate_size") or 4 * width)
    scores = 0
    if config.get("attn_logit_softcapping"):  # of all pairs, in float32
        scores = 2 * 4 * length * int(config["num_attention_heads"])
    most = batch_tokens(
        width, inner, hidden.dtype.itemsize, length, device=device, scores=scores
    )
    size = most // length
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]


def batch_tokens(
    hidden: int,
    inner: int,
    width: int,
    length: int,
    *,
    device: str = "cuda",
    scores: int = 0,
) -> int:
    """Return how many tokens of whole windows go through a block together on a GPU.

    The number of windows is a power of two: processes that share a calibration then cut
    their parts alike, and sums come out the same to the last bit.

    Args:
        hidden: Width of the states.
        inner: Of the MLP.
        width: Bytes of a value.
        length: Tokens of a window.
        device: Kind of device.
        scores: Bytes that attention takes for a token.
    """
    token = (12 * hidden + 4 * inner) * width + scores
    size = max(1, _BATCH_BYTES[device] // (token * length))
    return length * (1 << size.bit_length() - 1)


class Mover:
    """Takes states to a device and back.

    Args:
        device: Where blocks run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def feed(
        self, rows: Sequence[slice], *states: Tensor
    ) -> Iterator[tuple[Tensor, ...]]:
        """Yield rows of each of ``states`` on the device, one batch ahead."""
        ready: list[tuple[tuple[Tensor, ...], Any]] = []
        for part in rows:
            ready.append(self._fetch(part, states))
            if len(ready) > 1:
                yield self._taken(*ready.pop(0))
        while ready:
            yield self._taken(*ready.pop(0))

    def _fetch(
        self, part: slice, states: Sequence[Tensor]
    ) -> tuple[tuple[Tensor, ...], Any]:
        if self._stream is None:
            return tuple(s[part].to(self._device) for s in states), None
        with torch.cuda.stream(self._stream):
            copies = tuple(s[part].to(self._device, non_blocking=True) for s in states)
            event = self._stream.record_event()
        return copies, event

    def _taken(self, copies: tuple[Tensor, ...], event: Any) -> tuple[Tensor, ...]:
        if event is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(event)
            for copy in copies:
                copy.record_stream(stream)
        return copies

    def store(self, states: Tensor, part: slice, values: Tensor) -> None:
        """Replace rows of ``states``; on a GPU, at some time before they are fed."""
        if self._stream is None:
            states[part] = values
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            states[part].copy_(values, non_blocking=True)
        values.record_stream(self._stream)

    def wait(self) -> None:
        """Return when all that was stored has arrived."""
        if self._stream is not None:
            self._stream.synchronize()
