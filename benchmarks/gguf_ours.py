"""GGUF files of ours, each no larger than one of llama.cpp's quantizer.

    python benchmarks/gguf_ours.py WORK OURS [--models DIR] [--only MODEL]
                                   [--types Q4_K_M] [--device cuda] [--more JSON]

``WORK/MODEL/TYPE.gguf`` are the files of ``gguf_rival.py``; for each one
``OURS/MODEL/TYPE.gguf`` is a ``compress.run`` with its size as the budget: GPTQ on 64
x 512 tokens of the bundled mix, and the default allocator. Files that are there
are not made again. ``--more`` has further sections of the config, such as
``{"transforms": ["scale_folding"]}``. Levels are kept in the cache
(``COMPRESS_CACHE``), so that the first file of a model takes the longest.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

from gguf_rival import LENGTH, MODELS, SEED, TYPES

import compress

SAMPLES = 64
# Rows of ``rotated`` are multiples of 256. Most of those of ``permuted`` are not; its
# K types are for ``down_proj``.
_K = ["q3_k", "iq4_xs", "q4_k", "q5_k", "q6_k", "q8_0"]
SCHEMES = {
    "permuted": [*_K, "iq4_nl", "q4_0", "q4_1", "q5_0", "q5_1"],
    "rotated": ["q2_k", *_K],
}


def config_of(
    model: Path, size: int, workdir: Path, device: str, more: str = "{}"
) -> dict[str, Any]:
    """Return the config of one file."""
    return {
        "model": {"path": str(model)},
        "calibration": {
            "data": "mix",
            "samples": SAMPLES,
            "sequence_length": LENGTH,
            "seed": SEED,
        },
        "quantize": {"method": "gptq"},
        "budget": {"bytes": size},
        "allocate": {"method": "ilp", "schemes": SCHEMES[model.name]},
        "export": [{"format": "gguf"}],
        "run": {
            "workdir": str(workdir),
            "device": device,
            "seed": SEED,
            "verify": False,
        },
        **json.loads(more),
    }


def make(model: Path, size: int, target: Path, device: str, more: str) -> None:
    """Write one file, and its report beside it."""
    workdir = target.with_suffix(".run")
    shutil.rmtree(workdir, ignore_errors=True)
    start = time.perf_counter()
    report = compress.run(config_of(model, size, workdir, device, more)).report
    seconds = time.perf_counter() - start
    (made,) = (workdir / "export" / "gguf").glob("*.gguf")
    assert made.stat().st_size <= size
    (workdir / "report.json").rename(target.with_suffix(".report.json"))
    made.rename(target)
    shutil.rmtree(workdir)
    searched = report["allocation"]
    shown = {key: round(searched[key], 4) for key in ("predicted_kl", "measured_kl")}
    print(target, f"{target.stat().st_size:,} of {size:,}", json.dumps(shown))
    print(f"{seconds:.0f} s", json.dumps(searched["seconds"]), flush=True)


def main() -> None:
    """Make all files that are not there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path, help="MODEL/TYPE.gguf of gguf_rival.py")
    parser.add_argument("ours", type=Path)
    parser.add_argument(
        "--models", type=Path, default=Path("runs/benchmarks/offgrid"), help="DIR/MODEL"
    )
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--only", choices=MODELS, help="one of the models")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--more", default="{}", help="sections of the config, JSON")
    arguments = parser.parse_args()
    for name in [arguments.only] if arguments.only else MODELS:
        for kind in arguments.types:
            target = arguments.ours / name / f"{kind}.gguf"
            target.parent.mkdir(parents=True, exist_ok=True)
            size = (arguments.work / name / f"{kind}.gguf").stat().st_size
            if not target.is_file():
                model = arguments.models / name
                make(model, size, target, arguments.device, arguments.more)


if __name__ == "__main__":
    main()
