"""Two processes train as one with the same windows in a step."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from recovery_fixtures import opened, options_of, save_pair, text_of
from safetensors.torch import load_file
from torch import Tensor

from compress.recovery.recover import recover

TESTS = Path(__file__).resolve().parents[2]
SCRIPT = """
import json, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from recovery_fixtures import opened, options_of, text_of
from compress.recovery.recover import recover
folder = Path(sys.argv[1])
record = recover(
    opened(folder / "student"), opened(folder / "teacher"), folder / "two",
    text=text_of(), options=options_of(batch=4, **json.loads(sys.argv[3])),
    device="cpu", state=folder / "state-two",
)
(folder / f"record-{os.environ['RANK']}.json").write_text(json.dumps(record))
"""


def weights(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {k: v for file in files for k, v in load_file(file).items()}


def free_port() -> int:
    with socket.socket() as opened_socket:
        opened_socket.bind(("127.0.0.1", 0))
        port: int = opened_socket.getsockname()[1]
        return port


def run_two(folder: Path, **options: object) -> None:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    path = os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    processes = [
        subprocess.Popen(
            [sys.executable, script, folder, TESTS, json.dumps(options)],
            env=os.environ
            | shared
            | {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": "2",
                "PYTHONPATH": path,
                "OMP_NUM_THREADS": "1",
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    teacher, student = save_pair(tmp_path)
    common = {"train": "full", "steps": 4, "generated": 3, "evaluations": 2}
    one = recover(
        opened(student),
        opened(teacher),
        tmp_path / "one",
        text=text_of(),
        options=options_of(batch=8, **common),
        device="cpu",
        state=tmp_path / "state-one",
    )
    run_two(tmp_path, **common)
    records = [
        json.loads((tmp_path / f"record-{rank}.json").read_text()) for rank in (0, 1)
    ]
    assert [r["processes"] for r in records] == [2, 2]
    assert records[0]["kl_after"] == records[1]["kl_after"]
    assert records[0]["tokens"] == one["tokens"]
    expected = weights(tmp_path / "one")
    for name, tensor in weights(tmp_path / "two").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)
