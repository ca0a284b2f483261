"""Tasks put to an original and to what was made of it, inside of a run.

``compress compare`` does the same for finished checkpoints, as each is served; here the
models are those of the run, in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from compress.core.continuations import Continuation, Likelihood
from compress.evaluation.generations import continue_greedily
from compress.evaluation.side_by_side import figures_of
from compress.evaluation.tasks import Task, TaskScores, encoded, scores_of
from compress.evaluation.written import (
    AnswerScores,
    WritingTask,
    answer_scores,
    answers_in_parts,
    asked,
)
from compress.recovery.models import WholeModel

Groups = Sequence[Sequence[Continuation]]


@dataclass(frozen=True)
class Asked:
    """A model that answers.

    Attributes:
        score: Returns the likelihood of each continuation of each context.
        load: Loads the whole model, for answers in its own words.
    """

    score: Callable[[Groups], list[list[Likelihood]]]
    load: Callable[[], WholeModel]


def figures_of_tasks(
    tasks: Sequence[Task | WritingTask],
    models: Mapping[str, Asked],
    tokenizer: Any,
    *,
    longest: int,
    most: int,
    ends: frozenset[int],
) -> dict[str, dict[str, Any]]:
    """Return the figures of each task, by model and name.

    One whole model is in memory at a time, and only if a task wants written answers.

    Args:
        tasks: With their items.
        models: The first is the base that the others are held against.
        tokenizer: Of all of them.
        longest: Tokens that a model takes.
        most: Tokens of a written answer at most.
        ends: Tokens that end an answer.
    """
    scores: dict[str, list[TaskScores | AnswerScores]] = {name: [] for name in models}
    for name, model in models.items():
        whole: WholeModel | None = None
        for task in tasks:
            if isinstance(task, Task):
                groups = encoded(task, tokenizer, longest=longest)
                nats = [[one.nats for one in row] for row in model.score(groups)]
                scores[name].append(scores_of(task, nats))
                continue
            whole = whole or model.load()
            write = partial(
                continue_greedily, whole, tokens=most, ends=ends, name=task.name
            )
            answers = answers_in_parts(
                asked(task, tokenizer, longest=longest, most=most),
                write,
                tokenizer,
                known=lambda _: None,
                keep=lambda *_: None,
            )
            scores[name].append(answer_scores(task, answers, most=most))
    base = next(iter(models))
    return {
        name: {
            task.name: {
                "of": task.total,
                **figures_of(own, None if name == base else reference),
            }
            for task, own, reference in zip(tasks, found, scores[base], strict=True)
        }
        for name, found in scores.items()
    }
