"""A few made-up rows in the form of each question set."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_CHOICES = {"text": ["north", "south", "up"], "label": ["A", "B", "C"]}

ROWS: dict[str, Mapping[str, Any]] = {
    "arc_easy": {
        "id": "x1",
        "question": "Where does the needle point?",
        "choices": _CHOICES,
        "answerKey": "A",
    },
    "openbookqa": {
        "question_stem": "The needle points",
        "choices": _CHOICES,
        "answerKey": "C",
    },
    "boolq": {"question": "is it so", "passage": "It is so.", "answer": True},
    "piqa": {"goal": "Open a jar", "sol1": "Turn it.", "sol2": "Sing.", "label": 1},
    "hellaswag": {
        "ind": 1,
        "activity_label": "Cooking",
        "ctx_a": "[header] How to cook [title] Take a pan.  [step] Heat it.",
        "ctx_b": "the cook",
        "endings": ["[substeps] adds oil.", "sings."],
        "label": "0",
    },
    "winogrande": {
        "sentence": "Ann thanked Eve since _ had helped.",
        "option1": "Ann",
        "option2": "Eve",
        "answer": "2",
    },
    "mmlu": {
        "question": "What is 1 + 1?",
        "subject": "plain_sums",
        "choices": ["1", "2", "3", "4"],
        "answer": 1,
    },
    "gsm8k": {"question": "What is 2 + 3?", "answer": "It is 5.\n#### 5"},
    "ifeval": {
        "key": 1,
        "prompt": "Say hello in two words without a comma.",
        "instruction_id_list": [
            "punctuation:no_comma",
            "length_constraints:number_words",
        ],
        "kwargs": [{}, {"relation": "less than", "num_words": 3}],
    },
    "own": {"context": "2 + 2 =", "choices": [" 3", " 4"], "answer": 1},
    "own_reference": {"context": "Say it:", "answer": " it"},
}


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def write_tasks(folder: Path, items: int = 12) -> Path:
    """Write a folder with a choice task, a two-way task and a reference task."""
    arc = [
        {
            **ROWS["arc_easy"],
            "question": f"Which way is number {i}?",
            "answerKey": "ABC"[i % 3],
        }
        for i in range(items)
    ]
    boolq = [
        {**ROWS["boolq"], "question": f"is {i} odd", "answer": i % 2 == 1}
        for i in range(items)
    ]
    gsm8k = [{"question": f"{i} + 1?", "answer": f"{i + 1}"} for i in range(items)]
    write_rows(folder / "arc_easy.validation.jsonl", arc)
    write_rows(folder / "boolq.validation.jsonl", boolq)
    write_rows(folder / "gsm8k" / "test.jsonl", gsm8k)
    write_rows(folder / "gsm8k" / "train.jsonl", gsm8k)
    return folder
