"""Effects of neurons, against plain autograd and against measured KL."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from export_fixtures import StateDictSource
from gguf_fixtures import describe, tiny_config
from moe_fixtures import KINDS
from pruning_fixtures import WINDOWS
from streaming_fixtures import model_of
from torch import Tensor

from compress.model.experts import unstacked
from compress.model.streaming import StreamedModel
from compress.pruning import gradients
from compress.pruning.gradients import Gradients, gradients_of
from compress.pruning.places import mlp_places


def found_by_us(description: Any, source: Any, windows: Tensor) -> dict[str, Gradients]:
    streamed = StreamedModel(description, source)
    places = [mlp_places(description, i) for i in range(description.block_count)]
    return gradients_of(streamed, windows, places, seed=7)


def labels_of(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return a label for each position, drawn by inverting the distribution."""
    heights = torch.softmax(logits, -1).cumsum(-1)
    levels = torch.rand(len(logits), 1, generator=generator) * heights[:, -1:]
    return (heights < levels).sum(-1)


def by_autograd(model: Any, windows: Tensor) -> dict[str, tuple[Tensor, float]]:
    """Return effect and slope of each MLP: one window at a time, whole model."""
    met: dict[str, tuple[Tensor, Tensor]] = {}
    downs = {n: m for n, m in model.named_modules() if n.endswith("down_proj")}

    def keep(name: str, given: Tensor, output: Tensor) -> None:
        given.retain_grad()
        output.retain_grad()
        met[name] = given, output

    for name, module in downs.items():
        module.register_forward_hook(lambda _m, x, y, n=name: keep(n, x[0], y))
    generator = torch.Generator().manual_seed(7)
    totals = {name: [torch.zeros(m.in_features), 0.0] for name, m in downs.items()}
    for window in windows:
        embedded = model.get_input_embeddings()(window[None]).requires_grad_()
        logits = model(inputs_embeds=embedded).logits[0]
        labels = labels_of(logits.detach(), generator)
        torch.log_softmax(logits, -1).gather(1, labels[:, None]).sum().backward()
        for name, (x, y) in met.items():
            assert x.grad is not None and y.grad is not None
            totals[name][0] += (x * x.grad).detach()[0].square().sum(0)
            totals[name][1] += float(y.grad.square().mean(-1).sum())
    count = windows.numel()
    return {n: (effect / count, slope / count) for n, (effect, slope) in totals.items()}


@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi3"])
def test_effects_are_those_of_plain_autograd(kind: str) -> None:
    model, description, source = model_of(kind)
    ours = found_by_us(description, source, WINDOWS)
    theirs = by_autograd(model.requires_grad_(requires_grad=True), WINDOWS)
    assert {f"{path}.down_proj" for path in ours} == set(theirs)
    for path, found in ours.items():
        effect, slope = theirs[f"{path}.down_proj"]
        torch.testing.assert_close(found.effect, effect, rtol=1e-3, atol=1e-7)
        assert found.slope == pytest.approx(slope, rel=1e-3)


def test_windows_in_turns_give_the_same_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    _, description, source = model_of("llama")
    whole = found_by_us(description, source, WINDOWS)
    monkeypatch.setattr(gradients, "STORED_BYTES", 1)
    monkeypatch.setattr(gradients, "TOKENS_A_CALL", 1)
    for path, found in found_by_us(description, source, WINDOWS).items():
        torch.testing.assert_close(found.effect, whole[path].effect, rtol=1e-4, atol=0)


def test_an_expert_without_tokens_has_no_effect() -> None:
    """And the others have that of the tokens which came."""
    from transformers import AutoModelForCausalLM

    config = tiny_config("mixtral", vocab_size=128, **KINDS["mixtral"])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    first = describe(config, state, None)
    source = unstacked(StateDictSource(state), first.family)
    description = replace(first, tensors=dict(source.tensors()))
    token = WINDOWS[:1, :1]  # one token reaches two of four experts
    found = found_by_us(description, source, token)
    silent = [p for p, g in found.items() if not g.effect.any()]
    assert len(found) == 8
    assert len(silent) == 4


def test_half_the_effect_is_the_kl_of_losing_a_neuron() -> None:
    """In the last block; summed over neurons, within five standard errors."""
    model, description, source = model_of("llama")
    down = model.model.layers[-1].mlp.down_proj.weight
    name = "model.layers.2.mlp.down_proj.weight"
    with torch.no_grad():
        down *= 0.1  # the second order is the whole of it
    source.state[name] = down.detach().clone()
    windows = torch.randint(
        3, 128, (48, 32), generator=torch.Generator().manual_seed(5)
    )
    effect = found_by_us(description, source, windows)["model.layers.2.mlp"].effect
    with torch.no_grad():
        dense = torch.log_softmax(model(windows).logits.double(), -1)
        measured = []
        for neuron in range(0, 96, 4):
            column = down[:, neuron].clone()
            down[:, neuron] = 0
            other = torch.log_softmax(model(windows).logits.double(), -1)
            down[:, neuron] = column
            measured.append(float((dense.exp() * (dense - other)).sum(-1).mean()))
    predicted = effect[::4] / 2
    # A token is a sample of (x g)^2; of a normal g its deviation is 1.4 times the mean,
    # times 2 for the spread of x. 24 neurons share the draws of 1536 tokens.
    error = 2.8 / windows.numel() ** 0.5
    ratio = float(predicted.sum()) / sum(measured)
    assert ratio == pytest.approx(1, abs=5 * error)
    both = torch.stack([predicted.double(), torch.tensor(measured).double()])
    assert float(torch.corrcoef(both.log())[0, 1]) > 0.95
