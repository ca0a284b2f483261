"""Damage files from strangers, and read them: 100,000 times, by every reader.

    python benchmarks/fuzz.py [--cases 120000] [--processes 2]
    python benchmarks/fuzz.py --only "gguf headers:1234"

The second form runs one case again and shows its traceback: cases are numbers. What
counts as a finding is in tests/fuzzing.py.
"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"TQDM_DISABLE": "1"}

import argparse  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

import fuzz_targets  # noqa: E402
import fuzzing  # noqa: E402
from results import FOLDER, write_result  # noqa: E402


def main() -> int:
    """Run all targets; write the result; 1 if there is a finding."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=120_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", help="TARGET or TARGET:NUMBER")
    parser.add_argument("--readers", help="only some; others keep their rows")
    parser.add_argument("--no-result", action="store_true", help="write no file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        targets = fuzz_targets.targets(Path(folder) / "whole")
        if arguments.only:
            return _only(arguments.only, targets, arguments.cases, Path(folder))
        counts = _counts(targets, arguments.cases)
        names = arguments.readers.split(",") if arguments.readers else list(counts)
        chosen = [target for target in targets if target.name in names]
        found = _all(chosen, counts, arguments.processes, Path(folder))
    if arguments.readers:
        known = {row["reader"]: row for row in _known()}
        known |= {row["reader"]: row for row in found}
        found = [known[name] for name in counts if name in known]
    wrong = sum(row["findings"] for row in found)
    total = sum(row["cases"] for row in found)
    print(f"{total} cases, {wrong} findings")
    if not arguments.no_result:
        _write(found, total, wrong)
    return int(wrong > 0)


def _only(
    wanted: str, targets: list[fuzz_targets.Target], cases: int, place: Path
) -> int:
    name, _, number = wanted.partition(":")
    (target,) = (target for target in targets if target.name == name)
    numbers = [int(number)] if number else range(cases)
    found = fuzzing.fuzz(target, numbers, place)
    for kind, (case, trace) in found.findings.items():
        print(f"== {name}:{case}: {kind} ({found.counts[kind]} times)\n{trace}")
    print(f"{found.cases} cases, {found.refused} refused")
    return int(bool(found.findings))


def _known() -> list[dict[str, Any]]:
    file = FOLDER / "fuzz.json"
    rows: list[dict[str, Any]] = []
    return json.loads(file.read_text())["figures"]["readers"] if file.exists() else rows


def _counts(targets: list[fuzz_targets.Target], cases: int) -> dict[str, int]:
    """Return how many cases each reader gets: more if they cost less."""
    whole = sum(1 / target.cost for target in targets)
    return {t.name: int(cases / t.cost / whole) + 1 for t in targets}


def _all(
    targets: list[fuzz_targets.Target],
    counts: dict[str, int],
    processes: int,
    place: Path,
) -> list[dict[str, Any]]:
    """Deal targets to processes, and print what was found."""
    pipes = []
    started = time.monotonic()
    for rank in range(processes):
        reader, writer = os.pipe()
        if os.fork() == 0:
            os.close(reader)
            with os.fdopen(writer, "w") as out:
                for index in range(rank, len(targets), processes):
                    row = _row(targets[index], counts[targets[index].name], place)
                    print(json.dumps([index, row]), file=out, flush=True)
            os._exit(0)
        os.close(writer)
        pipes.append(os.fdopen(reader))
    rows: dict[int, Any] = {}
    for pipe in pipes:
        for line in pipe:
            index, row = json.loads(line)
            rows[index] = row
    found = [rows[index] for index in sorted(rows)]
    findings = {row["reader"]: row.pop("traces") for row in found}
    for name, traces in findings.items():
        for case, kind, trace in traces:
            print(f"== {name}:{case}: {kind}\n{trace}")
    print(f"{time.monotonic() - started:.0f} s")
    return found


def _write(found: list[dict[str, Any]], total: int, wrong: int) -> None:
    write_result(
        "fuzz",
        claim="Damaged files of strangers are read or refused with a message: no other "
        "exception, no crash, nothing over 10 s or 1 GB, no write outside of their "
        "folder, no program, connection, pickle or code of theirs.",
        figures={"cases": total, "findings": wrong, "readers": found},
        command="python benchmarks/fuzz.py",
    )


def _row(target: fuzz_targets.Target, count: int, place: Path) -> dict[str, Any]:
    found = fuzzing.fuzz(target, range(count), place)
    return {
        "reader": target.name,
        "cases": found.cases,
        "refused": found.refused,
        "findings": len(found.findings),
        "slowest s": round(found.slowest_seconds, 2),
        "more memory MB": round(found.memory_bytes / 1e6),
        "traces": [[case, kind, t] for kind, (case, t) in found.findings.items()],
    }


if __name__ == "__main__":
    raise SystemExit(main())
