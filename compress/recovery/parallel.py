"""Training on several devices: each process takes a share of every step's windows.

Started by torchrun, which sets the variables that torch.distributed reads. Every
process holds both models, or a share of their blocks (``sharding``); gradients are
averaged, so that all of them stay equal.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from compress.core.errors import ConfigError


@dataclass(frozen=True)
class Team:
    """The processes of a run.

    Attributes:
        rank: Number of this one; 0 writes files.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1

    def check_split(self, section: str) -> None:
        """Raise if there is nothing to split a model over.

        Raises:
            ConfigError: This process is the only one.
        """
        if self.size == 1:
            raise ConfigError(
                f"{section}.options.shard: one process would hold everything anyway; "
                "start with torchrun --nproc-per-node N -m compress run ..., or leave "
                "shard out"
            )

    def share(self, rows: Tensor) -> Tensor:
        """Return this process's part of the rows of a step."""
        return rows.chunk(self.size)[self.rank] if self.size > 1 else rows

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one type by their mean over all processes."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.size
        parts = torch.split(flat, [tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def add_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sum over all processes."""
        for tensor in tensors if self.size > 1 else ():
            dist.all_reduce(tensor)

    def average_gradients_(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace gradients by their mean over all processes."""
        self.average_([p.grad for p in parameters if p.grad is not None])

    def first(self, value: float, device: torch.device) -> float:
        """Return the first process's value, in all of them."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=device)
        dist.broadcast(tensor, 0)
        return float(tensor)

    def wait(self) -> None:
        """Return when all processes are here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def team(device: str) -> Iterator[tuple[Team, str]]:
    """Yield the processes of this run, and the device of this one.

    Without torchrun it is one process, on ``device``. With it, ``cuda`` becomes the GPU
    of the process's local number.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Team(), device
        return
    if device.startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    mine = not dist.is_initialized()
    if mine:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield Team(dist.get_rank(), dist.get_world_size()), device
    finally:
        if mine:
            dist.destroy_process_group()
