"""Write a benchmark's figures with all that is needed to repeat them."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from compress.workdir import write_atomically

FOLDER = Path(__file__).parent / "results"
PACKAGES = ("compress-llm", "torch", "transformers", "compressed-tensors")


def write_result(
    name: str,
    *,
    claim: str,
    figures: Any,
    seed: int | None = 0,
    command: str | None = None,
    versions: Sequence[str] = PACKAGES,
    raw: Any = None,
) -> Path:
    """Write ``results/NAME.json`` and return its path.

    Args:
        name: File name without suffix.
        claim: One sentence: what the figures are to show.
        figures: ``{table: [{column: value}, ...]}`` or ``{key: value}``; what
            ``render_results.py`` turns into tables.
        seed: Of everything random.
        command: How it was called; read from ``sys.argv`` when left out.
        versions: Packages to name.
        raw: What the figures were made from, for a script that adds to its result;
            kept in the file, in no table.
    """
    result = {
        "name": name,
        "claim": claim,
        "command": command or shlex.join(["python", *sys.argv]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "seed": seed,
        "versions": {"python": platform.python_version(), **_versions(versions)},
        "figures": figures,
    }
    text = json.dumps(result, indent=1, ensure_ascii=False)
    if raw is not None:
        text = f'{text[:-2]},\n "raw": {json.dumps(raw, ensure_ascii=False)}\n}}'
    path = FOLDER / f"{name}.json"
    write_atomically(path, f"{text}\n".encode())
    return path


def hardware() -> str:
    """Return the processor, its cores and the memory of this machine, in words."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass  # not Linux: the name of the architecture is all there is
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB"


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
