"""What each neuron is worth to the model's predictions, by one backward pass.

Labels ``s_t`` are drawn from the model's own ``p_t``; with ``L = sum_t log p(s_t)``

    effect_j = E[(x_j dL/dx_j)^2]

over tokens is twice the KL, to second order, that setting neuron ``j`` to zero costs if
positions do not add up: exactly so in the last block. Before it, attention lets a
neuron of several tokens act on one prediction; these products are left out, since a sum
over windows instead of tokens would have far fewer samples.
``slope = E|dL/dy|^2 / H`` at an MLP's output ``y`` likewise turns a mean squared error
of an output channel into twice its KL, as if errors had no direction.

The model streams: forward block by block with the states kept, then back. States of
``STORED_BYTES`` are in memory at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compress.calibration.input_sensitivity import forward_trace, head_gradients
from compress.model.streaming import StreamedModel
from compress.progress import progress_bar
from compress.pruning.places import MLPPlace

STORED_BYTES = 1 << 30
TOKENS_A_CALL = 2048


@dataclass
class Gradients:
    """Sums of one MLP, and of its output.

    Attributes:
        effect: float32 ``[I]`` on the CPU.
        slope: See the module.
    """

    effect: Tensor
    slope: float


def gradients_of(
    model: StreamedModel,
    windows: Tensor,
    places: Sequence[Sequence[MLPPlace]],
    *,
    seed: int = 0,
) -> dict[str, Gradients]:
    """Return the effect of every neuron, by path of its MLP.

    Args:
        model: Dense.
        windows: int64 ``[N, T]`` tokens.
        places: The MLPs of each block.
        seed: Of the drawn labels.
    """
    generator = torch.Generator().manual_seed(seed)
    totals = {
        place.path: Gradients(torch.zeros(place.neurons), 0.0)
        for block in places
        for place in block
    }
    width = int(model.description.config["hidden_size"])
    each = windows.shape[1] * width * 4 * (len(places) + 2)
    for part in torch.split(windows, max(1, STORED_BYTES // each)):
        states, trace = forward_trace(model, part)
        slopes = head_gradients(model, trace.pop(), 1, generator)[0]
        order = range(len(places))[::-1]
        for index in progress_bar(order, desc="effects", leave=False):
            hidden = trace.pop()
            with model.block(index, following=index - 1) as block:
                call = states.calls[index]
                _back(model, block, places[index], hidden, slopes, call, totals)
    count = windows.numel()
    for total in totals.values():
        total.effect /= count
        total.slope /= count
    return totals


_Met = dict[str, tuple[Tensor, Tensor]]
"""Input and output of each ``down``, by path of its MLP."""


def _keep(
    met: _Met, path: str, _module: nn.Module, given: tuple[Any, ...], output: Tensor
) -> None:
    met[path] = given[0], output


def _back(
    model: StreamedModel,
    block: nn.Module,
    places: Sequence[MLPPlace],
    hidden: Tensor,
    slopes: Tensor,
    call: dict[str, Any],
    totals: dict[str, Gradients],
) -> None:
    """Take gradients through a block, and turn ``slopes`` into those at its input."""
    index = places[0].block
    size = max(1, TOKENS_A_CALL // hidden.shape[1])
    for start in range(0, len(hidden), size):
        rows = slice(start, start + size)
        inputs = hidden[rows].clone().requires_grad_()
        met: _Met = {}
        hooks = [
            block.get_submodule(place.down_path).register_forward_hook(
                partial(_keep, met, place.path)
            )
            for place in places
        ]
        try:
            output = model.call_block(index, inputs, call)
        finally:
            for hook in hooks:
                hook.remove()
        seen = [path for path, (x, _) in met.items() if x.numel()]
        wanted = [t for path in seen for t in met[path]]
        down = slopes[rows].to(output)
        found = torch.autograd.grad(output, [inputs, *wanted], down, allow_unused=True)
        pairs = zip(found[1::2], found[2::2], strict=True)
        for path, (at_x, at_y) in zip(seen, pairs, strict=True):
            x = met[path][0].detach()
            products = (x * at_x).float().square().flatten(0, -2).sum(0)
            totals[path].effect += products.cpu()
            channels = at_y.shape[-1]
            totals[path].slope += float(at_y.float().square().sum()) / channels
        slopes[rows] = found[0].to(slopes)  # last: at_y may be a view of it
