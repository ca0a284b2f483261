"""Allocators on a real model, one level database, the same bytes.

    python benchmarks/allocators.py --device cuda [--budgets 3.0,3.5] [--seeds 0,1]
                                    [--allocators ilp,ramp]

The model is ``rotated`` of ``offgrid.py`` (or ``--model``); each linear of the decoder
becomes one of ggml's types (``--format safetensors``: INT2 to INT6 in groups of 64),
quantized once. Searches measure KL on text of the calibration's sources that it has not
drawn; the table's KL is of test texts that neither has seen. Searching allocators spend
the same number of measurements, whose text and order the seed decides nothing of.

What was run before is kept in ``results/NAME.json`` and not run again, so that options
may select a part; each line is written as soon as it is there. ``--workers`` searches
go side by side on one device, each a process: seconds are with that company.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import offgrid
import torch
from allocation_case import FORMATS, Case, Settings
from reference_kl import TEXTS
from results import FOLDER, PACKAGES, write_result

from compress import registry

MEASURED = ("ramp", "evolution", "reinforce", "random")  # slowest first
ALLOCATORS = ("uniform", "greedy", "ilp", *MEASURED)
Key = tuple[float, str, int]
Row = dict[str, Any]

_case: Case  # of a worker process


def options_of(allocator: str, evaluations: int) -> dict[str, Any]:
    """Return options under which an allocator spends a number of measurements."""
    if allocator == "ramp":
        warm_up = evaluations // 10
        return {"warm_up": warm_up, "episodes": max(1, evaluations - warm_up - 1)}
    return {"evaluations": evaluations} if allocator in MEASURED else {}


def search(case: Case, key: Key, evaluations: int) -> Row:
    """Return what an allocator finds."""
    bits, name, seed = key
    plugin = registry.get_allocator(name)
    problem = case.problem(bits, seed)
    started = time.perf_counter()
    options = plugin.Options(**options_of(name, evaluations))
    found = plugin(options).allocate(problem)
    seconds = time.perf_counter() - started
    assert problem.fits(found.assignment)
    return {
        "budget": bits,
        "allocator": name,
        "seed": seed,
        "assignment": "".join(map(str, found.assignment)),
        "bits": case.bits(found.assignment),
        "search": problem.measure(found.assignment, 1.0),
        "evaluations": found.evaluations,
        "seconds": round(seconds, 2),
    }


def begin(settings: Settings, threads: int) -> None:
    """Set a worker process up."""
    global _case
    torch.set_num_threads(threads)
    _case = Case(settings)


def search_here(key: Key, evaluations: int) -> Row:
    """Run :func:`search` in a worker process."""
    return search(_case, key, evaluations)


def wanted(arguments: argparse.Namespace) -> list[Key]:
    """Return what to run, slowest first; allocators without chance run once."""
    order = [*MEASURED, *(name for name in ALLOCATORS if name not in MEASURED)]
    return [
        (bits, name, seed)
        for name in order
        if name in arguments.allocators
        for bits in arguments.budgets
        for seed in (arguments.seeds if name in MEASURED else [0])
    ]


class Table:
    """All lines so far, in ``results/NAME.json``.

    Raises:
        SystemExit: The file has lines that were made under other settings.
    """

    def __init__(self, name: str, about: dict[str, Any]) -> None:
        self._name, self._about = name, about
        self._rows: dict[Key, Row] = {}
        self.once: dict[str, Any] = {}
        path = FOLDER / f"{name}.json"
        if not path.is_file():
            return
        raw = json.loads(path.read_text())["raw"]
        if raw["settings"] != about:
            raise SystemExit(f"{path} was made under {raw['settings']}; give --name")
        self.once = raw["once"]
        self._rows = {_key(row): row for row in raw["rows"]}

    def has(self, key: Key) -> bool:
        """Whether a line is there."""
        return key in self._rows

    def add(self, row: Row) -> None:
        """Add a line and write the file."""
        self._rows[_key(row)] = row
        rows = [self._rows[key] for key in sorted(self._rows, key=_place)]
        figures: dict[str, Any] = {**self._about, **self.once}
        for bits in sorted({row["budget"] for row in rows}):
            here = [row for row in rows if row["budget"] == bits]
            figures[f"KL in nats at {bits} bits a weight"] = summary(here)
        write_result(
            self._name,
            claim="Allocators on one level database at the same bytes: KL to bf16 on "
            "test texts, mean over seeds and its spread; `to ilp` is the difference of "
            "means over all windows, with the standard error over windows; `search` is "
            "the KL on the text that searches measure on.",
            figures=figures,
            raw={"settings": self._about, "once": self.once, "rows": rows},
            versions=(*PACKAGES, "stable-baselines3"),
        )


def _key(row: Row) -> Key:
    return row["budget"], row["allocator"], row["seed"]


def _place(key: Key) -> tuple[float, int, int]:
    return key[0], ALLOCATORS.index(key[1]), key[2]


def summary(rows: Sequence[Row]) -> list[Row]:
    """Return a line for each allocator from those of its seeds, at one budget."""
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        by_name.setdefault(row["allocator"], []).append(row)
    return [_summed(name, seeds, by_name.get("ilp")) for name, seeds in by_name.items()]


def _summed(name: str, seeds: list[Row], ilp: list[Row] | None) -> Row:
    figures: Row = {"allocator": name, "seeds": len(seeds)}
    for text in TEXTS:
        kls = [mean(row["test"][text]) for row in seeds]
        figures[text] = mean(kls)
        figures[f"± {text}"] = stdev(kls) if len(kls) > 1 else None
    if ilp is not None and name != "ilp":
        ours, theirs = _windows(seeds), _windows(ilp)
        apart = [a - b for a, b in zip(ours, theirs, strict=True)]
        figures["to ilp"] = mean(apart)
        figures["± to ilp"] = stdev(apart) / len(apart) ** 0.5
    for column in ("search", "bits", "evaluations", "seconds"):
        figures[column] = mean(row[column] for row in seeds)
    return figures


def _windows(seeds: Sequence[Row]) -> list[float]:
    """Return the KL of each window of all texts, mean over seeds."""
    each = [[kl for text in TEXTS for kl in row["test"][text]] for row in seeds]
    return [mean(kls) for kls in zip(*each, strict=True)]


def main() -> None:
    """Run what is wanted and not there, and write each line when it is done."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_case_arguments(parser)
    add_search_arguments(parser, budgets="3.0,3.5,4.0", seeds="0,1,2,3,4")
    parser.add_argument("--allocators", type=_names, default=",".join(ALLOCATORS))
    parser.add_argument("--name", default="allocators", help="of the result")
    arguments = parser.parse_args()
    settings = settings_of(arguments)
    about = settings.about() | {"evaluations": arguments.evaluations}
    table = Table(arguments.name, about)
    case = Case(settings)
    print(f"levels and losses: {case.seconds}", flush=True)
    if not table.once:
        where = torch.cuda.get_device_name() if "cuda" in settings.device else "CPU"
        spent = {f"{key} s": round(s, 1) for key, s in case.seconds.items()}
        table.once = {"on": where, "searches side by side": arguments.workers, **spent}
    keys = [key for key in wanted(arguments) if not table.has(key)]
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(
        min(arguments.workers, max(1, len(keys))),
        context,
        initializer=begin,
        initargs=(settings, arguments.threads),
    ) as pool:
        pending = [pool.submit(search_here, k, arguments.evaluations) for k in keys]
        for future in as_completed(pending):
            row = future.result()
            row["test"] = case.test([int(digit) for digit in row["assignment"]])
            table.add(row)
            kl = " ".join(f"{mean(row['test'][text]):.4f}" for text in TEXTS)
            print(
                f"{row['budget']} {row['allocator']:9} {row['seed']} "
                f"{row['bits']:.3f} bits, search {row['search']:.4f}, test {kl}, "
                f"{row['evaluations']:.0f} evaluations, {row['seconds']} s",
                flush=True,
            )


def add_case_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that :func:`settings_of` reads."""
    parser.add_argument("--model", type=Path, help="instead of making `rotated`")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/levels"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--format", choices=FORMATS, default="gguf")
    parser.add_argument("--schemes", type=_names, default=())
    parser.add_argument("--method", default=Settings.method, help="of the levels")
    for option in ("samples", "windows", "length", "test-windows", "test-length"):
        default = getattr(Settings, option.replace("-", "_"))
        parser.add_argument(f"--{option}", type=int, default=default)


def add_search_arguments(
    parser: argparse.ArgumentParser, *, budgets: str, seeds: str
) -> None:
    """Add what to search, how long, and how many side by side."""
    parser.add_argument("--budgets", type=_floats, default=budgets)
    parser.add_argument("--seeds", type=_integers, default=seeds)
    parser.add_argument("--evaluations", type=int, default=200)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2, help="of a worker")


def settings_of(arguments: argparse.Namespace) -> Settings:
    """Return the settings asked for; makes the model if none is given."""
    model = arguments.model
    if model is None:
        folder = Path("runs/benchmarks/offgrid")
        model = folder / ("rotated" if arguments.format == "gguf" else "permuted")
        if not model.exists():
            offgrid.main(folder)
    return Settings(
        model,
        arguments.work,
        arguments.format,
        arguments.method,
        tuple(arguments.schemes),
        arguments.samples,
        arguments.windows,
        arguments.length,
        arguments.test_windows,
        arguments.test_length,
        arguments.device,
    )


def _names(text: str) -> list[str]:
    return text.split(",")


def _floats(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
