r"""Rows of well-known question sets, as contexts and continuations to score.

The prompts are those of lm-evaluation-harness, so that figures can be compared; which
set a row is of shows in its keys. Where the harness lets a model choose a letter
(CommonsenseQA), the answers' texts are scored instead, which small models can do.

Rows of your own may have either form::

    {"context": "2 + 2 =", "choices": [" 3", " 4"], "answer": 1}
    {"context": "Question: ...\nAnswer:", "answer": " the reference answer"}

Source: EleutherAI/lm-evaluation-harness, task files of version 0.4.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress.evaluation.instructions import CHECKERS, NEED_LANGUAGE, is_followed

INSTRUCTIONS = "instructions"
"""Metric of prompts whose answers are written and checked."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Item:
    """A question: what may follow which context, and which of it is right.

    Attributes:
        contexts: One for each choice; all the same, but for WinoGrande.
        continuations: One for each choice, with the space that starts it.
        right: Index of the right choice.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    right: int

    @property
    def texts(self) -> tuple[str, ...]:
        """All that is read."""
        return self.contexts + self.continuations


@dataclass(frozen=True)
class Instruction:
    """Something a text can be checked for.

    Attributes:
        kind: A key of :data:`~compress.evaluation.instructions.CHECKERS`.
        arguments: Of the checker, by name.
    """

    kind: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Prompt:
    """What a model is asked to write, and what its answer is checked for.

    Attributes:
        text: What a user says.
        instructions: At least one.
    """

    text: str
    instructions: tuple[Instruction, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        """All that is read."""
        return (self.text,)


@dataclass(frozen=True)
class RowForm:
    """A shape of rows.

    Attributes:
        name: Of the set.
        keys: What a row must have.
        metric: The usual one: ``acc``, ``acc_norm``, ``bits_per_byte`` where there
            is nothing to choose from, or :data:`INSTRUCTIONS`.
        read: Makes an item of a row and of the rows that are shown as examples.
    """

    name: str
    keys: frozenset[str]
    metric: str
    read: Callable[[Row, Sequence[Row]], Item | Prompt]


def form_of(row: Row) -> RowForm | None:
    """Return the form of a row by its keys; ``None`` if it is of none."""
    return next((form for form in FORMS if form.keys <= row.keys()), None)


def _choice(context: str, choices: Sequence[str], right: int) -> Item:
    if not 0 <= right < len(choices):
        raise ValueError(f"answer {right} of {len(choices)} choices")
    return Item((context,) * len(choices), tuple(choices), right)


def _labelled(context: str, row: Row) -> Item:
    choices = row["choices"]
    texts = [f" {text}" for text in choices["text"]]
    return _choice(context, texts, choices["label"].index(row["answerKey"]))


def _arc(row: Row, _: Sequence[Row]) -> Item:
    return _labelled(f"Question: {row['question']}\nAnswer:", row)


def _openbookqa(row: Row, _: Sequence[Row]) -> Item:
    return _labelled(row["question_stem"], row)


def _piqa(row: Row, _: Sequence[Row]) -> Item:
    choices = [f" {row['sol1']}", f" {row['sol2']}"]
    return _choice(f"Question: {row['goal']}\nAnswer:", choices, int(row["label"]))


def _boolq(row: Row, _: Sequence[Row]) -> Item:
    context = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
    return _choice(context, [" no", " yes"], int(row["answer"]))


def _hellaswag(row: Row, _: Sequence[Row]) -> Item:
    begun = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    endings = [f" {_without_marks(ending)}" for ending in row["endings"]]
    return _choice(_without_marks(begun), endings, int(row["label"]))


def _without_marks(text: str) -> str:
    """Return a text without the marks of WikiHow."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _winogrande(row: Row, _: Sequence[Row]) -> Item:
    """Score what follows the gap after each option: a choice of contexts."""
    before, gap, after = row["sentence"].partition("_")
    if not gap:
        raise ValueError("the sentence has no gap, _")
    contexts = (before + row["option1"], before + row["option2"])
    right = ("1", "2").index(str(row["answer"]))
    return Item(contexts, (f" {after.strip()}",) * 2, right)


def _mmlu(row: Row, examples: Sequence[Row]) -> Item:
    """Score letters after five questions of the subject, as many as there are."""
    subject = row["subject"]
    shown = [example for example in examples if example["subject"] == subject][:5]
    parts = [
        f"The following are multiple choice questions (with answers) about "
        f"{subject.replace('_', ' ')}."
    ]
    parts += [f"{_lettered(e)} {'ABCD'[int(e['answer'])]}" for e in shown]
    context = "\n\n".join([*parts, _lettered(row)])
    return _choice(context, [f" {letter}" for letter in "ABCD"], int(row["answer"]))


def _lettered(row: Row) -> str:
    lines = [row["question"].strip()]
    lines += [f"{a}. {text}" for a, text in zip("ABCD", row["choices"], strict=True)]
    return "\n".join([*lines, "Answer:"])


def _gsm8k(row: Row, _: Sequence[Row]) -> Item:
    return _choice(f"Question: {row['question']}\nAnswer:", [f" {row['answer']}"], 0)


def _own(row: Row, _: Sequence[Row]) -> Item:
    return _choice(row["context"], row["choices"], int(row["answer"]))


def _own_reference(row: Row, _: Sequence[Row]) -> Item:
    return _choice(row["context"], [row["answer"]], 0)


def _ifeval(row: Row, _: Sequence[Row]) -> Prompt:
    pairs = zip(row["instruction_id_list"], row["kwargs"], strict=True)
    wanted = []
    for kind, given in pairs:
        if kind not in CHECKERS:
            raise ValueError(f"unknown instruction {kind!r}")
        known = {key: value for key, value in given.items() if value is not None}
        if kind not in NEED_LANGUAGE:
            is_followed(kind, "a", known)  # all arguments are there
        wanted.append(Instruction(kind, known))
    if not wanted or not row["prompt"].strip():
        raise ValueError("no prompt, or no instruction")
    return Prompt(row["prompt"], tuple(wanted))


def _form(
    name: str,
    keys: str,
    metric: str,
    read: Callable[[Row, Sequence[Row]], Item | Prompt],
) -> RowForm:
    return RowForm(name, frozenset(keys.split()), metric, read)


FORMS: tuple[RowForm, ...] = (
    _form("ifeval", "prompt instruction_id_list kwargs", INSTRUCTIONS, _ifeval),
    _form("winogrande", "sentence option1 option2 answer", "acc", _winogrande),
    _form(
        "hellaswag",
        "activity_label ctx_a ctx_b endings label",
        "acc_norm",
        _hellaswag,
    ),
    _form("piqa", "goal sol1 sol2 label", "acc_norm", _piqa),
    _form("openbookqa", "question_stem choices answerKey", "acc_norm", _openbookqa),
    _form("boolq", "passage question answer", "acc", _boolq),
    _form("mmlu", "subject question choices answer", "acc", _mmlu),
    _form("arc", "question choices answerKey", "acc_norm", _arc),
    _form("own", "context choices answer", "acc_norm", _own),
    _form("own_reference", "context answer", "bits_per_byte", _own_reference),
    _form("gsm8k", "question answer", "bits_per_byte", _gsm8k),
)
"""Forms of rows; the first whose keys a row has is its own."""
