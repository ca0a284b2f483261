"""Look for known faults in a checkpoint, and mend those that can be."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from compress.core.errors import CheckpointError, ConfigError
from compress.core.foreign import refusing
from compress.doctor import damage, packing, skip_list
from compress.doctor.faults import Fault
from compress.workdir import WorkDir

_KINDS = (skip_list, packing)


def examine(folder: Path) -> list[Fault]:
    """Return the faults of a checkpoint; reads headers and a few small tensors.

    Raises:
        CheckpointError: The folder has no readable ``config.json``.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} has no config.json; give the folder of a transformers checkpoint"
        )
    found = damage.find(folder)
    if not found:  # whole files: what is in them can be judged
        with refusing(folder):
            found = [fault for kind in _KINDS for fault in kind.find(folder)]
    return found


def mend(folder: Path) -> None:
    """Mend in place what can be mended, file by file, each whole or as before.

    An interrupted call is completed by another one.
    """
    for kind in _KINDS:
        if kind.find(folder):
            kind.mend(folder)


def mended_copy(folder: Path, target: Path) -> list[Fault]:
    """Write a mended copy of a checkpoint, and return the faults that it still has.

    Raises:
        ConfigError: ``target`` exists.
    """
    if target.exists():
        raise ConfigError(f"--to {target} exists; give a folder that does not")

    def fill(part: Path) -> None:
        shutil.copytree(folder, part, dirs_exist_ok=True)
        mend(part)

    WorkDir(target.parent).replace_folder(target, fill)
    return examine(target)


def described(folder: Path, faults: Sequence[Fault]) -> str:
    """Return what was found, for people."""
    if not faults:
        return f"{folder}: no known fault"
    lines = [f"{folder}: {len(faults)} of the known faults"]
    for fault in faults:
        remedy = "can be mended" if fault.mendable else "cannot be mended here"
        lines.append(f"  {fault.kind} ({fault.file}; {remedy}): {fault.text}")
    return "\n".join(lines)
