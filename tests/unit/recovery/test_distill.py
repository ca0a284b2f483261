"""Training brings a student nearer to its teacher, and can be broken off."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from recovery_fixtures import opened, options_of, save_pair, text_of
from safetensors.torch import load_file
from torch import Tensor

from compress.core.errors import CompressError, ConfigError
from compress.recovery import checkpoints, distill, generate
from compress.recovery.distill import Budget, rate
from compress.recovery.losses import linear_kl
from compress.recovery.models import WholeModel
from compress.recovery.recover import recover
from compress.recovery.trained import FullWeights


def trained(folder: Path, name: str = "out", **changes: Any) -> dict[str, Any]:
    if not (folder / "teacher").exists():
        save_pair(folder)
    return recover(
        opened(folder / "student"),
        opened(folder / "teacher"),
        folder / name,
        text=text_of(),
        options=options_of(**changes),
        device="cpu",
        state=folder / "state",
        importances=changes.get("importances"),
    )


def weights(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {k: v for file in files for k, v in load_file(file).items()}


def same(a: Path, b: Path) -> bool:
    mine, other = weights(a), weights(b)
    return all(torch.equal(mine[name], other[name]) for name in mine | other)


def test_the_budget_is_what_is_used_up_first() -> None:
    assert Budget(10, None).used(5, 1e9) == 0.5
    assert Budget(None, 60).used(5, 15) == 0.25
    assert Budget(10, 60).used(5, 45) == 0.75
    assert Budget(10, 60).used(20, 1) == 1


def test_the_rate_rises_and_falls_by_a_cosine() -> None:
    assert [rate(x, 0.1) for x in (0, 0.05, 0.1)] == [0, 0.5, 1]
    assert rate(0.55, 0.1) == pytest.approx(0.5)
    assert rate(1, 0.1) == pytest.approx(0)
    assert rate(0, 0) == 1


@pytest.mark.parametrize("train, norms", [("lora", True), ("full", False)])
def test_the_held_out_divergence_falls(tmp_path: Path, train: str, norms: bool) -> None:
    record = trained(tmp_path, steps=40, train=train, norms=norms)
    assert record["kl_after"] < 0.95 * record["kl_before"]
    measured = record["evaluations"]
    assert record["kl_after"] == min(entry["kl"] for entry in measured)
    assert [entry["step"] for entry in measured] == [0, 10, 20, 30, 40]
    assert record["tokens"] == 40 * 4 * 16
    assert (record["steps"], record["skipped_steps"]) == (40, 0)
    assert record["ranks"] == ([8, 8, 8] if train == "lora" else None)


def test_what_is_written_is_what_was_measured(tmp_path: Path) -> None:
    record = trained(tmp_path, steps=20)
    again = recover(
        opened(tmp_path / "out"),
        opened(tmp_path / "teacher"),
        tmp_path / "twice",
        text=text_of(),
        options=options_of(steps=1),
        device="cpu",
        state=tmp_path / "state",
    )
    assert again["kl_before"] == pytest.approx(record["kl_after"], rel=1e-4)


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    trained(tmp_path, "a")
    trained(tmp_path, "b")
    trained(tmp_path, "c", seed=1)
    assert same(tmp_path / "a", tmp_path / "b")
    assert not same(tmp_path / "a", tmp_path / "c")


def kill_after(monkeypatch: pytest.MonkeyPatch, saves: int) -> None:
    """Let a run die right after it has written so many checkpoints."""
    save, done = checkpoints.Checkpoint.save, [0]

    def dying(self: checkpoints.Checkpoint, *arguments: Any) -> None:
        save(self, *arguments)
        done[0] += 1
        if done[0] == saves:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.Checkpoint, "save", dying)


@pytest.mark.parametrize("train", ["lora", "full"])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: str
) -> None:
    options = {"train": train, "checkpoint_minutes": 0.0, "generated": 6}
    whole = trained(tmp_path, "whole", **options)
    with monkeypatch.context() as patched:
        kill_after(patched, 2)
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path, "broken", **options)
    assert not (tmp_path / "broken").exists()
    resumed = trained(tmp_path, "broken", **options)
    assert same(tmp_path / "whole", tmp_path / "broken")
    for key in ("steps", "kl_before", "kl_after", "best_step", "tokens"):
        assert resumed[key] == whole[key]
    assert not (tmp_path / "state" / "training.safetensors").exists()


def test_a_checkpoint_of_another_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        kill_after(patched, 1)
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path, checkpoint_minutes=0.0)
    with pytest.raises(ConfigError, match="options changed since it began"):
        trained(tmp_path, temperature=2.0)


def test_a_step_that_is_not_finite_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, calls = distill.Training._loss, [0]

    def broken(self: distill.Training, *given: Tensor) -> Tensor:
        calls[0] += 1
        return loss(self, *given) * (math.nan if calls[0] == 2 else 1)

    before, after = [], []
    step = distill.Training._step

    def watched(self: distill.Training, learning_rate: float) -> None:
        before.append(self.learner.snapshot())
        step(self, learning_rate)
        after.append(self.learner.snapshot())

    monkeypatch.setattr(distill.Training, "_loss", broken)
    monkeypatch.setattr(distill.Training, "_step", watched)
    record = trained(tmp_path, steps=4, evaluations=1)
    assert record["skipped_steps"] == 1
    moved = [
        any(not torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(before, after, strict=True)
    ]
    assert moved == [True, False, True, True]
    assert math.isfinite(record["kl_after"])


def test_vanished_gradients_end_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = distill.Training._loss
    monkeypatch.setattr(
        distill.Training, "_loss", lambda self, *given: 0 * loss(self, *given)
    )
    with pytest.raises(CompressError, match="no gradient is left"):
        trained(tmp_path)


def test_the_best_state_is_kept_when_training_spoils_the_student(
    tmp_path: Path,
) -> None:
    record = trained(tmp_path, steps=40, learning_rate=0.5, evaluations=40, patience=3)
    assert record["steps"] < 40  # and patience ends the run
    assert record["kl_after"] <= record["kl_before"]
    if record["best_step"] == 0:
        assert same(tmp_path / "out", tmp_path / "student")


def test_parts_of_a_step_add_up(tmp_path: Path) -> None:
    trained(tmp_path, "one", batch=8, train="full", steps=3)
    trained(tmp_path, "parts", batch=2, accumulate=4, train="full", steps=3)
    one, parts = weights(tmp_path / "one"), weights(tmp_path / "parts")
    for name in one:  # sums in another order; Adam divides small gradients by small
        torch.testing.assert_close(one[name], parts[name], rtol=1e-3, atol=1e-3)


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    trained(tmp_path, "plain")
    trained(tmp_path, "saved", gradient_checkpointing=True)
    for name, tensor in weights(tmp_path / "plain").items():
        other = weights(tmp_path / "saved")[name]
        torch.testing.assert_close(tensor, other, rtol=1e-5, atol=1e-6)


def test_kept_states_of_the_teacher_change_nothing(tmp_path: Path) -> None:
    # 200 windows, 40 a step: the last three of eight steps see known ones.
    given: dict[str, Any] = {"batch": 40, "steps": 8, "train": "full"}
    trained(tmp_path, "plain", **given)
    trained(tmp_path, "kept", teacher="cache", **given)
    for name, tensor in weights(tmp_path / "plain").items():
        other = weights(tmp_path / "kept")[name]
        torch.testing.assert_close(tensor, other, rtol=1e-5, atol=1e-6)


def test_compiled_passes_train_the_same(tmp_path: Path) -> None:
    given: dict[str, Any] = {"train": "full", "steps": 4, "embeddings": True}
    plain = trained(tmp_path, "plain", **given)
    torch._dynamo.reset()  # what other tests have compiled is compiled again
    torch._dynamo.utils.counters.clear()
    limit = torch._dynamo.config.recompile_limit
    found = trained(tmp_path, "compiled", compile=True, **given)
    for one, other in zip(plain["evaluations"], found["evaluations"], strict=True):
        assert other["kl"] == pytest.approx(one["kl"], rel=1e-3)
    assert found["kl_after"] < 0.99 * found["kl_before"]
    # Two widths, and the loss: what was measured ran as it is.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
    assert torch._dynamo.config.recompile_limit == limit


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tied_embedding_is_trained_once_for_both_uses(
    tmp_path: Path, dtype: str
) -> None:
    given = {"train": "full", "steps": 30, "dtype": dtype}
    blocks = trained(tmp_path, "blocks", **given)
    found = trained(tmp_path, "all", embeddings=True, **given)
    assert found["kl_after"] < 0.9 * found["kl_before"]
    before, after = weights(tmp_path / "student"), weights(tmp_path / "all")
    embedding = "model.embed_tokens.weight"
    size = before[embedding].numel()
    assert found["trained_values"] == blocks["trained_values"] + size
    assert before.keys() == after.keys() and "lm_head.weight" not in after
    assert not torch.equal(before[embedding], after[embedding])
    if dtype == "float32":  # what lies in the folder is what was measured
        again = trained(tmp_path, "again", steps=1, learning_rate=1e-12)
        assert again["kl_before"] == blocks["kl_before"]
        (tmp_path / "student").rename(tmp_path / "first")
        (tmp_path / "all").rename(tmp_path / "student")
        again = trained(tmp_path, "more", steps=1, learning_rate=1e-12)
        assert again["kl_before"] == pytest.approx(found["kl_after"], rel=1e-3)


def test_both_uses_of_a_tied_embedding_give_it_gradients(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    teacher, folder = save_pair(tmp_path)
    ids = text_of().held_out
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)(ids)
    loss = torch.nn.functional.kl_div(
        stock(ids).logits.log_softmax(-1).flatten(0, 1),
        logits.logits.detach().log_softmax(-1).flatten(0, 1),
        reduction="batchmean",
        log_target=True,
    )
    loss.backward()
    handles = [opened(folder), opened(teacher)]
    own, original = (
        WholeModel(handle, device="cpu", dtype=torch.float32) for handle in handles
    )
    leaves = FullWeights(own, handles[0], embeddings=True).parameters
    found = linear_kl(own.states(ids), own.head, original.states(ids), original.head)
    found.backward()
    torch.testing.assert_close(found.detach(), loss.detach(), rtol=1e-4, atol=1e-6)
    for name, leaf in leaves.items():
        expected = stock.get_parameter(name).grad
        torch.testing.assert_close(leaf.grad, expected, rtol=1e-3, atol=1e-6)


def test_time_ends_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    step = distill.Training._step

    def slow(self: distill.Training, learning_rate: float) -> None:
        step(self, learning_rate)
        now[0] += 10

    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr(distill.Training, "_step", slow)
    record = trained(tmp_path, steps=None, minutes=1.0)
    assert (record["steps"], record["seconds"]) == (6, 60)


def test_the_teachers_text_counts_against_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    step, write = distill.Training._step, generate.generate_windows

    def slow(self: distill.Training, learning_rate: float) -> None:
        step(self, learning_rate)
        now[0] += 10

    def writing(*arguments: Any, **named: Any) -> Tensor:
        now[0] += 35
        return write(*arguments, **named)

    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr(distill.Training, "_step", slow)
    monkeypatch.setattr(generate, "generate_windows", writing)
    record = trained(tmp_path, steps=None, minutes=1.0, generated=2)
    assert (record["steps"], record["seconds"]) == (3, 30)
    assert record["prepared_seconds"] == 35
    with pytest.raises(ConfigError, match="lower recover.options.generated"):
        trained(tmp_path, steps=None, minutes=0.5, generated=3)


@pytest.mark.parametrize("kind", ["gemma2", "qwen3"])
def test_families_with_rules_of_their_own_are_trained(
    tmp_path: Path, kind: str
) -> None:
    save_pair(tmp_path, kind=kind)
    record = trained(tmp_path, steps=20, ce=0.01)
    assert record["kl_after"] < record["kl_before"]


def test_products_in_bfloat16_train_too(tmp_path: Path) -> None:
    record = trained(tmp_path, steps=40, dtype="bfloat16", train="full")
    assert record["kl_after"] < 0.95 * record["kl_before"]
    assert record["dtype"] == "bfloat16"
