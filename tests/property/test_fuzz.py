"""A small budget of ``benchmarks/fuzz.py``: damaged files are read or refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "fuzz.py"


def test_damaged_files_are_read_or_refused() -> None:
    """In a process of its own: it forks, which only one thread may do."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--cases", "1500", "--no-result"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 findings" in done.stdout
