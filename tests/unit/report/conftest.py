"""Reports of made-up runs, see ``report_fixtures``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from report_fixtures import sample_report


@pytest.fixture
def make_report() -> Callable[..., dict[str, Any]]:
    """Return a function that builds a complete report of so many blocks."""
    return sample_report


@pytest.fixture
def bare_report() -> dict[str, Any]:
    """Return the least that a run can report: no quantizing, no evaluation."""
    return {
        "version": 1,
        "model": {"label": "bare", "family": "llama", "dtype": "float32"},
        "config": {},
        "calibration": None,
        "size_bytes": {"base": 1000},
        "metrics": {},
        "layers": [],
        "exports": {},
        "one_plan_two_files": None,
        "warnings": [],
    }
