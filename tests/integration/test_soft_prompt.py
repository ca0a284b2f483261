"""Virtual tokens learned in a run: after the codes, for peft, and for other sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pipeline_fixtures import Ground, digests, save_checkpoint, weights_of, write_text

import compress
from compress.core.errors import CompressError, ConfigError
from compress.model.loading import open_model
from compress.recovery.distill import Training
from compress.recovery.soft_prompt import read_prompt
from compress.scoring import streamed
from compress.served_folder import Served

OPTIONS = {
    "steps": 30,
    "tokens": 4,
    "samples": 40,
    "held_out": 8,
    "sequence_length": 32,
    "batch": 4,
    "learning_rate": 5e-2,
    "evaluations": 4,
}
QUANTIZE = {"method": "rtn", "scheme": "int2-g32"}  # enough is lost to win some back


def recover(**changes: Any) -> dict[str, Any]:
    return {"method": "soft_prompt", "options": {**OPTIONS, **changes}}


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    folder = tmp_path_factory.mktemp("prompt")
    save_checkpoint(folder / "model", initializer_range=0.15)
    return Ground(folder, folder / "model", write_text(folder))


@pytest.fixture(scope="module")
def plain(ground: Ground) -> compress.Result:
    """A run without a prompt."""
    return compress.run(ground.config("plain", quantize=QUANTIZE))


@pytest.fixture(scope="module")
def prompted(ground: Ground) -> compress.Result:
    """The same run with one."""
    return compress.run(ground.config("run", quantize=QUANTIZE, recover=recover()))


def test_the_prompt_brings_the_quantized_model_nearer_and_changes_no_weight(
    plain: compress.Result, prompted: compress.Result
) -> None:
    record, metrics = prompted.report["recovery"], prompted.report["metrics"]
    assert record["kl_after"] < min(record["kl_without"], record["kl_before"])
    assert metrics["with_prompt"]["kl"] < metrics["compressed"]["kl"]
    assert metrics["compressed"] == plain.report["metrics"]["compressed"]
    exports = [r.workdir / "export" / "safetensors" for r in (plain, prompted)]
    assert weights_of(exports[0]) == weights_of(exports[1])


def test_the_report_says_what_serving_it_costs(prompted: compress.Result) -> None:
    served = prompted.report["recovery"]["served"]
    assert (served["tokens"], served["cannot_carry"]) == (4, [])
    room = served["context_tokens"]
    assert any(
        f"takes 4 of {room} tokens of context" in w for w in prompted.report["warnings"]
    )
    assert not any("does not help" in w for w in prompted.report["warnings"])
    page = (prompted.workdir / "report.html").read_text()
    assert "Recovery by soft prompt" in page and "With the soft prompt" in page


def test_peft_puts_it_before_the_exported_model(
    ground: Ground, prompted: compress.Result
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    export = prompted.workdir / "export" / "safetensors"
    handle = open_model(str(export), cache=ground.folder / "cache")
    ids = torch.arange(3, 27).reshape(2, 12)
    prompt = read_prompt(prompted.workdir / "prompt")
    own = torch.stack(list(streamed(handle, Served(prompt=prompt)).logits(ids)))
    base = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, prompted.workdir / "prompt")
    with torch.no_grad():
        found = model(ids).logits[:, 4:]
    torch.testing.assert_close(found, own, rtol=1e-3, atol=1e-3)


def test_it_is_evaluated_on_another_size_of_the_model(
    ground: Ground, prompted: compress.Result
) -> None:
    other = ground.run("int4", quantize={"method": "rtn", "scheme": "int4-g32"})
    found = compress.evaluate(
        other / "export" / "safetensors",
        base=ground.model,
        texts=[str(ground.text)],
        windows=2,
        sequence_length=32,
        prompt=prompted.workdir / "prompt",
    )
    (with_it,), (without,) = (
        list(found[key].values()) for key in ("texts", "without_prompt_texts")
    )
    assert with_it["tokens"] == without["tokens"]
    assert with_it["kl"] != without["kl"]
    start = {"start": str(prompted.workdir / "prompt"), "tokens": None, "steps": 5}
    begun = compress.run(
        ground.config(
            "begun",
            quantize={"method": "rtn", "scheme": "int4-g32"},
            recover=recover(**start),
            export=None,
        )
    )
    assert begun.report["recovery"]["served"]["tokens"] == 4
    assert begun.report["metrics"]["compressed"]["kl"] == pytest.approx(without["kl"])


def test_it_is_learned_for_a_pruned_model_and_said_to_be_lost_in_gguf(
    ground: Ground,
) -> None:
    found = compress.run(
        ground.config(
            "pruned",
            prune={"method": "maw", "sparsity": 0.5, "round_to": 32},
            quantize=None,
            recover=recover(steps=10),
            export=[{"format": "gguf", "embedding": "f16"}],
        )
    )
    assert found.report["pruning"]["folder"] == "pruned"
    assert found.report["recovery"]["served"]["cannot_carry"] == ["gguf"]
    for said in ("cannot carry the soft prompt", "does not help"):
        assert any(said in w for w in found.report["warnings"])
    gguf = next((found.workdir / "export" / "gguf").glob("*.gguf"))
    with pytest.raises(ConfigError, match="without soft prompts"):
        compress.evaluate(gguf, prompt=found.workdir / "prompt")


def test_a_run_goes_on_and_trains_again_only_if_it_must(
    ground: Ground, prompted: compress.Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = recover(checkpoint_minutes=0)
    config = ground.config("resumed", quantize=QUANTIZE, recover=whole)
    workdir, step, taken = ground.folder / "resumed", Training._step, []

    def stopped(self: Training, rate: float) -> None:
        taken.append(rate)
        if len(taken) == 20:
            raise KeyboardInterrupt
        step(self, rate)

    monkeypatch.setattr(Training, "_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        compress.run(config)
    codes = digests(workdir / "blocks")
    compress.run(config, resume=True)
    assert 30 < len(taken) < 20 + 30  # from the last checkpoint, not from the start
    prompt = digests(workdir / "prompt")
    assert prompt == digests(prompted.workdir / "prompt")
    compress.run(config, resume=True)
    assert digests(workdir / "prompt") == prompt
    config["recover"] = recover(steps=8)
    with pytest.raises(ConfigError, match="recover changed"):
        compress.run(config, resume=True)
    report = compress.run(config, redo=True).report
    assert report["recovery"]["steps"] == 8
    assert digests(workdir / "prompt") != prompt
    assert digests(workdir / "blocks") == codes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quantize": None}, "add prune or quantize"),
        ({"recover": recover(start="x")}, "give one of them"),
        ({"recover": recover(tokens=None, start="x")}, "no soft prompt here"),
        ({"recover": recover(sequence_length=100000)}, "positions of the model"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(
    ground: Ground, changes: dict[str, Any], said: str
) -> None:
    config = ground.config("bad", **{"quantize": QUANTIZE, "recover": recover()})
    config = {k: v for k, v in (config | changes).items() if v is not None}
    with pytest.raises(CompressError, match=said):
        compress.run(config)
    assert not (ground.folder / "bad" / "blocks").exists()
