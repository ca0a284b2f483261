"""A lock on a work directory, so that two runs never write into the same one.

The lock is the operating system's (``flock``): it ends with the process that holds it,
however that ends, so a killed run leaves nothing that has to be cleaned up by hand. The
file names the holder, for the message that the other one gets.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

from compress.core.errors import ConfigError
from compress.core.foreign import MALFORMED, parse_json

_log = logging.getLogger(__name__)
_NAME = "run.lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a work directory's lock; makes the folder if it is not there.

    Of the processes that torchrun started, the first one holds it for all. The lock
    file is gone afterwards, and so is a folder in which nothing was written.

    Raises:
        ConfigError: It is no folder, or another run holds it; the message then names
            its process and host.
        OSError: The folder cannot be written.
    """
    if int(os.environ.get("RANK", "0")) > 0:
        yield
        return
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"run.workdir: {folder} is a file, not a folder")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = _acquired(folder / _NAME)
    try:
        yield
    finally:
        # Removed while it is held: whoever opened it meanwhile sees that it is gone.
        (folder / _NAME).unlink(missing_ok=True)
        os.close(descriptor)
        for path in made:
            with suppress(OSError):  # it is in use now
                path.rmdir()


def _acquired(path: Path) -> int:
    """Return a descriptor that holds the lock of a file which is there."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            _lock(descriptor, path)
        except BaseException:
            os.close(descriptor)
            raise
        if _is_at(path, descriptor):
            break
        os.close(descriptor)  # the last holder removed it after we had opened it
    holder = {
        "process": os.getpid(),
        "host": platform.node(),
        "since": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    os.ftruncate(descriptor, 0)
    with suppress(OSError):  # a full disk takes the name of the holder, not the lock
        os.write(descriptor, json.dumps(holder).encode())
    return descriptor


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"run.workdir: another run works in {path.parent}{_holder(path)}; wait "
            "until it ends, stop it, or set another run.workdir"
        ) from None
    except OSError as error:  # such as a network file system without locks
        _log.warning(
            "%s cannot be locked (%s): do not start a second run there",
            path.parent,
            error.strerror,
        )


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    """Return who holds a lock, in words; nothing if the file does not say."""
    try:
        about = parse_json(path.read_text("utf-8"))
        return (
            f" (process {about['process']} on {about['host']}, since {about['since']})"
        )
    except (OSError, *MALFORMED):
        return ""
