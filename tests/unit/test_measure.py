"""Several texts in one sweep give what each gives alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pipeline_fixtures import write_text
from torch import Tensor

from compress.evaluation import measure
from compress.evaluation.measure import (
    PreparedText,
    evaluate_texts,
    headline,
    prepare_texts,
)
from compress.evaluation.perplexity import TokenWindows

VOCABULARY, LENGTH = 17, 12


def prepared(name: str, rows: int, seed: int) -> PreparedText:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (rows, LENGTH), generator=generator)
    return PreparedText(name, TokenWindows("test", ids), rows * LENGTH)


class Model:
    """Logits that depend on the tokens alone, and a list of batch sizes."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._table = torch.randn(VOCABULARY, VOCABULARY, generator=generator)
        self.batches: list[int] = []

    def __call__(self, windows: Tensor) -> Tensor:
        self.batches.append(len(windows))
        return self._table[windows]


TEXTS = [prepared("a", 3, 1), prepared("b", 1, 2), prepared("c", 4, 3)]


@pytest.mark.parametrize("at_once", [1, 2, 3, 5, 8, 100])
def test_sweeps_of_any_size_give_the_same_figures(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [evaluate_texts([t], Model(1), Model(2), hidden_size=1) for t in TEXTS]
    monkeypatch.setattr(measure, "_HIDDEN_BYTES", at_once * LENGTH * 4)
    base, other = Model(1), Model(2)
    own, compared = evaluate_texts(TEXTS, base, other, hidden_size=1)
    assert compared is not None
    assert base.batches == other.batches
    assert max(base.batches) <= at_once
    assert sum(base.batches) == 8
    for text, (single_own, single_compared) in zip(TEXTS, alone, strict=True):
        assert single_compared is not None
        name = text.name
        assert own[name] == pytest.approx(single_own[name], nan_ok=True)
        expected = dict(single_compared[name])
        found = dict(compared[name])
        assert found.pop("kl_histogram") == expected.pop("kl_histogram")
        assert found == pytest.approx(expected, nan_ok=True)


def test_kl_can_be_left_out() -> None:
    _, other = evaluate_texts(TEXTS, Model(1), Model(2), hidden_size=1, kl=False)
    assert other is not None
    assert "kl" not in other["a"]
    assert "perplexity" in other["a"]


def test_without_a_candidate_there_is_only_the_base() -> None:
    own, other = evaluate_texts(TEXTS, Model(1), None, hidden_size=1)
    assert list(own) == ["a", "b", "c"]
    assert other is None


def test_the_first_text_is_the_headline() -> None:
    found = headline({"a": {"perplexity": 3.0, "kl": 0.1}, "b": {"perplexity": 4.0}})
    assert (found["perplexity"], found["kl"], list(found["texts"])) == (
        3,
        0.1,
        ["a", "b"],
    )


def test_bytes_are_those_of_the_tokens_that_count(tmp_path: Path) -> None:
    from gguf_fixtures import save_tokenizer

    tokenizer = save_tokenizer(tmp_path)
    path = write_text(tmp_path)
    (found,) = prepare_texts(
        [str(path)], tokenizer, protocol="windows", count=2, length=32
    )
    ids = found.windows.ids
    pieces = [tokenizer.decode(row[1:]) for row in ids]
    assert found.counted_bytes == sum(len(piece.encode()) for piece in pieces)
    assert found.counted_bytes > 62  # more than a byte a token
