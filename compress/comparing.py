"""A base and any number of candidates side by side: ``compress compare``.

All models see the same tokens. Figures of a model lie in a file of its own and are not
measured again while model, base, texts and tasks are the same. The base, and all that
is no GGUF file, runs block by block in torch in float32; GGUF files run in llama.cpp,
as their users run them. Everything is opened and checked before anything is computed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from compress import provenance
from compress.core.continuations import Continuation
from compress.core.errors import CheckpointError, ConfigError
from compress.evaluation.measure import (
    PreparedText,
    prepare_texts,
    score_candidates,
)
from compress.evaluation.measured import Measured
from compress.evaluation.paired import text_record
from compress.evaluation.side_by_side import (
    Measurements,
    mean_rows,
    pair_rows,
    task_rows,
    text_rows,
)
from compress.evaluation.tasks import Task, TaskScores, encoded, load_tasks, scores_of
from compress.evaluation.texts import check_evaluation_text
from compress.evaluation.written import (
    ANSWER_TOKENS,
    Answer,
    AnswerScores,
    WritingTask,
    answer_scores,
    answers_in_parts,
    asked,
)
from compress.model.devices import choose_device
from compress.report.comparison import comparison_markdown, comparison_text
from compress.report.comparison_plot import comparison_svg
from compress.report.wording import plain_data
from compress.subject import Subject
from compress.workdir import write_atomically

_log = logging.getLogger(__name__)

PROTOCOLS = ("hf2048", "llamacpp512")
_PROBE = "The quick brown fox, 2 + 2 = 4:\n    def f(x): return x"
_FILES = ("compare.json", "compare.md", "compare.svg")


@dataclass(frozen=True)
class Comparison:
    """Models side by side.

    Attributes:
        data: What ``compare.json`` holds.
        folder: Where everything lies.
    """

    data: Mapping[str, Any]
    folder: Path

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return dict(self.data)

    def text(self) -> str:
        """Return the tables for a terminal."""
        files = [f"  {self.folder / name}" for name in _FILES]
        return "\n".join([comparison_text(self.data), "", "Files", *files])


def compare(
    base: str | Path,
    candidates: Sequence[str | Path] = (),
    *,
    texts: Sequence[str] = ("wikitext2",),
    protocols: Sequence[str] = PROTOCOLS,
    tokens: int | None = 16384,
    tasks: Sequence[str] = (),
    only: Sequence[str] = (),
    limit: int | None = 100,
    answer_tokens: int = ANSWER_TOKENS,
    folder: str | Path = "runs/compare",
    device: str = "auto",
    overwrite: bool = False,
    command: str | None = None,
) -> Comparison:
    """Measure what was not measured yet, and put the models side by side.

    Args:
        base: HF folder or id, GGUF file, work directory of a run, ``builtin:NAME``;
            ``NAME=PATH`` names it in tables.
        candidates: The same, of the base's vocabulary.
        texts: Bundled texts or files.
        protocols: ``hf2048``, ``llamacpp512`` or both.
        tokens: The first of each text that are used, in whole windows; all if ``None``.
        tasks: JSONL files, folders of them, or ``hub:NAME``.
        only: Tasks to keep; all if empty.
        limit: Questions of a task, evenly spread; all if ``None``.
        answer_tokens: Most tokens of an answer, for tasks that want written text.
        folder: For results, and for what was measured.
        device: Of what runs in torch: ``auto``, ``cpu``, ``cuda``.
        overwrite: Measure everything again.
        command: How it was called, for the record.

    Raises:
        CompressError: Before any computation: a model, a text or a task cannot be read,
            or a candidate's vocabulary is not the base's.
    """
    started = time.monotonic()
    for text in texts:
        check_evaluation_text(text)
    named = _names([str(path) for path in (base, *candidates)])
    device = choose_device(device)
    loaded = load_tasks(tasks, only=only, limit=limit) if tasks else []
    if not texts and not loaded:
        raise ConfigError("nothing to measure: give a text or a folder of tasks")
    with tempfile.TemporaryDirectory() as cache:
        models = [
            Subject(
                path,
                name=name,
                is_exact=index == 0,
                device=device,
                cache=Path(cache) / str(index),
            )
            for index, (name, path) in enumerate(named)
        ]
        tokenizer = _one_tokenizer(models)
        windows = [
            text
            for protocol in protocols
            for text in prepare_texts(
                texts, tokenizer, protocol=protocol, most_tokens=tokens
            )
        ]
        root = Path(folder)
        longest = int(models[0].config["max_position_embeddings"])
        questions = [
            asked(task, tokenizer, longest=longest, most=answer_tokens)
            if isinstance(task, WritingTask)
            else encoded(task, tokenizer, longest=longest)
            for task in loaded
        ]
        job = _Job(
            models,
            windows,
            list(zip(loaded, questions, strict=True)),
            root,
            most=answer_tokens,
            overwrite=overwrite,
        )
        job.measure()
        data = job.data()
    data |= {
        "command": command or "compress.compare(base, candidates)",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": provenance.versions(),
        "hardware": provenance.hardware(device),
        "seconds": time.monotonic() - started,
    }
    data = plain_data(data)
    text = json.dumps(data, indent=1, ensure_ascii=False)
    write_atomically(root / "compare.json", text.encode())
    write_atomically(root / "compare.md", comparison_markdown(data).encode())
    write_atomically(root / "compare.svg", comparison_svg(data).encode())
    return Comparison(data, root)


def _names(given: Sequence[str]) -> list[tuple[str, str]]:
    """Return name and path of each model; names differ."""
    found: list[tuple[str, str]] = []
    for word in given:
        name, sign, path = word.partition("=")
        if not sign or "/" in name or Path(word).exists():
            path, name = word, Path(word).name.removeprefix("builtin:")
        if name in (known for known, _ in found):
            raise ConfigError(
                f"two models are called {name!r}; name them, as in int4={path}"
            )
        found.append((name, path))
    return found


def _one_tokenizer(models: Sequence[Subject]) -> Any:
    """Return the base's tokenizer, which must be that of all.

    Raises:
        CheckpointError: A candidate has another vocabulary.
    """
    base, *others = models
    tokenizer = base.handle.tokenizer()
    wanted = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    size = base.config["vocab_size"]
    for model in others:
        own = model.handle.tokenizer()
        found = own(_PROBE, add_special_tokens=False)["input_ids"]
        own_size = model.config["vocab_size"]
        if found != wanted or own_size != size:
            raise CheckpointError(
                f"{model.path}: its vocabulary is not that of {base.path} ({own_size} "
                f"and {size} tokens); compare models that share one"
            )
    return tokenizer


class _Job:
    """What is to be measured of which models, and what is made of it."""

    def __init__(
        self,
        models: Sequence[Subject],
        texts: Sequence[PreparedText],
        tasks: Sequence[tuple[Task | WritingTask, Any]],
        root: Path,
        *,
        most: int,
        overwrite: bool,
    ) -> None:
        self._models, self._texts, self._most = models, texts, most
        self._tasks = tasks
        self._files = {
            model.name: Measured(
                root / "measured" / f"{model.name}-{model.identity[:12]}.json",
                overwrite=overwrite,
            )
            for model in models
        }
        self._version = provenance.versions()["compress"]
        self._task_keys = {
            task.name: self._task_key(task, questions) for task, questions in tasks
        }

    def _task_key(self, task: Task | WritingTask, questions: Any) -> str:
        if isinstance(task, WritingTask):  # answers are checked anew each time
            return provenance.digest_of([questions, self._most, self._version])
        plain = [[vars(one) for one in group] for group in questions]
        return provenance.digest_of([task.digest, plain, self._version])

    def measure(self) -> None:
        """Measure what is not in the files."""
        for text in self._texts:
            self._measure_text(text)
        for model in self._models:
            for task, questions in self._tasks:
                if isinstance(task, WritingTask):
                    self._answers(model, task, questions)
                else:
                    self._measure_task(model, task, questions)
            model.release()

    def _text_key(self, text: PreparedText) -> str:
        ids = hashlib.sha256(text.windows.ids.numpy().tobytes()).hexdigest()
        base = self._models[0].identity
        return provenance.digest_of([text.windows.protocol, ids, base, self._version])

    def _measure_text(self, text: PreparedText) -> None:
        """Run the base once for all candidates that lack the text."""
        key = self._text_key(text)
        lacking = [m for m in self._models if not self._files[m.name].part(key)]
        if not lacking:
            return
        name = f"{text.name}, {text.windows.protocol}"
        _log.info("%s: %s", name, ", ".join(model.name for model in lacking))
        base, *others = self._models
        pending = [model for model in others if model in lacking]
        own, found = score_candidates(
            [text],
            base.logits,
            {model.name: model.logits for model in pending},
            hidden_size=int(base.config["hidden_size"]),
        )
        scores, size = own[text.name], text.counted_bytes
        self._files[base.name].add(key, name, text_record(scores, None, size))
        for model in pending:
            record = text_record(found[model.name][text.name], scores, size)
            self._files[model.name].add(key, name, record)

    def _answers(
        self, model: Subject, task: WritingTask, prompts: Sequence[Sequence[int]]
    ) -> list[Answer]:
        """Return the answers of a model: those in its file, and the rest written."""
        file, key = self._files[model.name], self._task_keys[task.name]

        def write(part: Sequence[Sequence[int]]) -> list[list[int]]:
            _log.info("%s, %d prompts: %s", task.name, len(part), model.name)
            return model.answers(part, most=self._most)

        return answers_in_parts(
            prompts,
            write,
            model.handle.tokenizer(),
            known=lambda number: file.part(f"{key}-{number}"),
            keep=lambda number, data: file.add(f"{key}-{number}", task.name, data),
        )

    def _measure_task(
        self, model: Subject, task: Task, groups: Sequence[Sequence[Continuation]]
    ) -> None:
        file, key = self._files[model.name], self._task_keys[task.name]
        if file.part(key):
            return
        _log.info("%s, %d questions: %s", task.name, len(groups), model.name)
        started = time.monotonic()
        found = model.likelihoods(groups)
        nats = [[one.nats for one in group] for group in found]
        data = {"nats": nats, "seconds": time.monotonic() - started}
        file.add(key, task.name, data)

    def data(self) -> dict[str, Any]:
        """Return the figures of all models."""
        found = Measurements(
            texts=self._texts,
            tasks=[task for task, _ in self._tasks],
            records={
                m.name: [self._text(m, t) for t in self._texts] for m in self._models
            },
            scores={
                m.name: [
                    self._scores(m, task, questions) for task, questions in self._tasks
                ]
                for m in self._models
            },
        )
        return {
            "version": 1,
            "models": [model.facts() for model in self._models],
            "texts": text_rows(found),
            "tasks": task_rows(found),
            "means": mean_rows(found),
            "pairs": pair_rows(found),
        }

    def _text(self, model: Subject, text: PreparedText) -> Mapping[str, Any]:
        record = self._files[model.name].part(self._text_key(text))
        assert record is not None, "measured before"
        return record

    def _scores(
        self, model: Subject, task: Task | WritingTask, questions: Any
    ) -> TaskScores | AnswerScores:
        if isinstance(task, WritingTask):
            answers = self._answers(model, task, questions)
            return answer_scores(task, answers, most=self._most)
        found = self._files[model.name].part(self._task_keys[task.name])
        assert found is not None, "measured before"
        return scores_of(task, found["nats"])
