"""What ends a run from outside: signals, a full disk, no memory, and what to do then.

Everything that was finished is in the work directory by then, whole (see
:mod:`compress.workdir`), so that each of these messages may promise that ``--resume``
continues.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from compress.core.errors import MemoryLimitError, StorageError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_RESUME = "what was finished is kept: continue with the same command and --resume"
# How torch words it where it raises a plain RuntimeError.
_NO_MEMORY = ("can't allocate memory", "not enough memory")


class Terminated(KeyboardInterrupt):
    """The process was asked to end by SIGTERM, as batch systems do before they kill."""


@contextmanager
def ending_in_order() -> Iterator[None]:
    """Let SIGTERM raise :class:`Terminated`, so that half-written files are removed.

    Only the main thread can do so; elsewhere nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    asked = False

    def terminate(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except Exception as error:
        if not asked:
            raise
        # Raised in the middle of a library's C code, it comes out as another error.
        raise Terminated from error
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def explained() -> Iterator[None]:
    """Turn what the machine refuses into errors that say what to do.

    Raises:
        StorageError: A file could not be written or read.
        MemoryLimitError: The memory of host or device did not suffice.
    """
    try:
        yield
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise
        raise StorageError(storage_message(error)) from error
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _is_out_of_memory(error):
            raise
        raise MemoryLimitError(_memory_message(str(error))) from error
    except Exception as error:  # safetensors has an error of its own for files
        if not _is_unwritable(error):
            raise
        raise StorageError(f"{error}; free some space; {_RESUME}") from error


def storage_message(error: OSError) -> str:
    """Return what a file operation failed at, in words, and what to do."""
    where = f"{error.filename}: " if error.filename else ""
    said = f"{where}{error.strerror or error}"
    if error.errno in _FULL:
        return f"the disk is full ({said}); free some space; {_RESUME}"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return (
            f"{said}; make the folder writable, or set another run.workdir. Whatever "
            "was finished there is kept, and --resume continues"
        )
    if error.errno == errno.EIO:
        return f"{said}: the disk or the network file system failed; {_RESUME}"
    return said


def _is_out_of_memory(error: RuntimeError) -> bool:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return any(words in str(error) for words in _NO_MEMORY)


def _is_unwritable(error: Exception) -> bool:
    library = sys.modules.get("safetensors")
    if library is None or not isinstance(error, library.SafetensorError):
        return False
    return any(os.strerror(number) in str(error) for number in (*_FULL, errno.EROFS))


def _memory_message(said: str) -> str:
    first = said.strip().splitlines()[0] if said.strip() else "no more to be had"
    return (
        f"out of memory ({first}); set run.max_memory, lower calibration.samples or "
        f"the batch of recover and tune, or take a larger machine; {_RESUME}"
    )
