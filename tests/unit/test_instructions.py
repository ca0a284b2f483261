"""Instructions of IFEval: what follows them, and what answers are worth."""

from __future__ import annotations

from typing import Any

import pytest
from instruction_cases import CASES
from task_fixtures import ROWS, write_rows

from compress.core.errors import ConfigError
from compress.evaluation import instructions, written
from compress.evaluation.instructions import (
    CHECKERS,
    NEED_LANGUAGE,
    is_followed,
    loose_variants,
    sentence_count,
    word_count,
)
from compress.evaluation.tasks import load_tasks
from compress.evaluation.written import Answer, WritingTask, answer_scores


@pytest.mark.parametrize(("kind", "arguments", "good", "bad"), CASES)
def test_a_text_follows_its_instruction_or_not(
    kind: str, arguments: dict[str, Any], good: str, bad: str
) -> None:
    assert is_followed(kind, good, arguments)
    assert not is_followed(kind, bad, arguments)
    assert not is_followed(kind, "  ", arguments)


def test_every_kind_has_a_case() -> None:
    assert {case[0] for case in CASES} | NEED_LANGUAGE == set(CHECKERS)


@pytest.mark.parametrize(
    ("kind", "arguments", "good", "bad"),
    [
        (
            "language:response_language",
            {"language": "de"},
            "Das ist ein schöner Tag, und wir gehen in die Stadt.",
            "This is a fine day, and we walk to the town.",
        ),
        (
            "change_case:english_capital",
            {},
            "THE HOUSE IS OLD AND BIG, AND THE GARDEN IS GREEN.",
            "DAS HAUS IST ALT UND GROSS, UND DER GARTEN IST GRÜN.",
        ),
        (
            "change_case:english_lowercase",
            {},
            "the house is old and big, and the garden is green.",
            "The house is old and big, and the garden is green.",
        ),
    ],
)
def test_languages_are_told(
    kind: str, arguments: dict[str, Any], good: str, bad: str
) -> None:
    pytest.importorskip("langdetect")
    assert is_followed(kind, good, arguments)
    assert not is_followed(kind, bad, arguments)


def test_sentences_and_words_are_counted() -> None:
    assert sentence_count('He said "Go!" Then (so it was) he went.\n\nNo end') == 3
    assert sentence_count("Mr. Smith met e.g. Dr. Jones. They spoke...") == 2
    assert word_count("it's 2 well-known words_here") == 6


def test_loose_variants_drop_first_and_last_lines_and_asterisks() -> None:
    assert set(loose_variants("Sure:\n*a*\nBye")) == {
        *("Sure:\n*a*\nBye", "*a*\nBye", "Sure:\n*a*", "*a*"),
        *("Sure:\na\nBye", "a\nBye", "Sure:\na", "a"),
    }


def ifeval(tmp_path: Any, *rows: Any, **options: Any) -> WritingTask:
    path = write_rows(tmp_path / "ifeval" / "input_data.jsonl", rows)
    (task,) = load_tasks([str(path)], **options)
    assert isinstance(task, WritingTask)
    return task


def test_answers_are_scored_by_prompt_and_by_instruction(tmp_path: Any) -> None:
    task = ifeval(tmp_path, *[ROWS["ifeval"]] * 4)
    assert (task.name, task.total, task.left_out) == ("ifeval", 4, 0)
    texts = ["Hello there", "Sure, this:\nHello there", "Hello, dear old friend", ""]
    answers = [Answer(text, 5 * index) for index, text in enumerate(texts)]
    scores = answer_scores(task, answers, most=15)
    assert scores.right.tolist() == [1, 0, 0, 0]
    assert scores.chosen.tolist() == [3, 0, 0, 0]
    figures = scores.figures()
    assert figures["prompt_strict"] == figures["accuracy"] == 0.25
    assert figures["prompt_loose"] == 0.5
    assert figures["instruction_strict"] == 2 / 8
    assert figures["instruction_loose"] == 4 / 8
    assert figures["answer_tokens"] == 7.5 and figures["cut"] == 0.25


def test_prompts_that_need_a_detector_are_left_out_and_counted(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    german = {
        **ROWS["ifeval"],
        "instruction_id_list": ["language:response_language"],
        "kwargs": [{"language": "de"}],
    }
    monkeypatch.setattr(written, "can_tell_languages", lambda: False)
    task = ifeval(tmp_path, german, ROWS["ifeval"], ROWS["ifeval"], limit=1)
    assert (task.total, task.left_out, len(task.items)) == (3, 1, 1)
    assert "1 of 3 prompts are left out" in caplog.text
    with pytest.raises(ConfigError, match="pip install langdetect"):
        ifeval(tmp_path, german)
    monkeypatch.setattr(written, "can_tell_languages", lambda: True)
    assert ifeval(tmp_path, german).left_out == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"instruction_id_list": ["new:kind", "new:kind"]}, "unknown instruction"),
        ({"kwargs": [{}, {}]}, "row 1 is no row of ifeval: KeyError: 'relation'"),
        ({"kwargs": [{}]}, "row 1 is no row of ifeval"),
        ({"prompt": " "}, "no prompt"),
    ],
)
def test_rows_that_cannot_be_checked_are_refused(
    tmp_path: Any, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ifeval(tmp_path, {**ROWS["ifeval"], **change})


def test_a_detector_is_looked_for_where_packages_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(instructions, "find_spec", lambda name: None)
    assert not instructions.can_tell_languages()
