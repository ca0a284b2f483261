"""The command ``compress kv``."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer


def kv(
    model: Annotated[
        str,
        typer.Argument(
            help="HF folder or id, .gguf file, or work directory.", show_default=False
        ),
    ],
    types: Annotated[
        list[str] | None,
        typer.Option(
            "--type", help="Type of the cache, or KEYS/VALUES; repeatable.", metavar="T"
        ),
    ] = None,
    fp8: Annotated[
        bool, typer.Option(help="Measure FP8 with calibrated scales too.")
    ] = True,
    strategy: Annotated[
        str, typer.Option(help="FP8 scales: tensor or attn_head.")
    ] = "tensor",
    scale: Annotated[
        str, typer.Option(help="What they cover: amax, percentile or mse.")
    ] = "amax",
    calibration: Annotated[
        str, typer.Option(help="Text for them: a bundled one, .txt or .jsonl.")
    ] = "mix",
    samples: Annotated[int, typer.Option(min=1, help="Windows of it.")] = 32,
    text: Annotated[
        str, typer.Option(help="Bundled text or .txt file to measure on.")
    ] = "wikitext2",
    windows: Annotated[int, typer.Option(min=1, help="Windows of it.")] = 4,
    sequence_length: Annotated[
        int, typer.Option(min=2, help="Tokens of a window.")
    ] = 512,
    context: Annotated[
        list[int] | None,
        typer.Option(help="Tokens whose cache is given in bytes; repeatable."),
    ] = None,
    limit: Annotated[
        float, typer.Option(help="KL in nats that a recommended type may cost.")
    ] = 0.001,
    tight_limit: Annotated[
        float, typer.Option(help="The same where memory is short.")
    ] = 0.01,
    to: Annotated[
        Path | None, typer.Option(help="Folder for kv.json and kv.md.")
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(
            help="Also write the model with the FP8 scales, for vLLM, to this folder."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure what types of the key-value cache cost a model, and say which to take.

    Flags for llama.cpp and vLLM end the table. The model itself is never changed.
    """
    if strategy not in ("tensor", "attn_head"):
        raise typer.BadParameter("--strategy is tensor or attn_head")
    if scale not in ("amax", "percentile", "mse"):
        raise typer.BadParameter("--scale is amax, percentile or mse")
    from compress import kvstudy
    from compress.kvcache.names import STUDIED_PAIRS
    from compress.kvcache.scales import ScaleRule

    command = shlex.join(["compress", *sys.argv[1:]])
    found = kvstudy.kv_study(
        model,
        types=STUDIED_PAIRS if types is None else types,
        fp8=fp8,
        rule=ScaleRule(strategy, scale),
        calibration=calibration,
        samples=samples,
        text=text,
        windows=windows,
        sequence_length=sequence_length,
        contexts=context or kvstudy.CONTEXTS,
        limit=limit,
        tight_limit=tight_limit,
        device=device,
        folder=to,
        command=command,
    )
    if store is not None:
        place = kvstudy.store_scales(
            model,
            store,
            rule=ScaleRule(strategy, scale),
            calibration=calibration,
            samples=samples,
            sequence_length=sequence_length,
            command=command,
        )
        typer.echo(f"with scales: {place}", err=True)
    typer.echo(json.dumps(found.to_dict(), indent=2) if as_json else found.text())
