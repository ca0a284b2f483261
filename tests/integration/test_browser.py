"""The pages in a browser: no errors, nothing fetched, narrow screens, the keyboard."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, find_browser
from report_fixtures import full_report, full_sweep

from compress.report import write_report
from compress.report.sweep import render_sweep

FOUND = find_browser()
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(FOUND is None, reason="there is no Chromium on this machine"),
]
WIDTHS = pytest.mark.parametrize("width", [1280, 390])
PAGES = pytest.mark.parametrize("name", ["report.html", "sweep.html"])
SCHEMES = pytest.mark.parametrize("scheme", ["light", "dark"])

# Text whose contrast to the nearest ground is below 4.5 to 1 (WCAG 2.2, 1.4.3), with
# the colours that the browser computed; SVG text is judged against its figure.
LOW_CONTRAST = """
(() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => {
    const f = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    return 0.2126 * f(r) + 0.7152 * f(g) + 0.0722 * f(b);
  };
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const e of document.querySelectorAll("h1,h2,h3,p,li,td,th,a,code,text,div")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    const inside = e.closest("text.inside, text[class*=on]");
    if (!own || inside) continue;
    const style = getComputedStyle(e);
    const ink = parse(e.tagName === "text" ? style.fill : style.color);
    const [a, b] = [light(ink), light(ground(e))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) found.push(e.textContent.slice(0, 40));
  }
  return found;
})()
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert FOUND is not None
    with Browser(FOUND) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    write_report(full_report(), folder)
    (folder / "sweep.html").write_text(render_sweep(full_sweep()), "utf-8")
    return folder


def shown(
    browser: Browser, page: Path, width: int = 1280, scheme: str = "light"
) -> Any:
    browser.resize(width, 844, scheme=scheme)
    browser.problems.clear()
    browser.requests.clear()
    browser.open(page)
    return browser


@PAGES
@WIDTHS
@SCHEMES
def test_a_page_has_no_errors_and_fetches_nothing(
    browser: Browser, pages: Path, name: str, width: int, scheme: str
) -> None:
    shown(browser, pages / name, width, scheme)
    assert browser.problems == []
    assert browser.requests == [(pages / name).as_uri()]
    assert len(browser.picture()) > 10_000


def test_an_error_on_a_page_is_seen(browser: Browser, tmp_path: Path) -> None:
    """The checks above can fail."""
    page = tmp_path / "bad.html"
    page.write_text('<img src="missing.png"><script>undefined.x</script>')
    shown(browser, page)
    browser.run("new Promise((done) => setTimeout(done, 200))")
    assert len(browser.problems) >= 2 and len(browser.requests) == 2


@PAGES
@WIDTHS
def test_a_page_is_no_wider_than_the_window(
    browser: Browser, pages: Path, name: str, width: int
) -> None:
    """Tables scroll inside of their boxes, which the keyboard reaches."""
    shown(browser, pages / name, width)
    assert browser.run("document.documentElement.scrollWidth") <= width
    outside = """[...document.querySelectorAll("main *, header *")].filter((e) =>
        e.getBoundingClientRect().right > innerWidth + 1
        && !e.closest(".scroll, pre, svg")).map((e) => e.outerHTML.slice(0, 80))"""
    assert browser.run(outside) == []
    stuck = """[...document.querySelectorAll(".scroll, pre")]
        .filter((e) => e.scrollWidth > e.clientWidth && e.tabIndex < 0).length"""
    assert browser.run(stuck) == 0


@PAGES
@SCHEMES
def test_all_text_has_contrast(
    browser: Browser, pages: Path, name: str, scheme: str
) -> None:
    shown(browser, pages / name, scheme=scheme)
    assert browser.run(LOW_CONTRAST) == []


@WIDTHS
def test_text_in_figures_can_be_read(browser: Browser, pages: Path, width: int) -> None:
    shown(browser, pages / "report.html", width)
    smallest = """Math.min(...[...document.querySelectorAll("figure > svg text")].map(
        (e) => parseFloat(getComputedStyle(e).fontSize)
          * e.ownerSVGElement.getBoundingClientRect().width
          / e.ownerSVGElement.viewBox.baseVal.width))"""
    assert browser.run(smallest) >= 9


def test_the_layer_table_is_sorted_by_the_keyboard(
    browser: Browser, pages: Path
) -> None:
    shown(browser, pages / "report.html")
    bits = """[...document.querySelectorAll(".sortable tbody tr")].map(
        (row) => Number(row.cells[2].dataset.sort))"""
    before = browser.run(bits)
    assert before != sorted(before)
    browser.run('document.querySelector("[aria-label=\\"Every layer\\"]").focus()')
    for _ in range(3):
        browser.press("Tab")
    assert browser.run("document.activeElement.textContent") == "bits per weight"
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert browser.run(outline) == "solid"
    browser.press("Enter")
    assert browser.run(bits) == sorted(before)
    browser.press("Enter")
    assert browser.run(bits) == sorted(before, reverse=True)
    state = 'document.activeElement.closest("th").getAttribute("aria-sort")'
    assert browser.run(state) == "descending"


def test_every_link_of_the_page_leads_to_a_part(browser: Browser, pages: Path) -> None:
    shown(browser, pages / "report.html")
    broken = """[...document.querySelectorAll("a")].filter((a) =>
        !document.getElementById(a.getAttribute("href").slice(1))).length"""
    assert browser.run(broken) == 0
    assert browser.run('document.querySelectorAll("nav a").length') >= 8
