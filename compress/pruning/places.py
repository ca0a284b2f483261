"""Where the MLPs of a model are: one in a block, or one for each expert.

A fused matrix (``gate_up_proj``) stacks gate over up; everything here speaks of gate
and up and knows which rows they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.core.artifact import ModelDescription
from compress.core.errors import CheckpointError
from compress.core.families import Linear
from compress.core.neurons import GatedMLP


@dataclass(frozen=True)
class MLPPlace:
    """One MLP of a block.

    Attributes:
        block: Number of the block.
        path: Full path of ``down``'s parent, such as ``model.layers.3.mlp``.
        rows: Full names of the linears that lose rows: gate and up, or a fused one.
        down: Full name of the linear that loses columns.
        down_path: The same inside the block.
        neurons: Width.
        expert: Number of the expert; ``None`` outside a mixture.
    """

    block: int
    path: str
    rows: tuple[str, ...]
    down: str
    down_path: str
    neurons: int
    expert: int | None = None

    @property
    def fused(self) -> bool:
        """Whether gate and up are the halves of one matrix."""
        return len(self.rows) == 1

    def read(self, read: Callable[[str], Tensor]) -> GatedMLP:
        """Return the weights in float32.

        Args:
            read: Returns a tensor by name.
        """
        down = read(f"{self.down}.weight").float()
        if self.fused:
            gate, up = read(f"{self.rows[0]}.weight").float().chunk(2)
        else:
            gate, up = (read(f"{name}.weight").float() for name in self.rows)
        return GatedMLP(gate, up, down, self.path, self.block)

    def row_indices(self, kept: Tensor) -> Tensor:
        """Return which rows of :attr:`rows` stay, given the neurons that do."""
        return torch.cat([kept, kept + self.neurons]) if self.fused else kept

    def columns(self, kept: Tensor) -> Tensor:
        """Return which columns of :attr:`down` stay."""
        return kept


def mlp_places(model: ModelDescription, index: int) -> list[MLPPlace]:
    """Return the MLPs of a block, in order of execution.

    Raises:
        CheckpointError: The family has no MLP that can be cut; names what there is.
    """
    block = model.family.block(index)
    members: dict[int | None, dict[str, Linear]] = {}
    for linear in model.block_linears(index):
        if linear.role in ("gate", "up", "gate_up", "down"):
            members.setdefault(linear.expert, {})[linear.role] = linear
    found = []
    for expert, roles in members.items():
        rows = [roles[role] for role in ("gate", "up", "gate_up") if role in roles]
        if "down" not in roles or not rows:
            break
        down = f"{block}.{roles['down'].path}"
        names = tuple(f"{block}.{linear.path}" for linear in rows)
        width = model.tensors[f"{down}.weight"].shape[1]
        found.append(
            MLPPlace(
                index,
                down.rpartition(".")[0],
                names,
                down,
                roles["down"].path,
                width,
                expert,
            )
        )
    if not found:
        roles_found = sorted({linear.role for linear in model.block_linears(index)})
        raise CheckpointError(
            f"{block}: no gated MLP to prune; {model.family.name} has {roles_found}"
        )
    return found
