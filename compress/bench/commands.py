"""``compress bench``: parses arguments and prints; the work is in this package."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="bench",
    help="Time kernels and models on this machine.",
    no_args_is_help=True,
)

Quick = Annotated[bool, typer.Option("--quick", help="Fewer and shorter measurements.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Output = Annotated[
    Path, typer.Option(help="Folder of the page with plots, and of the JSON.")
]


@app.command()
def kernels(
    quick: Quick = False, output: Output = Path("bench"), as_json: AsJson = False
) -> None:
    """Time linear layers of known models on this GPU, in 16, 8 and 6 bits."""
    from compress.bench.kernels import KernelSettings, bench_kernels, check_device

    check_device()
    settings = KernelSettings.quick() if quick else KernelSettings()
    _show(bench_kernels(settings, say=_say), output, as_json=as_json)


@app.command()
def model(
    folder: Annotated[
        Path,
        typer.Argument(
            help="A checkpoint, ours or dense; a .gguf file, which llama.cpp runs on "
            "the CPU; or random:llama-2-7b and the like.",
            show_default=False,
        ),
    ],
    original: Annotated[
        Path | None,
        typer.Option(help="The model it was made from; gives MCR, and the dense row."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; default: cuda if there is one.")
    ] = None,
    way: Annotated[
        list[str] | None,
        typer.Option(help="dense, int8 (torch's own W8A8) or served; repeatable."),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Sequences at a time; repeatable.")
    ] = None,
    prefill: Annotated[
        int | None, typer.Option(help="Tokens of the prompt that is timed alone.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens of prompts that are continued.")
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option(help="Generated tokens of a sequence.")
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Run through torch.compile first.")
    ] = False,
    quick: Quick = False,
    output: Output = Path("bench"),
    as_json: AsJson = False,
) -> None:
    """Time a model: tokens a second, memory and energy, dense and as it is served."""
    from compress.bench.model import ModelSettings, bench_model, check_settings

    usual = "cpu" if folder.suffix == ".gguf" else _device()
    settings = ModelSettings.for_device(folder, device or usual, quick=quick)
    given = {
        "original": original,
        "ways": tuple(way) if way else None,
        "batches": tuple(batch) if batch else None,
        "prefill_tokens": prefill,
        "context_tokens": context,
        "new_tokens": new_tokens,
        "compiled": compiled,
    }
    known: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
    settings = replace(settings, **known)
    check_settings(settings)
    _show(bench_model(settings, say=_say), output, as_json=as_json)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _show(data: dict[str, Any], folder: Path, *, as_json: bool) -> None:
    from compress.bench.page import as_text, write
    from compress.report.wording import plain_data

    typer.echo(json.dumps(plain_data(data), indent=1) if as_json else as_text(data))
    for path in write(data, folder):
        _say(f"written: {path}")
