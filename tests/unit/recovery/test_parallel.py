"""Two processes train as one with the same windows in a step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from recovery_fixtures import opened, options_of, save_pair, text_of
from safetensors.torch import load_file
from torch import Tensor
from torchrun_fixtures import run_processes

from compress.core.errors import ConfigError
from compress.recovery.recover import recover
from compress.workdir import WorkDir

SCRIPT = """
import json, os, sys
from pathlib import Path
from recovery_fixtures import opened, options_of, text_of
from compress.recovery.recover import recover
folder = Path(sys.argv[1])
options = json.loads(sys.argv[2])
stop = options.pop("stop", None)
if stop:
    from compress.recovery.checkpoints import CheckpointFiles
    save = CheckpointFiles.save
    def once(files, checkpoint):
        save(files, checkpoint)
        raise SystemExit("stopped here")
    CheckpointFiles.save = once
record = recover(
    opened(folder / "student"), opened(folder / "teacher"), folder / "two",
    text=text_of(), options=options_of(batch=4, **options),
    device="cpu", state=folder / "state-two",
)
(folder / f"record-{os.environ['RANK']}.json").write_text(json.dumps(record))
"""


def weights(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {k: v for file in files for k, v in load_file(file).items()}


def run_two(folder: Path, **options: object) -> None:
    run_processes(SCRIPT, folder, options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("train", "shard"), [("full", False), ("full", True), ("lora", True)]
)
def test_two_processes_do_what_one_does(
    train: str, shard: bool, tmp_path: Path
) -> None:
    """Whole models or split ones: rows, moments and gradients are the same."""
    if train == "lora":
        pytest.importorskip("peft")
    teacher, student = save_pair(tmp_path)
    common = {"train": train, "steps": 4, "evaluations": 2, "held_out": 5}
    common["generated"] = 0 if shard else 3
    one = recover(
        opened(student),
        opened(teacher),
        tmp_path / "one",
        text=text_of(),
        options=options_of(batch=8, **common),
        device="cpu",
        state=tmp_path / "state-one",
    )
    run_two(tmp_path, **common, shard=shard)
    records = [
        json.loads((tmp_path / f"record-{rank}.json").read_text()) for rank in (0, 1)
    ]
    assert [r["processes"] for r in records] == [2, 2]
    assert records[0]["kl_after"] == records[1]["kl_after"]
    assert records[0]["tokens"] == one["tokens"]
    expected = weights(tmp_path / "one")
    for name, tensor in weights(tmp_path / "two").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)
    assert not list((tmp_path / "state-two").glob("training*"))


@pytest.mark.slow
def test_a_split_run_goes_on_from_its_files(tmp_path: Path) -> None:
    """Killed after a checkpoint, it ends with the weights of the unbroken run."""
    save_pair(tmp_path)
    common = {"train": "full", "steps": 6, "evaluations": 3, "shard": True}
    common["gradient_checkpointing"] = True
    run_two(tmp_path, **common)
    expected = weights(tmp_path / "two")
    with pytest.raises(AssertionError, match="stopped here"):
        run_two(tmp_path, **common, checkpoint_minutes=0, stop=1)
    names = sorted(p.name for p in (tmp_path / "state-two").glob("training*"))
    assert names == [
        "training-2-0.safetensors",
        "training-2-1.safetensors",
        "training.json",
    ]
    name = "model.layers.0.mlp.up_proj.weight"
    own = load_file(tmp_path / "state-two" / names[1])
    assert 2 * len(own[f"now/{name}"]) == len(expected[name])
    # What every resumed run does first must not take them away.
    WorkDir(tmp_path / "state-two").begin({}, overwrite=False)
    run_two(tmp_path, **common, checkpoint_minutes=0)
    for name, tensor in weights(tmp_path / "two").items():
        assert torch.equal(tensor, expected[name])


def test_one_process_splits_nothing(tmp_path: Path) -> None:
    teacher, student = save_pair(tmp_path)
    with pytest.raises(ConfigError, match=r"shard: .* torchrun"):
        recover(
            opened(student),
            opened(teacher),
            tmp_path / "one",
            text=text_of(),
            options=options_of(shard=True),
            device="cpu",
            state=tmp_path / "state",
        )
    with pytest.raises(ValueError, match="generated"):
        options_of(shard=True, generated=2)
