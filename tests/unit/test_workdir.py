"""The work directory: whole files or none, and what a run may continue."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from compress.core.errors import CheckpointError, ConfigError, ExportError
from compress.core.scheme import Scheme
from compress.core.tensors import QuantizedTensor
from compress.workdir import LayerRecord, WorkDir, write_atomically

FINGERPRINT = {"model": "a", "plan": "b"}


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def coded(scheme: str = "int4-g32", notes: tuple[str, ...] = ()) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(0)
    grid = Scheme.parse(scheme).with_scales("bfloat16")
    codes = torch.randint(
        grid.lowest, grid.highest + 1, (6, 64), generator=generator, dtype=torch.int8
    )
    scale = torch.rand(6, 2, generator=generator).bfloat16()
    zero = None
    if "asym" in scheme:
        zero = torch.ones(6, 2, dtype=torch.int8)
    elif "offset" in scheme:
        zero = -torch.rand(6, 2, generator=generator).bfloat16()
    return QuantizedTensor(codes, scale, zero, grid, notes)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_content(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "folder" / "file"
    write_atomically(path, b"old")
    monkeypatch.setattr(os, failing, full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("scheme", ["int4-g32", "int3-g32-asym", "int5-g32-offset"])
def test_codes_are_read_back_as_they_were_saved(scheme: str, tmp_path: Path) -> None:
    work = WorkDir(tmp_path)
    tensor = coded(scheme, ("a note",))
    record = LayerRecord(None, 0.25, 1.5)
    assert not work.has_part("0000")
    work.save_part("0000", {"a.b": tensor, "c": coded()}, {"a.b": record, "c": record})
    assert work.has_part("0000")
    again = work.read_layer("0000", "a.b")
    assert again.scheme == tensor.scheme
    assert again.notes == ("a note",)
    for key, value in tensor.state().items():
        assert torch.equal(again.state()[key], value)
        assert again.state()[key].dtype == value.dtype
    assert work.records("0000")["a.b"]["weight_error"] == 0.25


def test_a_damaged_checkpoint_says_how_to_go_on(tmp_path: Path) -> None:
    work = WorkDir(tmp_path)
    work.save_part("0000", {"a": coded()}, {"a": LayerRecord(None, 0.1, 0.1)})
    path = tmp_path / "blocks" / "0000.safetensors"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(CheckpointError, match=r"damaged.*run again with --resume"):
        work.read_layer("0000", "a")


def test_a_second_run_needs_a_decision(tmp_path: Path) -> None:
    work = WorkDir(tmp_path)
    work.check(resume=False, overwrite=False)
    work.begin(FINGERPRINT, overwrite=False)
    with pytest.raises(ConfigError, match=r"holds an earlier run; continue it with"):
        work.check(resume=False, overwrite=False)
    work.check(resume=True, overwrite=False)
    work.check(resume=False, overwrite=True)


def test_what_changed_is_named(tmp_path: Path) -> None:
    work = WorkDir(tmp_path)
    work.begin(FINGERPRINT, overwrite=False)
    work.begin(FINGERPRINT, overwrite=False)
    with pytest.raises(ConfigError, match=r"cannot resume in .*: new, plan changed"):
        work.begin({"model": "a", "plan": "c", "new": "d"}, overwrite=False)


def test_overwriting_drops_the_run_and_nothing_else(tmp_path: Path) -> None:
    work = WorkDir(tmp_path)
    work.begin(FINGERPRINT, overwrite=False)
    work.save_part("0000", {"a": coded()}, {"a": LayerRecord(None, 0.1, 0.1)})
    work.stage("evaluation", lambda: {"x": 1})
    (tmp_path / "report.md").write_text("old")
    (tmp_path / "mine.txt").write_text("keep")
    work.begin({"model": "z"}, overwrite=True)
    assert not work.has_part("0000")
    assert work.stored("evaluation") is None
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["mine.txt", "state.json"]


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    work = WorkDir(tmp_path)
    work.begin(FINGERPRINT, overwrite=False)
    (tmp_path / "export" / "gguf.part").mkdir(parents=True)
    (tmp_path / "export" / "gguf.part" / "half").touch()
    (tmp_path / "blocks").mkdir()
    (tmp_path / "blocks" / "0003.safetensors.part").touch()
    work.begin(FINGERPRINT, overwrite=False)
    assert not list(tmp_path.rglob("*.part"))


def test_a_stage_is_computed_once(tmp_path: Path) -> None:
    work = WorkDir(tmp_path)
    calls: list[int] = []

    def compute() -> dict[str, int]:
        calls.append(1)
        return {"answer": 42}

    assert work.stage("s", compute) == work.stage("s", compute) == {"answer": 42}
    assert len(calls) == 1


def test_a_damaged_result_is_refused(tmp_path: Path) -> None:
    work = WorkDir(tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "s.json").write_text('{"half')
    with pytest.raises(CheckpointError, match=r"s\.json is damaged"):
        work.stored("s")


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full"), ExportError("no"), RuntimeError("bug")]
)
def test_a_folder_that_cannot_be_filled_is_not_there(
    error: Exception, tmp_path: Path
) -> None:
    def fill(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise error

    with pytest.raises(type(error)):
        WorkDir(tmp_path).replace_folder(tmp_path / "export" / "x", fill)
    assert list((tmp_path / "export").iterdir()) == []


def test_a_filled_folder_replaces_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "export" / "x"
    target.mkdir(parents=True)
    (target / "old").touch()
    WorkDir(tmp_path).replace_folder(target, lambda f: (f / "new").touch())
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in target.parent.iterdir()] == ["x"]


def test_codes_without_a_state_are_of_unknown_origin(tmp_path: Path) -> None:
    """Such as those that a kill left while an earlier run was being removed."""
    work = WorkDir(tmp_path)
    work.begin(FINGERPRINT, overwrite=False)
    work.save_part("0000", {"a": coded()}, {"a": LayerRecord(None, 0.1, 0.1)})
    (tmp_path / "state.json").unlink()
    work.begin(FINGERPRINT, overwrite=False)
    assert not work.has_part("0000")


def test_a_removal_that_is_killed_leaves_nothing_to_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = WorkDir(tmp_path)
    work.begin(FINGERPRINT, overwrite=False)
    work.save_part("0000", {"a": coded()}, {"a": LayerRecord(None, 0.1, 0.1)})
    work.save_part("0001", {"b": coded()}, {"b": LayerRecord(None, 0.1, 0.1)})
    removed: list[Path] = []

    def killed(path: Path, **_: object) -> None:
        removed.append(path)
        if (path / "0000.safetensors").exists():
            (path / "0000.safetensors").unlink()  # the first file of the folder
            raise KeyboardInterrupt

    monkeypatch.setattr("compress.workdir.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        work.begin({"model": "z"}, overwrite=True)
    monkeypatch.undo()
    assert removed
    with pytest.raises(ConfigError, match="model, plan changed"):
        work.begin({"model": "z"}, overwrite=False)
    work.begin(FINGERPRINT, overwrite=False)  # the old run, from its first block
    assert not work.has_part("0000") and not work.has_part("0001")


def test_a_folder_is_never_half_of_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, target = WorkDir(tmp_path), tmp_path / "export" / "x"
    work.replace_folder(target, lambda f: (f / "old").touch())

    def killed(path: Path, **_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("compress.workdir.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        work.replace_folder(target, lambda f: (f / "new").touch())
    assert [path.name for path in target.iterdir()] == ["new"]


def test_redoing_keeps_the_codes_that_tuning_begins_with(tmp_path: Path) -> None:
    work = WorkDir(tmp_path)
    work.begin(FINGERPRINT, overwrite=False)
    work.save_part("0000", {"a": coded()}, {"a": LayerRecord(None, 0.1, 0.1)})
    for name in ("allocation", "tuning", "evaluation"):
        work.stage(name, lambda: 1)
    work.begin({**FINGERPRINT, "tune": "x"}, overwrite=False, redo=True)
    assert work.has_part("0000")
    assert work.stored("allocation") == 1
    assert work.stored("tuning") is None and work.stored("evaluation") is None
    work.begin({**FINGERPRINT, "plan": "x"}, overwrite=False, redo=True)
    assert not work.has_part("0000")
    assert work.stored("allocation") is None
