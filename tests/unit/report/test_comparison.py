"""The tables and the figure of a comparison."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest

from compress.report.comparison import (
    comparison_markdown,
    comparison_tables,
    comparison_text,
)
from compress.report.comparison_plot import comparison_svg


def interval(value: float, width: float, *, significant: bool) -> dict[str, Any]:
    ends = {"low": value - width, "high": value + width}
    return {"value": value, **ends, "significant": significant}


def text_row(model: str, kl: float | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "text": "tales",
        "model": model,
        "protocol": "llamacpp512",
        "tokens": 2550,
        "perplexity": 20.5,
        "bits_per_byte": 1.234,
    }
    if kl is None:
        return row
    row |= {name: kl for name in ("kl", "kl_median", "kl_p90", "kl_p99", "kl_max")}
    return row | {
        "top1": 0.91,
        "flips": 0.05,
        "kl_interval": interval(kl, kl / 10, significant=True),
        "ppl_ratio_interval": interval(1.05, 0.01, significant=True),
    }


def task_row(model: str, **differences: Any) -> dict[str, Any]:
    row = {"task": "piqa", "model": model, "of": 1838, "items": 100}
    row |= {"accuracy": 0.6, "accuracy_se": 0.049, "bits_per_byte": 1.1}
    return row | differences


DIFFERENCE = {
    "flips": 0.11,
    "changed": 0.11,
    "p": 0.0004,
    "significant": True,
    "accuracy_difference": interval(-0.09, 0.04, significant=True),
    "bits_per_byte_difference": interval(0.05, 0.07, significant=False),
}


@pytest.fixture
def data() -> dict[str, Any]:
    def model(name: str, size: int, where: str) -> dict[str, Any]:
        return {
            "name": name,
            "size_bytes": size,
            "bits_per_weight": 16 * size / 4e8,
            "runs_in": where,
        }

    names = ("base", "a|<b>", "tiny.gguf")
    pairs = {"first": "a|<b>", "second": "tiny.gguf", "texts": [], "tasks": DIFFERENCE}
    return {
        "models": [
            model("base", 400_000_000, "torch"),
            model("a|<b>", 100_000_000, "torch"),
            model("tiny.gguf", 50_000_000, "llama.cpp"),
        ],
        "texts": [
            text_row(n, kl) for n, kl in zip(names, (None, 0.02, 0.3), strict=True)
        ],
        "tasks": [task_row(n, **(DIFFERENCE if n != "base" else {})) for n in names],
        "means": [
            {"tasks": 1, "model": n, "items": 100, "accuracy": 0.6}
            | (DIFFERENCE if n != "base" else {})
            for n in names
        ],
        "pairs": [pairs],
        "command": "compress compare a b",
        "date": "2026-01-01",
        "versions": {"compress": "0"},
        "hardware": {"cpu": "some", "cores": 2, "device": "cpu"},
    }


def test_the_summary_has_a_row_a_model(data: dict[str, Any]) -> None:
    summary = comparison_tables(data)[0]
    row = dict(zip(summary.headers, summary.rows[1], strict=True))
    assert row["of base"] == "25.0 %"
    assert row["bits"] == "4.00"
    assert row["KL"] == "0.0200"
    assert row["perplexity"] == "×1.050 [1.040, 1.060]*"
    assert row["difference"] == "-9.0 [-13.0, -5.0]*"


def test_a_difference_of_nothing_has_no_minus(data: dict[str, Any]) -> None:
    data["means"][1] |= {"accuracy_difference": interval(-1e-9, 0, significant=False)}
    assert "+0.0 [+0.0, +0.0]" in comparison_tables(data)[0].rows[1]


def test_only_what_is_significant_is_starred(data: dict[str, Any]) -> None:
    tasks = next(t for t in comparison_tables(data) if t.title == "Tasks")
    row = tasks.rows[1]
    assert row[2] == "100 of 1,838"
    assert row[tasks.headers.index("p")] == "4e-04*"
    assert row[-1] == "+0.050 [-0.020, +0.120]"


def test_the_mean_of_several_tasks_has_a_row(data: dict[str, Any]) -> None:
    tasks = next(t for t in comparison_tables(data) if t.title == "Tasks")
    assert len(tasks.rows) == 3
    data["means"] = [{**row, "tasks": 2} for row in data["means"]]
    tasks = next(t for t in comparison_tables(data) if t.title == "Tasks")
    assert [row[0] for row in tasks.rows[3:]] == ["mean of 2"] * 3


def test_no_texts_or_no_tasks_leave_their_tables_out(data: dict[str, Any]) -> None:
    titles = [t.title for t in comparison_tables({**data, "texts": []})]
    assert titles == ["Summary", "Tasks", "Candidates against each other"]
    none = {**data, "tasks": [], "means": [], "pairs": []}
    assert [t.title for t in comparison_tables(none)] == [
        "Summary",
        "Texts, llamacpp512",
    ]
    for part in ({**data, "texts": []}, none):
        ElementTree.fromstring(comparison_svg(part).encode())


def test_a_terminal_gets_ascii_and_a_note_on_llamacpp(data: dict[str, Any]) -> None:
    text = comparison_text(data)
    assert "8-bit" in text or "8 bits" in text
    assert "x1.050" in text
    data["models"][2]["runs_in"] = "torch"
    assert "llama.cpp" not in comparison_text(data)


def test_a_terminal_gets_fewer_columns_than_markdown(data: dict[str, Any]) -> None:
    text, markdown = comparison_text(data), comparison_markdown(data)
    assert "median" in markdown and "median" not in text
    assert r"+0.050 \[-0.020, +0.120\]" in markdown
    assert "+0.050" in text and "+0.120" not in text
    rows = [line for line in text.splitlines() if line.startswith("  ")]
    assert [line for line in rows if len(line) > 125] == []


def test_names_of_others_are_escaped(data: dict[str, Any]) -> None:
    assert r"a\|&lt;b&gt;" in comparison_markdown(data)
    drawn = ElementTree.fromstring(comparison_svg(data).encode())
    labels = [element.text for element in drawn.iter() if element.text]
    assert "a|<b>" in labels


def test_the_figure_places_models_by_their_figures(data: dict[str, Any]) -> None:
    drawn = ElementTree.fromstring(comparison_svg(data).encode())
    space = "{http://www.w3.org/2000/svg}"
    bars = [r for r in drawn.iter(f"{space}rect") if r.get("class") == "p0"]
    widths = [float(bar.attrib["width"]) for bar in bars]
    assert widths[1] / widths[0] == pytest.approx(0.25, abs=0.001)
    hints = [title.text or "" for title in drawn.iter(f"{space}title")]
    assert "tales, llamacpp512: 0.0200" in hints
    assert "mean of 1 tasks: -9.0" in hints
