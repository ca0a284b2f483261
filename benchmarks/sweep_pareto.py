"""A sweep over one model: pruning ratios, schemes and budgets, and its front.

    python benchmarks/offgrid.py OFFGRID
    python benchmarks/sweep_pareto.py OFFGRID/permuted [--work DIR] [--speed 64]

Runs ``compress.sweep`` with rounding to nearest, so that a point takes seconds: bytes
of the exported GGUF file, KL on WikiText-2 and bits per byte in torch. ``--speed`` adds
tokens a second of the file in llama.cpp, for a machine with nothing else to do. Writes
``docs/sweep_permuted.svg`` as well.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

from results import PACKAGES, write_result

import compress

FIGURE = Path(__file__).parent.parent / "docs" / "sweep_permuted.svg"
TYPES = ["q4_0", "iq4_nl", "q5_0", "q5_1", "q8_0"]


def sweep_of(model: str, workdir: Path, *, speed: int) -> dict[str, Any]:
    """Return the config of the sweep."""
    base = {
        "model": {"path": model},
        "calibration": {"data": "mix", "samples": 16, "sequence_length": 512},
        "prune": {"method": "cfsp", "shape": "uniform", "round_to": 64},
        "quantize": {"method": "rtn"},
        "allocate": {"method": "ilp", "schemes": TYPES, "samples": 4, "windows": 2},
        "evaluate": {"perplexity": ["wikitext2"], "windows": 2, "sequence_length": 512},
        "export": [{"format": "gguf"}],
        "run": {"verify": False},
    }
    return {
        "base": base,
        "sparsities": [0, 0.1],
        "budgets": ["82MB", "90MB", "110MB"],
        "schemes": ["q4_0", "q5_0", "q8_0"],
        "export": True,
        "speed": speed,
        "fits": ["85MB", "100MB", "150MB"],
        "workdir": str(workdir),
    }


def main() -> None:
    """Run the sweep and write the result and the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--speed", type=int, default=0, help="tokens to time")
    given = parser.parse_args()
    started = time.perf_counter()
    config = sweep_of(given.model, given.work / "sweep_pareto", speed=given.speed)
    found = compress.sweep(config)
    seconds = time.perf_counter() - started
    print(found.text())
    points = found.data["points"]
    original = points[0]["original"]
    rows = [
        {
            "point": point["name"],
            "front": "*" if point["on_front"] else "",
            "bytes": point["bytes"],
            "KL": point["kl"],
            "KL error": point["kl_se"],
            "perplexity ratio": point["ppl_ratio"],
            "bits per byte": point["bits_per_byte"],
            "tokens/s": point.get("tokens_per_second"),
            "of the original's": point.get("times_original"),
            "seconds": point["seconds"],
        }
        for point in points
    ]
    if not given.speed:
        timed = ("tokens/s", "of the original's")
        rows = [{k: v for k, v in row.items() if k not in timed} for row in rows]
    write_result(
        "sweep_pareto",
        claim="Rounding to nearest over pruning ratios, schemes and budgets: bytes of "
        "the GGUF file and KL to bf16 on two windows of 512 tokens of WikiText-2, "
        "between which and other text much may change; a star: no other point has no "
        "more bytes and less KL.",
        figures={
            "model": Path(given.model).name,
            "bytes of the original": original["bytes"],
            "bits per byte of the original": original["bits_per_byte"],
            "points": len(points),
            "seconds of this call": seconds,
            "Points": rows,
        },
        versions=(*PACKAGES, "llama-cpp-python"),
    )
    shutil.copyfile(found.workdir / "pareto.svg", FIGURE)


if __name__ == "__main__":
    main()
