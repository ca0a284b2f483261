"""States in a file: the same result in less memory, and nothing left of it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pipeline_fixtures import codes_of, config_of, save_checkpoint, write_text

import compress
from compress.core.errors import ConfigError, StorageError
from compress.model.spill import Room, give_back


def test_states_in_a_file_keep_their_values(tmp_path: Path) -> None:
    values = torch.randn(5, 7, 3)
    states, pages = Room(tmp_path / "a", 2).empty(values.shape, values.dtype)
    states.copy_(values)
    give_back(pages)
    assert torch.equal(states, values)
    states[2:4] *= 2
    give_back(pages)
    assert torch.equal(states[2:4], values[2:4] * 2)
    assert list((tmp_path / "a").iterdir()) == []  # the file has no name


def test_pages_that_are_given_back_take_no_memory(tmp_path: Path) -> None:
    """In a process of its own, whose memory nothing else moves."""
    script = f"""
import torch
from pathlib import Path
from compress.model.spill import Room, give_back
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
states, pages = Room(Path({str(tmp_path)!r}), 1).empty((64, 1 << 18), torch.float32)
before = resident()
for row in states:
    row.fill_(1.0)
    give_back(pages)
assert resident() - before < 16 << 20, resident() - before
assert float(states.sum()) == states.numel()
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.fixture
def config(tmp_path: Path) -> dict[str, object]:
    save_checkpoint(tmp_path / "model", num_hidden_layers=3)
    text = write_text(tmp_path)
    return config_of(
        tmp_path / "model",
        text,
        tmp_path / "run",
        calibration={"samples": 16, "sequence_length": 64},
        quantize={"options": {}},
    )


def test_a_run_under_a_limit_gives_the_same_codes(
    config: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress.run(config)
    whole = codes_of(tmp_path / "run")
    room = Room(tmp_path / "spilled", 3)
    monkeypatch.setattr("compress.preview.room_of", lambda run: room)
    made = []
    empty = Room.empty
    monkeypatch.setattr(Room, "empty", lambda *a: made.append(a[1:]) or empty(*a))
    compress.run(config, overwrite=True)
    assert made, "nothing was spilled"
    found = codes_of(tmp_path / "run")
    assert found.keys() == whole.keys()
    codes = [name for name in whole if name.endswith(".codes")]
    equal = torch.cat([(found[n] == whole[n]).flatten() for n in codes])
    # Sums over tokens in another order: a value on an edge may fall to either side.
    assert equal.double().mean() > 0.999


def test_a_limit_below_what_any_run_needs_is_refused(
    config: dict[str, object], tmp_path: Path
) -> None:
    section = {"workdir": str(tmp_path / "run"), "max_memory": "100MB"}
    with pytest.raises(ConfigError, match=r"run\.max_memory: 100MB does not suffice"):
        compress.run({**config, "run": section})
    assert not (tmp_path / "run").exists()


def test_a_limit_above_the_prediction_changes_nothing(
    config: dict[str, object], tmp_path: Path
) -> None:
    section = {"workdir": str(tmp_path / "run"), "max_memory": "8GiB"}
    compress.run({**config, "run": section})
    assert not (tmp_path / "run" / "spill").exists()


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="of Linux")
def test_a_disk_without_room_is_an_error_at_once(
    config: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = Room(tmp_path / "spilled", 3)
    monkeypatch.setattr("compress.preview.room_of", lambda run: room)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageError, match="the disk is full"):
        compress.run(config)
