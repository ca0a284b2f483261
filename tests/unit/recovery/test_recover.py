"""The folder that recovery writes, and what it refuses."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from recovery_fixtures import opened, options_of, save_pair, text_of
from safetensors.torch import load_file, save_file

from compress.config import load_config, recover_options
from compress.config.recover_section import DistillOptions, SoftPromptOptions
from compress.core.errors import CheckpointError, ConfigError
from compress.preparing import check_inputs
from compress.recovery.folder import check_folder, check_weights
from compress.recovery.models import WholeModel
from compress.recovery.recover import recover
from compress.recovery.trained import FullWeights


def run(student: Path, teacher: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    importances = changes.pop("importances", None)
    return recover(
        opened(student),
        opened(teacher),
        folder / "out",
        text=text_of(),
        options=options_of(**changes),
        device="cpu",
        state=folder / "state",
        importances=importances,
    )


def test_the_folder_is_laid_out_as_the_students(tmp_path: Path) -> None:
    teacher, student = save_pair(tmp_path)
    (student / "tokenizer.json").write_text("{}")
    run(student, teacher, tmp_path)
    names = sorted(file.name for file in student.iterdir() if file.is_file())
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == names
    assert len([name for name in names if name.endswith(".safetensors")]) > 2
    for name in names:
        before, after = student / name, tmp_path / "out" / name
        if not name.endswith(".safetensors"):
            assert after.read_bytes() == before.read_bytes()
            continue
        own, new = load_file(before), load_file(after)
        assert list(own) == list(new)
        for key, tensor in own.items():
            assert (tensor.dtype, tensor.shape) == (new[key].dtype, new[key].shape)
            frozen = "embed_tokens" in key or "lm_head" in key
            assert torch.equal(tensor, new[key]) == frozen


def test_transformers_opens_it_and_computes_the_same(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    teacher, student = save_pair(tmp_path)
    run(student, teacher, tmp_path)
    out, ids = tmp_path / "out", text_of().held_out
    stock = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ours = WholeModel(opened(out), device="cpu", dtype=torch.float32)
    with torch.no_grad():
        found = ours.head.logits(ours.states(ids).flatten(0, 1))
        expected = stock(ids).logits.flatten(0, 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_ranks_follow_importances(tmp_path: Path) -> None:
    teacher, student = save_pair(tmp_path)
    record = run(student, teacher, tmp_path, steps=1, importances=[1.0, 2.0, 3.0])
    assert record["ranks"] == [4, 8, 12]
    assert json.loads(json.dumps(record)) == record


def test_a_block_has_one_importance(tmp_path: Path) -> None:
    teacher, student = save_pair(tmp_path)
    with pytest.raises(ConfigError, match="2 importances for 3 blocks"):
        run(student, teacher, tmp_path, importances=[1.0, 2.0])


def test_both_models_share_a_vocabulary(tmp_path: Path) -> None:
    teacher, student = save_pair(tmp_path)
    config = json.loads((teacher / "config.json").read_text())
    config["vocab_size"] = 64
    (teacher / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="128 tokens and the original's 64"):
        run(student, teacher, tmp_path)


def test_a_weight_under_another_name_is_found_before_training(tmp_path: Path) -> None:
    _, student = save_pair(tmp_path)
    handle = opened(student)
    model = WholeModel(handle, device="cpu", dtype=torch.float32)
    name = "model.layers.1.mlp.up_proj.weight"
    for file in student.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors["other"] = tensors.pop(name)
            save_file(tensors, file)
    with pytest.raises(CheckpointError, match=re.escape(name)):
        check_weights(student, FullWeights(model, handle))


def test_a_tied_head_that_is_stored_too_is_found_before_training(
    tmp_path: Path,
) -> None:
    _, student = save_pair(tmp_path)
    handle = opened(student)
    model = WholeModel(handle, device="cpu", dtype=torch.float32)
    whole = FullWeights(model, handle, embeddings=True)
    check_weights(student, whole)
    embedding = model.module.get_parameter("model.embed_tokens.weight").detach()
    extra = {"lm_head.weight": embedding.clone()}
    save_file(extra, student / "model-extra.safetensors")
    check_weights(student, FullWeights(model, handle))
    with pytest.raises(CheckpointError, match="lm_head.weight is stored beside"):
        check_weights(student, whole)


def test_compiling_wants_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, student = save_pair(tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="recover.options.compile.*no-such-compiler"):
        run(student, teacher, tmp_path, compile=True)
    stages: dict[str, Any] = {
        "recover": {"prune": {"sparsity": 0.2}},
        "tune": {"quantize": {"method": "rtn", "scheme": "int2-g32"}},
    }
    for name, before in stages.items():  # a run says so before it begins
        whole = {"model": {"path": "x"}, "run": {"device": "cpu"}, **before}
        whole[name] = {"options": {"compile": True}}
        with pytest.raises(ConfigError, match=f"{name}.options.compile.*needs a comp"):
            check_inputs(load_config(whole))


def test_the_student_is_a_folder(tmp_path: Path) -> None:
    teacher, student = save_pair(tmp_path)
    handle = opened(student)
    gone = replace(handle, description=replace(handle.description, assets=None))
    with pytest.raises(CheckpointError, match="folder"):
        check_folder(gone.description)


def section(**recover: Any) -> Any:
    prune = {"sparsity": 0.2}
    data = {"model": {"path": "x"}, "prune": prune, "recover": recover}
    return load_config(data).recover


def test_recovery_wants_something_to_recover_from() -> None:
    with pytest.raises(ConfigError, match="recover: nothing was removed.*add prune"):
        load_config({"model": {"path": "x"}, "recover": {}})


def test_a_config_names_method_and_options() -> None:
    found = recover_options(section())
    assert isinstance(found, DistillOptions)
    assert (found.train, found.seconds) == ("lora", 600)
    found = recover_options(section(options={"steps": 5, "train": "full"}))
    assert (found.steps, found.seconds) == (5, None)
    found = recover_options(section(method="soft_prompt", options={"tokens": 3}))
    assert isinstance(found, SoftPromptOptions)
    assert found.learning_rate == 1e-3


@pytest.mark.parametrize(
    "given, message",
    [
        ({"method": "destill"}, "recover.method: .*did you mean 'distill'"),
        ({"options": {"rang": 8}}, "recover.options.rang: .*did you mean 'rank'"),
        ({"options": {"rank": 7}}, "recover.options.rank"),
        ({"options": {"kl": 0.0}}, "kl and ce are both 0"),
        ({"options": {"embeddings": True}}, "embeddings are .*train: full"),
        (
            {"options": {"compile": True, "gradient_checkpointing": True}},
            "compile does not go with gradient_checkpointing",
        ),
        (
            {"options": {"compile": True, "shard": True}},
            "compile does not go with shard",
        ),
        (
            {"options": {"teacher": "cache", "shard": True}},
            "with shard all compute together",
        ),
        ({"method": "soft_prompt", "options": {"rank": 8}}, "recover.options.rank"),
    ],
)
def test_a_wrong_config_is_told_at_its_place(
    given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        section(**given)
