"""Experts as checkpoints name them, whatever a file or a module stacks.

A published mixture of experts has one matrix per expert and projection; transformers 5
stacks them in memory as ``experts.gate_up_proj [E, 2I, H]`` and ``experts.down_proj
[E, H, I]``, below ``mlp`` whatever the checkpoint calls it, and undoes that in
``save_pretrained``. Everything here works on the checkpoint's names: each expert's
matrices are ordinary layers. This module crosses to the stacked form and back:

* :func:`unstacked` reads stacked tensors (a module in memory, or a folder that was
  saved that way) by the checkpoint's names, one expert at a time;
* :func:`stacked` reads a checkpoint by the names of transformers' modules;
* :func:`split_experts_` gives a module tree one linear layer per expert matrix, so that
  hooks, statistics and loading need not know that there are experts;
* :func:`weight_of` finds the part of a stacked parameter that holds a layer.

Source: ``conversion_mapping.py`` of transformers 5.17 and 5.23.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compress.core.artifact import TensorInfo, TensorSource
from compress.core.errors import CheckpointError
from compress.core.families import Experts, Family

MODULE = "mlp"
"""Where transformers keeps a mixture inside a block, whatever checkpoints call it."""
_GATE_UP, _DOWN = "experts.gate_up_proj", "experts.down_proj"


class SplitExperts(nn.ModuleList):
    """The experts of one block as linear layers, computing what transformers computes.

    Every expert is called in every pass, be it with no tokens, so that whoever watches
    its inputs learns that there were none. While they run it can be asked what each of
    them gets.
    """

    def __init__(self, fused: Any, names: Experts) -> None:
        """Take over the shapes and the activation of transformers' module.

        Args:
            fused: Module with ``gate_up_proj``, ``down_proj`` and ``act_fn``.
            names: What the checkpoint calls the matrices.
        """
        count, hidden, inner = fused.down_proj.shape
        device = fused.down_proj.device
        super().__init__(
            _Expert(names, hidden, inner, fused.act_fn, device) for _ in range(count)
        )
        self._running: tuple[Tensor, Tensor] | None = None

    def expert(self, number: int) -> Any:
        """Return one expert."""
        return self[number]

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """Return the weighted sum ``[T, H]`` of the experts chosen for each token.

        Args:
            hidden_states: ``[T, H]``.
            top_k_index: int64 ``[T, K]``, the experts of each token.
            top_k_weights: ``[T, K]``.
        """
        output = torch.zeros_like(hidden_states)
        before, self._running = self._running, (hidden_states, top_k_index)
        try:
            for number, expert in enumerate(self):
                tokens, place = torch.where(top_k_index == number)
                weights = top_k_weights[tokens, place, None]
                values = expert(hidden_states[tokens]) * weights
                output.index_add_(0, tokens, values.to(output.dtype))
        finally:
            self._running = before
        return output

    def tokens_of(self, number: int) -> Tensor:
        """Return the rows that an expert is handed, int64 ``[n]``, while all run."""
        assert self._running is not None, "the experts do not run now"
        return torch.where(self._running[1] == number)[0]

    def states_of(self, number: int) -> Tensor:
        """Return what an expert is handed, ``[n, H]``, while all run."""
        assert self._running is not None, "the experts do not run now"
        return self._running[0][self.tokens_of(number)]


class ActiveExperts(SplitExperts):
    """Split experts of which only those with tokens are called.

    For inference: which ones these are must be known on the host, so each pass waits
    for the device once, and cannot be captured in a CUDA graph.
    """

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """Return what :class:`SplitExperts` returns, bit for bit."""
        output = torch.zeros_like(hidden_states)
        for number in torch.unique(top_k_index).tolist():
            tokens, place = torch.where(top_k_index == number)
            values = self[number](hidden_states[tokens])
            values = values * top_k_weights[tokens, place, None]
            output.index_add_(0, tokens, values.to(output.dtype))
        return output


class _Expert(nn.Module):
    """One gated MLP, its layers named as in the checkpoint."""

    def __init__(
        self, names: Experts, hidden: int, inner: int, activation: Any, device: Any
    ) -> None:
        super().__init__()
        for name in (names.gate, names.up):
            self.add_module(name, nn.Linear(hidden, inner, bias=False, device=device))
        down = nn.Linear(inner, hidden, bias=False, device=device)
        self.add_module(names.down, down)
        self._names, self.activation = names, activation

    def forward(self, inputs: Tensor) -> Tensor:
        names = self._names
        gate = self.get_submodule(names.gate)(inputs)
        inner = self.activation(gate) * self.get_submodule(names.up)(inputs)
        down: Tensor = self.get_submodule(names.down)(inner)
        return down

    def inner(self, inputs: Tensor) -> Tensor:
        """Return the input of ``down`` ``[T, I]`` without waking any hook."""
        names = self._names
        gate, up = (
            nn.functional.linear(inputs, self.get_submodule(n).get_parameter("weight"))
            for n in (names.gate, names.up)
        )
        values: Tensor = self.activation(gate) * up
        return values


def split_experts_(
    model: nn.Module, family: Family, *, kind: type[SplitExperts] = SplitExperts
) -> None:
    """Replace stacked experts by :class:`SplitExperts`, and take the stored names.

    Args:
        model: A transformers model of ``family``, usually without weights.
        family: Does nothing if it has no experts.
        kind: What they become.
    """
    names = family.experts
    if names is None:
        return
    for block in model.get_submodule(family.blocks).children():
        mlp: Any = block.get_submodule(MODULE)
        if not hasattr(mlp, "experts"):
            continue  # an ordinary MLP between the mixtures
        mlp.experts = kind(mlp.experts, names)
        if names.mlp != MODULE:
            # The block's forward goes on calling self.mlp, which is no child any more.
            del block._modules[MODULE]
            block.__dict__[MODULE] = mlp
            block.add_module(names.mlp, mlp)


def weight_of(model: nn.Module, family: Family, layer: str) -> Tensor:
    """Return the parameter of a layer in a transformers model, or its part of one.

    Args:
        model: With stacked experts, as transformers makes it.
        family: Of the model.
        layer: Module name in the checkpoint.

    Returns:
        A view ``[R, C]``: writing to it changes the model.
    """
    found = _expert_of(layer, family)
    if found is None:
        return model.get_submodule(layer).get_parameter("weight")
    block, number, leaf = found
    names = family.experts
    assert names is not None
    experts = model.get_submodule(f"{block}.{MODULE}.experts")
    if leaf == names.down:
        return experts.get_parameter("down_proj")[number]
    half = experts.get_parameter("gate_up_proj")[number].chunk(2)
    return half[0 if leaf == names.gate else 1]


def unstacked(source: TensorSource, family: Family) -> TensorSource:
    """Return ``source`` by the checkpoint's names; itself if nothing is stacked."""
    if family.experts is None or not any(n.endswith(_DOWN) for n in source.tensors()):
        return source
    return _Unstacked(source, family, family.experts)


def stacked(source: TensorSource, family: Family) -> TensorSource:
    """Return a checkpoint by the names of transformers' modules."""
    if family.experts is None:
        return source
    return _Stacked(source, family, family.experts)


def _expert_of(layer: str, family: Family) -> tuple[str, int, str] | None:
    """Return block, number and matrix name if ``layer`` is an expert's."""
    if family.experts is None:
        return None
    container = re.escape(family.experts.container)
    match = re.fullmatch(rf"(.+)\.{container}\.(\d+)\.([^.]+)", layer)
    return (match[1], int(match[2]), match[3]) if match else None


class _Unstacked(TensorSource):
    """Entries of stacked tensors under the names of a checkpoint."""

    def __init__(self, source: TensorSource, family: Family, names: Experts) -> None:
        self._source = source
        self._tensors: dict[str, TensorInfo] = {}
        # Where a tensor comes from: name, entry, and which half of it.
        self._places: dict[str, tuple[str, int | None, int | None]] = {}
        for name, info in source.tensors().items():
            block, inside, rest = name.partition(f".{MODULE}.")
            path = f"{block}.{names.mlp}"
            if rest == _GATE_UP:
                self._add(name, info, path, {names.gate: 0, names.up: 1})
            elif rest == _DOWN:
                self._add(name, info, path, {names.down: None})
            else:
                # Routers lie below the mixture; an ordinary MLP keeps its place.
                router = bool(inside) and rest.startswith("gate.")
                known = f"{path}.{rest}" if router else name
                self._tensors[known], self._places[known] = info, (name, None, None)

    def _add(
        self, name: str, info: TensorInfo, path: str, parts: Mapping[str, int | None]
    ) -> None:
        count, rows, columns = info.shape
        shape = (rows // len(parts), columns)
        for number in range(count):
            for leaf, half in parts.items():
                known = f"{path}.experts.{number}.{leaf}.weight"
                self._tensors[known] = TensorInfo(shape, info.dtype)
                self._places[known] = name, number, half

    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read(self, name: str) -> Tensor:
        place, number, half = self._places.get(name, (name, None, None))
        if number is None:
            return self._source.read(place)
        entry = self._source.read_index(place, number)
        return entry if half is None else entry.chunk(2)[half].clone()


class _Stacked(TensorSource):
    """A checkpoint's experts, stacked as transformers' modules want them."""

    def __init__(self, source: TensorSource, family: Family, names: Experts) -> None:
        self._source = source
        self._tensors: dict[str, TensorInfo] = {}
        self._plain: dict[str, str] = {}
        # Rows of matrices to stack: for each expert the ones that are put together.
        self._parts: dict[str, list[list[str]]] = {}
        for name, info in source.tensors().items():
            found = _expert_of(name.removesuffix(".weight"), family)
            if found is None:
                known = name.replace(f".{names.mlp}.", f".{MODULE}.", 1)
                self._tensors[known], self._plain[known] = info, name
            elif found[1:] == (0, names.down):
                self._add(source.tensors(), names, found[0])

    def _add(
        self, stored: Mapping[str, TensorInfo], names: Experts, block: str
    ) -> None:
        first = f"{block}.{names.container}"
        count = 0
        while f"{first}.{count}.{names.down}.weight" in stored:
            count += 1
        for target, leaves in (
            (_GATE_UP, (names.gate, names.up)),
            (_DOWN, (names.down,)),
        ):
            parts = [
                [f"{first}.{number}.{leaf}.weight" for leaf in leaves]
                for number in range(count)
            ]
            info = stored.get(parts[0][0])
            if info is None:
                raise CheckpointError(f"tensor {parts[0][0]} is missing")
            rows, columns = info.shape
            known = f"{block}.{MODULE}.{target}"
            shape = (count, rows * len(leaves), columns)
            self._tensors[known] = TensorInfo(shape, info.dtype)
            self._parts[known] = parts

    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read(self, name: str) -> Tensor:
        if name not in self._parts:
            return self._source.read(self._plain.get(name, name))
        whole: Tensor | None = None
        for number, parts in enumerate(self._parts[name]):
            entry = torch.cat([self._source.read(part) for part in parts])
            if whole is None:
                whole = torch.empty(self._tensors[name].shape, dtype=entry.dtype)
            whole[number] = entry
        assert whole is not None
        return whole
