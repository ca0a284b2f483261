"""What a finished run hands back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress import exporting
from compress.report import summary_table


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        report: What ``report.json`` holds.
        workdir: Where everything lies.
    """

    report: Mapping[str, Any]
    workdir: Path

    def summary(self) -> str:
        """Return the table that ends a run."""
        return summary_table(self.report)

    @property
    def failures(self) -> list[str]:
        """Why exports were not written, or what reading them back has disproved."""
        held = self.report.get("held_back")
        return [*([held] if held else []), *exporting.failures(self.report["exports"])]
