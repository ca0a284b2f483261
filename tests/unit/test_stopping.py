"""What ends a run from outside becomes a message, whatever raised it."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest
import torch

from compress.core.errors import MemoryLimitError, StorageError
from compress.stopping import Terminated, ending_in_order, explained


def test_sigterm_unwinds_and_leaves_the_handler_as_it_was() -> None:
    before = signal.getsignal(signal.SIGTERM)
    cleaned = []
    with pytest.raises(Terminated), ending_in_order():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            cleaned.append(True)
    assert cleaned
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_that_a_library_turns_into_its_own_error_is_told_apart() -> None:
    def library() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException:  # as C code does that asks an object for its length
            raise ValueError("could not determine the shape") from None

    with pytest.raises(Terminated), ending_in_order():
        library()


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(ZeroDivisionError), ending_in_order(), explained():
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, r"the disk is full \(out\.bin: .*--resume"),
        (errno.EDQUOT, r"the disk is full .*--resume"),
        (errno.EFBIG, r"the disk is full .*--resume"),
        (errno.EROFS, r"out\.bin: .*make the folder writable.*--resume"),
        (errno.EACCES, r"out\.bin: .*make the folder writable"),
        (errno.EIO, r"network file system failed.*--resume"),
    ],
)
def test_a_file_that_cannot_be_written_says_what_to_do(number: int, words: str) -> None:
    with pytest.raises(StorageError, match=words), explained():
        raise OSError(number, os.strerror(number), "out.bin")


def test_a_closed_pipe_is_none_of_our_business() -> None:
    with pytest.raises(BrokenPipeError), explained():
        raise BrokenPipeError(errno.EPIPE, "closed")


def test_no_memory_is_told_from_other_errors_of_torch() -> None:
    with pytest.raises(MemoryLimitError, match=r"max_memory.*--resume"), explained():
        torch.empty(1 << 55)
    with pytest.raises(MemoryLimitError), explained():
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(MemoryLimitError), explained():
        raise MemoryError
    with pytest.raises(RuntimeError, match="shape"), explained():
        torch.zeros(2).view(3)


def test_a_full_disk_under_safetensors_is_one_too(tmp_path: Path) -> None:
    from safetensors import SafetensorError

    said = f"I/O error: {os.strerror(errno.ENOSPC)} (os error 28)"
    with pytest.raises(StorageError, match="--resume"), explained():
        raise SafetensorError(said)
    with pytest.raises(SafetensorError), explained():
        raise SafetensorError("invalid header")
