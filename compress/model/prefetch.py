"""Reading tensors in threads before they are asked for."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from compress.core.artifact import TensorSource

_THREADS = 4


class ReadAhead:
    """A source whose tensors can be announced.

    Only a GPU gains: what it computes leaves the CPU free to read, and copies to it are
    fast from pinned memory, which the threads read into. For a CPU nothing is read
    before its time.

    Args:
        source: What is read, from several threads at once.
        device: Where tensors are wanted.
    """

    def __init__(self, source: TensorSource, device: torch.device) -> None:
        self._source, self._device = source, device
        self._coming: dict[str, Future[Tensor]] = {}
        self._pool = ThreadPoolExecutor(_THREADS) if device.type == "cuda" else None

    def expect(self, names: Iterable[str]) -> None:
        """Begin to read tensors that will be asked for soon."""
        if self._pool is not None:
            for name in names:
                if name not in self._coming:
                    self._coming[name] = self._pool.submit(self._pinned, name)

    def _pinned(self, name: str) -> Tensor:
        tensor = self._source.read(name)
        return tensor.pin_memory() if tensor.device.type == "cpu" else tensor

    def read(self, name: str) -> Tensor:
        """Return one tensor on the device, in its storage type."""
        if name in self._coming:
            return self._coming.pop(name).result().to(self._device, non_blocking=True)
        return self._source.read(name).to(self._device)
