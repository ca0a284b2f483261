"""Question sets: found in files or on the hub, cut to a subset, tokenized, scored.

``acc`` takes the choice of the highest log-likelihood, ``acc_norm`` of the highest per
character of its text. Bits per byte of the right answer need no choice: they move
smoothly where accuracy is near chance, as it is for small models.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.core.continuations import Continuation
from compress.core.errors import ConfigError
from compress.core.foreign import MALFORMED, parse_json
from compress.evaluation.task_rows import (
    INSTRUCTIONS,
    Item,
    Prompt,
    Row,
    RowForm,
    form_of,
)
from compress.evaluation.written import WritingTask, writing_task

_log = logging.getLogger(__name__)

_SPLITS = ("validation", "test", "valid", "dev", "train")
"""Splits a file's name may end with; the first two are scored, ``dev`` is shown."""

_NAMELESS = ("input_data", "data")
"""Names of files that say nothing: the folder's is the task's."""

HUB: dict[str, tuple[str, str | None, str]] = {
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test"),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test"),
    "boolq": ("google/boolq", None, "validation"),
    "commonsense_qa": ("tau/commonsense_qa", None, "validation"),
    "gsm8k": ("openai/gsm8k", "main", "test"),
    "hellaswag": ("Rowan/hellaswag", None, "validation"),
    "ifeval": ("google/IFEval", None, "train"),
    "mmlu": ("cais/mmlu", "all", "test"),
    "openbookqa": ("allenai/openbookqa", "main", "test"),
    "piqa": ("baber/piqa", None, "validation"),
    "winogrande": ("allenai/winogrande", "winogrande_xl", "validation"),
}
"""Data sets of the Hugging Face hub: repository, configuration and split by name."""


@dataclass(frozen=True)
class Task:
    """Questions to score.

    Attributes:
        name: Such as ``arc_easy``.
        metric: The usual one: ``acc``, ``acc_norm`` or ``bits_per_byte``.
        items: The questions.
        total: How many there are, of which ``items`` are evenly spread ones.
    """

    name: str
    metric: str
    items: tuple[Item, ...]
    total: int

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that is scored."""
        plain = [[i.contexts, i.continuations, i.right] for i in self.items]
        return hashlib.sha256(json.dumps([self.metric, plain]).encode()).hexdigest()


@dataclass(frozen=True)
class TaskScores:
    """What a model makes of a task; item by item, in order.

    Attributes:
        acc: Whether the likeliest choice is right, float64 ``[N]``.
        acc_norm: The same per character.
        chosen: Index of the choice by the task's usual metric, int64 ``[N]``.
        gold_bits: Bits of the right answer, float64 ``[N]``.
        gold_bytes: UTF-8 bytes of the right answer, float64 ``[N]``.
        metric: Of the task.
    """

    acc: Tensor
    acc_norm: Tensor
    chosen: Tensor
    gold_bits: Tensor
    gold_bytes: Tensor
    metric: str

    @property
    def is_choice(self) -> bool:
        """Whether there is something to choose from."""
        return self.metric != "bits_per_byte"

    @property
    def right(self) -> Tensor:
        """Whether an item is right by the usual metric, float64 ``[N]``."""
        return self.acc_norm if self.metric == "acc_norm" else self.acc


def load_tasks(
    sources: Sequence[str], *, only: Sequence[str] = (), limit: int | None = None
) -> list[Task | WritingTask]:
    """Return the tasks of files, folders and hub data sets.

    Files of one task (``NAME.validation.part1of3.jsonl``) are joined. Of a folder, and
    all below it, validation and test splits are taken; questions of ``NAME.dev`` are
    examples for MMLU; files that hold no known form of rows are named and left out.

    Args:
        sources: JSONL files, folders of them, or ``hub:NAME`` with a name of
            :data:`HUB`.
        only: Names to keep; all if empty.
        limit: Questions of each task at most, evenly spread over it.

    Raises:
        ConfigError: A source is missing or holds nothing, a row does not fit, or a name
            in ``only`` is unknown.
    """
    raw: dict[str, tuple[str, list[Row], list[Row]]] = {}
    for source in sources:
        found = _hub(source) if source.startswith("hub:") else _files(Path(source))
        for name in found.keys() & raw.keys():
            raise ConfigError(f"two sources hold task {name}; name it once")
        raw |= found
    if unknown := sorted(set(only) - raw.keys()):
        raise ConfigError(
            f"no task {', '.join(unknown)}; there are {', '.join(sorted(raw))}"
        )
    return [
        _task(name, where, rows, shown, limit)
        for name, (where, rows, shown) in sorted(raw.items())
        if not only or name in only
    ]


def _task(
    name: str, where: str, rows: Sequence[Row], shown: Sequence[Row], limit: int | None
) -> Task | WritingTask:
    form = form_of(rows[0])
    assert form is not None, "sources keep known forms only"
    if form.metric == INSTRUCTIONS:
        read = [
            _read(form, row, (), f"{where}: row {i + 1}") for i, row in enumerate(rows)
        ]
        return writing_task(name, [p for p in read if isinstance(p, Prompt)], limit)
    kept = len(rows) if limit is None else min(limit, len(rows))
    chosen = [i * len(rows) // kept for i in range(kept)]
    items = tuple(_item(form, rows[i], shown, f"{where}: row {i + 1}") for i in chosen)
    return Task(name, form.metric, items, len(rows))


def _item(form: RowForm, row: Row, shown: Sequence[Row], where: str) -> Item:
    item = _read(form, row, shown, where)
    assert isinstance(item, Item), "prompts are of another metric"
    if not all(item.contexts) or not all(text.strip() for text in item.continuations):
        raise ConfigError(f"{where}: a context or an answer is empty")
    return item


def _read(form: RowForm, row: Row, shown: Sequence[Row], where: str) -> Item | Prompt:
    if form_of(row) is not form:
        lacks = ", ".join(sorted(form.keys - row.keys())) or "a value of the same kind"
        raise ConfigError(
            f"{where}: rows before are {form.name}'s; this one lacks {lacks}"
        )
    try:
        item = form.read(row, shown)
        if not all(isinstance(text, str) for text in item.texts):
            raise TypeError("a context, a prompt or an answer is no text")
    except MALFORMED as error:
        raise ConfigError(
            f"{where} is no row of {form.name}: {type(error).__name__}: {error}"
        ) from error
    return item


def check_source(source: str) -> None:
    """Raise unless a source holds tasks; of the hub its name alone is checked.

    Raises:
        ConfigError: It is missing, or none of its files has a known form.
    """
    if source.startswith("hub:"):
        _hub_name(source)
    else:
        _files(Path(source))


_Raw = dict[str, tuple[str, list[Row], list[Row]]]
"""For each task: where it is from, its rows, and rows to show as examples."""


def _files(source: Path) -> _Raw:
    if source.is_dir():
        files = sorted(source.rglob("*.jsonl"))
    elif source.is_file():
        files = [source]
    else:
        raise ConfigError(
            f"tasks: {source} does not exist; give a JSONL file, a folder of them, or "
            f"hub:NAME with one of {', '.join(HUB)}"
        )
    by_name: dict[str, dict[str, list[Path]]] = {}
    for file in files:
        name, split = _name_and_split(file)
        by_name.setdefault(name, {}).setdefault(split, []).append(file)
    found: _Raw = {}
    for name, splits in by_name.items():
        scored = splits if source.is_file() else ("", "validation", "test")
        chosen = next((splits[s] for s in scored if s in splits), [])
        if not chosen:
            continue
        rows = [row for file in chosen for row in _rows(file)]
        where = str(chosen[0])
        if not rows or form_of(rows[0]) is None:
            keys = ", ".join(rows[0]) if rows else "none"
            _log.warning("%s: rows of no known form (keys: %s), left out", where, keys)
            continue
        shown = [row for file in _shown(source, name, splits) for row in _rows(file)]
        found[name] = where, rows, shown
    if not found:
        raise ConfigError(f"tasks: {source} holds no JSONL file of a known form")
    return found


def _shown(source: Path, name: str, splits: Mapping[str, list[Path]]) -> list[Path]:
    """Return files of examples; those of a single file lie beside it."""
    if source.is_file():
        return sorted(source.parent.glob(f"{name}.dev*.jsonl"))
    return splits.get("dev", [])


def _name_and_split(file: Path) -> tuple[str, str]:
    """Return ``piqa`` and ``validation`` for ``piqa.validation.jsonl``."""
    words = file.name.removesuffix(".jsonl").split(".")
    if words[0] in _SPLITS:
        return file.parent.name, words[0]
    if words[0] in _NAMELESS:
        return file.parent.name, ""
    split = next((word for word in words[1:] if word in _SPLITS), "")
    return words[0], split


def _rows(file: Path) -> list[Row]:
    rows: list[Row] = []
    with file.open(encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    row = parse_json(line)
                    if not isinstance(row, dict):
                        raise ConfigError(f"{file}:{number}: not a JSON object")
                    rows.append(row)
        except ValueError as error:
            raise ConfigError(f"{file}:{len(rows) + 1}: no JSON: {error}") from error
    return rows


def _hub(source: str) -> _Raw:
    import datasets

    name = _hub_name(source)
    path, part, split = HUB[name]
    try:
        rows = list(datasets.load_dataset(path, part, split=split))
        shown = []
        if name == "mmlu":
            shown = list(datasets.load_dataset(path, part, split="dev"))
    except Exception as error:  # datasets raises what its many sources raise
        raise ConfigError(
            f"{source}: {path} could not be fetched from the Hugging Face hub: "
            f"{type(error).__name__}: {error}; or give a JSONL file or folder"
        ) from error
    return {name: (source, rows, shown)}


def _hub_name(source: str) -> str:
    name = source.removeprefix("hub:")
    if name not in HUB:
        raise ConfigError(
            f"unknown task {source!r}; there are hub:{', hub:'.join(HUB)}"
        )
    return name


def encoded(task: Task, tokenizer: Any, *, longest: int) -> list[list[Continuation]]:
    """Return the choices of each item as tokens.

    Context and answer are tokenized together and parted at the context's length, as
    lm-evaluation-harness does; white space that ends a context goes to the answer.

    Args:
        task: With its items.
        tokenizer: Of the model.
        longest: Tokens a model takes; longer contexts lose their start.
    """
    pairs = [
        (context.rstrip() or context, context + answer)
        for item in task.items
        for context, answer in zip(item.contexts, item.continuations, strict=True)
    ]
    starts = tokenizer([start for start, _ in pairs], verbose=False)["input_ids"]
    wholes = tokenizer([whole for _, whole in pairs], verbose=False)["input_ids"]
    if cuts := sum(len(ids) - 1 > longest for ids in wholes):
        _log.warning(
            "%s: %d of %d contexts are longer than %d tokens and lose their start",
            *(task.name, cuts, len(wholes), longest),
        )
    rest = iter(zip(wholes, starts, strict=True))
    return [
        [
            cut(ids, len(start), longest)
            for ids, start in islice(rest, len(item.contexts))
        ]
        for item in task.items
    ]


def cut(ids: Sequence[int], start: int, longest: int) -> Continuation:
    """Return a continuation of at most ``longest`` tokens, shortened at its left."""
    start = min(max(start, 1), len(ids) - 1)
    dropped = max(0, len(ids) - 1 - longest)
    return Continuation(tuple(ids[dropped:]), max(1, start - dropped))


def scores_of(task: Task, nats: Sequence[Sequence[float]]) -> TaskScores:
    """Return what log-likelihoods say of a task.

    Args:
        task: With its items.
        nats: Log-likelihood of each choice of each item.
    """
    rows = []
    for item, values in zip(task.items, nats, strict=True):
        lengths = [len(text.removeprefix(" ")) for text in item.continuations]
        rates = [value / size for value, size in zip(values, lengths, strict=True)]
        best, best_rate = values.index(max(values)), rates.index(max(rates))
        rows.append(
            (
                float(best == item.right),
                float(best_rate == item.right),
                best_rate if task.metric == "acc_norm" else best,
                -values[item.right] / math.log(2),
                len(item.continuations[item.right].encode()),
            )
        )
    acc, acc_norm, chosen, bits, size = torch.tensor(rows, dtype=torch.float64).T
    return TaskScores(acc, acc_norm, chosen.long(), bits, size, task.metric)
