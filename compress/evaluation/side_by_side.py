"""Rows of a comparison: a base and candidates on the same texts and tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from compress.evaluation.measure import PreparedText
from compress.evaluation.paired import (
    answer_figures,
    differences,
    task_figures,
    text_figures,
    text_pair,
)
from compress.evaluation.significance import CONFIDENCE, holm
from compress.evaluation.tasks import Task, TaskScores
from compress.evaluation.written import AnswerScores, WritingTask


@dataclass(frozen=True)
class Measurements:
    """What was measured of each model, by name; the base is the first.

    Attributes:
        texts: Windows of a text under a protocol each.
        tasks: With their items.
        records: For each text what
            :func:`~compress.evaluation.paired.text_record` made.
        scores: For each task.
    """

    texts: Sequence[PreparedText]
    tasks: Sequence[Task | WritingTask]
    records: Mapping[str, Sequence[Mapping[str, Any]]]
    scores: Mapping[str, Sequence[TaskScores | AnswerScores]]

    @property
    def base(self) -> str:
        """Name of the base."""
        return next(iter(self.records))

    @property
    def candidates(self) -> list[str]:
        """Names of the others."""
        return list(self.records)[1:]

    def choices(self, name: str) -> list[TaskScores | AnswerScores]:
        """Return scores of the tasks whose answers may be right or wrong."""
        return [one for one in self.scores[name] if one.is_choice]


def text_rows(found: Measurements) -> list[dict[str, Any]]:
    """Return a row for each text and model, against the base."""
    rows = []
    for index, text in enumerate(found.texts):
        base = found.records[found.base][index]
        for name, records in found.records.items():
            other = None if name == found.base else base
            figures = text_figures(records[index], other)
            rows.append({"text": text.name, "model": name, **figures})
    return rows


def task_rows(found: Measurements) -> list[dict[str, Any]]:
    """Return a row for each task and model, against the base.

    A difference is significant if McNemar's p, corrected by Holm for the number of
    tasks, is below 5 %.
    """
    by_model: list[list[dict[str, Any]]] = []
    for name, scores in found.scores.items():
        rows = []
        triples = zip(found.tasks, scores, found.scores[found.base], strict=True)
        for task, own, base in triples:
            figures = figures_of(own, None if name == found.base else base)
            about = {"task": task.name, "model": name, "of": task.total}
            rows.append({**about, **figures})
        tested = [row for row in rows if "p" in row]
        for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True):
            row |= {"p_holm": p, "significant": p < 1 - CONFIDENCE}
        by_model.append(rows)
    return [row for rows in zip(*by_model, strict=True) for row in rows]


def figures_of(
    own: TaskScores | AnswerScores, base: TaskScores | AnswerScores | None
) -> dict[str, Any]:
    """Return the figures of a task, and differences from a base's if there is one."""
    if isinstance(own, AnswerScores):
        assert base is None or isinstance(base, AnswerScores), "of one task"
        return answer_figures(own, base)
    assert base is None or isinstance(base, TaskScores), "of one task"
    return task_figures(own, base)


def mean_rows(found: Measurements) -> list[dict[str, Any]]:
    """Return the mean of the tasks that have an accuracy, for each model."""
    base = found.choices(found.base)
    rows = []
    for name in found.scores if base else ():
        mine = found.choices(name)
        accuracy = sum(float(one.right.mean()) for one in mine) / len(mine)
        row: dict[str, Any] = {"model": name, "tasks": len(mine)}
        row |= {"items": sum(len(one.right) for one in mine), "accuracy": accuracy}
        if name != found.base:
            row |= differences(base, mine).to_dict()
        rows.append(row)
    return rows


def pair_rows(found: Measurements) -> list[dict[str, Any]]:
    """Return how each two candidates differ."""
    rows = []
    for first, second in combinations(found.candidates, 2):
        row: dict[str, Any] = {"first": first, "second": second, "texts": []}
        records = zip(found.records[first], found.records[second], strict=True)
        for text, (one, other) in zip(found.texts, records, strict=True):
            about = {"text": text.name, "protocol": text.windows.protocol}
            row["texts"].append({**about, **text_pair(one, other)})
        if found.choices(first):
            row["tasks"] = differences(
                found.choices(first), found.choices(second)
            ).to_dict()
        rows.append(row)
    return rows
