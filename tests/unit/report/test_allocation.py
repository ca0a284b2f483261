"""What the report says of a search under a budget, from a made-up one."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from compress.report import summary_table, write_report
from compress.report.allocation import budget_table, scheme_table, unit_table
from compress.report.allocation_plots import bits_map, budget_bar, progress_plot
from compress.report.terminal import allocation_text

Report = dict[str, Any]
Make = Callable[..., Report]
WEIGHTS = 1 << 20


def choices(*sizes: tuple[str, float, float]) -> list[dict[str, Any]]:
    return [
        {"scheme": name, "bytes": round(WEIGHTS * bits / 8), "error": 0.01, "loss": kl}
        for name, bits, kl in sizes
    ]


@pytest.fixture
def searched(make_report: Make) -> Report:
    """A run of three blocks whose units got two schemes."""
    report = make_report(3)
    report["layers"][0].update(bits_per_weight=8.5, scheme="int8-g32")
    usual = choices(("int4-g32", 4.5, 0.02), ("int8-g32", 8.5, 0.001))
    stacked = ["a.q_proj", "a.k_proj", "a.v_proj"]
    units = [
        {"layers": ["<embed>"], "weights": WEIGHTS, "chosen": 1, "choices": usual},
        {"layers": stacked, "weights": WEIGHTS, "chosen": 0, "choices": usual},
        {"layers": ["a.o_proj"], "weights": WEIGHTS, "chosen": 0, "choices": usual},
    ]
    best = (0.5, 0.2, 0.2, 0.05)
    report["allocation"] = {
        "method": "evolution",
        "format": "gguf",
        "budget_bytes": 2_400_000,
        "file_bytes": 2_393_856,
        "fixed_bytes": 100_000,
        "predicted_kl": 0.041,
        "measured_kl": 0.05,
        "evaluations": 12.5,
        "history": [
            {"evaluations": 4.0 * i, "best": kl, "note": f"step {i}"}
            for i, kl in enumerate(best)
        ],
        "seconds": {"levels": 61.0, "search": 2.0},
        "notes": ["q2_k: <not> here"],
        "units": units,
    }
    return report


def drawing(html: str) -> ElementTree.Element:
    (svg,) = re.findall(r'<svg viewBox="[^"]*" role="img".*?</svg>', html)
    return ElementTree.fromstring(svg)


def of_class(root: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return [e for e in root.iter() if name in e.get("class", "").split()]


def test_units_are_told_with_choice_bytes_and_loss(searched: Report) -> None:
    rows = unit_table(searched).rows
    assert rows[1][:5] == ("a.q_proj +2", "int4-g32", "589,824", "4.50", "0.0200")


def test_schemes_add_up_to_all_units(searched: Report) -> None:
    rows = {row[0]: row for row in scheme_table(searched).rows}
    assert rows["int4-g32"][1:] == ("4", "66.7 %", "1,179,648", "4.50", "0.0400")
    assert rows["int8-g32"][1] == "1"


def test_the_budget_is_told_with_time_and_share(searched: Report) -> None:
    rows = dict(budget_table(searched).rows)  # type: ignore[arg-type]
    assert rows["file"] == "2,393,856 bytes, 99.74 % of the budget"
    assert rows["time: levels"] == "1 min 01 s"
    assert rows["models measured by the search"] == "12.5"


def test_the_bar_is_as_long_as_the_file(searched: Report) -> None:
    root = drawing(budget_bar(searched))
    widths = [float(e.get("width", 0)) + 1 for e in of_class(root, "solid")]
    assert sum(widths) == pytest.approx(480 * 2_393_856 / 2_400_000, abs=0.05)
    assert widths[0] == pytest.approx(480 * 1_179_648 / 2_400_000, abs=0.01)


def test_the_map_has_a_number_in_each_shade(searched: Report) -> None:
    root = drawing(bits_map(searched))
    cells = [e for e in root.iter() if re.fullmatch(r"h\d", e.get("class", ""))]
    numbers = [e.text for e in root.iter() if "on" in e.get("class", "")]
    assert len(cells) == len(numbers) == 21
    assert [e.get("class") for e in cells].count("h5") == 1
    assert numbers.count("8.5") == 1 and numbers.count("4.5") == 20


def test_experts_of_a_role_share_a_cell(searched: Report) -> None:
    layers = searched["layers"]
    gate = next(x for x in layers if (x["block"], x["role"]) == (1, "gate"))
    layers.append({**gate, "bits_per_weight": 8.5, "name": "another expert"})
    root = drawing(bits_map(searched))
    hints = [e.text or "" for e in root.iter() if e.tag.endswith("title")]
    assert "block 1, gate: 6.50 bits per weight" in hints


def test_progress_has_a_mark_for_each_step(searched: Report) -> None:
    root = drawing(progress_plot(searched))
    assert len(of_class(root, "mark")) == 4
    assert len(of_class(root, "trace")) == 1


def test_an_allocator_that_measures_nothing_has_no_progress(searched: Report) -> None:
    for step in searched["allocation"]["history"]:
        step["evaluations"] = 0.0
    assert progress_plot(searched) == ""


def test_all_three_forms_show_the_search(searched: Report, tmp_path: Path) -> None:
    files = {p.suffix: p.read_text() for p in write_report(searched, tmp_path)}
    page = files[".html"]
    assert 'id="budget"' in page and "Progress of evolution" in page
    assert "&lt;embed&gt;" in page and "<embed>" not in page
    assert "&lt;not&gt;" in page
    assert "99.74 % of the budget" in files[".md"]
    assert "99.74 % of the budget" in summary_table(searched)


def test_a_run_without_a_search_says_nothing_of_budgets(
    make_report: Make, tmp_path: Path
) -> None:
    report = make_report(2) | {"allocation": None}
    files = {p.suffix: p.read_text() for p in write_report(report, tmp_path)}
    assert 'id="budget"' not in files[".html"]
    assert "## Budget" not in files[".md"]


def test_a_plan_on_the_terminal_names_what_was_left_out(searched: Report) -> None:
    text = allocation_text("made-up", searched["allocation"])
    assert text.startswith("Plan for made-up")
    assert "a.q_proj +2" in text and "note: q2_k: <not> here" in text
