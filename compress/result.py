"""What a finished run hands back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import exporting
from compress.core.errors import CheckpointError, ConfigError
from compress.core.foreign import MALFORMED, parse_json
from compress.report import summary_table
from compress.report.notebook import notebook_view
from compress.report.wording import methods_used
from compress.writing import write_atomically

if TYPE_CHECKING:
    from compress.publishing import Publication


@dataclass(frozen=True, repr=False)
class Result:
    """A finished run.

    Attributes:
        report: What ``report.json`` holds.
        workdir: Where everything lies.
    """

    report: Mapping[str, Any]
    workdir: Path

    def __repr__(self) -> str:
        """Return one line; the report would fill screens."""
        label = self.report["model"]["label"]
        return f"Result({label}: {methods_used(self.report)}; {self.workdir})"

    def summary(self) -> str:
        """Return the table that ends a run."""
        return summary_table(self.report)

    def push_to_hub(
        self,
        repo: str,
        *,
        format: str | None = None,
        private: bool = True,
        dry_run: bool = False,
        force: bool = False,
        token: str | None = None,
        message: str = "Upload a compressed model",
    ) -> Publication:
        """Upload an export and a card with the report to the Hugging Face hub.

        Neither calibration text nor a path of this machine goes up.

        Args:
            repo: ``owner/name``.
            format: Which export; may be left out where there is one.
            private: Whether a repository that is created is its owner's alone.
            dry_run: Only return what would go.
            force: Upload although an export failed its check.
            token: Of the hub; the one of ``hf auth login`` if left out.
            message: Of the commit.

        Raises:
            ConfigError: The name is none, or there is no such export.
            ExportError: An export failed its check, or the hub refuses it.
        """
        from compress.publishing import push_to_hub

        return push_to_hub(
            self,
            repo,
            format=format,
            private=private,
            dry_run=dry_run,
            force=force,
            token=token,
            message=message,
        )

    def save_figures(self, folder: str | Path) -> list[Path]:
        """Write the figures of the report as PNG files, and return their paths.

        Args:
            folder: Made if it is not there; files of the same names are replaced.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        from compress.report.report_png import report_figures

        found = report_figures(self.report)
        for name, data in found.items():
            write_atomically(Path(folder) / name, data)
        return [Path(folder) / name for name in found]

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the cards, and the whole page below them."""
        return notebook_view(self.report, str(self.workdir))

    @property
    def failures(self) -> list[str]:
        """Why exports were not written, or what reading them back has disproved."""
        held = self.report.get("held_back")
        return [*([held] if held else []), *exporting.failures(self.report["exports"])]


def open_result(workdir: str | Path) -> Result:
    """Return the result of a finished run from its work directory.

    Raises:
        ConfigError: There is no finished run.
        CheckpointError: Its report is damaged.
    """
    root = Path(workdir)
    file = root / "report.json"
    if not file.is_file():
        raise ConfigError(f"{root}: no finished run here (no report.json)")
    try:
        report = parse_json(file.read_text("utf-8"))
        if not {"config", "exports", "model"} <= set(report):
            raise ValueError("keys are missing")
    except (OSError, *MALFORMED) as error:
        raise CheckpointError(f"{file} is no report of a run: {error}") from error
    return Result(report, root)
