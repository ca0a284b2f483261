"""What scripts of tools that calibrate share: their command line, and ``peer.json``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any


def command_line(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of model, tokens, OUT, bits, group size and device."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path, help="int64 [N, T], .npy")
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    return parser


def write_about(
    arguments: argparse.Namespace,
    package: str,
    *,
    tokens: Sequence[int],
    seconds: float,
    **more: Any,
) -> None:
    """Write ``peer.json`` beside the checkpoint.

    Args:
        arguments: Of :func:`command_line`.
        package: What was run, as pip knows it.
        tokens: Windows, and tokens of each.
        seconds: That it took.
        more: Options of the tool's own.
    """
    about = {
        "tool": f"{package} {version(package)}",
        "bits": arguments.bits,
        "group_size": arguments.group_size,
        "tokens": list(tokens),
        "seconds": round(seconds, 1),
        **more,
    }
    (arguments.out / "peer.json").write_text(json.dumps(about, indent=2), "utf-8")
