"""Prompts that a model answers in its own words, and what its answers are worth.

Answers are greedy. An instruction is followed strictly if the answer itself passes its
checker, loosely if one of the answer's variants does
(:func:`~compress.evaluation.instructions.loose_variants`); a prompt is if all of its
instructions are. The four accuracies are those of IFEval.

Source: Zhou et al. (2023), arXiv 2311.07911, section 2.2.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from compress.core.errors import ConfigError
from compress.evaluation.instructions import (
    NEED_LANGUAGE,
    can_tell_languages,
    is_followed,
    loose_variants,
)
from compress.evaluation.task_rows import INSTRUCTIONS, Instruction, Prompt

_log = logging.getLogger(__name__)

ANSWER_TOKENS = 1280
"""Most tokens of an answer, as in lm-evaluation-harness."""


@dataclass(frozen=True)
class WritingTask:
    """Prompts to answer.

    Attributes:
        name: Such as ``ifeval``.
        items: The prompts.
        total: How many there are, of which ``items`` are evenly spread ones.
        left_out: Prompts of these that nothing here can check; never silently.
    """

    name: str
    items: tuple[Prompt, ...]
    total: int
    left_out: int = 0

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what is asked and checked."""
        plain = [
            [p.text, [[i.kind, dict(i.arguments)] for i in p.instructions]]
            for p in self.items
        ]
        return hashlib.sha256(json.dumps(plain).encode()).hexdigest()


@dataclass(frozen=True)
class Answer:
    """What a model wrote.

    Attributes:
        text: Without special tokens.
        tokens: How many; as many as were allowed if it did not end by itself.
    """

    text: str
    tokens: int


@dataclass(frozen=True)
class AnswerScores:
    """What a model's answers are worth; prompt by prompt, in order.

    Attributes:
        given: Instructions, float64 ``[N]``.
        strict: Of which the answer follows, float64 ``[N]``.
        loose: Of which a variant does, float64 ``[N]``.
        chosen: Which ones the answer follows, as bits, int64 ``[N]``.
        tokens: Of the answer, float64 ``[N]``.
        most_tokens: That an answer may have.
        left_out: Prompts that were not asked.
    """

    given: Tensor
    strict: Tensor
    loose: Tensor
    chosen: Tensor
    tokens: Tensor
    most_tokens: int
    left_out: int
    metric: str = INSTRUCTIONS
    is_choice: bool = True

    @property
    def right(self) -> Tensor:
        """Whether all instructions of a prompt are followed strictly."""
        return (self.strict == self.given).double()

    def figures(self) -> dict[str, Any]:
        """Return the four accuracies, and how long answers are."""
        accuracy = float(self.right.mean())
        return {
            "metric": self.metric,
            "items": len(self.given),
            "instructions": int(self.given.sum()),
            "left_out": self.left_out,
            "accuracy": accuracy,
            "accuracy_se": math.sqrt(accuracy * (1 - accuracy) / len(self.given)),
            "prompt_strict": accuracy,
            "prompt_loose": float((self.loose == self.given).double().mean()),
            "instruction_strict": float(self.strict.sum() / self.given.sum()),
            "instruction_loose": float(self.loose.sum() / self.given.sum()),
            "answer_tokens": float(self.tokens.mean()),
            "most_tokens": self.most_tokens,
            "cut": float((self.tokens >= self.most_tokens).double().mean()),
        }


def writing_task(
    name: str, prompts: Sequence[Prompt], limit: int | None
) -> WritingTask:
    """Return the prompts that can be checked here, evenly spread if there is a limit.

    Raises:
        ConfigError: None can be.
    """
    known = [prompt for prompt in prompts if _is_checkable(prompt)]
    left_out = len(prompts) - len(known)
    if left_out:
        _log.warning(
            "%s: %d of %d prompts are left out: the language of their answers counts, "
            "and langdetect is not installed (pip install langdetect)",
            *(name, left_out, len(prompts)),
        )
    if not known:
        raise ConfigError(
            f"{name}: no prompt can be checked without langdetect; install it "
            "(pip install langdetect)"
        )
    kept = len(known) if limit is None else min(limit, len(known))
    items = tuple(known[i * len(known) // kept] for i in range(kept))
    return WritingTask(name, items, len(prompts), left_out)


def _is_checkable(prompt: Prompt) -> bool:
    needs = any(one.kind in NEED_LANGUAGE for one in prompt.instructions)
    return not needs or can_tell_languages()


def asked(
    task: WritingTask, tokenizer: Any, *, longest: int, most: int
) -> list[list[int]]:
    """Return each prompt as tokens: a user's turn in the chat template.

    A tokenizer without one gets the plain text, and a warning says so.

    Args:
        task: With its prompts.
        tokenizer: Of the model.
        longest: Tokens that a model takes.
        most: Tokens of an answer; longer prompts lose their start.

    Raises:
        ConfigError: There is no room for a prompt.
    """
    if most >= longest:
        raise ConfigError(
            f"{task.name}: answers of {most} tokens leave no room for a prompt in the "
            f"model's {longest}; ask for fewer answer tokens"
        )
    if getattr(tokenizer, "chat_template", None):
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt.text}],
                tokenize=False,
                add_generation_prompt=True,
            )
            for prompt in task.items
        ]
        ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    else:
        _log.warning("%s: no chat template, prompts are plain texts", task.name)
        texts = [prompt.text for prompt in task.items]
        ids = tokenizer(texts, verbose=False)["input_ids"]
    return [list(row[most - longest :]) for row in ids]


def answer_scores(
    task: WritingTask, answers: Sequence[Answer], *, most: int
) -> AnswerScores:
    """Return what answers are worth.

    Args:
        task: With its prompts.
        answers: One for each.
        most: Tokens that an answer could have.
    """
    rows = []
    for prompt, answer in zip(task.items, answers, strict=True):
        strict = [_follows(one, answer.text) for one in prompt.instructions]
        variants = loose_variants(answer.text)
        loose = [
            any(_follows(one, text) for text in variants) for one in prompt.instructions
        ]
        bits = sum(1 << index for index, value in enumerate(strict) if value)
        rows.append((len(strict), sum(strict), sum(loose), bits, answer.tokens))
    given, kept, loosely, chosen, tokens = torch.tensor(rows, dtype=torch.float64).T
    return AnswerScores(
        given, kept, loosely, chosen.long(), tokens, most, task.left_out
    )


def _follows(wanted: Instruction, text: str) -> bool:
    return is_followed(wanted.kind, text, wanted.arguments)


Write = Callable[[Sequence[Sequence[int]]], list[list[int]]]
"""Answers a few prompts, both as tokens."""


def answers_in_parts(
    prompts: Sequence[Sequence[int]],
    write: Write,
    tokenizer: Any,
    *,
    known: Callable[[int], Mapping[str, Any] | None],
    keep: Callable[[int, Mapping[str, Any]], None],
    part: int = 16,
) -> list[Answer]:
    """Return answers to prompts, a part after the other, each kept at once.

    Args:
        prompts: As tokens.
        write: Answers a part.
        tokenizer: Decodes the answers.
        known: Returns a part that was kept, by its number.
        keep: Is given a part: its ``texts``, and how many ``tokens`` each has.
        part: Prompts of one.
    """
    found: list[Answer] = []
    for number, start in enumerate(range(0, len(prompts), part)):
        data = known(number)
        if data is None:
            rows = write(prompts[start : start + part])
            texts = [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
            data = {"texts": texts, "tokens": [len(row) for row in rows]}
            keep(number, data)
        pairs = zip(data["texts"], data["tokens"], strict=True)
        found += [Answer(text, tokens) for text, tokens in pairs]
    return found
