"""Statistics of the two ends of a model: what embedding and head are judged by.

The head's input ``x`` is the last hidden state behind the final norm; its second moment
``A`` is a Hessian like that of any linear layer.

An embedding is looked up. A change ``e`` of a row moves the output, wherever its token
stands, by a KL of ``(e . g)^2 / 2`` to second order, with ``g`` the gradient of
``sum_t log p(s_t)`` at that position and ``s_t`` drawn from ``p_t`` (Fisher
information). So its Hessian is the second moment ``F`` of ``g``.

A row of a tied matrix is met in both ways, as often as its token comes: at the head
with ``(1 - p) (e . x)^2 / 2``, ``p`` the token's probability. So its Hessian is
``c A + F``, with ``c`` the mean of ``1 - p`` over draws. It is coded before any block,
hence from the dense model.

Rows are tokens, so both ends also know how often each came in the calibration text.

Source: Martens (2014), "New insights and perspectives on the natural gradient method",
for the Fisher information as a metric of the output; the sum for tied matrices is ours.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from compress.calibration.collect import Moments
from compress.calibration.input_sensitivity import forward_trace, head_gradients
from compress.core.statistics import LayerStatistics
from compress.distributed.team import Team
from compress.model.states import Activations
from compress.model.streaming import StreamedModel
from compress.progress import progress_bar

_SEQUENCES, _TOKENS = 16, 256
"""Calibration text that gradients are taken on: these many windows, cut to a length."""
_AT_ONCE = 4  # windows whose states of all blocks are in memory


def embedding_statistics(
    model: StreamedModel,
    windows: Tensor,
    head: LayerStatistics | None = None,
    *,
    team: Team | None = None,
) -> LayerStatistics:
    """Return the statistics of an embedding ``[V, C]``, or of a tied matrix.

    Args:
        model: Dense.
        windows: int64 ``[N, T]`` calibration tokens.
        head: Of the head's inputs in the dense model, if they are at hand; else a tied
            matrix costs one more pass.
        team: The processes, of which each runs its share of that pass.
    """
    team = team or Team()
    count = windows.numel()
    fisher, spread = _look_ups(model, windows[:_SEQUENCES, :_TOKENS])
    counts = _counts(model, windows)
    if not model.description.tied:
        return LayerStatistics(2 * count * fisher, count, counts=counts)
    head = _dense_head(model, windows, team) if head is None else head
    hessian = spread * head.hessian + 2 * count * fisher
    return LayerStatistics(hessian, count, counts=counts)


def _counts(model: StreamedModel, windows: Tensor) -> Tensor:
    """Return how often each token of the vocabulary came, int64 ``[V]``."""
    embedding = f"{model.description.family.embedding}.weight"
    rows = model.description.tensors[embedding].shape[0]
    return torch.bincount(windows.flatten().cpu(), minlength=rows)


def _look_ups(model: StreamedModel, windows: Tensor) -> tuple[Tensor, float]:
    """Return ``F`` float32 ``[C, C]``, of one position, and ``c``."""
    generator = torch.Generator().manual_seed(0)
    blocks = range(model.description.block_count)[::-1]
    moments, spreads = Moments(), []
    for part in torch.split(windows, _AT_ONCE):
        states, trace = forward_trace(model, part)
        spreads.append(_spread(model, trace[-1]))
        gradients = head_gradients(model, trace.pop(), 1, generator)[0]
        for index in progress_bar(blocks, desc="embedding", leave=False):
            hidden = trace.pop()
            with model.block(index, following=index - 1):
                for n in range(len(hidden)):
                    inputs = hidden[n : n + 1].clone().requires_grad_()
                    output = model.call_block(index, inputs, states.calls[index])
                    down = gradients[n : n + 1].to(output)
                    (gradients[n : n + 1],) = torch.autograd.grad(output, inputs, down)
        factor = _factor(model, part, hidden)
        moments.add(factor * gradients.to(model.device))
    found = moments.statistics(model.description.family.embedding)
    return found.hessian / (2 * found.tokens), sum(spreads) / len(spreads)


@torch.no_grad()
def _spread(model: StreamedModel, hidden: Tensor) -> float:
    """Return the mean of ``1 - p`` of tokens drawn behind each state."""
    with model.head() as head:
        found = [1 - torch.softmax(head(x), -1).square().sum(-1).mean() for x in hidden]
    return float(torch.stack(found).mean())


@torch.no_grad()
def _factor(model: StreamedModel, windows: Tensor, hidden: Tensor) -> float:
    """Return what the model multiplies its embedding with (1, or as Gemma does)."""
    weight = model.source.read(f"{model.description.family.embedding}.weight")
    rows = weight[windows[0]].double()
    return float((hidden[0].cpu().double() * rows).sum() / rows.square().sum())


@torch.no_grad()
def head_statistics(
    model: StreamedModel,
    windows: Tensor,
    states: Activations,
    dense: Activations | None = None,
    *,
    team: Team | None = None,
) -> LayerStatistics:
    """Return the statistics of the head's inputs.

    Args:
        model: Has the final norm.
        windows: int64 ``[N, T]`` calibration tokens, of all processes.
        states: Outputs of the last block, for this process's share of them.
        dense: Those of the dense model, where drift is wanted.
        team: The processes.
    """
    moments = Moments()
    streams = [states] if dense is None else [states, dense]
    with model.final_norm() as norm:
        for batch in model.feed(model.batches(states), *streams):
            moments.add(*(norm(hidden) for hidden in batch))
    moments.join_(team or Team())
    found = moments.statistics(model.description.family.head)
    return replace(found, counts=_counts(model, windows))


@torch.no_grad()
def _dense_head(model: StreamedModel, windows: Tensor, team: Team) -> LayerStatistics:
    """Run the dense model over all windows, up to its head."""
    states = model.embed(team.share(windows))
    indices = range(model.description.block_count)
    for index in progress_bar(indices, desc="head", unit="block", leave=False):
        with model.block(index):
            model.advance(index, states)
    return head_statistics(model, windows, states, team=team)
