"""One ``compress compare``: a base, INT4, a K-quant and a pruned model.

    python benchmarks/compare.py --model OFFGRID/permuted --tasks DATA [--make-only]

The candidates are made first, each by one run on the same calibration tokens, and stay
in ``--work`` for the next time: GPTQ in groups of 64 as safetensors, GPTQ on ggml's
``q4_k`` as GGUF, and a dense model without a fifth of its MLP neurons. The comparison
is timed alone. Questions are evenly spread ones of each file below ``DATA``. With the
default sizes it takes about 1,040 s of computation, so some ten minutes on two cores
that nothing else uses.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import time
from pathlib import Path
from typing import Any

from results import PACKAGES, write_result

import compress
from compress.log import set_up_logging

CALIBRATION = {"data": "mix", "samples": 32, "sequence_length": 512}
CANDIDATES: dict[str, dict[str, Any]] = {
    "int4-g64": {
        "quantize": {"method": "gptq", "scheme": "int4-g64"},
        "export": [{"format": "safetensors"}],
    },
    "q4_k": {
        "quantize": {"method": "gptq", "scheme": "q4_k"},
        "export": [{"format": "gguf"}],
    },
    "pruned-20": {
        "prune": {"method": "cfsp", "sparsity": 0.2},
        "export": [{"format": "safetensors"}],
    },
}
TASKS = ("arc_easy", "gsm8k", "hellaswag", "openbookqa", "piqa", "winogrande")


def main() -> None:
    """Make the candidates, compare, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tasks", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/compare"))
    parser.add_argument("--tokens", type=int, default=4096, help="of each protocol")
    parser.add_argument("--limit", type=int, default=60, help="questions of a task")
    parser.add_argument("--make-only", action="store_true")
    arguments = parser.parse_args()
    set_up_logging()
    made = {
        name: make(name, sections, arguments.model, arguments.work)
        for name, sections in CANDIDATES.items()
    }
    if arguments.make_only:
        return
    target = arguments.work / "compared"
    shutil.rmtree(target, ignore_errors=True)  # nothing is taken from another time
    load = os.getloadavg()[0]
    started, before = time.perf_counter(), cpu_seconds()
    found = compress.compare(
        f"bf16={arguments.model}",
        [f"{name}={folder}" for name, folder in made.items()],
        tokens=arguments.tokens,
        tasks=[str(arguments.tasks)],
        only=TASKS,
        limit=arguments.limit,
        folder=target,
    )
    seconds, cpu = time.perf_counter() - started, cpu_seconds() - before
    print(found.text())
    data = found.to_dict()
    write_result(
        "compare",
        claim="A base and three candidates side by side, tasks included, on two cores: "
        "`compress compare` alone took the seconds below (fewer where nothing else "
        "runs: see those of all cores). Intervals hold 95 % of "
        "paired bootstrap means; p is McNemar's, starred after Holm's correction.",
        figures={
            "seconds": seconds,
            "seconds of all cores, llama.cpp included": cpu,
            "load of the machine in the minute before": load,
            "subsets": f"first {arguments.tokens} tokens of WikiText-2 for each "
            f"protocol; {arguments.limit} questions, evenly spread, of each task",
            "models": [model_row(row) for row in data["models"]],
            "texts": [text_row(row) for row in data["texts"]],
            "tasks": [task_row(row) for row in data["tasks"]],
            "mean of the tasks": [task_row(row) for row in data["means"]],
            "candidates against each other": [
                pair_row(pair, text) for pair in data["pairs"] for text in pair["texts"]
            ],
        },
        command=f"python benchmarks/compare.py --model {shown(arguments.model)} "
        f"--tasks {shown(arguments.tasks)} --tokens {arguments.tokens} "
        f"--limit {arguments.limit}",
        versions=(*PACKAGES, "llama-cpp-python"),
    )


def shown(path: str | Path) -> str:
    """Return a path as the record has it: from here, or its last folder alone."""
    where, here = Path(path), Path.cwd()
    if where.is_absolute():
        return str(
            where.relative_to(here) if where.is_relative_to(here) else where.name
        )
    return str(where)


def cpu_seconds() -> float:
    """Return seconds of computation so far, of this process and its children."""
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    used = [resource.getrusage(who) for who in whose]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def make(name: str, sections: dict[str, Any], model: str, work: Path) -> Path:
    """Return the work directory of a candidate, made if it is not there."""
    folder = work / name
    if not (folder / "report.json").is_file():
        common = {
            "model": {"path": model},
            "calibration": CALIBRATION,
            "run": {"workdir": str(folder), "verify": False},
        }
        compress.run({**common, **sections}, overwrite=True)
    return folder


def model_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return size and bits."""
    return {
        "model": row["name"],
        "runs in": row["runs_in"],
        "bytes": row["size_bytes"],
        "parameters": row["parameters"],
        "bits per weight": row["bits_per_weight"],
    }


def text_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a text that the docs speak of."""
    kept = ("kl", "kl_se", "kl_median", "kl_p90", "kl_p99", "kl_p999", "kl_max", "top1")
    return {
        "text": row["text"],
        "protocol": row["protocol"],
        "model": row["model"],
        "perplexity": row["perplexity"],
        "ratio": ranged(row.get("ppl_ratio_interval")),
        "bits per byte": row["bits_per_byte"],
        **{key: row.get(key) for key in kept},
    }


def task_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return accuracy, what changed, and whether it is significant."""
    p = row.get("p")
    star = "*" if row.get("significant") else ""
    return {
        "task": row.get("task", "mean"),
        "model": row["model"],
        "questions": row["items"],
        "of": row.get("of"),
        "accuracy": row.get("accuracy"),
        "difference": ranged(row.get("accuracy_difference")),
        "flips": row.get("flips"),
        "changed": row.get("changed"),
        "p": None if p is None else f"{p:.3g}{star}",
        "bits per byte": row.get("bits_per_byte"),
        "rise of bits": ranged(row.get("bits_per_byte_difference")),
    }


def pair_row(pair: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    """Return how two candidates differ."""
    return {
        "candidates": f"{pair['second']} - {pair['first']}",
        "protocol": text["protocol"],
        "KL": ranged(text["kl_difference"]),
        "accuracy": ranged(pair["tasks"]["accuracy_difference"]),
        "p": pair["tasks"]["p"],
    }


def ranged(interval: dict[str, Any] | None) -> str | None:
    """Return a value with its interval, starred if it is significant."""
    if interval is None:
        return None
    star = "*" if interval["significant"] else ""
    if interval["low"] is None:
        return f"{interval['value']:.4g}"
    ends = f"[{interval['low']:.4g}, {interval['high']:.4g}]"
    return f"{interval['value']:.4g} {ends}{star}"


if __name__ == "__main__":
    main()
