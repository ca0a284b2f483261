"""Inputs of a block, met in order, by one batch and by many."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import pytest
import torch
from streaming_fixtures import model_of
from torch import Tensor, nn

from compress.calibration.walk import BlockWalk, InputWatch, Measure, Settle
from compress.core.families import Linear, family_of
from compress.core.statistics import LayerStatistics
from compress.model.streaming import StreamedModel

LLAMA = family_of("llama").linears
NAMES = ["attention", "attention_output", "mlp", "mlp_output"]


class Block(nn.Module):
    """The linears of a Llama block in a row, so that each input tells the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        for number, linear in enumerate(LLAMA):
            parent, name = linear.path.split(".")
            layer = nn.Linear(1, 1, bias=False)
            layer.weight.data.fill_(number + 2)
            getattr(self, parent).add_module(name, layer)
        self.ran: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        for linear in LLAMA:
            x = self.get_submodule(linear.path)(x)
            self.ran.append(linear.role)
        return x


def running(block: Block, x: float) -> Callable[[], Tensor]:
    return lambda: block(torch.tensor([float(x)]))


def test_each_shared_input_is_met_once_before_its_layers_run() -> None:
    block, seen = Block(), []
    watch = InputWatch(block, LLAMA)
    watch.run(running(block, 1), lambda name, _x: seen.append((name, len(block.ran))))
    assert seen == list(zip(NAMES, (0, 3, 4, 6), strict=True))


def test_a_run_for_one_input_goes_no_further() -> None:
    block = Block()
    watch = InputWatch(block, LLAMA)
    assert float(watch.until("mlp", running(block, 1)).detach()) == 2 * 3 * 4 * 5
    assert block.ran == ["q", "k", "v", "o"]


def test_other_runs_may_happen_where_an_input_is_met() -> None:
    block = Block()
    watch = InputWatch(block, LLAMA)
    seen: list[tuple[str, float]] = []

    def meet(name: str, x: Tensor) -> None:
        other = watch.until(name, running(block, 10))
        seen.append((name, float((other / x).detach())))
        if name == "attention_output":  # what comes later sees the new weight
            block.self_attn.o_proj.weight.data.fill_(-1)

    output = watch.run(running(block, 1), meet)
    assert seen == [(name, 10.0) for name in NAMES]
    assert float(output.detach()) == -2 * 3 * 4 * 6 * 7 * 8


def test_closed_hooks_show_nothing() -> None:
    block, seen = Block(), []
    watch = InputWatch(block, LLAMA)
    watch.close()
    watch.run(running(block, 1), lambda name, _x: seen.append(name))
    assert seen == []


WINDOWS = torch.randint(3, 128, (5, 24), generator=torch.Generator().manual_seed(1))
PARTS = [slice(0, 2), slice(2, 4), slice(4, 5)]


def shrinking(
    walk: BlockWalk,
    linears: Sequence[Linear],
    found: dict[str, LayerStatistics],
    prefix: str,
) -> Settle:
    """Return what notes statistics and makes the layers' weights smaller."""

    def settle(inputs: Mapping[str, Measure]) -> None:
        ((name, measure),) = inputs.items()
        found[prefix + name] = measure().statistics(name)
        for linear in linears:
            if linear.input == name:
                walk.replace(linear.path, walk.weight(linear.path) * 0.7)

    return settle


def walked(
    kind: str, drift: bool
) -> tuple[dict[str, LayerStatistics], list[Tensor], list[int]]:
    """Send windows through two blocks whose weights shrink as their inputs are met.

    Returns:
        Statistics of each input, final states, and the windows of each forward pass.
    """
    _, description, source = model_of(kind)
    model = StreamedModel(description, source)
    streams = [model.embed(WINDOWS)]
    streams += [model.copy(streams[0])] if drift else []
    linears = description.family.linears
    found: dict[str, LayerStatistics] = {}
    passes: list[int] = []
    for index in (0, 1):
        with model.block(index) as block:
            block.register_forward_pre_hook(lambda _m, x: passes.append(len(x[0])))
            walk = BlockWalk(model, index, block, *streams)
            settle = shrinking(walk, linears, found, f"{index}.")
            walk.run(linears, settle)
    return found, [stream.hidden for stream in streams], passes


@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi3"])
@pytest.mark.parametrize("drift", [False, True])
def test_many_batches_give_what_one_gives(
    kind: str, drift: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, ends, passes = walked(kind, drift)
    assert set(passes) == {len(WINDOWS)}
    assert len(passes) == 2 * (1 + drift)  # one for each block and model
    monkeypatch.setattr("compress.model.streaming.batches", lambda *_: PARTS)
    found, others, passes = walked(kind, drift)
    assert max(passes) == 2
    assert list(found) == list(expected)
    for name, one in expected.items():
        many = found[name]
        assert many.tokens == one.tokens
        assert torch.allclose(many.hessian, one.hessian, rtol=1e-4, atol=1e-3), name
        assert (many.drift is None) == (one.drift is None) == (not drift)
        if many.drift is not None and one.drift is not None:
            # Nothing has moved before the first block.
            assert float(one.drift.abs().max()) > 0 or name == "0.attention"
            assert torch.allclose(many.drift, one.drift, rtol=1e-4, atol=1e-3), name
    for end, other in zip(ends, others, strict=True):
        assert torch.allclose(end, other, atol=1e-5)


def test_a_block_measured_at_once_has_its_own_inputs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Statistics are of the weights it came with, outputs of those it was given."""
    monkeypatch.setattr("compress.model.streaming.batches", lambda *_: PARTS)
    _, description, source = model_of("llama")
    model = StreamedModel(description, source)
    states = model.embed(WINDOWS)
    dense = model.copy(states)
    dense.hidden *= 1.1
    linears = description.family.linears
    found: dict[str, LayerStatistics] = {}
    with model.block(0) as block, torch.no_grad():
        seen: list[dict[str, Tensor]] = [{}, {}]
        whole = []
        for hidden, inputs in zip((states.hidden, dense.hidden), seen, strict=True):
            watch = InputWatch(block, linears)
            forward = partial(model.call_block, 0, hidden.clone(), states.calls[0])
            whole.append(watch.run(forward, inputs.__setitem__))
            watch.close()
        walk = BlockWalk(model, 0, block, states, dense)

        def settle(inputs: Mapping[str, Measure]) -> None:
            found.update({name: m().statistics(name) for name, m in inputs.items()})
            for linear in linears:
                walk.replace(linear.path, walk.weight(linear.path) * 0.7)

        before = states.hidden.clone()
        walk.run_at_once(linears, settle)
        small = model.call_block(0, before, states.calls[0])
    assert torch.allclose(dense.hidden, whole[1], atol=1e-5)
    assert torch.allclose(states.hidden, small, atol=1e-5)
    assert not torch.allclose(small, whole[0], atol=1e-2)
    for name, one in found.items():
        x, y = (inputs[name].flatten(0, -2).double() for inputs in seen)
        assert torch.allclose(one.hessian.double(), 2 * x.T @ x, rtol=1e-4, atol=1e-3)
        assert one.drift is not None
        drift = 2 * (y - x).T @ x
        assert torch.allclose(one.drift.double(), drift, rtol=1e-4, atol=1e-3)
