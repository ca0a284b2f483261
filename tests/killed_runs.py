"""Kills a run at each write it makes, resumes it, and prints what came out.

A program of its own: it imports everything once and forks for each run, which only a
process with a single thread may do (OMP_NUM_THREADS=1).

Usage: killed_runs.py CONFIG FOLDER
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from pipeline_fixtures import digests  # noqa: E402

from compress import pipeline  # noqa: E402


def main(config: dict[str, Any], folder: Path) -> None:
    """Print exported files and leftovers of each killed and resumed run."""
    settings = {**config, "run": {**config["run"], "workdir": str(folder / "whole")}}
    pipeline.run(settings)  # imports what is imported late, once for all
    outcomes = []
    for number in range(1, 1000):
        workdir = folder / str(number)
        settings = {**config, "run": {**config["run"], "workdir": str(workdir)}}
        first = status_of(lambda s=settings, n=number: killed_at(n, s))
        if first == 0:
            break
        left = sorted(p.name for p in workdir.rglob("*.part"))
        second = status_of(lambda s=settings: pipeline.run(s, resume=True))
        outcomes.append(
            {
                "signal": first,
                "left": left,
                "resumed": second,
                "left_after": sorted(p.name for p in workdir.rglob("*.part")),
                "files": digests(workdir / "export"),
            }
        )
    print(json.dumps(outcomes))


def killed_at(number: int, config: dict[str, Any]) -> None:
    """Run a config; end without warning at its n-th flush or rename of a folder.

    At a flush a file is written but not in its place yet, and all before it are.
    """
    seen = 0
    fsync, replace = os.fsync, os.replace

    def count() -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted_fsync(file: int) -> None:
        count()
        fsync(file)

    def counted_replace(source: Any, target: Any) -> None:
        if Path(source).is_dir():
            count()
        replace(source, target)

    os.fsync = counted_fsync  # type: ignore[assignment]
    os.replace = counted_replace  # type: ignore[assignment]
    pipeline.run(config)


def status_of(work: Callable[[], Any]) -> int:
    """Return the exit code of ``work`` in a child; minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
