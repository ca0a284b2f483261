"""Scripts that run in several processes, as torchrun starts them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent


def free_port() -> int:
    with socket.socket() as opened_socket:
        opened_socket.bind(("127.0.0.1", 0))
        port: int = opened_socket.getsockname()[1]
        return port


def run_processes(script: str, folder: Path, options: object, *, size: int = 2) -> None:
    """Run a script in so many processes; its arguments are a folder and JSON."""
    for code, errors in outcomes(script, folder, options, size=size):
        assert code == 0, errors


def outcomes(
    script: str, folder: Path, options: object, *, size: int = 2
) -> list[tuple[int, str]]:
    """Run a script as :func:`run_processes`; return exit code and errors of each."""
    path = folder / "script.py"
    path.write_text(script)
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(size),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(
            [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
        ),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, path, folder, json.dumps(options)],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    found = []
    for process in processes:
        _, errors = process.communicate(timeout=240)
        found.append((process.returncode, errors))
    return found
