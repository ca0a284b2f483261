"""One run at a time in a work directory, and nothing left of the lock."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from compress.core.errors import ConfigError
from compress.locking import locked

HOLD = """
import sys, time
from pathlib import Path
from compress.locking import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> subprocess.Popen[str]:
    """Another process that holds the lock of ``tmp_path / "run"``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_run_is_refused_and_told_who_is_there(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    with (
        pytest.raises(ConfigError, match=rf"another run .*\(process {holder.pid} on"),
        locked(tmp_path / "run"),
    ):
        pass
    assert (tmp_path / "run" / "run.lock").is_file()  # the holder's
    holder.kill()
    holder.wait()


def test_a_killed_run_holds_nothing(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locked(tmp_path / "run"):
        pass


def test_a_run_that_wrote_nothing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), locked(tmp_path / "a" / "b"):
        raise RuntimeError("before anything was written")
    assert list(tmp_path.iterdir()) == []


def test_what_was_written_stays(tmp_path: Path) -> None:
    with locked(tmp_path / "a"):
        (tmp_path / "a" / "kept").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["kept"]


def test_a_file_is_no_work_directory(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(ConfigError, match="is a file, not a folder"), locked(path):
        pass


def test_a_lock_that_its_holder_removed_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """We opened the file, then the holder removed it and let go."""
    import compress.locking as locking

    lock, calls = locking._lock, []

    def removed_before(descriptor: int, path: Path) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            path.unlink()
        lock(descriptor, path)

    monkeypatch.setattr(locking, "_lock", removed_before)
    with locked(tmp_path):
        assert len(calls) == 2
        with pytest.raises(ConfigError, match="another run"), locked(tmp_path):
            pass


def test_only_the_first_process_of_torchrun_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with locked(tmp_path):
        monkeypatch.setitem(os.environ, "RANK", "1")
        with locked(tmp_path):
            pass
