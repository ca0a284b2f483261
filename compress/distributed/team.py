"""The processes of one run, started by torchrun, and all that passes between them.

Every process runs the same program on its share of the windows and of the layers; a
:class:`Team` is where they meet. Without torchrun it has one member and each of its
methods is that member's own answer, so that nobody asks how many there are.

Sums of tensors go through the device's own library (NCCL on a GPU, gloo on a CPU),
plain data through gloo. Work that cannot be shared is done by the first process
:meth:`~Team.alone`; in there nothing may be exchanged, since the others wait.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from compress.core.errors import CompressError, ConfigError
from compress.distributed.watch import ProcessError, Watch, relayed

T = TypeVar("T")

# The first process may write files for hours while the others wait. That all of them
# live is the watch's business, not a time limit's.
_PATIENCE = timedelta(days=14)


class Team:
    """The processes of a run.

    Args:
        rank: Number of this one; 0 writes files.
        size: How many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self._alone = False

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and speaks to the user."""
        return self.rank == 0

    @property
    def _is_one(self) -> bool:
        """Whether there is nobody to exchange anything with."""
        assert not self._alone, "the other processes wait and would not answer"
        return self.size == 1

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

    def check_windows(self, count: int) -> None:
        """Raise if a process would have no calibration window to run.

        Raises:
            ConfigError: There are fewer windows than processes.
        """

        def check() -> None:
            if count < self.size:
                raise ConfigError(
                    f"calibration.samples: {count} windows cannot be shared by "
                    f"{self.size} processes; give more samples, or start fewer"
                )

        self.alone(check)

    def share(self, rows: Tensor) -> Tensor:
        """Return this process's part of the rows of a tensor, equal within one."""
        return rows.tensor_split(self.size)[self.rank]

    def mine(self, items: Sequence[T]) -> Sequence[T]:
        """Return every ``size``-th item, from this process's number on."""
        return items[self.rank :: self.size]

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one type by their mean over all processes."""
        if self._is_one:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.size
        parts = torch.split(flat, [tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def add_(self, tensors: Sequence[Tensor], *, owner: int | None = None) -> None:
        """Replace contiguous tensors by their sum over all processes.

        Args:
            tensors: Of the same shapes everywhere.
            owner: The only process whose tensors become the sums; those of the others
                are of no use afterwards. By default all get them.
        """
        for tensor in () if self._is_one else tensors:
            if owner is None:
                dist.all_reduce(tensor)
            else:
                dist.reduce(tensor, owner)

    def largest_(self, tensor: Tensor) -> None:
        """Replace each element by its largest value in all processes."""
        if not self._is_one:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)

    def average_gradients_(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace gradients by their mean over all processes."""
        self.average_([p.grad for p in parameters if p.grad is not None])

    def tell(self, value: T) -> T:
        """Return the first process's value, in all of them; plain data."""
        if self._is_one:
            return value
        told = [value]
        dist.broadcast_object_list(told, 0)
        return told[0]

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, in order; plain data or CPU tensors."""
        if self._is_one:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def exchange(
        self, tensors: Mapping[str, Tensor], about: T, device: torch.device | str
    ) -> list[tuple[dict[str, Tensor], T]]:
        """Return the tensors of each process, bit by bit, and what it says of them.

        Args:
            tensors: Of this one; names, shapes and types may differ between processes.
            about: Plain data.
            device: Where all of the tensors come to lie.
        """
        if self._is_one:
            return [(dict(tensors), about)]
        own = {k: v.to(device).contiguous() for k, v in tensors.items()}
        shapes = {k: (tuple(v.shape), v.dtype) for k, v in own.items()}
        found = []
        for rank, (given, said) in enumerate(self.gather((shapes, about))):
            if rank == self.rank:
                flat = _bytes_of(own, device)
            else:
                size = sum(_size(shape, dtype) for shape, dtype in given.values())
                flat = torch.empty(size, dtype=torch.uint8, device=device)
            if len(flat):
                dist.broadcast(flat, rank)
            received = own if rank == self.rank else _unpacked(flat, given)
            found.append((received, said))
        return found

    def rows_at_first(self, rows: Tensor) -> Tensor | None:
        """Return the rows that :meth:`share` gave out, on the CPU of the first process.

        The others get ``None``.
        """
        if self._is_one:
            return rows
        found: list[Any] | None = [None] * self.size if self.is_first else None
        dist.gather_object(rows.cpu(), found)
        return None if found is None else torch.cat(found)

    def alone(self, work: Callable[[], T]) -> T:
        """Return what the first process finds, in all of them; plain data.

        Raises:
            CompressError: ``work`` raised it; the same everywhere.
        """
        if self._is_one:
            return work()
        found: T | None = None
        error: CompressError | None = None
        if self.is_first:
            try:
                with self._apart():
                    found = work()
            except CompressError as raised:
                error = raised
        said = None if error is None else (str(error), error.exit_code)
        failure, found = self.tell((said, found))
        if error is not None:
            raise error
        if failure is not None:
            raise relayed(*failure)
        return found  # type: ignore[return-value]

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """Let nobody exchange anything for a while.

        Libraries that find a process group take it that all processes call them
        (compressed-tensors 0.15 shares decompression out, for one).
        """
        group, dist.GroupMember.WORLD = dist.GroupMember.WORLD, None
        self._alone = True
        try:
            yield
        finally:
            self._alone = False
            dist.GroupMember.WORLD = group

    def ahead(self, work: Callable[[], T]) -> T:
        """Let the first process work, and then the others; each gets its own result.

        For work that leaves files which the others can use, and whose errors need not
        be said twice.
        """
        if self._is_one:
            return work()
        found: list[T] = []
        self.alone(lambda: found.append(work()))
        return found[0] if found else work()

    def led(
        self,
        work: Callable[[Callable[..., float]], T],
        part: Callable[..., float],
    ) -> T:
        """Return what the first process finds with a function that all carry out.

        Args:
            work: Done by the first process; is handed ``part``.
            part: Called in all processes with the same arguments (plain data) whenever
                ``work`` calls it; returns the same everywhere.
        """
        if self._is_one:
            return work(part)

        def call(*arguments: Any) -> float:
            self.tell(arguments)
            return part(*arguments)

        if not self.is_first:
            while (arguments := self.tell(None)) is not None:
                part(*arguments)
            return self.tell(None)  # type: ignore[return-value]
        found = work(call)
        self.tell(None)
        return self.tell(found)

    def wait(self) -> None:
        """Return when all processes are here."""
        if not self._is_one:
            dist.all_reduce(torch.zeros(1))


def _size(shape: Sequence[int], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _bytes_of(tensors: Mapping[str, Tensor], device: torch.device | str) -> Tensor:
    """Return the bytes of all tensors, one after another."""
    parts = [tensor.reshape(-1).view(torch.uint8) for tensor in tensors.values()]
    return torch.cat([torch.empty(0, dtype=torch.uint8, device=device), *parts])


def _unpacked(
    flat: Tensor, shapes: Mapping[str, tuple[Sequence[int], torch.dtype]]
) -> dict[str, Tensor]:
    found, start = {}, 0
    for name, (shape, dtype) in shapes.items():
        stop = start + _size(shape, dtype)
        # A copy of its own, since a view has to begin at a multiple of its type's size.
        found[name] = flat[start:stop].clone().view(dtype).view(*shape)
        start = stop
    return found


@contextmanager
def team(device: str) -> Iterator[tuple[Team, str]]:
    """Yield the processes of this run, and the device of this one.

    Without torchrun it is one process, on ``device``. With it, ``cuda`` becomes the GPU
    of the process's local number. An error of one process ends all of them, with its
    message, at their next exchange or soon after.

    Raises:
        ConfigError: This process has no GPU.
        ProcessError: Another process failed, or ended without a word.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Team(), device
        return
    if dist.is_initialized():
        yield Team(dist.get_rank(), dist.get_world_size()), own_device(device)
        return
    store, rank, size = _met()
    # A process may take part in several runs, one after another; each has its own keys.
    name = f"compress-{(store.add('compress', 1) - 1) // size}"
    with Watch(name, rank, size) as watch, _group_left(), watch.explained():
        device = own_device(device)
        backend = "gloo"
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(
            backend,
            store=PrefixStore(name, store),
            rank=rank,
            world_size=size,
            timeout=_PATIENCE,
        )
        members = Team(rank, size)
        yield members, device
        members.wait()


@contextmanager
def _group_left() -> Iterator[None]:
    """Leave the process group at the end, also at an error.

    One that is still there when the interpreter ends may abort it (gloo's threads then
    have nobody who waits for them), and an exit code is lost.
    """
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@cache
def _met() -> tuple[Any, int, int]:
    """Return torchrun's store, and number and count of the processes.

    The store lives as long as the process: a second run must not meet in the store of
    the first while that one is taken down.
    """
    store, rank, size = next(rendezvous("env://"))
    return store, rank, size


def check_single(what: str) -> None:
    """Raise if torchrun started several processes of what takes one.

    Raises:
        ConfigError: It did.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"{what} takes one process; under torchrun, start each of its runs by "
            "itself with `-m compress run`"
        )


def own_device(device: str) -> str:
    """Return where this process works: of several, each has a GPU of its own.

    Raises:
        ConfigError: It has none.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not device.startswith("cuda"):
        return device
    number, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if number >= count:
        raise ConfigError(
            f"process {os.environ['RANK']} is number {number} of its host, which has "
            f"{count} GPUs; start with --nproc-per-node {count}"
        )
    return f"cuda:{number}"


__all__ = ["ProcessError", "Team", "check_single", "own_device", "team"]
