"""Commands on a finished run: ``compress figures`` and ``compress push``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def figures(
    workdir: Annotated[
        Path, typer.Argument(help="Work directory of a run.", show_default=False)
    ],
    to: Annotated[
        Path | None,
        typer.Option(help="Folder for them; WORKDIR/figures unless given."),
    ] = None,
) -> None:
    """Write the figures of a report as PNG files, for a README."""
    from compress.result import open_result

    for path in open_result(workdir).save_figures(to or workdir / "figures"):
        typer.echo(path)


def push(
    workdir: Annotated[
        Path, typer.Argument(help="Work directory of a run.", show_default=False)
    ],
    repo: Annotated[str, typer.Argument(help="owner/name.", show_default=False)],
    to: Annotated[
        str | None,
        typer.Option("--format", help="Which export; the only one unless given."),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Let all see a repository that is made.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would go; send nothing.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Upload although an export failed.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Upload an export to the Hugging Face hub, with a card that carries the report.

    Neither calibration text nor paths of this machine go up. A repository that is made
    is private, unless --public.
    """
    from compress.result import open_result

    found = open_result(workdir).push_to_hub(
        repo, format=to, private=not public, dry_run=dry_run, force=force
    )
    shown = json.dumps(found.to_dict(), indent=2) if as_json else found.text()
    typer.echo(shown)
    if dry_run and not as_json:
        typer.echo(f"\n{found.card}")
