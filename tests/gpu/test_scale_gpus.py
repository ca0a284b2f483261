"""Run with ``pytest -m gpu`` on a machine with two CUDA devices: NCCL beside gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from moe_fixtures import save_mixture
from pipeline_fixtures import (
    codes_of,
    config_of,
    report_of,
    save_checkpoint,
    write_text,
)
from torchrun_fixtures import run_processes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
# One window is a batch, however many a process has, as in runs that take hours: a
# GPU's library may use another kernel for half as many rows.
RUN = """
import json, sys
from compress import pipeline
from compress.model import states
states._BATCH_BYTES["cuda"] = 1
pipeline.run(json.loads(sys.argv[2]))
"""


@pytest.mark.parametrize("kind", ["layer", "block", "mixtral"])
def test_two_gpus_give_the_codes_of_one(kind: str, tmp_path: Path) -> None:
    if kind == "mixtral":
        save_mixture(tmp_path / "model", kind)
    else:
        save_checkpoint(tmp_path / "model")
    write_text(tmp_path)
    order = "block" if kind == "block" else "layer"

    def config(name: str) -> dict[str, object]:
        return config_of(
            tmp_path / "model",
            tmp_path / "text.txt",
            tmp_path / name,
            quantize={"order": order},
            run={"device": "cuda"},
        )

    run_processes(RUN, tmp_path, config("one"), size=1)
    run_processes(RUN, tmp_path, config("two"), size=2)
    one, two = codes_of(tmp_path / "one"), codes_of(tmp_path / "two")
    names = [name for name in one if name.endswith(".codes")]
    same = sum(int((one[n] == two[n]).sum()) for n in names)
    assert same >= 0.999 * sum(one[n].numel() for n in names)
    devices = [p["device"] for p in report_of(tmp_path / "two")["processes"]]
    assert devices == ["cuda:0", "cuda:1"]
