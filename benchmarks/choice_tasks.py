"""Questions with answers to choose from: accuracy, and bits per byte of the right one.

ARC easy and challenge, HellaSwag, PIQA and MMLU from JSON lines, no examples shown, the
answer's text scored after the question (cloze form of the Open Language Model
Evaluation Standard). Accuracy takes the answer of the highest log-likelihood per byte.
Bits per byte of the right answer moves smoothly where accuracy is near chance, as it is
for small models. Padding is on the right, where a causal model does not see it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Tokens of one forward pass, padding included.
_TOKENS = {"cpu": 4096, "cuda": 65536}
_POSITIONS = 4096


@dataclass(frozen=True)
class Question:
    """A context, what may follow it, and which of it is right."""

    context: str
    answers: tuple[str, ...]
    right: int


@dataclass(frozen=True)
class Answer:
    """One answer as tokens.

    Attributes:
        question: Its index.
        index: Among the answers of the question.
        ids: Tokens of context and answer.
        start: Where the answer's tokens begin.
        size_bytes: Of the answer.
    """

    question: int
    index: int
    ids: list[int]
    start: int
    size_bytes: int


@dataclass(frozen=True)
class Task:
    """A set of questions, tokenized."""

    name: str
    right: list[int]
    answers: list[Answer]


def _arc(row: dict[str, Any]) -> Question:
    choices = row["choices"]
    right = choices["label"].index(row["answerKey"])
    return _question(row["question"], choices["text"], right)


def _piqa(row: dict[str, Any]) -> Question:
    return _question(row["goal"], [row["sol1"], row["sol2"]], row["label"])


def _mmlu(row: dict[str, Any]) -> Question:
    return _question(row["question"], row["choices"], row["answer"])


def _question(text: str, answers: Sequence[str], right: int) -> Question:
    context = f"Question: {text.strip()}\nAnswer:"
    return Question(context, tuple(f" {answer.strip()}" for answer in answers), right)


def _hellaswag(row: dict[str, Any]) -> Question:
    begun = f"{row['ctx_a']} {row['ctx_b'].capitalize()}"
    context = _plain(f"{row['activity_label']}: {begun}")
    endings = tuple(f" {_plain(ending)}" for ending in row["endings"])
    return Question(context, endings, int(row["label"]))


def _plain(text: str) -> str:
    """Remove the marks of WikiHow from a text."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return re.sub(r" +", " ", text).strip()


TASKS: dict[str, tuple[str, Callable[[dict[str, Any]], Question]]] = {
    "arc_easy": ("arc_easy.validation*.jsonl", _arc),
    "arc_challenge": ("arc_challenge.validation*.jsonl", _arc),
    "hellaswag": ("hellaswag.validation*.jsonl", _hellaswag),
    "piqa": ("piqa.validation*.jsonl", _piqa),
    "mmlu": ("mmlu.validation*.jsonl", _mmlu),
}


def load_tasks(folder: Path, tokenizer: Any, *, items: int | None) -> list[Task]:
    """Return all of :data:`TASKS`.

    Args:
        folder: Where their files are.
        tokenizer: Of the model.
        items: Questions of each, evenly spread; all if ``None``.
    """
    return [_task(name, folder, tokenizer, items) for name in TASKS]


def _task(name: str, folder: Path, tokenizer: Any, items: int | None) -> Task:
    pattern, read = TASKS[name]
    files = sorted(folder.glob(pattern))
    if not files:
        raise SystemExit(f"{folder} has no {pattern}")
    texts = [file.read_text("utf-8") for file in files]
    lines = [line for text in texts for line in text.split("\n") if line]
    kept = len(lines) if items is None else min(items, len(lines))
    chosen = [lines[i * len(lines) // kept] for i in range(kept)]
    questions = [read(json.loads(line)) for line in chosen]
    pairs = [
        (q, i)
        for q, question in enumerate(questions)
        for i in range(len(question.answers))
    ]
    contexts = tokenizer([question.context for question in questions])["input_ids"]
    whole = tokenizer(
        [questions[q].context + questions[q].answers[i] for q, i in pairs]
    )
    answers = [
        Answer(q, i, ids, len(contexts[q]), len(questions[q].answers[i].encode()))
        for (q, i), ids in zip(pairs, whole["input_ids"], strict=True)
    ]
    return Task(name, [question.right for question in questions], answers)


def measure_task(model: Any, task: Task, device: str) -> dict[str, float]:
    """Return accuracy, its standard error, and bits per byte of the right answers."""
    scores: dict[tuple[int, int], tuple[float, int]] = {}
    for batch in _batches(task.answers, _TOKENS[torch.device(device).type]):
        found = _log_likelihoods(model, batch, device)
        for answer, value in zip(batch, found, strict=True):
            scores[answer.question, answer.index] = value, answer.size_bytes
    hits, nats, size = 0, 0.0, 0
    for question, right in enumerate(task.right):
        rates = []
        while (question, len(rates)) in scores:
            value, length = scores[question, len(rates)]
            rates.append(value / length)
        hits += rates.index(max(rates)) == right
        value, length = scores[question, right]
        nats, size = nats - value, size + length
    accuracy, count = hits / len(task.right), len(task.right)
    return {
        "accuracy": accuracy,
        "accuracy_se": math.sqrt(accuracy * (1 - accuracy) / count),
        "bits_per_byte": nats / math.log(2) / size,
        "questions": count,
    }


def _batches(answers: Sequence[Answer], tokens: int) -> Iterator[list[Answer]]:
    """Yield answers of like length, so many that padded they hold ``tokens``."""
    batch: list[Answer] = []
    for answer in sorted(answers, key=lambda answer: len(answer.ids)):
        if batch and len(answer.ids) * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        batch.append(answer)
    if batch:
        yield batch


@torch.inference_mode()
def _log_likelihoods(model: Any, batch: Sequence[Answer], device: str) -> list[float]:
    """Return the log-likelihood in nats of each answer after its context."""
    width = max(len(answer.ids) for answer in batch)
    padded = torch.zeros(len(batch), width, dtype=torch.int64)
    rows, places = [], []
    for row, answer in enumerate(batch):
        padded[row, : len(answer.ids)] = torch.tensor(answer.ids)
        here = range(answer.start, len(answer.ids))
        rows += [row] * len(here)
        places += here
    ids, row, place = (
        value.to(device) for value in (padded, torch.tensor(rows), torch.tensor(places))
    )
    states = model.base_model(ids, use_cache=False).last_hidden_state[row, place - 1]
    head = model.get_output_embeddings()
    parts: list[Tensor] = []
    for some, true in zip(
        states.split(_POSITIONS), ids[row, place].split(_POSITIONS), strict=True
    ):
        logits = head(some).float()
        parts.append(logits.gather(1, true[:, None])[:, 0] - logits.logsumexp(-1))
    total = torch.zeros(len(batch), dtype=torch.float64, device=device)
    total.index_add_(0, row, torch.cat(parts).double())
    return total.tolist()  # type: ignore[no-any-return]
