"""The command line. It parses arguments and prints; the work is in the pipeline.

Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 failed (also
where everything was written and an export then failed its check), 2 bad usage or
config, 130 interrupted, 143 stopped by SIGTERM.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from compress.bench.commands import app as bench_app
from compress.cli_compare import compare
from compress.cli_kv import kv
from compress.cli_push import figures, push
from compress.cli_setup import init, list_plugins
from compress.core.errors import CompressError
from compress.log import is_first, set_up_logging
from compress.registry import names
from compress.stopping import Terminated, ending_in_order, explained

if TYPE_CHECKING:
    from compress.pipeline import Result

logger = logging.getLogger(__name__)


class _ReportingGroup(TyperGroup):
    """Turns the errors a user can cause into one message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with ending_in_order(), explained():
                return super().invoke(ctx)
        except CompressError as error:
            _fail(str(error), error.exit_code)
        except Terminated:
            _fail(f"stopped by SIGTERM: {_interrupted(ctx.invoked_subcommand)}", 143)
        except KeyboardInterrupt:
            _fail(_interrupted(ctx.invoked_subcommand), 130)


def _fail(message: str, code: int) -> None:
    logger.debug("the error came from here", exc_info=True)
    if is_first():  # of several processes; another has logged what was its own
        # Names in files may hold half of a character, which no terminal takes.
        typer.echo(message.encode("utf-8", "backslashreplace").decode(), err=True)
    raise typer.Exit(code)


def _interrupted(command: str | None) -> str:
    if command == "run":
        return "interrupted; continue with the same command and --resume"
    if command in ("sweep", "compare"):
        return "interrupted; the same command continues"
    return "interrupted"


app = typer.Typer(
    name="compress",
    cls=_ReportingGroup,
    help="Make a language model smaller, and report what it cost.",
    epilog="To begin: compress init, which writes a config and says what comes next.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(bench_app)

ConfigFile = Annotated[Path, typer.Argument(help="YAML file.", show_default=False)]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key of the config."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _version(asked: bool) -> None:
    if asked:
        from compress import __version__

        typer.echo(f"compress {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Say more, on stderr.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print it."),
    ] = False,
) -> None:
    set_up_logging(verbose=verbose)


app.command()(init)


@app.command()
def run(
    config: ConfigFile,
    resume: Annotated[
        bool, typer.Option(help="Continue a run that was interrupted.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option(help="Replace an earlier run in the work directory.")
    ] = False,
    redo: Annotated[
        bool,
        typer.Option(
            "--redo",
            help="Continue a run whose config has changed: compute again what that "
            "affects, keep the rest.",
        ),
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Export a result however bad its perplexity is."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option(help="Print plan, sizes, memory and time; compute nothing.")
    ] = False,
    sets: Sets = None,
    as_json: AsJson = False,
) -> None:
    """Run the whole pipeline of a config: calibrate, quantize, evaluate, export."""
    if sum((resume, overwrite, redo)) > 1:
        raise typer.BadParameter("--resume, --redo and --overwrite exclude each other")
    from compress.config import load_config

    loaded = load_config(config, sets or ())
    from compress import pipeline

    if dry_run:
        preview = pipeline.dry_run(loaded)
        _print(preview.to_dict() if as_json else preview.text())
        return
    command = shlex.join(["compress", *sys.argv[1:]])
    result = pipeline.run(
        loaded,
        resume=resume,
        overwrite=overwrite,
        redo=redo,
        force=force,
        command=command,
    )
    _print_result(result, as_json=as_json)


@app.command()
def plan(
    config: ConfigFile,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Search under this size of the file: 95MB, 4.25bpw, or 0.3x of the "
            "original. In the place of the config's budget, or of quantize.scheme.",
        ),
    ] = None,
    search: Annotated[
        bool, typer.Option("--search", help="Search under the config's budget.")
    ] = False,
    sets: Sets = None,
    as_json: AsJson = False,
) -> None:
    """Stop at the plan: scheme and bytes of each layer.

    Without a search nothing is computed. A search fills the cache, where the run finds
    what it needs, and writes nothing else.
    """
    from compress.config import budget_assignments, load_config

    chosen = budget_assignments(budget) if budget is not None else []
    loaded = load_config(config, [*(sets or ()), *chosen])
    from compress import pipeline, searching

    is_search = search or budget is not None
    found = searching.search(loaded) if is_search else pipeline.plan(loaded)
    _print(found.to_dict() if as_json else found.text())


@app.command("eval")
def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="HF folder or id, .gguf file, or our own output.", show_default=False
        ),
    ],
    base: Annotated[
        str | None, typer.Option(help="Model to measure KL divergence from.")
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text", "--texts", help="Bundled text or .txt file; repeatable."
        ),
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of each text.")] = 10,
    sequence_length: Annotated[
        int, typer.Option(min=2, help="Tokens in a window.")
    ] = 1024,
    protocol: Annotated[
        str, typer.Option(help="windows, hf2048 or llamacpp512.")
    ] = "windows",
    prompt: Annotated[
        Path | None,
        typer.Option(help="Folder of a soft prompt, put before every window."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity, and KL divergence from a base, of any checkpoint."""
    from compress import pipeline

    metrics = pipeline.evaluate(
        model,
        base=base,
        texts=text,
        windows=windows,
        sequence_length=sequence_length,
        protocol=protocol,
        prompt=prompt,
    )
    from compress.report.evaluation import evaluation_text

    _print(metrics if as_json else evaluation_text(metrics))


app.command()(compare)
app.command()(kv)


@app.command()
def inspect(
    path: Annotated[
        str, typer.Argument(help="Model, or a work directory.", show_default=False)
    ],
    as_json: AsJson = False,
) -> None:
    """Show layers, schemes and bits per weight of a checkpoint; loads no weights."""
    from compress import pipeline

    inspection = pipeline.inspect(path)
    _print(inspection.to_dict() if as_json else inspection.text())


@app.command()
def doctor(
    folder: Annotated[
        Path, typer.Argument(help="Checkpoint of transformers.", show_default=False)
    ],
    to: Annotated[
        Path | None, typer.Option(help="Write a mended copy to this folder.")
    ] = None,
    write: Annotated[bool, typer.Option("--write", help="Mend in place.")] = False,
) -> None:
    """Find known faults of a checkpoint, and mend them if asked; exit code 1 if any."""
    from compress.doctor import examination

    faults = examination.examine(folder)
    _print(examination.described(folder, faults))
    if faults and to is not None:
        faults, folder = examination.mended_copy(folder, to), to
        _print(examination.described(folder, faults))
    elif faults and write:
        examination.mend(folder)
        faults = examination.examine(folder)
        _print(examination.described(folder, faults))
    if faults:
        raise typer.Exit(1)


@app.command()
def export(
    workdir: Annotated[
        Path, typer.Argument(help="Work directory of a run.", show_default=False)
    ],
    to: Annotated[
        str,
        typer.Option(
            help="Format, such as gguf.",
            show_default=False,
            autocompletion=lambda: names("exporters"),
        ),
    ],
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Option of the exporter, such as dense=true.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write another format from a finished run."""
    from compress import pipeline
    from compress.config import parse_options

    options = parse_options(sets or ())
    _print_result(pipeline.export(workdir, to, options), as_json=as_json)


@app.command()
def sweep(
    config: Annotated[
        Path, typer.Argument(help="YAML file of a sweep.", show_default=False)
    ],
    overwrite: Annotated[
        bool, typer.Option(help="Run points again that are finished.")
    ] = False,
    fit: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SIZE",
            help="Say which point to take for a size, such as 1GB; repeatable.",
        ),
    ] = None,
    sets: Sets = None,
    as_json: AsJson = False,
) -> None:
    """Run a config over models, sizes and settings, and draw bytes against loss.

    Points that are finished are not run again: the same command continues.
    """
    from compress.config import load_sweep

    chosen = [f"fits={json.dumps(fit)}"] if fit else []
    loaded = load_sweep(config, [*(sets or ()), *chosen])
    from compress import sweeping

    command = shlex.join(["compress", *sys.argv[1:]])
    found = sweeping.sweep(loaded, overwrite=overwrite, command=command)
    _print(found.to_dict() if as_json else found.text())
    if found.failures:
        raise typer.Exit(1)


app.command()(figures)
app.command()(push)
app.command("list")(list_plugins)


@app.command()
def schema() -> None:
    """Print the JSON Schema of the config, for editors."""
    from compress.config import config_schema

    _print(config_schema())


def _print_result(result: Result, *, as_json: bool) -> None:
    from compress.report.wording import plain_data

    _print(plain_data(result.report) if as_json else result.summary())
    if result.failures:
        raise typer.Exit(1)


def _print(content: object) -> None:
    typer.echo(content if isinstance(content, str) else json.dumps(content, indent=2))


def main() -> None:
    """Run the command line; the target of the scripts."""
    # Blocks of many sizes come and go: without this torch keeps half as much again
    # (13.4 GB instead of 8.1 for GPTQ of a 7B model). A user's own setting stays.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    app()
