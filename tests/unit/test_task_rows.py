"""Prompts of question sets, written out."""

from __future__ import annotations

from typing import Any

import pytest
from task_fixtures import ROWS

from compress.evaluation.task_rows import Item, form_of


def item_of(name: str, *shown: Any, **changes: Any) -> Item:
    row = {**ROWS[name], **changes}
    form = form_of(row)
    assert form is not None
    return form.read(row, shown)


@pytest.mark.parametrize("name", ROWS)
def test_a_form_is_found_by_its_keys(name: str) -> None:
    form = form_of(ROWS[name])
    assert form is not None
    assert form.name == name.removesuffix("_easy")


def test_rows_of_nothing_known_have_no_form() -> None:
    assert form_of({"key": 1, "prompt": "Write.", "instruction_id_list": []}) is None


@pytest.mark.parametrize(
    ("name", "context", "continuations", "right"),
    [
        (
            "arc_easy",
            "Question: Where does the needle point?\nAnswer:",
            (" north", " south", " up"),
            0,
        ),
        ("openbookqa", "The needle points", (" north", " south", " up"), 2),
        ("boolq", "It is so.\nQuestion: is it so?\nAnswer:", (" no", " yes"), 1),
        ("piqa", "Question: Open a jar\nAnswer:", (" Turn it.", " Sing."), 1),
        (
            "hellaswag",
            "Cooking: How to cook. Take a pan.  Heat it. The cook",
            ("  adds oil.", " sings."),
            0,
        ),
        (
            "gsm8k",
            "Question: What is 2 + 3?\nAnswer:",
            (" It is 5.\n#### 5",),
            0,
        ),
        ("own", "2 + 2 =", (" 3", " 4"), 1),
        ("own_reference", "Say it:", (" it",), 0),
    ],
)
def test_prompts(
    name: str, context: str, continuations: tuple[str, ...], right: int
) -> None:
    item = item_of(name)
    assert set(item.contexts) == {context}
    assert item.continuations == continuations
    assert item.right == right


def test_winogrande_scores_the_rest_after_each_option() -> None:
    item = item_of("winogrande")
    assert item.contexts == (
        "Ann thanked Eve since Ann",
        "Ann thanked Eve since Eve",
    )
    assert item.continuations == (" had helped.",) * 2
    assert item.right == 1


def test_mmlu_shows_examples_of_its_subject_alone() -> None:
    same = {**ROWS["mmlu"], "question": "What is 2 + 2?", "answer": 3}
    other = {**ROWS["mmlu"], "subject": "tides"}
    item = item_of("mmlu", other, same)
    assert item.contexts[0] == (
        "The following are multiple choice questions (with answers) about plain sums."
        "\n\nWhat is 2 + 2?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: D"
        "\n\nWhat is 1 + 1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    )
    assert item.continuations == (" A", " B", " C", " D")
    assert item.right == 1


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("arc_easy", {"answerKey": "E"}),
        ("piqa", {"label": 2}),
        ("winogrande", {"sentence": "No gap."}),
        ("winogrande", {"answer": "3"}),
    ],
)
def test_an_answer_that_is_none_is_refused(name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        item_of(name, **changes)
