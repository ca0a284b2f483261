"""Predicted loss of each choice, in nats a token, if only one unit takes it.

``fisher``: a change ``dW`` of a layer's weights moves the logits so that

    KL = 1/2 E[<dW, g>^2],   g = d/dW sum_t log p(s_t),   s_t drawn from p_t,

to second order and summed over a window (Fisher information). One forward and one
backward pass, block by block, give ``g`` of a window for a layer, and a product with
each candidate's ``dW`` costs next to nothing beside it. The choices of a unit are
samples of nearly independent ``dW``, so what they say together is one number,

    a = mean over choices of KL / error,   loss of a choice = a * error,

with ``error`` the relative error in the inputs' metric: its relative standard error is
near ``sqrt(2 / (windows * draws * choices))``.

``measured``: the same ``a`` from the KL that one choice of the unit truly costs, one
unit after another; a forward pass of half the model for each.

Embedding and head have no statistics of inputs: each of their choices is measured.

Source: the additive model of HAWQ and of EvoPress' ablations; Fisher information as in
natural gradients. Limits: second order and additive; both estimates are scaled by the
error, which takes the rest of a layer's Hessian for fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from compress.allocation.assemble import LevelSource
from compress.allocation.candidates import Candidate
from compress.allocation.store import Level, LevelStore
from compress.calibration.input_sensitivity import forward_trace, head_gradients
from compress.core.artifact import ModelDescription
from compress.core.plan import LayerPlan
from compress.model.states import Activations
from compress.model.streaming import StreamedModel
from compress.progress import progress_bar

_STORED_BYTES = 1 << 30
"""Block inputs and gradients that are held at once; more windows are taken in turn."""

Measure = Callable[[Sequence[int | None]], float]


def unit_error(layers: Sequence[LayerPlan], levels: Mapping[LayerPlan, Level]) -> float:
    """Return the relative error of a unit at one choice, all layers together."""
    found = [levels[layer] for layer in layers]
    energy = sum(level.energy for level in found)
    return sum(x.error * x.energy for x in found) / energy if energy else 0.0


def scaled(slope: float, errors: Sequence[float]) -> list[float]:
    """Return the loss of each choice from the loss at relative error one."""
    return [slope * error for error in errors]


def measured_slopes(
    units: Sequence[Candidate],
    errors: Sequence[Sequence[float]],
    measure: Measure,
) -> list[float]:
    """Return the loss at relative error one of each unit, measured at its worst choice.

    The worst choice is the furthest above the noise of few tokens.
    """
    slopes = []
    for i, unit in enumerate(progress_bar(units, desc="sensitivity", leave=False)):
        worst = max(range(len(unit.options)), key=errors[i].__getitem__)
        alone = [worst if j == i else None for j in range(len(units))]
        error = errors[i][worst]
        slopes.append(measure(alone) / error if error else 0.0)
    return slopes


def fisher_slopes(
    model: StreamedModel,
    windows: Tensor,
    units: Sequence[Candidate],
    errors: Sequence[Sequence[float]],
    *,
    levels: Mapping[LayerPlan, Level],
    store: LevelStore,
    draws: int = 1,
    seed: int = 0,
) -> list[float]:
    """Return the loss at relative error one of each unit inside the blocks.

    Args:
        model: The dense model.
        windows: int64 ``[N, T]`` tokens.
        units: Those with layers outside of the blocks get 0.
        errors: Of each choice of each unit.
        levels: Of all choices.
        store: Where their codes are.
        draws: Labels drawn for each position.
        seed: Of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    description = model.description
    changes = _Changes(description, model, units, levels, store)
    width = int(description.config["hidden_size"])
    each = windows.shape[1] * width * 4 * (description.block_count + 1 + draws)
    for part in torch.split(windows, max(1, _STORED_BYTES // each)):
        states, trace = forward_trace(model, part)
        gradients = head_gradients(model, trace.pop(), draws, generator)
        blocks = range(description.block_count)[::-1]
        for index in progress_bar(blocks, desc="sensitivity", leave=False):
            here = Activations(trace.pop(), states.calls)
            with model.block(index, following=index - 1) as block:
                gradients = changes.through(index, block, here, gradients)
    return [
        _slope(changes.kl(i, windows.shape[1]), errors[i]) for i in range(len(units))
    ]


def _slope(losses: Sequence[float], errors: Sequence[float]) -> float:
    """Return the mean ratio of losses to errors; 0 where nothing was seen."""
    ratios = [x / e for x, e in zip(losses, errors, strict=True) if e > 0]
    return sum(ratios) / len(ratios) if ratios else 0.0


class _Changes:
    """Products of gradients with what each choice changes, block by block."""

    def __init__(
        self,
        description: ModelDescription,
        model: StreamedModel,
        units: Sequence[Candidate],
        levels: Mapping[LayerPlan, Level],
        store: LevelStore,
    ) -> None:
        self._description, self._model, self._units = description, model, units
        self._levels = levels
        self._source = LevelSource(
            model.source, store, held_bytes=0, device=str(model.device)
        )
        self._unit_of = {n: i for i, unit in enumerate(units) for n in unit.layers}
        # Units of several blocks (experts) gather products until all are there.
        self._products: list[list[Tensor]] = [[] for _ in units]
        self._pending: dict[int, tuple[Tensor, int]] = {}

    def kl(self, unit: int, tokens: int) -> list[float]:
        """Return the KL of each choice of a unit, nats a token."""
        found = self._products[unit]
        if not found:
            return [0.0] * len(self._units[unit].options)
        squares = torch.cat(found, 1).square().mean(1)
        return [float(x) / (2 * tokens) for x in squares]

    def through(
        self, index: int, block: nn.Module, states: Activations, gradients: Tensor
    ) -> Tensor:
        """Note products for all layers of a block; return gradients at its input."""
        prefix = f"{self._description.family.block(index)}."
        names = [n for n in self._unit_of if n.startswith(prefix)]
        changes = {name: self._change(name, block, prefix) for name in names}
        found = {name: list[Tensor]() for name in names}
        result = torch.empty_like(gradients)
        for n in range(len(states.hidden)):
            hidden = states.hidden[n : n + 1].clone().requires_grad_()
            with _watched(block, names, prefix) as calls:
                output = self._model.call_block(index, hidden, states.calls[index])
            seen = list(calls)
            for draw in range(len(gradients)):
                down = gradients[draw, n : n + 1].to(output)
                result[draw, n : n + 1], *slopes = torch.autograd.grad(
                    output,
                    [hidden, *(calls[name][1] for name in seen)],
                    down,
                    retain_graph=draw + 1 < len(gradients),
                )
                for name, slope in zip(seen, slopes, strict=True):
                    x = calls[name][0].flatten(0, -2)
                    gradient = slope.flatten(0, -2).T @ x
                    found[name].append(changes[name] @ gradient.reshape(-1))
                for name in names:
                    if name not in calls:  # an expert that no token came to
                        found[name].append(changes[name].new_zeros(len(changes[name])))
        for name, products in found.items():
            self._note(name, torch.stack(products, 1).double().cpu())
        return result

    def _change(self, name: str, block: nn.Module, prefix: str) -> Tensor:
        """Return ``dW`` of each choice, ``[K, R * C]``."""
        path = name.removeprefix(prefix)
        dense = block.get_submodule(path).get_parameter("weight")
        unit = self._units[self._unit_of[name]]
        changes = []
        for option in unit.options:
            layer = next(x for x in option.layers if x.name == name)
            values = self._source.values(self._levels[layer])
            changes.append((values - dense.float()).to(dense.dtype).reshape(-1))
        return torch.stack(changes)

    def _note(self, name: str, products: Tensor) -> None:
        """Add a layer's products ``[K, samples]`` to those of its unit."""
        index = self._unit_of[name]
        before, count = self._pending.pop(index, (torch.zeros_like(products), 0))
        if count + 1 == len(self._units[index].layers):
            self._products[index].append(before + products)
        else:
            self._pending[index] = before + products, count + 1


@contextmanager
def _watched(
    block: nn.Module, names: Sequence[str], prefix: str
) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Yield what fills with each layer's input and its output, part of the graph."""
    calls: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Callable[..., None]:
        def keep(
            _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
        ) -> None:
            if output.requires_grad and output.numel():
                calls[name] = inputs[0].detach(), output

        return keep

    hooks = [
        block.get_submodule(name.removeprefix(prefix)).register_forward_hook(
            watch(name)
        )
        for name in names
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
