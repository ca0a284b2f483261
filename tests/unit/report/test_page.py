"""The HTML page and its figures."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from compress.report import write_report
from compress.report.svg import Axis
from compress.report.wording import worst_text

Report = dict[str, Any]
Make = Callable[..., Report]


class Page(HTMLParser):
    """Checks that tags are balanced and gathers what a reader would see."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data


def written(report: dict[str, Any], folder: Path) -> dict[str, str]:
    return {
        path.suffix: path.read_text("utf-8") for path in write_report(report, folder)
    }


def figures(html: str) -> list[ElementTree.Element]:
    return [
        ElementTree.fromstring(svg)
        for svg in re.findall(r'<svg viewBox="[^"]*" role="img".*?</svg>', html)
    ]


def figure_named(html: str, title: str) -> ElementTree.Element:
    return next(f for f in figures(html) if f.get("aria-label", "").startswith(title))


def with_class(root: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return [e for e in root.iter() if name in e.get("class", "").split()]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, 5e-324, 1e308])
def test_odd_numbers_never_break_page_or_plots(
    tmp_path: Path, value: float, make_report: Make
) -> None:
    report = make_report(2)
    texts = report["metrics"]["compressed"]["texts"]
    for text in texts.values():
        text.update({key: value for key in text if isinstance(text[key], float)})
        text["kl_histogram"]["edges"][-1] = value
    for layer in report["layers"]:
        layer.update(error=value, weight_error=value)
    html = written(report, tmp_path)[".html"]
    assert not re.search(r'="[^"]*\b(nan|inf)\b', html)
    assert figures(html)
    assert Page(html).open == []


def test_page_loads_nothing_from_elsewhere(tmp_path: Path, make_report: Make) -> None:
    page = Page(written(make_report(), tmp_path)[".html"])
    names = {"src", "href", "srcset", "data", "action"}
    links = [a[n] or "" for _, a in page.tags for n in names & a.keys()]
    assert links and all(link.startswith("#") for link in links)
    policies = [a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a]
    assert (policies[0] or "").startswith("default-src 'none'")


def test_text_of_others_is_escaped(tmp_path: Path, make_report: Make) -> None:
    evil = "<script>alert('x')</script>|`&\""
    report = make_report(2)
    report["model"]["label"] = report["command"] = report["config_text"] = evil
    report["warnings"] = [evil]
    report["layers"][0].update(name=evil, role=evil, notes=[evil])
    texts = report["metrics"]["compressed"]["texts"]
    texts[evil] = texts.pop("dialogue")
    report["exports"]["gguf"]["notes"] = [evil]
    files = written(report, tmp_path)
    page = Page(files[".html"])
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert evil in page.text
    outside_fences = re.sub(r"(?ms)^(`{3,})\w*\n.*?^\1$", "", files[".md"])
    assert "<script>" not in outside_fences


def test_errors_without_statistics_fall_on_weight_error_alone(
    tmp_path: Path, make_report: Make
) -> None:
    report = make_report(2)
    for layer in report["layers"]:
        layer["error"] = None
    html = written(report, tmp_path)[".html"]
    titles = [f.get("aria-label", "") for f in figures(html)]
    assert any("layer's weights" in title for title in titles)
    assert not any("layer's output" in title for title in titles)


def test_layer_plot_has_a_mark_for_each_layer(
    tmp_path: Path, make_report: Make
) -> None:
    html = written(make_report(), tmp_path)[".html"]
    plot = figure_named(html, "Error of each layer's output")
    assert len(with_class(plot, "mark")) == 210
    assert len(with_class(plot, "trace")) == 7


def test_layers_without_error_are_hollow_and_counted(
    tmp_path: Path, make_report: Make
) -> None:
    report = make_report(2)
    report["layers"][3]["error"] = 0.0
    html = written(report, tmp_path)[".html"]
    plot = figure_named(html, "Error of each layer's output")
    assert len(with_class(plot, "hollow")) == 1
    assert "1 layer without any error" in html


def test_bars_are_as_long_as_their_bytes(tmp_path: Path, make_report: Make) -> None:
    report = make_report(1)
    plot = figure_named(written(report, tmp_path)[".html"], "Where the bytes are")
    bars = [float(e.get("width", 0)) + 1 for e in plot.iter() if "rect" in e.tag]
    parts = [v for p in report["size_breakdown"].values() for v in p.values()]
    expected = [480 * v / sum(report["size_breakdown"]["base"].values()) for v in parts]
    assert bars == pytest.approx([max(e, 1) for e in expected], abs=0.01)


def test_histogram_shares_add_up_to_all_tokens(
    tmp_path: Path, make_report: Make
) -> None:
    html = written(make_report(1), tmp_path)[".html"]
    plot = figure_named(html, "KL over the tokens of wikitext2")
    hints = [e.text or "" for e in plot.iter() if e.tag.endswith("title")]
    shares = [float(hint.split(": ")[1].split(" %")[0]) for hint in hints]
    assert sum(shares) == pytest.approx(100, abs=0.005 * len(shares))


def test_every_numeric_cell_carries_its_raw_value_for_sorting(
    tmp_path: Path, make_report: Make
) -> None:
    report = make_report(1)
    page = Page(written(report, tmp_path)[".html"])
    keys = [a["data-sort"] for _, a in page.tags if "data-sort" in a]
    assert {repr(layer["error"]) for layer in report["layers"]} <= set(keys)


def test_every_scrolling_box_is_reachable_by_keyboard(
    tmp_path: Path, make_report: Make
) -> None:
    page = Page(written(make_report(2), tmp_path)[".html"])
    boxes = [a for _, a in page.tags if "scroll" in (a.get("class") or "").split()]
    assert boxes and all(a.get("tabindex") == "0" for a in boxes)


def test_cards_show_the_worst_text_and_name_it(
    tmp_path: Path, make_report: Make
) -> None:
    report = make_report(1)
    assert worst_text(report) == "wikitext2"
    assert "worst of 3 texts: wikitext2" in written(report, tmp_path)[".html"]


def test_a_logarithmic_axis_gives_equal_room_to_each_decade() -> None:
    axis = Axis.over([0.002, 0.9], 0, 300, is_log=True)
    assert axis.low < 0.002 and axis.high > 0.9
    steps = [axis.at(v * 10) - axis.at(v) for v in (0.002, 0.01, 0.05)]
    assert steps == pytest.approx([steps[0]] * 3)


def test_errors_that_are_all_zero_have_no_plot(
    tmp_path: Path, make_report: Make
) -> None:
    report = make_report(2)
    for layer in report["layers"]:
        layer["weight_error"] = 0.0
    titles = [
        f.get("aria-label", "") for f in figures(written(report, tmp_path)[".html"])
    ]
    assert not any("layer's weights" in title for title in titles)
