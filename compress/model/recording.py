"""What a model hands its blocks, recorded by running it with the blocks replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from compress.core.errors import CheckpointError
from compress.model.states import BlockCall


@contextmanager
def recorded(blocks: Any, calls: list[BlockCall]) -> Iterator[list[Tensor]]:
    """Replace the blocks' forward by recorders; yield the inputs of block 0."""
    first: list[Tensor] = []

    def recorder(index: int) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if args:
                raise CheckpointError("this architecture calls its blocks by position")
            if not calls[index]:
                calls[index].update(kwargs)
            if index == 0:
                first.append(hidden_states)
            return hidden_states

        return forward

    for index, block in enumerate(blocks):
        block.forward = recorder(index)
    try:
        yield first
    finally:
        for block in blocks:
            del block.forward


def moved(value: Any, device: torch.device) -> Any:
    """Copy a nest of tensors to ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(moved(item, device) for item in value)
    return value
