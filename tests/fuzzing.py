"""Runs readers on damaged files, in forked processes that are watched.

A case is a number: it seeds the generator that damages one file of a target. It ends
well if the reader accepts the files or raises a ``CompressError``. Everything else is a
finding: another exception, a crash of the process, more than ten seconds, more than
1 GiB of memory beyond that of the process before, a write outside of the case's folder,
a started program, an unpickled object, a connection, or code of the case's folder that
is run.
"""

from __future__ import annotations

import faulthandler
import json
import mmap
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from fuzz_targets import Target
from mutations import mutated

from compress.core.errors import CompressError

_TESTS = Path(__file__).resolve().parent
_ROOT = _TESTS.parent
SECONDS = 10
MEMORY_BYTES = 1 << 30
_BATCH = 500
_SHARED = 1 << 16
_FORBIDDEN = (
    "pickle.find_class",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "socket.connect",
)
_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.link")


class _Hang(BaseException):
    """The time of a case is over."""


@dataclass
class Outcome:
    """What became of a target's cases.

    Attributes:
        cases: That were run.
        refused: With a ``CompressError``.
        findings: By kind and place: the first number that shows it, and a traceback.
        slowest_seconds: Of a case.
        memory_bytes: Most that a worker took beyond what it began with.
    """

    cases: int = 0
    refused: int = 0
    findings: dict[str, tuple[int, str]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    slowest_seconds: float = 0.0
    memory_bytes: int = 0


def fuzz(target: Target, numbers: Sequence[int], place: Path) -> Outcome:
    """Run cases of a target.

    Args:
        target: What is read.
        numbers: Of the cases.
        place: A folder for damaged files; nothing may be written outside of it.
    """
    found = Outcome()
    left = list(numbers)
    while left:
        done = _batch(target, left[:_BATCH], place, found)
        left = left[done:]
    return found


def _batch(target: Target, numbers: list[int], place: Path, found: Outcome) -> int:
    """Run cases in one process, as many as it survives; return how many are done."""
    shared = mmap.mmap(-1, _SHARED)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        code = 1
        try:
            _work(target, numbers, place, shared, writer)
            code = 0
        except BaseException:  # of the harness itself
            line = json.dumps({"harness": traceback.format_exc()})
            os.write(writer, f"{line}\n".encode())
        finally:
            os._exit(code)
    os.close(writer)
    begun, since = -1, time.monotonic()
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        now = int.from_bytes(shared[:8], "little")
        if now != begun:
            begun, since = now, time.monotonic()
        elif time.monotonic() - since > 2 * SECONDS:  # it cannot even take a signal
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    with os.fdopen(reader, "rb") as pipe:
        lines = pipe.read().decode().splitlines()
    for line in map(json.loads, lines):
        if "harness" in line:
            raise RuntimeError(line["harness"])
        _add(found, line)
    at = int.from_bytes(shared[:8], "little")
    code = os.waitstatus_to_exitcode(status)
    if code == 0:
        return len(numbers)
    said = f"the process ended with {code}"
    found.cases += at
    _add(found, {"case": numbers[at], "finding": said, "trace": said, "seconds": 0})
    return at + 1


def _add(found: Outcome, line: dict[str, Any]) -> None:
    if "memory" in line:
        found.memory_bytes = max(found.memory_bytes, line["memory"])
        found.cases += line["accepted"] + line["refused"]
        found.refused += line["refused"]
        found.slowest_seconds = max(found.slowest_seconds, line["slowest"])
        return
    found.cases += 1
    found.counts[line["finding"]] += 1
    found.findings.setdefault(line["finding"], (line["case"], line["trace"]))


def _work(
    target: Target, numbers: list[int], place: Path, shared: mmap.mmap, writer: int
) -> None:
    """In the child: run the cases, and report findings as lines of JSON."""
    out = os.fdopen(writer, "w", buffering=1)
    faulthandler.disable()
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    warnings.simplefilter("ignore")
    folder = place / f"case-{os.getpid()}"
    shutil.copytree(target.folder, folder)
    tempfile.tempdir = str(folder)
    signal.signal(signal.SIGALRM, _alarm)
    guard = _Guard(folder)
    _read(target, folder)  # whatever is imported late
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    _limit_memory()
    refused = accepted = 0
    slowest = 0.0
    for index, number in enumerate(numbers):
        shared[:8] = index.to_bytes(8, "little")
        guard.broken = ""
        file, whole = _damage(target, number, folder)
        started = time.monotonic()
        kind, trace = _read(target, folder)
        slowest = max(slowest, time.monotonic() - started)
        if guard.broken:
            kind, trace = guard.broken, guard.broken
        file.write_bytes(whole)
        if kind in ("accepted", "refused"):
            refused += kind == "refused"
            accepted += kind == "accepted"
            continue
        print(
            json.dumps({"case": number, "finding": kind, "trace": trace[-3000:]}),
            file=out,
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    line = {"memory": peak, "accepted": accepted, "refused": refused}
    print(json.dumps(line | {"slowest": slowest}), file=out)
    shutil.rmtree(folder, ignore_errors=True)


def _damage(target: Target, number: int, folder: Path) -> tuple[Path, bytes]:
    """Damage a file of a folder; return it and its whole content."""
    generator = random.Random(f"{target.name} {number}")
    file = folder / generator.choice(target.files)
    whole = file.read_bytes()
    file.write_bytes(mutated(whole, generator))
    return file, whole


def _read(target: Target, folder: Path) -> tuple[str, str]:
    """Read a folder; return what came of it, and a traceback if that is a finding."""
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        target.read(folder)
        return "accepted", ""
    except CompressError as error:
        if not str(error).strip():
            return "an error without a message", traceback.format_exc()
        return "refused", ""
    except BaseException as error:
        return f"{type(error).__name__} in {_own(error)}", traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _own(error: BaseException) -> str:
    """Return the innermost line of ours in a traceback."""
    found = "?"
    for frame in traceback.extract_tb(error.__traceback__):
        path = Path(frame.filename)
        if path.is_relative_to(_ROOT) and path.parent != _TESTS:
            found = f"{frame.name} of {path.relative_to(_ROOT)}"
    return found


def _alarm(number: int, frame: FrameType | None) -> None:
    raise _Hang


def _limit_memory() -> None:
    """Let no more be allocated than the limit beyond what is there."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData"):
            used = int(line.split()[1]) * 1024
            limit = used + MEMORY_BYTES
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


class _Guard:
    """Watches files, programs, connections and code of this process.

    Attributes:
        broken: What was done that must not be; empty if nothing.
    """

    def __init__(self, folder: Path) -> None:
        self.broken = ""
        self._folder = str(folder.resolve())
        sys.addaudithook(self._seen)

    def _seen(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _FORBIDDEN:
            self.broken = f"{event} {str(arguments)[:200]}"
        elif event == "open":
            path, mode, flags = arguments
            changes = isinstance(mode, str) and any(c in mode for c in "wax+")
            changes |= bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            if changes and isinstance(path, str | bytes | os.PathLike):
                self._check(os.fsdecode(path), "a file")
        elif event in _CHANGES:
            self._check(os.fsdecode(arguments[0]), event)
        elif event == "exec":
            name = getattr(arguments[0], "co_filename", "")
            if str(name).startswith(self._folder):
                self.broken = f"code of {name} is run"

    def _check(self, path: str, what: str) -> None:
        whole = os.path.realpath(path)
        if not whole.startswith(self._folder) and whole != os.devnull:
            self.broken = f"{what} outside: {whole}"
