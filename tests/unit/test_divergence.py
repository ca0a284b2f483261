"""Distances between predictions, against sums done by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from compress.core.errors import CompressError
from compress.evaluation import divergence
from compress.evaluation.divergence import Scores, compare, mean_and_error, summarize
from compress.evaluation.perplexity import TokenWindows


def logits(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def text(rows: int, length: int, vocabulary: int, first: int = 0) -> TokenWindows:
    generator = torch.Generator().manual_seed(9)
    ids = torch.randint(0, vocabulary, (rows, length), generator=generator)
    return TokenWindows("test", ids, first)


def scores_of(windows: TokenWindows, p: Tensor, q: Tensor) -> tuple[Scores, Scores]:
    base, other = compare(windows, p, q)
    assert other is not None
    return base, other


def test_a_model_is_at_no_distance_from_itself() -> None:
    windows, p = text(3, 20, 11), logits(3, 20, 11)
    base, same = scores_of(windows, p, p.clone())
    assert same.kl is not None and same.dp is not None
    assert float(same.kl.abs().max()) == 0
    assert float(same.dp.abs().max()) == 0
    assert torch.equal(base.nll, same.nll)
    figures = summarize(same, base=base, text_bytes=60)
    assert (figures["ppl_ratio"], figures["top1"], figures["flips"]) == (1, 1, 0)


def test_a_case_of_three_tokens_by_hand() -> None:
    # One prediction: p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4); the true token is 1.
    p = torch.tensor([[[0.5, 0.25, 0.25], [1, 1, 1]]]).log()
    q = torch.tensor([[[0.25, 0.5, 0.25], [1, 1, 1]]]).log()
    base, other = scores_of(TokenWindows("hand", torch.tensor([[0, 1]])), p, q)
    figures = summarize(other, base=base, text_bytes=1)
    # 1/2 log 2 + 1/4 log 1/2 + 1/4 log 1 = 1/4 log 2
    assert figures["kl"] == pytest.approx(math.log(2) / 4, rel=1e-6)
    assert float(base.nll) == pytest.approx(math.log(4), rel=1e-6)
    assert figures["perplexity"] == pytest.approx(2, rel=1e-6)
    assert figures["ppl_ratio"] == pytest.approx(0.5, rel=1e-6)
    assert figures["bits_per_byte"] == pytest.approx(1, rel=1e-6)
    assert figures["dp_rms"] == pytest.approx(0.25, rel=1e-6)
    assert (figures["top1"], figures["flips"], figures["tokens"]) == (0, 1, 1)


def test_figures_are_those_of_torch() -> None:
    windows, p, q = (
        text(2, 30, 13, first=5),
        logits(2, 30, 13),
        logits(2, 30, 13, seed=1),
    )
    base, other = scores_of(windows, p, q)
    targets = windows.ids[:, 6:]
    nll = torch.nn.functional.cross_entropy(
        q[:, 5:-1].double().transpose(1, 2), targets, reduction="none"
    )
    log_p, log_q = (x[:, 5:-1].double().log_softmax(-1) for x in (p, q))
    kl = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none")
    assert other.kl is not None and other.same_top is not None
    assert base.nll.shape == other.kl.shape == (2, 24)
    assert torch.allclose(other.nll, nll, atol=1e-5)
    assert torch.allclose(other.kl, kl.sum(-1), atol=1e-5)
    assert torch.equal(other.same_top, (log_p.argmax(-1) == log_q.argmax(-1)).double())


@pytest.mark.parametrize("at_once", [1, 7, 29])
def test_chunks_of_positions_change_nothing(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows, p, q = (
        text(2, 30, 13, first=3),
        logits(2, 30, 13),
        logits(2, 30, 13, seed=1),
    )
    _, whole = scores_of(windows, p, q)
    monkeypatch.setattr(divergence, "numbers_at_once", lambda _: 13 * at_once)
    _, parts = scores_of(windows, p, q)
    for name in ("nll", "kl", "same_top", "flipped", "dp"):
        assert torch.allclose(getattr(whole, name), getattr(parts, name), atol=1e-12)


def test_the_last_position_and_those_before_the_first_do_not_count() -> None:
    windows, p = text(1, 10, 5, first=4), logits(1, 10, 5)
    q = p.clone()
    q[:, :4] = 0
    q[:, -1] = 0
    base, other = scores_of(windows, p, q)
    assert other.kl is not None
    assert other.kl.shape == (1, windows.predictions) == (1, 5)
    assert float(other.kl.max()) == 0
    assert torch.equal(base.nll, other.nll)


def test_standard_errors_come_from_windows() -> None:
    values = torch.tensor([[1.0, 3.0], [3.0, 5.0], [5.0, 7.0]]).double()
    mean, error = mean_and_error(values)
    assert mean == 4
    assert error == pytest.approx(2 / math.sqrt(3))  # of the means 2, 4, 6
    assert math.isnan(mean_and_error(values[:1])[1])


def test_quantiles_and_histogram_cover_all_positions() -> None:
    windows, p, q = text(2, 40, 13), logits(2, 40, 13), logits(2, 40, 13, seed=1)
    base, other = scores_of(windows, p, q)
    figures = summarize(other, base=base, text_bytes=80)
    ordered = [
        figures[f"kl_{k}"] for k in ("median", "p90", "p95", "p99", "p999", "max")
    ]
    assert ordered == sorted(ordered)
    histogram = figures["kl_histogram"]
    assert sum(histogram["counts"]) == figures["tokens"] == 78
    assert len(histogram["edges"]) == len(histogram["counts"]) + 1


def test_the_base_alone_has_no_distance() -> None:
    windows = text(2, 10, 5)
    own, other = compare(windows, logits(2, 10, 5))
    assert other is None
    figures = summarize(own, base=None, text_bytes=20)
    assert set(figures) == {
        "protocol",
        "tokens",
        "perplexity",
        "perplexity_se",
        "bits_per_byte",
    }


@pytest.mark.parametrize("broken", ["base", "compressed"])
def test_logits_that_are_not_finite_are_refused(broken: str) -> None:
    windows, p, q = text(1, 10, 5), logits(1, 10, 5), logits(1, 10, 5)
    (p if broken == "base" else q)[0, 3, 2] = float("nan")
    with pytest.raises(CompressError, match=f"the {broken} model yields NaN"):
        compare(windows, p, q)


def test_vocabularies_must_agree() -> None:
    with pytest.raises(CompressError, match="must share one vocabulary"):
        compare(text(1, 10, 5), logits(1, 10, 5), logits(1, 10, 6))


def test_logits_are_taken_one_window_at_a_time() -> None:
    windows, p = text(4, 10, 5), logits(4, 10, 5)
    events: list[str] = []

    def model(name: str) -> Iterator[Tensor]:
        for row in p:
            events.append(name)
            yield row

    compare(windows, model("p"), model("q"))
    assert events == ["p", "q"] * 4
