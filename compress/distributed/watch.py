"""One process's failure ends all of them, with its message; none waits for ever.

A collective operation waits for whoever does not come. So each process keeps a thread
with a connection to the store of torchrun: it counts there that it lives, looks whether
its neighbour does, and whether anyone has failed. A process that fails says so in the
store before it leaves. The others then have a few seconds to notice by themselves (a
closed connection ends what they wait for) and are ended if they do not.
"""

from __future__ import annotations

import logging
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import TracebackType
from typing import Any

from torch.distributed import (  # type: ignore[attr-defined]
    PrefixStore,
    TCPStore,
)

from compress.core.errors import CompressError

_log = logging.getLogger(__name__)
_PERIOD, _BEAT = 0.3, 5.0  # seconds between looks, and between signs of life
_SILENCE = 300.0  # seconds without a sign of life; a stopped process makes none
_GRACE = 5.0  # seconds between a failure elsewhere and the end of this process
_FAILURE, _SEEN, _DONE = "failure", "seen", "done"
_LOST = ("gloo", "NCCL", "closed by peer", "reset by peer", "TCPStore", "Broken pipe")


class ProcessError(CompressError):
    """Another process of the run failed, or is gone."""


def relayed(message: str, code: int) -> ProcessError:
    """Return the error of another process, for this one to raise."""
    error = ProcessError(message)
    error.exit_code = code
    return error


class Watch:
    """Looks after the processes of a run, from each of them.

    Args:
        name: Of the run, in the store.
        rank: Of this process.
        size: How many there are.
        silence: Seconds without a sign of life after which a process counts as gone.
    """

    def __init__(
        self, name: str, rank: int, size: int, *, silence: float = _SILENCE
    ) -> None:
        self._rank, self._size, self._silence = rank, size, silence
        self._beat = min(_BEAT, silence / 3)
        self._store = PrefixStore(f"{name}-watch", _connected())
        self._ended = threading.Event()
        self._failure: tuple[str, int] | None = None
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._unseen = threading.Lock()  # taken once

    def __enter__(self) -> Watch:
        """Begin to watch."""
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop watching; the process that keeps the store goes last."""
        self._ended.set()
        self._thread.join()
        if error is None:
            with suppress(RuntimeError):  # the store is gone: everyone was done
                self._store.add(_DONE, 1)
                self._await(_DONE, self._size)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Tell the others of an error, or say which of theirs has caused it.

        Raises:
            ProcessError: The error was that of another process.
        """
        try:
            yield
        except ProcessError:
            self._acknowledge()
            raise
        except Exception as error:
            if _is_lost_connection(error):
                raise self._theirs() from error
            self._tell(str(error) or repr(error), getattr(error, "exit_code", 1))
            raise
        except BaseException as error:  # interrupted
            self._tell(f"ended by {type(error).__name__}", 1)
            raise

    def _theirs(self) -> ProcessError:
        """Return what another process failed of, once that is known."""
        deadline = time.monotonic() + _GRACE
        while self._failure is None and time.monotonic() < deadline:
            time.sleep(_PERIOD / 3)
        if self._failure is not None:
            return relayed(*self._failure)
        return ProcessError(
            "a process of this run ended without a word: it was killed, or its host "
            "is gone (out of memory?). What was finished is in the work directory; "
            "start again with --resume"
        )

    def _tell(self, message: str, code: int) -> None:
        """Say that this process failed, unless another was first."""
        mine = f"process {self._rank} of {self._size} ({platform.node()}): {message}"
        entry = f"{code} {mine}"
        with suppress(RuntimeError):  # the store is gone
            is_news = self._store.compare_set(_FAILURE, "", entry) == entry.encode()
            if is_news and self._rank:  # who started the first one shows its errors
                _log.error("%s", mine)
            self._await(_SEEN, self._size - 1)

    def _acknowledge(self) -> None:
        """Let the process that failed know that this one knows it."""
        if self._unseen.acquire(blocking=False):
            with suppress(RuntimeError):
                self._store.add(_SEEN, 1)

    def _await(self, key: str, count: int) -> None:
        """Return when so many have counted up a key, or after a while."""
        deadline = time.monotonic() + _GRACE
        while self._store.add(key, 0) < count and time.monotonic() < deadline:
            time.sleep(_PERIOD / 3)

    def _look(self) -> None:
        beat, neighbour = 0.0, (self._rank + 1) % self._size
        heard, last = time.monotonic(), 0
        while not self._ended.wait(_PERIOD):
            now = time.monotonic()
            try:
                if self._store.check([_FAILURE]):
                    code, _, said = self._store.get(_FAILURE).decode().partition(" ")
                    self._leave(said, int(code))
                    return
                if now - beat > self._beat:
                    beat = now
                    self._store.add(f"alive/{self._rank}", 1)
                    count = self._store.add(f"alive/{neighbour}", 0)
                    heard, last = (now, count) if count != last else (heard, last)
            except RuntimeError:
                self._leave("the process that keeps torchrun's store is gone", 1)
                return
            if now - heard > self._silence:
                self._leave(
                    f"process {neighbour} has not been heard of for "
                    f"{self._silence:.0f} s; its host may be gone",
                    1,
                )
                return

    def _leave(self, said: str, code: int) -> None:
        """Let this process end by itself, and end it if it does not."""
        self._failure = said, code
        self._acknowledge()
        if self._ended.wait(_GRACE):
            return
        if self._rank == 0:
            print(said, file=sys.stderr, flush=True)
        os._exit(code)


def _connected() -> Any:
    """Return a connection of its own: one that waits for a key answers nobody else."""
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=30),
        wait_for_workers=False,
    )


def _is_lost_connection(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and any(w in str(error) for w in _LOST)
