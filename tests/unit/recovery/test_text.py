"""Windows that recovery trains on: their order, and those that the teacher writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_fixtures import save_checkpoint, write_text
from recovery_fixtures import opened, options_of, save_pair, text_of

from compress.recovery import generate
from compress.recovery.generate import generate_windows, stored_windows
from compress.recovery.models import WholeModel
from compress.recovery.text import Order, load_recovery_text


def test_held_out_windows_are_others(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model")
    options = options_of(samples=20, held_out=5, sequence_length=16)
    tokenizer = opened(tmp_path / "model").tokenizer()
    text = load_recovery_text(str(write_text(tmp_path)), tokenizer, options)
    assert (text.train.shape, text.held_out.shape) == ((20, 16), (5, 16))
    rows = {tuple(row) for row in text.train.tolist()}
    assert not any(tuple(row) in rows for row in text.held_out.tolist())


def test_each_epoch_takes_every_window_once_in_an_order_of_its_own() -> None:
    order = Order(count=10, batch=4, seed=0)
    rows = torch.cat([order.rows(step) for step in range(5)])
    first, second = rows[:10].tolist(), rows[10:].tolist()
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert Order(10, 4, seed=1).rows(0).tolist() != first[:4]
    assert Order(10, 2, seed=0).rows(1).tolist() == first[2:4]


def test_a_step_may_be_larger_than_the_text() -> None:
    rows = Order(count=3, batch=7, seed=0).rows(1)
    assert len(rows) == 7 and set(rows.tolist()) == {0, 1, 2}


def teacher(folder: Path, kind: str = "llama") -> WholeModel:
    path, _ = save_pair(folder, kind=kind)
    return WholeModel(opened(path), device="cpu", dtype=torch.float32)


def test_the_teacher_writes_what_it_finds_likely(tmp_path: Path) -> None:
    model, text = teacher(tmp_path), text_of().train
    made = generate_windows(model, text, count=40, seed=0)
    assert (made.shape, made.dtype) == ((40, 16), torch.int64)

    def loss(windows: torch.Tensor) -> float:
        logits = model.head.logits(model.states(windows).flatten(0, 1))
        logp = logits.view(len(windows), 16, -1).log_softmax(-1)[:, :-1]
        return -float(logp.gather(2, windows[:, 1:, None]).mean())

    assert loss(made) < loss(text[:40]) - 0.1  # the text is random


def test_samples_follow_the_teachers_distribution(tmp_path: Path) -> None:
    model = teacher(tmp_path)
    text = torch.full((1, 2), 5)
    made = generate_windows(model, text, count=6000, seed=0)
    assert made[:, 0].tolist() == [5] * 6000  # the prompt
    logits = model.head.logits(model.states(made[:1, :1])[0])
    expected = logits.softmax(-1)[0]
    found = torch.bincount(made[:, 1], minlength=128) / 6000
    # Total variation of n draws of k values is about sqrt(k / (2 pi n)) at most.
    assert 0.5 * float((found - expected).abs().sum()) < 2 * (128 / 6.28 / 6000) ** 0.5


def test_windows_begin_as_those_of_the_text_do(tmp_path: Path) -> None:
    model, text = teacher(tmp_path), text_of().train.clone()
    text[:, 0] = 7
    made = generate_windows(model, text, count=5, seed=0)
    assert made[:, 0].tolist() == [7] * 5
    assert set(made[:, 1].tolist()) <= set(text[:, 1:].flatten().tolist())


def test_a_seed_decides_what_is_written_and_a_file_keeps_it(tmp_path: Path) -> None:
    model, text = teacher(tmp_path), text_of().train
    first = generate_windows(model, text, count=8, seed=0)
    assert torch.equal(generate_windows(model, text, count=8, seed=0), first)
    assert not torch.equal(generate_windows(model, text, count=8, seed=1), first)
    file = tmp_path / "kept.safetensors"
    kept = stored_windows(lambda: model, text, count=8, seed=0, file=file)
    again = stored_windows(lambda: model, text, count=8, seed=9, file=file)
    assert torch.equal(kept, first) and torch.equal(again, first)


def test_prompts_are_half_a_window_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    go_on = generate._continue

    def watched(*given: Any) -> torch.Tensor:
        found.append(given[2])
        return go_on(*given)

    monkeypatch.setattr(generate, "_continue", watched)
    # Batches are of one size; what is over is dropped.
    monkeypatch.setattr(generate, "_batch", lambda *_: 3)
    made = generate_windows(teacher(tmp_path), text_of().train, count=7, seed=0)
    assert (len(made), [len(lengths) for lengths in found]) == (7, [3, 3, 3])
    assert torch.cat(found).tolist() == [1, 2, 4, 8, 1, 2, 4, 8, 1]


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "qwen3"])
def test_each_token_is_drawn_given_all_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    model, text = teacher(tmp_path, kind), text_of().train
    monkeypatch.setattr(
        torch, "multinomial", lambda p, n, generator: p.argmax(-1, keepdim=True)
    )
    made = generate_windows(model, text, count=3, seed=0)
    states = model.states(made)  # of whole windows, without a cache
    likely = model.head.logits(states.flatten(0, 1)).argmax(-1).view_as(made)
    for row, (own, known) in enumerate(zip(made, likely, strict=True)):
        prompt = 2**row  # 1, 2, 4: what was taken from the text
        assert torch.equal(own[prompt:], known[prompt - 1 : -1])
        assert any(
            torch.equal(own[:prompt], window[place : place + prompt])
            for window in text
            for place in range(17 - prompt)
        )


def test_keys_and_values_stay_where_they_are(tmp_path: Path) -> None:
    model, text = teacher(tmp_path, "llama"), text_of().held_out
    cache = generate._cache(model, text.shape[1])
    places = []
    for place in range(3):
        model.body(input_ids=text[:, place : place + 1], past_key_values=cache)
        places.append([layer.keys.data_ptr() for layer in cache.layers])
        assert cache.get_seq_length() == place + 1
    assert len(places[0]) == 3 and places[0] == places[1] == places[2]
    whole = model.states(text[:, :4])
    last = model.body(input_ids=text[:, 3:4], past_key_values=cache).last_hidden_state
    torch.testing.assert_close(last[:, 0], whole[:, 3], rtol=1e-4, atol=1e-5)


def test_time_ends_writing_after_a_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "_batch", lambda model, length: 4)
    model, text = teacher(tmp_path), text_of().train
    made = generate_windows(model, text, count=1000, seed=0, seconds=0)
    assert len(made) == 4
    assert len(generate_windows(model, text, count=10, seed=0, seconds=60)) == 10


def test_a_budget_of_time_says_it_all() -> None:
    options = options_of(time="30min", steps=None)
    assert (options.seconds, options.writing_seconds) == (1800, 180)
    assert options_of(time="1.5h", generated=5).writing_seconds is None
    assert options_of(time="90s").seconds == 90
    assert not options_of(minutes=3).writes
    with pytest.raises(ValueError, match="30 moons.* is no time; write 90s"):
        options_of(time="30 moons")
    with pytest.raises(ValueError, match="give one of them"):
        options_of(time="30min", minutes=30)
    with pytest.raises(ValueError, match="shard"):
        options_of(time="30min", shard=True)
