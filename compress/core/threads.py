"""How many processors torch's operations share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Let operations of this thread run on so many; also a decorator.

    One is right for many small operations: threads share out each of them and wait for
    the last, which takes many times as long on processors that other work keeps busy.
    """
    import torch  # a config can be read without it

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
