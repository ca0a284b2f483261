"""Blocks whose weights are split over the processes, for models that outgrow a GPU.

This is PyTorch's FSDP2: each process holds some rows of every matrix of the blocks, and
of what an optimizer keeps for them. A block's weights are whole while it computes; its
gradients are averaged and split again. Norms, embedding and head stay whole, and so
does what is added to a block afterwards (adapters).

Source: Zhao et al. (2023), "PyTorch FSDP", arXiv 2304.11277; ``fully_shard`` of torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compress.distributed.team import Team


class Shards:
    """Splits the blocks of one model.

    Args:
        team: The processes.
        device: Of this one.
        dtype: In which a block computes, whatever type its weights have.
    """

    def __init__(self, team: Team, device: torch.device, dtype: torch.dtype) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy

        self.team = team
        self._mesh = init_device_mesh(device.type, (team.size,))
        self._policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )

    def split_(self, block: nn.Module) -> None:
        """Keep this process's rows of each matrix of a block."""
        self._wrap(block, {p for p in block.parameters() if p.dim() < 2})

    def join_(self, body: nn.Module) -> None:
        """Let a body whose blocks are split read them ahead; the rest stays whole."""
        self._wrap(body, {p for p in body.parameters() if not is_split(p)})

    def _wrap(self, module: nn.Module, whole: set[nn.Parameter]) -> None:
        from torch.distributed.fsdp import fully_shard

        fully_shard(
            module,
            mesh=self._mesh,
            mp_policy=self._policy,
            reshard_after_forward=True,
            ignored_params=whole,
        )


def local(parameter: Tensor) -> Tensor:
    """Return this process's rows of a split parameter; any other as it is."""
    if not is_split(parameter):
        return parameter
    rows: Any = parameter
    part: Tensor = rows.to_local()
    return part


def is_split(tensor: Tensor) -> bool:
    """Whether each process holds some rows only."""
    return hasattr(tensor, "to_local")


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with the rows of all processes; each of them must ask."""
    if not is_split(tensor):
        return tensor
    rows: Any = tensor
    full: Tensor = rows.full_tensor()
    return full


class Leaves:
    """What an optimizer of this process changes: parameters, or its rows of them.

    Args:
        parameters: By name.

    Attributes:
        values: Plain tensors by the same names, in the parameters' memory.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = dict(parameters)
        self.values: dict[str, nn.Parameter] = {
            name: nn.Parameter(local(p.detach())) if is_split(p) else p
            for name, p in parameters.items()
        }

    def receive_(self, team: Team) -> None:
        """Average the gradients that lie in the parameters over the processes.

        Those of split parameters are averages already.
        """
        together = []
        for name, parameter in self._parameters.items():
            if is_split(parameter):
                gradient = parameter.grad
                kept = None if gradient is None else local(gradient)
                self.values[name].grad, parameter.grad = kept, None
            else:
                together.append(parameter)
        team.average_gradients_(together)

    def clip_(self, most: float, team: Team) -> Tensor:
        """Scale all gradients so that their common length is ``most`` or less.

        Returns:
            The length before.
        """
        split = [self.values[n] for n, p in self._parameters.items() if is_split(p)]
        if not split:
            return torch.nn.utils.clip_grad_norm_(self.values.values(), most)
        others = [p for p in self._parameters.values() if not is_split(p)]
        squares = torch.stack([_squares(split), _squares(others) / team.size])
        total = squares.sum()
        team.add_([total])
        norm = total.sqrt()
        grads = [p.grad for p in self.values.values() if p.grad is not None]
        torch._foreach_mul_(grads, (most / (norm + 1e-6)).clamp(max=1.0))
        return norm


def _squares(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the sum of the squares of all gradients."""
    parameters = list(parameters)
    norms = [torch.linalg.vector_norm(p.grad) for p in parameters if p.grad is not None]
    device = parameters[0].device if parameters else None
    if not norms:
        return torch.zeros((), device=device)
    return torch.stack(norms).square().sum()
