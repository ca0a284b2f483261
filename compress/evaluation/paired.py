"""Figures of a comparison: of each model, and of two on the same windows and questions.

Accuracy hides changes that cancel: ``flips`` is the share of questions that just one of
the two answers right, ``changed`` the share with another choice, right or wrong.

Source: Dutta et al. (2024), "Accuracy is not all you need".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.evaluation.divergence import Scores, summarize
from compress.evaluation.significance import (
    CONFIDENCE,
    Interval,
    bootstrap,
    mcnemar,
)
from compress.evaluation.tasks import TaskScores
from compress.evaluation.written import AnswerScores


def text_record(scores: Scores, base: Scores | None, text_bytes: int) -> dict[str, Any]:
    """Return what is kept of a text: its figures, and the means of its windows.

    Args:
        scores: Of the model.
        base: Of the base, when ``scores`` is a candidate's.
        text_bytes: UTF-8 bytes of the counted tokens.
    """
    means = {"nll": scores.nll, "kl": scores.kl, "top1": scores.same_top}
    return {
        "figures": summarize(scores, base=base, text_bytes=text_bytes),
        "text_bytes": text_bytes,
        "windows": {
            name: values.mean(1).tolist()
            for name, values in means.items()
            if values is not None
        },
    }


@dataclass(frozen=True)
class Difference:
    """What a second model loses or gains on questions that a first one answers too.

    Attributes:
        lost: Questions that only the first answers right.
        gained: Questions that only the second answers right.
        changed: Questions with another choice.
        count: Of all questions.
        accuracy: Second less first, with its interval.
    """

    lost: int
    gained: int
    changed: int
    count: int
    accuracy: Interval

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, with the shares and the p-value of McNemar's test."""
        p = mcnemar(self.lost, self.gained)
        return {
            "lost": self.lost,
            "gained": self.gained,
            "flips": (self.lost + self.gained) / self.count,
            "changed": self.changed / self.count,
            "p": p,
            "significant": p < 1 - CONFIDENCE,
            "accuracy_difference": self.accuracy.to_dict(),
        }


def differences(
    first: Sequence[TaskScores | AnswerScores],
    second: Sequence[TaskScores | AnswerScores],
) -> Difference:
    """Return how a second model's answers to some tasks differ from a first one's.

    Counts are over all questions; the accuracy is the mean of the tasks'.
    """
    pairs = list(zip(first, second, strict=True))
    gaps = [b.right - a.right for a, b in pairs]
    return Difference(
        lost=sum(int((gap < 0).sum()) for gap in gaps),
        gained=sum(int((gap > 0).sum()) for gap in gaps),
        changed=sum(int((a.chosen != b.chosen).sum()) for a, b in pairs),
        count=sum(len(gap) for gap in gaps),
        accuracy=bootstrap(gaps),
    )


def task_figures(scores: TaskScores, base: TaskScores | None) -> dict[str, Any]:
    """Return the figures of a task, and their differences from a base's."""
    count = len(scores.acc)
    figures: dict[str, Any] = {
        "metric": scores.metric,
        "items": count,
        "bits_per_byte": float(scores.gold_bits.sum() / scores.gold_bytes.sum()),
    }
    if scores.is_choice:
        accuracy = float(scores.right.mean())
        figures |= {
            "acc": float(scores.acc.mean()),
            "acc_norm": float(scores.acc_norm.mean()),
            "accuracy": accuracy,
            "accuracy_se": math.sqrt(accuracy * (1 - accuracy) / count),
        }
    if base is None:
        return figures
    gap = bootstrap([scores.gold_bits - base.gold_bits], [scores.gold_bytes])
    figures["bits_per_byte_difference"] = gap.to_dict()
    if scores.is_choice:
        figures |= differences([base], [scores]).to_dict()
    return figures


def answer_figures(scores: AnswerScores, base: AnswerScores | None) -> dict[str, Any]:
    """Return the figures of written answers, and their differences from a base's."""
    figures = scores.figures()
    if base is None:
        return figures
    for name in ("strict", "loose"):
        gap = getattr(scores, name) - getattr(base, name)
        figures[f"instruction_{name}_difference"] = bootstrap(
            [gap], [scores.given]
        ).to_dict()
    return figures | differences([base], [scores]).to_dict()


def text_figures(
    record: Mapping[str, Any], base: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the figures of a text, and intervals of what is paired with a base's."""
    figures = {k: v for k, v in record["figures"].items() if k != "kl_histogram"}
    if base is None:
        return figures
    rise = bootstrap([_gap(base, record, "nll")])
    ends = [math.exp(end) for end in (rise.value, rise.low, rise.high)]
    per_byte = figures["tokens"] / (math.log(2) * record["text_bytes"])
    bits = [end * per_byte for end in (rise.value, rise.low, rise.high)]
    ratio = {**Interval(*ends).to_dict(), "significant": rise.excludes_zero}
    return {
        **figures,
        "ppl_ratio_interval": ratio,
        "bits_per_byte_difference": Interval(*bits).to_dict(),
        **{
            f"{name}_interval": bootstrap([_means(record, name)]).to_dict()
            for name in ("kl", "top1")
        },
    }


def text_pair(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return how two candidates differ on a text: KL and log perplexity."""
    gaps = {name: bootstrap([_gap(first, second, name)]) for name in ("kl", "nll")}
    return {f"{name}_difference": gap.to_dict() for name, gap in gaps.items()}


def _means(record: Mapping[str, Any], name: str) -> Tensor:
    return torch.tensor(record["windows"][name], dtype=torch.float64)


def _gap(first: Mapping[str, Any], second: Mapping[str, Any], name: str) -> Tensor:
    return _means(second, name) - _means(first, name)
