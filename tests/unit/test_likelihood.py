"""Log-likelihoods by a streamed model, against transformers' own forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_fixtures import random_model

from compress.core.continuations import Continuation
from compress.core.errors import CompressError
from compress.evaluation import likelihood
from compress.evaluation.likelihood import likelihoods
from compress.model.streaming import StreamedModel

KINDS = ("llama", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3")


def groups(seed: int = 0) -> list[list[Continuation]]:
    """Questions of several shapes: shared context, letters, nothing in common."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> list[int]:
        drawn = torch.randint(3, 128, (count,), generator=generator)
        return [int(token) for token in drawn]

    context = tokens(9)
    shared = [Continuation((*context, *tokens(n)), 9) for n in (1, 4, 7)]
    letters = [Continuation((*context, letter), 9) for letter in (5, 6, 7, 8)]
    apart = [Continuation(tuple(tokens(n)), 3) for n in (6, 11)]
    return [shared, letters, apart, [Continuation(tuple(tokens(20)), 4)]]


def expected(model: Any, one: Continuation) -> tuple[float, bool]:
    """Score a continuation alone, by the whole model."""
    ids = torch.tensor([one.ids])
    with torch.inference_mode():
        logp = model(ids).logits[0, :-1].double().log_softmax(-1)
    rest = ids[0, one.start :]
    rows = logp[one.start - 1 :]
    nats = float(rows.gather(1, rest[:, None]).sum())
    return nats, bool((rows.argmax(-1) == rest).all())


@pytest.mark.parametrize("kind", KINDS)
def test_choices_in_one_pass_score_as_alone(kind: str) -> None:
    model, description, source = random_model(kind)
    found = likelihoods(StreamedModel(description, source), groups())
    for group, scores in zip(groups(), found, strict=True):
        for one, score in zip(group, scores, strict=True):
            nats, is_greedy = expected(model, one)
            # float32 sums of at most 17 terms near 5 nats each
            assert score.nats == pytest.approx(nats, abs=2e-4)
            assert score.is_greedy == is_greedy


def test_the_likeliest_answer_is_greedy() -> None:
    model, description, source = random_model()
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        for _ in range(3):
            token = model(ids).logits[0, -1].argmax()
            ids = torch.cat([ids, token[None, None]], dim=1)
    best = Continuation(tuple(ids[0].tolist()), 3)
    other = Continuation((*best.ids[:-1], (best.ids[-1] + 1) % 128), 3)
    ((first, second),) = likelihoods(
        StreamedModel(description, source), [[best, other]]
    )
    assert first.is_greedy and not second.is_greedy


def test_beyond_a_sliding_window_the_model_keeps_its_own_mask() -> None:
    model, description, source = random_model("gemma2", sliding_window=6)
    found = likelihoods(StreamedModel(description, source), groups())
    nats = [expected(model, one)[0] for group in groups() for one in group]
    assert [s.nats for scores in found for s in scores] == pytest.approx(nats, abs=2e-4)


@pytest.mark.parametrize("tokens", [1, 30, 10_000])
def test_any_number_of_tokens_at_once_gives_the_same(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, description, source = random_model()
    wanted = likelihoods(StreamedModel(description, source), groups())
    monkeypatch.setattr(likelihood, "_HIDDEN_BYTES", tokens * 4 * 64)
    assert likelihoods(StreamedModel(description, source), groups()) == wanted


def test_logits_that_are_not_finite_are_an_error() -> None:
    _, description, source = random_model()
    source.state["lm_head.weight"].fill_(3e38)
    with pytest.raises(CompressError, match="infinite logits"):
        likelihoods(StreamedModel(description, source), groups())
