"""Matrices of one shape and scheme, trained together: codes, values and gradients.

Where blocks are split over processes, a stack has the rows of this process, codes and
all. Numbers that all rows share (tables of a whole matrix) are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from compress.core.errors import SchemeError
from compress.core.scheme import WHOLE
from compress.core.tensors import QuantizedTensor, join_rows
from compress.core.tunable import TunableCodes, tunable
from compress.distributed.team import Team
from compress.recovery.models import WholeModel
from compress.recovery.sharding import is_split, local

_WEIGHTS_AT_ONCE = 1 << 25  # of a stack: what one operation touches


@dataclass(frozen=True)
class Stack:
    """Matrices that are treated together.

    Attributes:
        names: Of the layers.
        codes: What their values come from.
        live: ``[B, R, C]`` in the model's type: the weights of the layers.
        gradient: The gradients of the layers, as ``live``.
        split: The model's weights of the layers, if these are the rows of this process.
    """

    names: tuple[str, ...]
    codes: TunableCodes
    live: Tensor
    gradient: Tensor
    split: tuple[nn.Parameter, ...] = ()

    @torch.no_grad()
    def refresh_(self) -> None:
        """Put the values of the codes into the model."""
        self.live.copy_(self.codes.decode())
        for own, weight in zip(self.live, self.split, strict=False):
            local(weight.detach()).copy_(own)

    def receive_(self, team: Team) -> None:
        """Take the gradients of a step, averaged over the processes."""
        if not self.split:
            team.average_([self.gradient])
        for own, weight in zip(self.gradient, self.split, strict=False):
            if weight.grad is not None:
                own.copy_(local(weight.grad))
                weight.grad = None

    def team_of(self, number: str, team: Team) -> Team | None:
        """Return the processes that have other parts of a number beside the codes."""
        scheme = self.codes.scheme
        book = scheme.codebook
        in_all = scheme.row_block == WHOLE
        if book is not None:
            in_all = number == "tables" and (book.positional or in_all)
        return None if in_all or not self.split else team

    def average_(self, gradients: Mapping[str, Tensor], team: Team) -> None:
        """Make gradients of numbers beside the codes equal where the numbers are."""
        if not self.split:  # sums without an order differ between processes
            team.average_(list(gradients.values()))
        else:
            team.add_([g for n, g in gradients.items() if not self.team_of(n, team)])

    def result(self) -> dict[str, QuantizedTensor]:
        """Return the stored form of each layer, by name.

        Where blocks are split every process asks, and the first one gets it.
        """
        own = self.codes.result()
        if not self.split:
            return dict(zip(self.names, own, strict=True))
        first = dist.get_rank() == 0
        parts: list[list[QuantizedTensor]] | None = None
        if first:
            parts = [[] for _ in range(dist.get_world_size())]
        dist.gather_object(own, parts)
        if parts is None:
            return {}
        whole = [join_rows(rows) for rows in zip(*parts, strict=True)]
        return dict(zip(self.names, whole, strict=True))


def stacks_of(
    model: WholeModel, codes: Mapping[str, QuantizedTensor]
) -> Iterable[Stack]:
    """Yield stacks of all coded layers; the model gets their weights.

    Raises:
        SchemeError: A matrix cannot be split over the processes.
    """
    alike: dict[object, dict[str, QuantizedTensor]] = {}
    for name, tensor in codes.items():
        split = is_split(model.module.get_parameter(f"{name}.weight"))
        key = (tensor.shape, tensor.scheme, split)
        alike.setdefault(key, {})[name] = tensor
    for group in alike.values():
        names = list(group)
        rows, columns = group[names[0]].shape
        most = max(1, _WEIGHTS_AT_ONCE // (rows * columns))
        for start in range(0, len(names), most):
            part = {name: group[name] for name in names[start : start + most]}
            split = is_split(model.module.get_parameter(f"{names[0]}.weight"))
            yield _split_stack(model, part) if split else _whole_stack(model, part)


def _whole_stack(model: WholeModel, part: Mapping[str, QuantizedTensor]) -> Stack:
    """Make the weights of layers views of a stack."""
    codes = tunable(list(part.values()), model.device)
    live = torch.zeros(codes.shape, dtype=model.dtype, device=model.device)
    stack = Stack(tuple(part), codes, live, torch.zeros_like(live))
    for number, name in enumerate(part):
        leaf = nn.Parameter(stack.live[number])
        leaf.grad = stack.gradient[number]  # backward passes add to it in place
        model.put_(f"{name}.weight", leaf)
    return stack


def _split_stack(model: WholeModel, part: Mapping[str, QuantizedTensor]) -> Stack:
    """Keep this process's rows of layers, beside the model's weights."""
    size, rank = dist.get_world_size(), dist.get_rank()
    rows = []
    for name, tensor in part.items():
        problem = split_problem(tensor, size)
        if problem is not None:
            raise SchemeError(f"tune: {name}: {problem}")
        rows.append(tensor.split_rows([tensor.shape[0] // size] * size)[rank])
    weights = tuple(model.module.get_parameter(f"{name}.weight") for name in part)
    for weight in weights:
        weight.requires_grad_(True)
    codes = tunable(rows, model.device)
    live = torch.zeros(codes.shape, dtype=model.dtype, device=model.device)
    return Stack(tuple(part), codes, live, torch.zeros_like(live), weights)


def split_problem(tensor: QuantizedTensor, size: int) -> str | None:
    """Return why the rows of a matrix cannot be split over processes."""
    rows, scheme = tensor.shape[0], tensor.scheme
    block = 1 if scheme.row_block == WHOLE else scheme.row_block
    if rows % (size * block) == 0:
        return None
    return (
        f"{rows} rows in blocks of {block} ({scheme.name}) cannot be split over {size} "
        f"processes; start a number that divides {rows // block}, or leave shard out"
    )
