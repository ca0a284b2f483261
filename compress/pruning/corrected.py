"""Repairing towards the original's residual stream, in the model as pruned so far.

Least squares on the original's activations leaves two things alone: that a block sees
other inputs once the blocks before it are pruned, and that their errors travel on. Here
both models run side by side. With ``h`` the stream before a block, ``m`` behind its
attention and ``n`` behind its MLP, primes for the pruned model, ``z`` and ``x`` the
inputs of ``o_proj`` and ``down`` in it,

    o_proj:  min E|m - h + trust (h - h') - W z|^2
    down:    min E|n - m + trust (m - m') - W x_S|^2

so that a block takes over part of the error that reaches it. With ``trust = 1`` all of
the stream would be restored as far as the text goes; less is better where the text is
short, since an error is no function of what the block sees.

Source: the target with the stream's error in it is that of SliceGPT's and GPTQ's
successors for linear layers (for example arXiv 2504.02692, GPTAQ); trust is ours.
Limits: families with a norm between a sub-layer and the stream (Gemma), and mixtures of
experts, whose outputs are weighed by a router, are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.calibration.collect import add_product_
from compress.core.artifact import ModelDescription
from compress.core.compensation import least_squares
from compress.core.errors import ConfigError
from compress.model.states import Activations, allocate
from compress.model.streaming import StreamedModel
from compress.pruning.places import MLPPlace
from compress.pruning.statistics import NeuronMoments

_TRUST = 0.5
_ATTENTION_RIDGE = 0.1


@dataclass
class Sides:
    """Streams of the original and of the pruned model at the same block.

    Attributes:
        model: Runs either; a loaded block has the weights of one at a time.
        dense: Of the original.
        pruned: Of the model as pruned so far.
    """

    model: StreamedModel
    dense: Activations
    pruned: Activations


class _Cross:
    """Sums over tokens of ``t x^T``, and of ``x x^T`` where nobody else counts it."""

    def __init__(self) -> None:
        self.tokens = 0
        self._cross: Tensor | None = None
        self._gram: Tensor | None = None

    def add(self, targets: Tensor, inputs: Tensor, *, gram: bool) -> None:
        """Count tokens: ``targets`` ``[..., R]``, ``inputs`` ``[..., C]``."""
        x = inputs.reshape(-1, inputs.shape[-1])
        t = targets.reshape(-1, targets.shape[-1]).to(x)
        if self._cross is None:
            self._cross = torch.zeros(t.shape[1], x.shape[1], device=x.device)
            self._gram = torch.zeros(x.shape[1], x.shape[1], device=x.device)
        assert self._gram is not None
        add_product_(self._cross, t, x)
        if gram:
            add_product_(self._gram, x, x)
        self.tokens += len(x)

    def means(self) -> tuple[Tensor, Tensor]:
        """Return mean ``t x^T`` and ``x x^T``."""
        assert self._cross is not None and self._gram is not None
        return self._cross / self.tokens, self._gram / self.tokens


class _Taps:
    """Hooks that keep what a block's ``o_proj`` and ``down`` are given and return."""

    def __init__(self, block: nn.Module, output: str, down: str) -> None:
        self.attention: tuple[Tensor, Tensor] | None = None
        self.mlp: Tensor | None = None
        self._hooks = [
            block.get_submodule(output).register_forward_hook(self._keep_attention),
            block.get_submodule(down).register_forward_pre_hook(self._keep_mlp),
        ]

    def _keep_attention(self, _: nn.Module, inputs: tuple[Any, ...], out: Any) -> None:
        self.attention = inputs[0], out

    def _keep_mlp(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.mlp = inputs[0]

    def taken(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return inputs and outputs of ``o_proj``, and inputs of ``down``."""
        assert self.attention is not None and self.mlp is not None
        return *self.attention, self.mlp

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()


@torch.no_grad()
def observed(
    sides: Sides, block: nn.Module, place: MLPPlace, *, stored: torch.dtype
) -> tuple[NeuronMoments, Tensor]:
    """Move the original on by a block, and return what repairs the pruned model's.

    Args:
        sides: Streams at the block's input; the original's is at its output afterwards.
        block: Loaded, with the original's weights; gets the new ``o_proj``.
        place: Its MLP.
        stored: What weights are rounded to in the checkpoint.

    Returns:
        Moments of the inputs of ``down`` in the pruned model, with ``cross``; and the
        new weights of ``o_proj``, ``[H, C]``.
    """
    model, dense, pruned = sides.model, sides.dense, sides.pruned
    index = place.block
    rows, call = model.batches(dense), dense.calls[index]
    family = model.description.family
    output = family.with_role("o")
    assert output is not None
    middle = allocate(dense.hidden.shape, dense.hidden.dtype, model.device)
    after = Activations(torch.empty_like(dense.hidden), dense.calls)
    between = Activations(middle, dense.calls)
    taps = _Taps(block, output.path, place.down_path)
    try:
        for part, (h,) in zip(rows, model.feed(rows, dense), strict=True):
            n = model.call_block(index, h, call)
            model.store(after, part, n)
            model.store(between, part, h + taps.taken()[1])
        attention = _Cross()
        for h_pruned, h, m in model.feed(rows, pruned, dense, between):
            model.call_block(index, h_pruned, call)
            z = taps.taken()[0]
            attention.add(m - h + _TRUST * (h - h_pruned), z, gram=True)
        layer = block.get_submodule(output.path).get_parameter("weight")
        cross, gram = attention.means()
        kept = torch.arange(gram.shape[0], device=gram.device)
        solved = least_squares(layer.data, gram, kept, _ATTENTION_RIDGE, cross)
        solved = solved.to(stored)
        layer.data = solved.to(layer)
        moments, mlp = NeuronMoments(), _Cross()
        for h_pruned, m, n in model.feed(rows, pruned, between, after):
            model.call_block(index, h_pruned, call)
            _, added, x = taps.taken()
            moments.add(x)
            mlp.add(n - m + _TRUST * (m - h_pruned - added), x, gram=False)
    finally:
        taps.close()
    dense.hidden = after.hidden
    moments.cross = mlp.means()[0]
    return moments, solved


def check_corrected(model: ModelDescription) -> None:
    """Raise unless the stream of a family is what its sub-layers add to.

    Raises:
        ConfigError: Names the family and what to set.
    """
    mixed = any(model.experts(i) for i in range(model.block_count))
    if model.family.output_norms or mixed:
        raise ConfigError(
            f"prune.propagate corrected: not for {model.family.name}, whose MLP does "
            "not add to the residual stream directly; set propagate: dense"
        )
