"""The figures of a report as PNG: those it has data for, and no others."""

from __future__ import annotations

import struct

import pytest
from report_fixtures import full_report

from compress.core.errors import MissingDependencyError
from compress.report import report_png


def test_each_figure_of_the_page_is_drawn() -> None:
    pytest.importorskip("matplotlib", reason="the extra plots is not installed")
    found = report_png.report_figures(full_report(4))
    assert {"size.png", "kl.png", "bits.png", "error.png", "search.png"} <= set(found)
    for picture in found.values():
        assert picture[:8] == b"\x89PNG\r\n\x1a\n"
        assert struct.unpack(">II", picture[16:24])[0] == 1280
    assert report_png.report_figures({}) == {}


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_png, "can_draw", lambda: False)
    with pytest.raises(MissingDependencyError, match="plots"):
        report_png.report_figures({})
