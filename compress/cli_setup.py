"""Commands of a user who begins: what there is, and a first config."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compress.core.errors import ConfigError

if TYPE_CHECKING:
    from compress.registry import PluginEntry

_OWN = "compress-llm "


def _kinds() -> list[str]:
    from compress.registry import KINDS

    return list(KINDS)


def _targets() -> list[str]:
    from compress.config.starting import TARGETS

    return list(TARGETS)


def list_plugins(
    kind: Annotated[
        str | None,
        typer.Argument(
            help="quantizers, pruners, allocators, exporters.",
            show_default=False,
            autocompletion=_kinds,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List plug-ins: what each does, its source, and who ships it if not we."""
    from compress.registry import entries

    rows = [_plugin_row(entry) for entry in entries(kind)]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    width = max((len(str(row["name"])) for row in rows), default=0)
    shown = None
    for row in rows:
        if row["kind"] != shown:
            typer.echo(f"{row['kind']}" if shown is None else f"\n{row['kind']}")
            shown = row["kind"]
        origin = str(row["origin"])
        by = "" if origin.startswith(_OWN) else f" [{origin}]"
        typer.echo(f"  {str(row['name']):<{width}}  {row['summary']}{by}")
        if row["source"]:
            typer.echo(f"  {'':<{width}}  from: {row['source']}")


def _plugin_row(entry: PluginEntry) -> dict[str, object]:
    problem = entry.problem()
    plugin = None if problem else entry.load()
    return {
        "name": entry.name,
        "kind": entry.kind,
        "origin": entry.origin,
        "summary": plugin.summary if plugin else f"BROKEN: {problem}",
        "source": plugin.source if plugin else "",
        "works": problem is None,
    }


def init(
    file: Annotated[
        Path, typer.Argument(help="The config to write.", show_default=True)
    ] = Path("compress.yaml"),
    model: Annotated[
        str | None,
        typer.Option(help="HF folder or id, .gguf file, or builtin:NAME."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="What runs the result: llamacpp, transformers or vllm.",
            autocompletion=_targets,
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(help="Of the file: 95MB, 4.25bpw or 0.3x; a usual one if left."),
    ] = None,
    sparsity: Annotated[
        float,
        typer.Option(min=0, max=0.99, help="Share of the MLP neurons to remove."),
    ] = 0.0,
    data: Annotated[str, typer.Option(help="Calibration text.")] = "mix",
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
) -> None:
    """Write a commented config; on a terminal, ask for what no option says."""
    from compress.config.starting import TARGETS, starting_config
    from compress.workdir import write_atomically

    if file.exists() and not force:
        raise ConfigError(f"{file} is there already; --force replaces it")
    if model is None or target is None:
        model, target, size = _asked(model, target, size)
    if target not in TARGETS:
        names = ", ".join(TARGETS)
        raise ConfigError(f"--target {target}: unknown; targets are {names}")
    text = starting_config(
        model=model,
        target=target,
        size=size,
        sparsity=sparsity,
        data=data,
        file=shlex.quote(str(file)),
    )
    write_atomically(file, text.encode())
    name = shlex.quote(str(file))
    typer.echo(f"{file} is written; next:\n")
    typer.echo(f"  compress run {name} --dry-run   # sizes, memory and time")
    quick = "--set quantize.method=rtn --set evaluate.windows=1"
    typer.echo(f"  compress run {name} {quick}   # a quick first look")
    typer.echo(f"  compress run {name} --overwrite   # the real one")


def _can_ask() -> bool:
    return sys.stdin.isatty()


def _asked(
    model: str | None, target: str | None, size: str | None
) -> tuple[str, str, str | None]:
    """Ask for what is missing; the default target stands where nobody can answer.

    Raises:
        ConfigError: There is no model and nobody to ask.
    """
    from compress.config.starting import TARGETS

    if not _can_ask():
        if model is None:
            raise ConfigError(
                "which model? give --model with a HF folder or id, a .gguf file, or "
                "builtin:smollm2-135m; on a terminal `compress init` asks"
            )
        return model, target or next(iter(TARGETS)), size
    if model is None:
        model = typer.prompt("Model (HF folder or id, .gguf file, builtin:NAME)")
    if target is None:
        for name, about in TARGETS.items():
            typer.echo(f"  {name}: {about.says}")
        default = next(iter(TARGETS))
        target = typer.prompt("What will run the result?", default=default)
    if size is None:
        question = "Size of the file (95MB, 4.25bpw, 0.3x; empty: a usual one)"
        size = typer.prompt(question, default="", show_default=False) or None
    return str(model), str(target), size
