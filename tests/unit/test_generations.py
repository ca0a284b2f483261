"""Greedy texts: those of transformers, whatever the lengths of the prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_fixtures import save_checkpoint
from transformers import AutoModelForCausalLM

from compress.core.inputs import fake_quantize_inputs
from compress.core.scheme import InputScheme
from compress.evaluation.generations import (
    continue_greedily,
    generations,
    round_inputs_,
)
from compress.model.loading import ModelHandle, open_model
from compress.recovery.models import WholeModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generations") / "tiny"
    save_checkpoint(folder, initializer_range=0.3)
    return folder


@pytest.fixture(scope="module")
def handle(folder: Path) -> ModelHandle:
    return open_model(str(folder), cache=folder / "cache")


def whole(handle: ModelHandle) -> WholeModel:
    return WholeModel(handle, device="cpu", dtype=torch.float32)


def test_the_ids_are_those_of_transformers(handle: ModelHandle, folder: Path) -> None:
    prompts = [[5], [7, 11, 2, 30], [40, 3]]
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = [
        stock.generate(
            torch.tensor([prompt]),
            max_new_tokens=9,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    assert continue_greedily(whole(handle), prompts, tokens=9) == expected
    assert len({tuple(ids) for ids in expected}) == 3


def test_a_text_ends_before_the_token_that_ends_it(handle: ModelHandle) -> None:
    tokenizer = Recorded(handle.tokenizer())
    (ids,) = continue_greedily(whole(handle), [tokenizer("a b")["input_ids"]], tokens=8)
    tokenizer.eos_token_id = ids[3]
    load: Callable[[], WholeModel] = lambda: whole(handle)  # noqa: E731
    found = generations({"base": load}, tokenizer, ["a b"], tokens=8)
    wanted = tokenizer.decode(ids[: ids.index(ids[3])], skip_special_tokens=True)
    assert found["prompts"][0]["texts"] == {"base": wanted}


def test_how_many_first_tokens_agree_is_told(handle: ModelHandle) -> None:
    def other() -> WholeModel:
        model = whole(handle)
        with torch.no_grad():
            model.body.layers[1].mlp.down_proj.weight.mul_(-3)
        return model

    tokenizer = handle.tokenizer()
    models = {"base": lambda: whole(handle), "compressed": other}
    found = generations(models, tokenizer, ["a b", "c"], tokens=6)
    for entry in found["prompts"]:
        prompt = [list(tokenizer(entry["prompt"])["input_ids"])]
        base, changed = (
            continue_greedily(load(), prompt, tokens=6)[0] for load in models.values()
        )
        same = [a == b for a, b in zip(base, changed, strict=True)]
        first = same.index(False) if False in same else len(same)
        assert entry["same_tokens"] == {"compressed": first}
    same_model = generations(
        {"base": models["base"], "compressed": models["base"]},
        tokenizer,
        ["a b"],
        tokens=6,
    )["prompts"][0]
    assert same_model["texts"]["base"] == same_model["texts"]["compressed"]


def test_inputs_are_rounded_where_a_runtime_rounds_them(handle: ModelHandle) -> None:
    name = "model.layers.0.mlp.down_proj"
    model, plain = whole(handle), whole(handle)
    scheme = InputScheme("int8")
    seen: list[torch.Tensor] = []

    def rewrite(inputs: torch.Tensor) -> torch.Tensor:
        seen.append(inputs)
        return fake_quantize_inputs(inputs, scheme=scheme, amax=None)

    round_inputs_(model.module, {name: rewrite})
    x = torch.randn(1, 3, seen_width(plain, name))
    layers: Any = [m.module.get_submodule(name) for m in (model, plain)]
    expected = layers[1](fake_quantize_inputs(x, scheme=scheme, amax=None))
    assert torch.equal(layers[0](x), expected)
    assert not torch.equal(expected, layers[1](x)) and len(seen) == 1


def seen_width(model: WholeModel, name: str) -> int:
    layer: Any = model.module.get_submodule(name)
    return int(layer.in_features)


class Recorded:
    """A tokenizer whose end can be chosen."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id: int | None = None

    def __call__(self, text: str) -> Any:
        return self._tokenizer(text)

    def decode(self, ids: list[int], **options: Any) -> str:
        text: str = self._tokenizer.decode(ids, **options)
        return text
