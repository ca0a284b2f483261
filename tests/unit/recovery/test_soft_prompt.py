"""Virtual tokens: what they add, that weights stay, and that peft loads them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from recovery_fixtures import opened, save_pair, text_of

from compress.config.recover_section import SoftPromptOptions
from compress.core.errors import ConfigError
from compress.recovery.models import WholeModel
from compress.recovery.recover import recover
from compress.recovery.soft_prompt import SoftPrompt, read_prompt


def digests(folder: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.iterdir()
        if file.is_file()
    }


def trained(folder: Path) -> dict[str, object]:
    teacher, student = save_pair(folder)
    options = SoftPromptOptions(
        steps=50, batch=4, tokens=5, evaluations=5, learning_rate=1e-2, dtype="float32"
    )
    return recover(
        opened(student),
        opened(teacher),
        folder / "prompt",
        text=text_of(),
        options=options,
        device="cpu",
        state=folder / "state",
    )


def test_no_virtual_token_is_no_change(tmp_path: Path) -> None:
    _, student = save_pair(tmp_path)
    model = WholeModel(opened(student), device="cpu", dtype=torch.float32)
    ids = text_of().held_out
    torch.testing.assert_close(
        model.states_after(torch.empty(0, 64), ids), model.states(ids)
    )


def test_the_held_out_divergence_falls_and_weights_stay(tmp_path: Path) -> None:
    _, student = save_pair(tmp_path)
    before = digests(student)
    record = trained(tmp_path)
    assert record["kl_after"] < record["kl_before"]  # type: ignore[operator]
    assert (record["method"], record["trained_values"]) == ("soft_prompt", 5 * 64)
    assert {name: digests(student)[name] for name in before} == before
    assert sorted(digests(tmp_path / "prompt")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_peft_computes_the_same(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    trained(tmp_path)
    student, ids = tmp_path / "student", text_of().held_out
    own = SoftPrompt(
        WholeModel(opened(student), device="cpu", dtype=torch.float32), tokens=5
    )
    own.restore({"prompt": read_prompt(tmp_path / "prompt")})
    expected = own.model.head.logits(own.states(ids).flatten(0, 1))
    base = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    with torch.no_grad():
        found = PeftModel.from_pretrained(base, tmp_path / "prompt")(ids).logits
    torch.testing.assert_close(
        found[:, 5:].flatten(0, 1), expected, rtol=1e-4, atol=1e-4
    )


def test_there_are_no_more_virtual_tokens_than_words(tmp_path: Path) -> None:
    _, student = save_pair(tmp_path)
    model = WholeModel(opened(student), device="cpu", dtype=torch.float32)
    with pytest.raises(ConfigError, match="vocabulary"):
        SoftPrompt(model, tokens=129)
