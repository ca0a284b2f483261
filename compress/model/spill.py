"""States between blocks in a file, for a run that memory has no room for.

A file without a name is mapped: it goes with the process, however that ends. After each
batch the pages are given back, so that what counts as memory of the process is one
batch and not all windows. The file's blocks are claimed at once: a disk that is full is
an error before the first write, not a signal in the middle.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Room:
    """How little memory the states may take.

    Attributes:
        folder: Where files are made; has to be on a disk.
        windows: That a block may see at once.
    """

    folder: Path
    windows: int

    def empty(
        self, shape: Sequence[int], dtype: torch.dtype
    ) -> tuple[Tensor, mmap.mmap]:
        """Return a tensor of zeros in a file, and the mapping that it lies in.

        Raises:
            OSError: The disk has no room for it.
        """
        size = torch.Size(shape).numel() * dtype.itemsize
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.folder) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            pages = mmap.mmap(file.fileno(), size)
        return torch.frombuffer(pages, dtype=dtype).view(*shape), pages


def give_back(pages: mmap.mmap | None) -> None:
    """Take the pages of a file out of the process; what they hold stays."""
    if pages is not None and hasattr(mmap, "MADV_DONTNEED"):
        pages.madvise(mmap.MADV_DONTNEED)
