"""Table, figure and page of a sweep, from made-up points."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import pytest
from report_fixtures import full_sweep

from compress.report.front import with_front
from compress.report.sweep import answers, point_table, render_sweep
from compress.report.sweep_plots import names_of_series, render_svg
from compress.report.sweep_png import render_png


def made_up(**changes: Any) -> dict[str, Any]:
    points = [
        {
            "name": f"p{i}",
            "model": "m",
            "budget_bytes": size + 1000,
            "bytes": size,
            "text": "wikitext2",
            "kl": kl,
            "settings": {"quantize.method": method},
            "failures": [],
        }
        for i, (size, kl, method) in enumerate(
            [
                (60_000_000, 0.5, "rtn"),
                (60_000_000, 0.3, "gptq"),
                (80_000_000, 0.4, "rtn"),
                (90_000_000, 0.01, "gptq"),
            ]
        )
    ]
    foreign = [{"name": "Q4 & co", "bytes": 75_000_000, "kl": 0.2}]
    data = {"points": with_front(points), "foreign": foreign, "command": "<run>"}
    return data | changes


def marks(svg: str) -> list[ElementTree.Element]:
    """Return the marks of points, not those of the key."""
    root = ElementTree.fromstring(svg.partition("\n")[2])
    (key,) = (e for e in root.iter() if e.get("class") == "key")
    inside = set(key.iter())
    return [
        e
        for e in root.iter()
        if "mark" in e.get("class", "").split() and e not in inside
    ]


def test_the_front_is_what_no_other_point_beats() -> None:
    on_front = [p["name"] for p in made_up()["points"] if p["on_front"]]
    assert on_front == ["p1", "p3"]


def test_each_model_has_a_front_of_its_own() -> None:
    points = [{**p, "model": p["name"]} for p in made_up()["points"]]
    assert all(p["on_front"] for p in with_front(points))


def test_the_figure_has_a_mark_for_each_point_at_its_place() -> None:
    found = marks(render_svg(made_up()))
    places = {
        (e[0].text or "").partition(":")[0]: [
            float(x) for x in re.findall(r"-?[\d.]+", e.get("transform", ""))[:2]
        ]
        for e in found
    }
    assert set(places) == {"p0", "p1", "p2", "p3", "Q4 & co"}
    assert places["p0"][0] == places["p1"][0] < places["Q4 & co"][0] < places["p2"][0]
    assert places["p3"][1] > places["Q4 & co"][1] > places["p1"][1] > places["p0"][1]
    hollow = [e for e in found if "hollow" in e.get("class", "").split()]
    assert len(hollow) == 1


def test_series_differ_by_mark_and_not_by_colour_alone() -> None:
    shapes = {e.get("d") for e in marks(render_svg(made_up()))}
    assert len(shapes) == 3  # two methods, and other tools


def test_the_table_is_sorted_and_leaves_out_what_nobody_knows() -> None:
    table = point_table(made_up())
    assert [row[0] for row in table.rows] == ["p1", "p0", "Q4 & co", "p2", "p3"]
    assert "perplexity ratio" not in table.headers
    assert "wikitext2" in table.caption


def test_the_page_escapes_and_warns() -> None:
    data = made_up()
    data["points"][0]["failures"] = ["gguf: the codes <differ>"]
    page = render_sweep(data)
    assert "&lt;run&gt;" in page and "&lt;differ&gt;" in page
    assert "Warnings" in page


@pytest.mark.parametrize("kl", [0.0, 1e-30, 1e30])
def test_odd_distances_do_not_break_the_figure(kl: float) -> None:
    data = made_up(foreign=[])
    data["points"] = [{**data["points"][0], "kl": kl}]
    assert len(marks(render_svg(data))) == 1


def test_models_are_drawn_on_one_front_by_bits_per_byte() -> None:
    data = full_sweep()
    page = render_sweep(data)
    assert "bits per byte" in page and "tokens a second" in page
    drawn_names = {(e[0].text or "").partition(":")[0] for e in marks(render_svg(data))}
    assert drawn_names == {point["name"] for point in data["points"]}
    assert "Q4_K_M" in page  # in the table, though it has no bits per byte


def test_the_table_holds_the_originals() -> None:
    rows = {row[0]: row for row in point_table(full_sweep()).rows}
    assert rows["original made-up/360m"][2] == "540,000,000"


def test_a_size_is_answered_with_the_best_point_that_fits() -> None:
    data = full_sweep()
    (large, small) = answers(data)
    best = min(data["points"], key=lambda p: float(p["bits_per_byte"]))
    assert large.startswith(f"1GB: take {best['name']} (")
    assert small.startswith("100MB: take 95MB-135m")
    data["config"]["fits"] = ["1MB"]
    assert answers(data) == [
        "1MB: no point is that small; the smallest has 80,000,000 bytes"
    ]


def test_an_unfinished_sweep_says_so() -> None:
    data = full_sweep() | {"is_complete": False}
    assert "The sweep is not finished" in render_sweep(data)
    assert "not finished" not in render_sweep(full_sweep())


def test_budgets_and_plain_schemes_are_series_of_their_own() -> None:
    data = made_up()
    del data["points"][0]["budget_bytes"]
    assert {name.rpartition(", ")[2] for name in names_of_series(data)} == {
        "budget",
        "one scheme",
        "other tools",
    }


@pytest.mark.parametrize("make", [made_up, full_sweep])
def test_the_figure_is_drawn_as_png_too(make: Callable[[], dict[str, Any]]) -> None:
    pytest.importorskip("matplotlib", reason="the extra plots is not installed")
    picture = render_png(make())
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", picture[16:24]) == (1280, 900)
