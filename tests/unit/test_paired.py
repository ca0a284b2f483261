"""Figures of a comparison, from scores made by hand."""

from __future__ import annotations

import math

import pytest
import torch

from compress.evaluation.divergence import Scores
from compress.evaluation.paired import (
    differences,
    task_figures,
    text_figures,
    text_pair,
    text_record,
)
from compress.evaluation.significance import mcnemar
from compress.evaluation.tasks import TaskScores


def answers(right: str, chosen: str, bits: float = 1.0) -> TaskScores:
    hits = torch.tensor([float(mark) for mark in right], dtype=torch.float64)
    picks = torch.tensor([int(mark) for mark in chosen])
    return TaskScores(
        hits, hits, picks, torch.full_like(hits, bits), torch.ones_like(hits), "acc"
    )


BASE = answers("1111100000", "0000011111", 8.0)
OTHER = answers("1100010000", "0022201112", 9.0)


def test_flips_count_both_directions_and_changes_any_other_choice() -> None:
    found = differences([BASE], [OTHER])
    assert (found.lost, found.gained, found.changed, found.count) == (3, 1, 5, 10)
    plain = found.to_dict()
    assert plain["flips"] == 0.4
    assert plain["p"] == mcnemar(3, 1)
    assert plain["significant"] is False
    assert plain["accuracy_difference"]["value"] == pytest.approx(-0.2)


def test_losses_in_one_direction_alone_are_significant() -> None:
    worse = answers("0000000000", "2222222222")
    found = differences([BASE, BASE], [worse, worse]).to_dict()
    assert (found["lost"], found["gained"]) == (10, 0)
    assert found["p"] == 2 / 2**10
    assert found["significant"] is True


def test_a_model_does_not_differ_from_itself() -> None:
    found = differences([BASE], [BASE]).to_dict()
    assert (found["flips"], found["changed"], found["p"]) == (0, 0, 1)
    assert found["accuracy_difference"]["significant"] is False


def test_counts_are_pooled_and_accuracies_averaged_over_tasks() -> None:
    found = differences([BASE, BASE], [OTHER, BASE])
    assert (found.lost, found.gained, found.count) == (3, 1, 20)
    assert found.accuracy.value == pytest.approx(-0.1)


def test_bits_of_the_answer_are_compared_by_byte() -> None:
    figures = task_figures(OTHER, BASE)
    assert figures["bits_per_byte"] == 9
    assert figures["bits_per_byte_difference"]["value"] == pytest.approx(1)
    assert figures["bits_per_byte_difference"]["significant"] is True
    assert figures["accuracy_se"] == pytest.approx(math.sqrt(0.3 * 0.7 / 10))


def test_tasks_without_choices_have_no_accuracy() -> None:
    reference = TaskScores(*vars(BASE).values())
    reference = TaskScores(**{**vars(reference), "metric": "bits_per_byte"})
    figures = task_figures(reference, reference)
    assert "accuracy" not in figures and "p" not in figures
    assert figures["bits_per_byte_difference"]["value"] == 0


def scores(nll: float, kl: float | None = None) -> Scores:
    """Return ten windows of three tokens, with some spread between windows."""
    spread = torch.linspace(-0.1, 0.1, 10, dtype=torch.float64)[:, None]
    values = nll + spread.expand(10, 3)
    if kl is None:
        return Scores("p", values)
    filled = [torch.full_like(values, value) for value in (kl, 0.9, 0.1, 0.0)]
    return Scores("p", values, *filled)


def test_a_text_is_paired_window_by_window() -> None:
    base, other = scores(2.0), scores(2.5, kl=0.3)
    records = text_record(base, None, 60), text_record(other, base, 60)
    figures = text_figures(records[1], records[0])
    # The windows' own spread cancels: the interval has no width.
    assert figures["ppl_ratio_interval"] == pytest.approx(
        {"value": math.exp(0.5), "low": math.exp(0.5), "high": math.exp(0.5)}
        | {"significant": True}
    )
    gap = figures["bits_per_byte"] - records[0]["figures"]["bits_per_byte"]
    assert figures["bits_per_byte_difference"]["value"] == pytest.approx(gap)
    assert figures["kl_interval"]["value"] == pytest.approx(0.3)
    assert figures["top1_interval"]["value"] == pytest.approx(0.9)
    assert "kl_histogram" not in figures


def test_two_candidates_are_compared_by_their_difference() -> None:
    base = scores(2.0)
    near = text_record(scores(2.1, kl=0.1), base, 60)
    far = text_record(scores(2.4, kl=0.5), base, 60)
    found = text_pair(near, far)
    assert found["kl_difference"]["value"] == pytest.approx(0.4)
    assert found["nll_difference"]["value"] == pytest.approx(0.3)
    assert found["kl_difference"]["significant"] is True
