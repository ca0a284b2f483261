"""The command ``compress compare``."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer


def compare(
    base: Annotated[
        str,
        typer.Argument(
            help="HF folder or id, .gguf file, or work directory; NAME=PATH names it.",
            show_default=False,
        ),
    ],
    candidates: Annotated[
        list[str] | None,
        typer.Argument(help="The same, any number.", show_default=False),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option("--text", help="Bundled text or .txt file; repeatable."),
    ] = None,
    protocol: Annotated[
        list[str] | None,
        typer.Option(help="hf2048 or llamacpp512; both unless given."),
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=0, help="Of each text, the first ones; 0 for all.")
    ] = 16384,
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="JSONL file, folder of them, or hub:NAME; repeatable."),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Task to keep; repeatable.")
    ] = None,
    limit: Annotated[
        int, typer.Option(min=0, help="Questions of a task, evenly spread; 0 for all.")
    ] = 100,
    answer_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens of an answer that is written.")
    ] = 1280,
    to: Annotated[
        Path, typer.Option(help="Folder for tables, figure and measurements.")
    ] = Path("runs/compare"),
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Measure everything again.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Put a base and candidates side by side: size, KL, perplexity, tasks, flips.

    What was measured of a model is kept: the same command continues, and another
    candidate is measured alone.
    """
    from compress import comparing

    found = comparing.compare(
        base,
        candidates or (),
        texts=text if text is not None else ("wikitext2",),
        protocols=protocol or comparing.PROTOCOLS,
        tokens=tokens or None,
        tasks=tasks or (),
        only=only or (),
        limit=limit or None,
        answer_tokens=answer_tokens,
        folder=to,
        device=device,
        overwrite=overwrite,
        command=shlex.join(["compress", *sys.argv[1:]]),
    )
    typer.echo(json.dumps(found.to_dict(), indent=2) if as_json else found.text())
