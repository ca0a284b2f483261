"""Kill runs at random moments, resume them, compare every file with an unbroken run.

A tiny random Llama goes through each kind of stage. A run is forked, waits until the
stage begins, and is sent SIGKILL after a random share of the time that the stage takes;
half of the resumed runs are killed once more. Then the same with SIGTERM, on a file
system that is too small, and on one that has become read-only (a tmpfs, which needs
root; without it these rows are left out and said so).

    python benchmarks/kill.py [--kinds quantize,recover] [--kills 50]

Kinds that are left out keep their rows of the last result; --more adds to a row.
"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"TQDM_DISABLE": "1"}

import argparse  # noqa: E402
import hashlib  # noqa: E402
import json  # noqa: E402
import mmap  # noqa: E402
import random  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

import torch  # noqa: E402
from disks import can_mount, remount, small_disk  # noqa: E402
from kill_cases import KINDS, config  # noqa: E402
from pipeline_fixtures import save_checkpoint, write_text  # noqa: E402
from results import FOLDER, write_result  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tqdm import tqdm  # noqa: E402

import compress.allocation.search as searching  # noqa: E402
from compress import pipeline  # noqa: E402
from compress.core.errors import CompressError  # noqa: E402
from compress.stopping import Terminated, ending_in_order  # noqa: E402

WORK = Path("runs/benchmarks/kill")
# Hold times and dates beside results, which lie in other files.
_RECORDS = ("results", "pruning", "recovery", "tuning")
_REPORTS = ("state.json", "report.json", "report.md", "report.html")


class Clock:
    """Tells the parent of a forked run which stages it has entered."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, 4096)

    def forget(self) -> None:
        """Begin anew."""
        self._shared[:] = bytes(4096)

    def stages(self) -> list[str]:
        """Return the stages that the child has entered."""
        return bytes(self._shared).rstrip(b"\0").decode().split("\n")[:-1]

    def watch(self, stages: tuple[str, ...]) -> None:
        """In the child: note the beginning of each stage."""
        written = 0
        timed = pipeline.timed

        def noting(seconds: dict[str, float], stage: str) -> Any:
            nonlocal written
            if stage in stages:
                text = f"{stage}\n".encode()
                self._shared[written : written + len(text)] = text
                written += len(text)
            return timed(seconds, stage)

        pipeline.timed = noting
        searching.timed = noting


def forked(work: Callable[[], Any], log: Path) -> int:
    """Start ``work`` in a child, which ends with the exit codes of the command."""
    child = os.fork()
    if child:
        return child
    code = 70
    # The usual lock of progress bars is shared by all forks: one that was killed while
    # it held it would stop the others.
    tqdm.set_lock(threading.RLock())
    try:
        sys.stderr = log.open("a")  # noqa: SIM115 - ends with the child
        with ending_in_order():
            work()
        code = 0
    except Terminated:
        code = 143
    except CompressError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        code = error.exit_code
    except BaseException as error:
        sys.stderr.write(f"BUG {type(error).__name__}: {error}\n")
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(child: int) -> int:
    """Wait for a child; return its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Trials:
    """Runs of one kind, each broken in a way of its own."""

    def __init__(self, kind: str, generator: random.Random) -> None:
        self.kind, self.generator = kind, generator
        self.folder = WORK / kind.replace(" ", "_")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.log = self.folder / "log.txt"
        self.clock = Clock()
        self.bugs: list[str] = []
        self.seconds: dict[str, float] = {}
        self.expected = self._unbroken("first")
        again = self._unbroken("second")
        if again != self.expected:
            names = sorted(set(again.items()) ^ set(self.expected.items()))
            self.bugs.append(f"two unbroken runs differ: {dict(names)}")

    def _unbroken(self, name: str) -> dict[str, str]:
        if ended(self.start(self.folder / name)) != 0:
            raise SystemExit(f"{self.kind}: {self.log.read_text()}")
        report = json.loads((self.folder / name / "run/report.json").read_text())
        self.seconds = report["seconds"] | (report["allocation"] or {}).get(
            "seconds", {}
        )
        return results(self.folder / name / "run")

    def start(self, place: Path, *, resume: bool = False) -> int:
        """Fork a run in ``place``, with a cache of its own."""
        self.clock.forget()

        def work() -> None:
            os.environ["COMPRESS_CACHE"] = str(place / "cache")
            self.clock.watch(KINDS[self.kind].stages)
            pipeline.run(config(self.kind, WORK, place / "run"), resume=resume)

        return forked(work, self.log)

    def killed(self, place: Path, number: int, *, resume: bool = False) -> int:
        """Send a signal in one of the kind's stages; return how the run ended."""
        stage = self.generator.choice(KINDS[self.kind].stages)
        wait = self.generator.random() * self.seconds[stage]
        child = self.start(place, resume=resume)
        entered = 0.0
        while True:
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                return os.waitstatus_to_exitcode(status)
            now = time.monotonic()
            if not entered and stage in self.clock.stages():
                entered = now
            if entered and now - entered >= wait:
                os.kill(child, number)
                return ended(child)
            time.sleep(0.0002)

    def finish(self, place: Path, what: str) -> bool:
        """Resume a run, and compare; whether all is as if nothing had been."""
        code = ended(self.start(place, resume=True))
        found = results(place / "run") if code == 0 else {}
        left = [str(path) for path in place.rglob("*.part")]
        right = code == 0 and found == self.expected and not left
        if not right:
            wrong = sorted(k for k, v in self.expected.items() if found.get(k) != v)
            self.bugs.append(f"{what}: code {code}, differ {wrong[:5]}, left {left}")
        elif place.exists():
            shutil.rmtree(place, ignore_errors=True)
        return right

    def kills(self, count: int) -> dict[str, Any]:
        """Break ``count`` runs by SIGKILL."""
        hit = twice = good = tries = 0
        while hit < count and tries < 4 * count:
            tries += 1
            place = self.folder / f"kill-{tries}"
            if self.killed(place, signal.SIGKILL) != -signal.SIGKILL:
                shutil.rmtree(place, ignore_errors=True)
                continue  # it was faster this time
            hit += 1
            if self.generator.random() < 0.5:
                twice += self.killed(place, signal.SIGKILL, resume=True) < 0
            good += self.finish(place, f"kill {tries}")
        return {"killed": hit, "killed twice": twice, "identical": good}

    def terminations(self, count: int) -> dict[str, Any]:
        """Break ``count`` runs by SIGTERM; each must clean up behind itself."""
        hit = good = tries = 0
        while hit < count and tries < 4 * count:
            tries += 1
            place = self.folder / f"term-{tries}"
            code = self.killed(place, signal.SIGTERM)
            if code == 0:
                shutil.rmtree(place, ignore_errors=True)
                continue
            hit += 1
            left = [*place.rglob("*.part"), *place.rglob("run.lock")]
            if code != 143 or left:
                self.bugs.append(f"SIGTERM {tries}: code {code}, left {left}")
            good += self.finish(place, f"SIGTERM {tries}")
        return {"SIGTERM": hit, "identical after SIGTERM": good}

    def full_disks(self, count: int) -> dict[str, Any]:
        """Run on file systems that have a random share of the room that is needed."""
        needed = sum(
            -(-path.stat().st_size // 4096) * 4096
            for path in (self.folder / "second").rglob("*")
            if path.is_file()
        )
        refused = good = 0
        for number in range(count):
            room = int(needed * self.generator.uniform(0.05, 0.95))
            with small_disk(self.folder / f"full-{number}", room) as place:
                code = ended(self.start(place))
                if code == 0:
                    continue
                refused += 1
                said = self.log.read_text().splitlines()[-1]
                if code not in (1, 2) or "BUG" in said or "space" not in said:
                    self.bugs.append(f"full disk {number}: code {code}: {said}")
                remount(place, f"size={64 << 20}")
                good += self.finish(place, f"full disk {number} of {room}")
        return {"full disk": refused, "identical after full disk": good}

    def read_only(self, count: int) -> dict[str, Any]:
        """Kill a run, make its disk read-only, try to resume, make it writable."""
        refused = good = 0
        for number in range(count):
            with small_disk(self.folder / f"ro-{number}", 64 << 20) as place:
                self.killed(place, signal.SIGKILL)
                remount(place, "ro")
                code = ended(self.start(place, resume=True))
                said = self.log.read_text().splitlines()[-1]
                refused += code == 1 and "Read-only" in said
                if code not in (0, 1) or "BUG" in said:
                    self.bugs.append(f"read-only {number}: code {code}: {said}")
                remount(place, "rw")
                good += self.finish(place, f"read-only {number}")
        return {"read-only": refused, "identical after read-only": good}


def results(workdir: Path) -> dict[str, str]:
    """Return digests of all that a run computes, by path; times of solves left out."""
    found = {}
    for path in sorted(workdir.rglob("*")):
        name = path.relative_to(workdir)
        if not path.is_file() or name.parts[0] in _RECORDS or name.name in _REPORTS:
            continue
        if name.parts[0] in ("blocks", "tuned"):  # beside tensors, seconds
            data = b"".join(
                f"{key} {tensor.dtype}".encode()
                + tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
                for key, tensor in sorted(load_file(path).items())
            )
        else:
            data = path.read_bytes()
        found[str(name)] = hashlib.sha256(data).hexdigest()
    return found


_SUMS = (
    *("killed", "killed twice", "identical", "SIGTERM", "identical after SIGTERM"),
    *("full disk", "identical after full disk", "read-only"),
    *("identical after read-only", "problems", "seconds"),
)


def row_of(
    kind: str, arguments: argparse.Namespace, first: int, mounts: bool
) -> tuple[dict[str, Any], Trials]:
    """Break runs of a kind; return its row and what was wrong."""
    started = time.monotonic()
    trials = Trials(kind, random.Random(f"{first} {kind}"))
    row: dict[str, Any] = dict.fromkeys(("stage", *_SUMS), 0)
    row |= {"stage": kind, **trials.kills(arguments.kills)}
    row |= trials.terminations(arguments.others)
    if mounts:
        row |= trials.full_disks(arguments.others)
        row |= trials.read_only(arguments.others)
    row |= {"problems": len(trials.bugs), "files compared": len(trials.expected)}
    return row | {"seconds": round(time.monotonic() - started)}, trials


def main() -> int:
    """Break runs of all kinds; write the result; 1 if one did not come out right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--others", type=int, default=5, help="of each other way")
    parser.add_argument("--more", action="store_true", help="add to the last result")
    arguments = parser.parse_args()
    tqdm.monitor_interval = 0  # no thread of its own: this process forks
    if not (WORK / "model").is_dir():
        save_checkpoint(WORK / "model", num_hidden_layers=3, initializer_range=0.15)
        write_text(WORK)
    pipeline.run(
        config("quantization", WORK, WORK / "warm"), overwrite=True
    )  # late imports
    file = FOLDER / "kill.json"
    rows = json.loads(file.read_text())["figures"]["stages"] if file.exists() else []
    kept = {row["stage"]: row for row in rows}
    mounts = can_mount(WORK)
    bugs: list[str] = []
    for kind in arguments.kinds.split(","):
        known = kept.get(kind, {}) if arguments.more else {}
        row, trials = row_of(kind, arguments, known.get("killed", 0), mounts)
        kept[kind] = {**row, **{key: row[key] + known.get(key, 0) for key in _SUMS}}
        bugs += [f"{kind}: {bug}" for bug in trials.bugs]
        print(json.dumps(kept[kind]), *trials.bugs, sep="\n", flush=True)
        write_result(
            "kill",
            claim="A run that is killed in any stage, or meets a full or a read-only "
            "disk, ends after --resume with the files of an unbroken run, byte by "
            "byte. Training included: on a CPU, ended by steps.",
            figures={
                "disks": "tmpfs" if mounts else "not run: mounting needs root",
                "stages": [kept[name] for name in KINDS if name in kept],
            },
            command="python benchmarks/kill.py",
        )
    return int(bool(bugs))


if __name__ == "__main__":
    raise SystemExit(main())
