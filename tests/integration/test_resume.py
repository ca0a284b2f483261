"""Runs that were killed go on, and end with the files of a run that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from pipeline_fixtures import (
    call,
    config_of,
    digests,
    save_checkpoint,
    write_config,
    write_text,
)

import compress
from compress.core.errors import ConfigError

TESTS = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}
BOTH = [{"format": "safetensors", "max_shard_size": "60KB"}, {"format": "gguf"}]
EMBEDDING = {"model.embed_tokens": {"scheme": "q5_1", "method": "rtn"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a text, and a run that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("resume")
    save_checkpoint(folder / "tiny", num_hidden_layers=3)
    write_text(folder)
    compress.run(config(folder, "whole"))
    return folder


def config(folder: Path, workdir: str, **changes: Any) -> dict[str, Any]:
    sections: dict[str, Any] = {"export": BOTH, **changes}
    return config_of(folder / "tiny", folder / "text.txt", folder / workdir, **sections)


def with_embedding(folder: Path, workdir: str) -> dict[str, Any]:
    """Return a config with every kind of checkpoint: blocks, and the embedding's."""
    return config(
        folder,
        workdir,
        quantize={"overrides": EMBEDDING},
        export=[{"format": "gguf"}],
    )


def kill_when(path: Path, command: list[str]) -> int:
    """Start a command, kill it as soon as ``path`` is there; returns its exit code."""
    with subprocess.Popen(
        command,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        deadline = time.monotonic() + 60
        while not path.exists() and process.poll() is None:
            assert time.monotonic() < deadline, "the run is stuck"
            time.sleep(0.0005)
        process.kill()
    return process.returncode


@pytest.mark.parametrize(
    "moment", ["blocks/0001.safetensors", "export/safetensors.part"]
)
def test_a_run_that_is_killed_from_outside_can_go_on(
    moment: str, folder: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "killed"
    path = write_config(tmp_path / "run.yaml", config(folder, str(workdir)))
    command = [sys.executable, "-m", "compress", "run", str(path)]
    code = kill_when(workdir / moment, command)
    assert code == -signal.SIGKILL, "the run ended before it could be killed"
    assert not (workdir / "report.json").exists()
    result = call("run", path, "--resume")
    assert result.exit_code == 0, result.output
    assert digests(workdir / "export") == digests(folder / "whole" / "export")
    assert not list(workdir.rglob("*.part"))


def test_sigterm_ends_a_run_in_order(folder: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "stopped"
    path = write_config(tmp_path / "run.yaml", config(folder, str(workdir)))
    with subprocess.Popen(
        [sys.executable, "-m", "compress", "run", str(path)],
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 60
        while not (workdir / "blocks/0000.safetensors").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.0005)
        again = call("run", path, "--resume")  # while it works there
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert again.exit_code == 2
    assert f"another run works in {workdir} (process {process.pid} on" in again.stderr
    assert process.returncode == 143, said
    assert "stopped by SIGTERM: interrupted; continue with" in said
    assert not list(workdir.rglob("*.part")) and not (workdir / "run.lock").exists()
    assert call("run", path, "--resume").exit_code == 0
    assert digests(workdir / "export") == digests(folder / "whole" / "export")


def killed_everywhere(settings: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    path = folder / "config.json"
    path.write_text(json.dumps(settings))
    command = [sys.executable, str(TESTS / "killed_runs.py"), str(path), str(folder)]
    done = subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    outcomes: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return outcomes


def test_a_run_can_be_killed_at_every_single_write(
    folder: Path, tmp_path: Path
) -> None:
    outcomes = killed_everywhere(with_embedding(folder, "unused"), tmp_path)
    expected = digests(tmp_path / "whole" / "export")
    assert len(outcomes) > 10
    assert any(outcome["left"] for outcome in outcomes)  # files cut short, mid-write
    for number, outcome in enumerate(outcomes, 1):
        assert outcome["signal"] == -signal.SIGKILL
        assert outcome["resumed"] == 0, number
        assert outcome["left_after"] == [], number
        assert outcome["files"] == expected, number


def test_a_second_run_without_flags_is_refused(folder: Path) -> None:
    before = digests(folder / "whole")
    path = write_config(folder / "again.yaml", config(folder, "whole"))
    result = call("run", path)
    assert result.exit_code == 2
    assert "holds an earlier run; continue it with --resume" in result.output
    assert digests(folder / "whole") == before


def test_resuming_a_finished_run_computes_nothing_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir = compress.run(config(folder, "finished")).workdir
    stamps = {p: p.stat().st_mtime_ns for p in workdir.glob("blocks/*")}
    stamps |= {p: p.stat().st_mtime_ns for p in workdir.glob("export/*/*")}
    # Not even a pass of the calibration text through blocks that are done.
    never = Mock(side_effect=AssertionError("a block was run"))
    monkeypatch.setattr("compress.transform.BlockWalk", never)
    compress.run(config(folder, "finished"), resume=True)
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps


def test_resuming_where_nothing_began_starts(folder: Path) -> None:
    workdir = compress.run(config(folder, "fresh"), resume=True).workdir
    assert digests(workdir / "export") == digests(folder / "whole" / "export")


def test_overwriting_starts_again(folder: Path) -> None:
    changed = {"scheme": "int8-g32"}
    compress.run(config(folder, "replaced", quantize=changed))
    workdir = compress.run(config(folder, "replaced"), overwrite=True).workdir
    assert digests(workdir / "export") == digests(folder / "whole" / "export")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"quantize": {"scheme": "int8-g32"}}, "plan, quantize"),
        ({"quantize": {"options": {"shrink": 0.2}}}, "quantize"),
        ({"quantize": {"propagate": "fp"}}, "quantize"),
        ({"calibration": {"samples": 9}}, "calibration"),
        ({"calibration": {"seed": 1}}, "calibration"),
        ({"calibration": {"dtype": "bfloat16"}}, r"calibration\.dtype"),
        ({"model": {"dtype": "float16"}, "calibration": {"dtype": "float32"}}, "model"),
        ({"run": {"seed": 5}}, "run.seed"),
    ],
)
def test_a_changed_config_cannot_be_resumed(
    changes: dict[str, Any], named: str, folder: Path
) -> None:
    changed = config(folder, "whole", **changes)
    before = digests(folder / "whole")
    with pytest.raises(ConfigError, match=rf"cannot resume in .*: {named} changed"):
        compress.run(changed, resume=True)
    assert digests(folder / "whole") == before


def test_another_text_or_export_can_be_added(folder: Path) -> None:
    first = config(folder, "added", evaluate=None, export=BOTH[:1])
    first["quantize"] |= {"scale_dtype": "float16"}
    workdir = compress.run(first).workdir
    blocks = {p: p.stat().st_mtime_ns for p in workdir.glob("blocks/*")}
    second = config(folder, "added")
    report = compress.run(second, resume=True).report
    assert {p: p.stat().st_mtime_ns for p in blocks} == blocks
    assert set(report["exports"]) == {"safetensors", "gguf"}
    assert report["metrics"]["compressed"]["kl"] > 0


def test_an_export_with_other_options_is_written_anew(folder: Path) -> None:
    first = config(folder, "options", export=[{"format": "safetensors"}])
    workdir = compress.run(first).workdir
    assert len(list(workdir.glob("export/safetensors/*.safetensors"))) == 1
    compress.run(config(folder, "options", export=BOTH[:1]), resume=True)
    assert len(list(workdir.glob("export/safetensors/*.safetensors"))) > 1
    compress.run(first, resume=True)
    assert len(list(workdir.glob("export/safetensors/*.safetensors"))) == 1
