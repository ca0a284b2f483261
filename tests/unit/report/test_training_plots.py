"""Curves of training, samples, and what the table of layers says of a search."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from report_fixtures import full_report, sample_report

from compress.report import write_report
from compress.report.layers import layer_table
from compress.report.samples import samples_section, samples_table
from compress.report.training_plots import training_plot


@pytest.fixture
def record() -> dict[str, Any]:
    found: dict[str, Any] = full_report(2)["recovery"]
    return found


def drawing(html: str) -> ElementTree.Element:
    (svg,) = re.findall(r'<svg viewBox="[^"]*" role="img".*?</svg>', html)
    return ElementTree.fromstring(svg)


def places(html: str, series: int) -> list[tuple[float, float]]:
    """Return where the marks of a series are, in the order of its points."""
    found = []
    for e in drawing(html).iter():
        if e.get("class", "").split() == ["mark", f"s{series}"]:
            x, y = re.findall(r"-?[\d.]+", e.get("transform", ""))[:2]
            found.append((float(x), float(y)))
    return found


def test_a_curve_has_a_mark_for_each_evaluation(record: dict[str, Any]) -> None:
    html = training_plot(record, title="Recovery")
    kl, loss = places(html, 0), places(html, 1)
    assert len(kl) == len(record["evaluations"]) == len(loss) + 1
    assert [x for x, _ in kl] == sorted(x for x, _ in kl)
    assert [y for _, y in kl] == sorted(y for _, y in kl)  # lower is less, further down
    assert "Recovery by distill" in html and "training loss" in html


def test_the_step_that_was_kept_is_marked(record: dict[str, Any]) -> None:
    html = training_plot(record, title="Recovery")
    (line,) = [e for e in drawing(html).iter() if e.get("class") == "limit"]
    index = [e["step"] for e in record["evaluations"]].index(record["best_step"])
    assert float(line.get("x1", "")) == pytest.approx(
        places(html, 0)[index][0], abs=0.1
    )


def test_no_curve_is_drawn_from_one_point(record: dict[str, Any]) -> None:
    record["evaluations"] = record["evaluations"][:1]
    assert training_plot(record, title="Recovery") == ""
    assert training_plot({}, title="Recovery") == ""


@pytest.mark.parametrize("value", [None, 0.0, float("nan"), 1e300])
def test_odd_values_do_not_break_a_curve(record: dict[str, Any], value: Any) -> None:
    record["evaluations"][2]["kl"] = value
    html = training_plot(record, title="Recovery")
    assert not re.search(r'="[^"]*\b(nan|inf)\b', html)
    drawing(html)


def test_samples_stand_side_by_side_with_the_difference_marked() -> None:
    html = samples_section(full_report(2))
    assert re.findall("<mark>(.*?)</mark>", html) == [
        "&lt;that&gt; never stopped.",
        "that ran backwards.",
    ]
    assert html.count("the same text") == 1 and "first 5 tokens are the same" in html
    rows = samples_table(full_report(2)).rows
    assert rows[0][0] == "Once upon a time" and rows[0][3] == "5"


def test_a_run_without_samples_has_no_such_part(tmp_path: Path) -> None:
    for samples in (None, {"skipped": "the whole model does not fit cuda"}):
        report = sample_report(2) | {"samples": samples}
        texts = [path.read_text("utf-8") for path in write_report(report, tmp_path)]
        assert not any("Samples" in text for text in texts[1:])


def test_layers_are_told_what_the_search_predicted_of_them() -> None:
    report = full_report(2)
    unit = report["allocation"]["units"][0]
    unit["choices"][0].update(loss=0.123, bytes=1)  # the smallest one
    unit["choices"][unit["chosen"]]["loss"] = 0.0456
    if unit["chosen"] == 0:
        unit["chosen"] = 1
        unit["choices"][1]["loss"] = 0.0456
        unit["choices"][0]["loss"] = 0.123
    html = layer_table(report)
    (row,) = re.findall(rf"<tr><th[^>]*>{unit['layers'][0]}</th>.*?</tr>", html)
    assert 'data-sort="0.123"' in row and 'data-sort="0.0456"' in row
    assert "sensitivity" not in layer_table(sample_report(2))


def test_the_map_of_bits_is_there_without_a_search(tmp_path: Path) -> None:
    html = write_report(sample_report(2), tmp_path)[2].read_text("utf-8")
    assert "Bits per weight by block and role" in html
