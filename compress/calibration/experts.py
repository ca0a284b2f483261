"""Calibration of experts: few tokens, and what the dense model would have fed them.

An expert sees only the tokens that the router sends to it, so its statistics run over
those alone; gate and up of one expert share an input, down has its own. Where too few
tokens came to say anything about a matrix of C columns, ``max(64, C / 16)`` being the
least, the expert is rounded to nearest instead, with scales of least squared error, and
the report says so.

For the correction of drift an expert's inputs are compared with those of the dense
model *for the same tokens*: the router of the compressed model decides which, and the
dense expert is run on the dense hidden states of just those.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from compress.core import grids, low_rank
from compress.core.contracts import Quantizer
from compress.core.families import Experts, Linear
from compress.core.scheme import Scheme
from compress.core.statistics import LayerStatistics
from compress.core.tensors import QuantizedTensor
from compress.model.experts import SplitExperts

FEW_TOKENS = "rounded to nearest: too few tokens reached this expert"
"""How the note of an expert begins that calibration could say nothing about."""


def tokens_needed(columns: int) -> int:
    """Return the fewest tokens that statistics of ``columns`` inputs are used from."""
    return max(64, -(-columns // 16))


def few_tokens(linear: Linear, statistics: LayerStatistics) -> str | None:
    """Return a note if an expert's layer has to be rounded; ``None`` if it need not."""
    needed = tokens_needed(statistics.columns)
    if linear.expert is None or statistics.tokens >= needed:
        return None
    return f"{FEW_TOKENS} ({statistics.tokens}; {needed} are needed)"


def coded_blindly(
    quantizer: Quantizer, weight: Tensor, scheme: Scheme, note: str
) -> QuantizedTensor:
    """Return codes of ``weight`` ``[R, C]`` as if all inputs were alike.

    On a grid these are the nearest codes, with scales of least error. Tables are the
    quantizer's business: it gets equal importances, or ``H = 2`` times the identity.
    """
    if scheme.codebook is None:
        return round_to_nearest(weight, scheme, note)
    if quantizer.takes_importance(scheme):
        ones = torch.ones(weight.shape[1], device=weight.device)
        coded = quantizer.quantize_by_importance(weight, scheme, ones)
        return replace(coded, notes=(*coded.notes, note))
    alike = LayerStatistics(2 * torch.eye(weight.shape[1], device=weight.device), 1)
    coded = quantizer.quantize(weight, scheme, alike)
    return replace(coded, notes=(*coded.notes, note))


def round_to_nearest(weight: Tensor, scheme: Scheme, note: str) -> QuantizedTensor:
    """Return the nearest codes of ``weight`` ``[R, C]``, with scales of least error."""
    groups = grids.as_groups(weight.float(), scheme)
    parameters = grids.search_parameters(groups, scheme)
    codes = grids.encode(groups, parameters, scheme).view(weight.shape)
    coded = grids.assemble(codes, parameters, scheme, notes=(note,))
    return low_rank.correct(weight, coded)


class DenseExperts:
    """Inputs that the experts of one block, which now run, get from the dense model.

    Args:
        experts: The block's experts, with dense weights until they are quantized.
        states: ``[T, H]``, what the dense model hands to its experts.
    """

    def __init__(self, experts: SplitExperts, states: Tensor) -> None:
        self._experts, self._states = experts, states
        self._inner: dict[int, Tensor] = {}

    def inputs(self, linear: Linear) -> Tensor:
        """Return the dense input ``[n, C]`` of a layer.

        To be asked for gate or up before either is replaced: what down gets follows
        from their dense weights.
        """
        assert linear.expert is not None
        if linear.role == "down" and linear.expert in self._inner:
            return self._inner.pop(linear.expert)
        tokens = self._experts.tokens_of(linear.expert)
        states = self._states[tokens.to(self._states.device)].to(tokens.device)
        inner: Tensor = self._experts.expert(linear.expert).inner(states)
        if linear.role == "down":
            return inner
        self._inner[linear.expert] = inner
        return states


def alike(
    readers: Mapping[str, Linear], name: str, settled: Collection[str]
) -> list[str]:
    """Return inputs that can be settled together, from one of them on.

    Args:
        readers: A layer that reads each input, by name, in order of execution.
        name: An input; if experts read it, the same inputs of those behind follow.
        settled: Inputs whose readers have their codes; what ``down`` gets is known
            where gate and up are among them.
    """
    first = readers[name]
    if first.expert is None:
        return [name]
    is_down = first.role == "down"
    known = {readers[x].expert for x in settled if readers[x].role != "down"}
    found = [
        other
        for other, reader in readers.items()
        if reader.expert is not None
        and reader.expert >= first.expert
        and (reader.role == "down") == is_down
        and (reader.expert in known or not is_down)
    ]
    return sorted(found, key=lambda other: readers[other].expert or 0)


def inputs_of(block: nn.Module, names: Experts | None, linear: Linear) -> Tensor:
    """Return what an expert's layer ``[n, C]`` will be fed, while experts run.

    For ``down`` that follows from the present weights of gate and up.
    """
    assert linear.expert is not None
    experts = _experts_of(block, names)
    states = experts.states_of(linear.expert)
    if linear.role != "down":
        return states
    inner: Tensor = experts.expert(linear.expert).inner(states)
    return inner


def window_sizes(
    block: nn.Module, names: Experts | None, linear: Linear, length: int
) -> list[int]:
    """Return how many tokens of each window reach an expert, while experts run.

    Args:
        block: Has the experts.
        names: Of the experts.
        linear: A layer of the expert.
        length: Tokens of a window.
    """
    assert linear.expert is not None
    tokens = _experts_of(block, names).tokens_of(linear.expert)
    sizes: list[int] = torch.bincount(tokens // length).tolist()
    return sizes


def _experts_of(block: nn.Module, names: Experts | None) -> SplitExperts:
    assert names is not None, "only experts have an expert's layers"
    experts = block.get_submodule(names.container)
    assert isinstance(experts, SplitExperts)
    return experts


def keep_states(
    linears: Sequence[Linear], names: Experts | None, kept: list[Tensor]
) -> dict[str, Callable[[Tensor], None]]:
    """Return hooks that keep what a block hands to its experts, if it has any."""
    if names is None or all(linear.expert is None for linear in linears):
        return {}
    return {names.container: kept.append}


def dense_experts(
    block: nn.Module, names: Experts | None, kept: Sequence[Tensor]
) -> DenseExperts | None:
    """Return the dense inputs of a block's experts, if :func:`keep_states` kept any."""
    if names is None or not kept:
        return None
    experts = block.get_submodule(names.container)
    assert isinstance(experts, SplitExperts)
    return DenseExperts(experts, torch.cat(list(kept)))
