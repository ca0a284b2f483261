"""Rounded inputs reach the layers that are named, and no others."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from moe_fixtures import KINDS, opened, plan_of, save_mixture
from pipeline_fixtures import windows
from streaming_fixtures import WINDOWS, model_of
from torch import nn

from compress.calibration.observe import observe
from compress.core.errors import CalibrationError, SchemeError
from compress.core.inputs import fake_quantize_inputs
from compress.core.scheme import InputScheme
from compress.evaluation.rounding import rounding_of
from compress.model.streaming import StreamedModel
from compress.planning.input_upgrades import shared_inputs


@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi3"])
def test_streamed_logits_equal_hooks_on_the_whole_model(kind: str) -> None:
    model, description, source = model_of(kind)
    scheme = InputScheme("int8", 16)
    names = [*description.linears(), "lm_head"]
    for name in names:
        layer: nn.Module = model.get_submodule(name)
        layer.register_forward_pre_hook(
            lambda _, inputs: (fake_quantize_inputs(inputs[0], scheme),)
        )
    with torch.no_grad():
        expected = torch.stack([model(w[None]).logits[0] for w in WINDOWS])
    rounding = rounding_of(dict.fromkeys(names, scheme), {})
    streamed = StreamedModel(description, source, rounding=rounding)
    ours = torch.stack(list(streamed.logits(WINDOWS)))
    plain = torch.stack(list(StreamedModel(description, source).logits(WINDOWS)))
    loss = (expected - plain).abs().max()
    assert loss > 1e-3
    # Another order of float32 sums moves some values over a tie.
    assert (ours - expected).abs().max() < 0.2 * loss


def test_another_source_does_not_inherit_the_rounding() -> None:
    _, description, source = model_of("llama")
    names = description.linears()
    rounding = rounding_of(dict.fromkeys(names, InputScheme("int4")), {})
    plain = StreamedModel(description, source)
    again = StreamedModel(description, source, rounding=rounding).with_source(source)
    for a, b in zip(plain.logits(WINDOWS), again.logits(WINDOWS), strict=True):
        assert torch.equal(a, b)


def test_watchers_see_inputs_before_they_are_rounded() -> None:
    _, description, source = model_of("llama")
    name = description.linears()[0]
    rounding = rounding_of({name: InputScheme("int4")}, {})
    seen: list[torch.Tensor] = []
    streamed = StreamedModel(description, source, rounding=rounding)
    states = streamed.embed(WINDOWS)
    with streamed.block(0):
        streamed.run_block(0, states, watch={"self_attn.q_proj": seen.append})
    # Fifteen levels a token is far fewer than sixty-four distinct inputs.
    assert len(seen[0][0, 0].unique()) > 15


def test_layers_whose_inputs_are_exact_are_left_out() -> None:
    assert rounding_of({"a": None, "b": InputScheme("int8")}, {}).keys() == {"b"}


def test_two_level_inputs_need_their_calibration() -> None:
    rounding = rounding_of({"a": InputScheme("e2m1", 16, two_level=True)}, {})
    with pytest.raises(SchemeError, match="none was measured"):
        rounding["a"](torch.ones(1, 16))


@pytest.mark.parametrize("tied", [False, True])
def test_largest_inputs_are_those_that_hooks_see(tied: bool) -> None:
    model, description, source = model_of("llama", tied=tied)
    names = [*description.linears()] + ([] if tied else ["lm_head"])
    expected: dict[str, float] = {}

    def spy(name: str) -> None:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            largest = float(inputs[0].abs().max())
            expected[name] = max(expected.get(name, 0.0), largest)

        model.get_submodule(name).register_forward_pre_hook(hook)

    for name in names:
        spy(name)
    with torch.no_grad():
        model(WINDOWS)
    streamed = StreamedModel(description, source)
    found = observe(
        lambda **options: streamed.with_source(source, **options),
        WINDOWS,
        layers=names,
    )
    assert found.kv_scales == {}
    assert found.input_amax == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_observed_and_rounded_like_other_layers(
    kind: str, tmp_path: Path
) -> None:
    save_mixture(tmp_path, kind)
    handle = opened(tmp_path)
    names = [n for n in handle.description.linears() if "experts" in n]
    model = StreamedModel(handle.description, handle.source)
    # Two tokens reach at most four of the eight experts of two blocks.
    few = windows(1, 2)
    found = observe(partial(model.with_source, handle.source), few, layers=names)
    assert found.input_amax.keys() == set(names)
    seen = {
        n: a for n, a in found.input_amax.items() if n.endswith(("w1", "gate_proj"))
    }
    assert min(seen.values()) > 0
    rounding = rounding_of(dict.fromkeys(names, InputScheme("int4")), {})
    rounded = model.with_source(handle.source, rounding=rounding)
    for a, b in zip(model.logits(few), rounded.logits(few), strict=True):
        assert (a - b).abs().max() > 1e-4


def test_experts_are_not_upgraded(tmp_path: Path) -> None:
    save_mixture(tmp_path, "mixtral")
    handle = opened(tmp_path)
    inputs = shared_inputs(plan_of(handle, "rtn", "w8a8"), handle.description)
    assert {x.name for x in inputs} == {"attention", "attention_output"}


def test_inputs_that_are_not_finite_are_named() -> None:
    _, description, source = model_of("llama")
    streamed = StreamedModel(description, source)

    def build(**options: object) -> StreamedModel:
        made = streamed.with_source(source, **options)  # type: ignore[arg-type]
        norm = made.model.get_submodule("model.layers.1.input_layernorm")
        norm.variance_epsilon = float("nan")
        return made

    name = "model.layers.1.self_attn.q_proj"
    with pytest.raises(CalibrationError, match=name):
        observe(build, WINDOWS, layers=[name])
