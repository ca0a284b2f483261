"""What scale folding gains or costs at 3 and 4 bits.

    python benchmarks/scale_folding.py [--device cuda] [--only REGEX]

The models are ``permuted`` and ``rotated`` of ``offgrid.py`` (SmolLM2-135M); all
linears of the decoder; calibration of the bundled mix. Each row is a ``compress.run``
without export, with and without the transform before round to nearest or GPTQ; KL to
the original is its own evaluation, on texts that calibration has not seen. Rows that
are in ``--work`` already are not made again.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import offgrid
import torch
from reference_kl import TEXTS
from results import hardware, write_result

import compress
from compress.workdir import write_atomically

SCHEMES = {
    "permuted": ("int3-g64", "int4-g64"),
    "rotated": ("int3-g64", "int4-g64", "q3_k", "q4_k"),
}
METHODS = ("rtn", "gptq")
FOLDING = {"plain": [], "folded": ["scale_folding"]}
CASES = [(m, s, q) for m, schemes in SCHEMES.items() for s in schemes for q in METHODS]


def texts_of(
    model: Path, scheme: str, method: str, transforms: list[str], options: Any
) -> dict[str, Any]:
    """Return KL and its standard error for each text, and the seconds of the run."""
    workdir = options.work / "folding"
    shutil.rmtree(workdir, ignore_errors=True)
    config: dict[str, Any] = {
        "model": {"path": str(model)},
        "calibration": {
            "data": "mix",
            "samples": options.samples,
            "sequence_length": 512,
        },
        "transforms": transforms,
        "quantize": {"method": method, "scheme": scheme},
        "evaluate": {
            "perplexity": list(TEXTS),
            "windows": options.windows,
            "sequence_length": options.length,
        },
        "run": {"workdir": str(workdir), "device": options.device},
    }
    started = time.perf_counter()
    metrics = compress.run(config).report["metrics"]["compressed"]
    seconds = time.perf_counter() - started
    shutil.rmtree(workdir)
    kls = {t: [metrics["texts"][t][key] for key in ("kl", "kl_se")] for t in TEXTS}
    cuda = options.device.startswith("cuda")
    where = torch.cuda.get_device_name() if cuda else hardware()
    return {"on": where, "seconds": round(seconds, 1), "kl": kls}


def row_of(case: tuple[str, str, str], folder: Path, options: Any) -> dict[str, Any]:
    """Return the figures of one case, folded beside plain."""
    model, scheme, method = case
    kls: dict[str, dict[str, Any]] = {}
    for label, transforms in FOLDING.items():
        name = f"{model}-{scheme}-{method}-{label}-{options.samples}-{options.windows}"
        stored = options.work / "folding-rows" / f"{name}x{options.length}.json"
        if not stored.is_file():
            found = texts_of(folder / model, scheme, method, transforms, options)
            write_atomically(stored, json.dumps(found).encode())
        kls[label] = json.loads(stored.read_text())
    row: dict[str, Any] = {"model": model, "scheme": scheme, "method": method}
    for text in TEXTS:
        (plain, error), (folded, _) = (kls[label]["kl"][text] for label in FOLDING)
        row[f"KL {text}"], row[f"± {text}"] = plain, error
        row[f"folded {text}"] = folded
        row[f"folded / plain {text}"] = folded / plain
    row |= {f"{label} s": kls[label]["seconds"] for label in FOLDING}
    return row | {"on": kls["folded"]["on"]}


def main() -> None:
    """Make and measure every row, and write the result after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, help="folder with both, else made")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--only", default="", help="cases that match")
    parser.add_argument("--name", default="scale_folding", help="of the result")
    options = parser.parse_args()
    folder = options.models or options.work / "offgrid"
    if not folder.exists():
        offgrid.main(folder)
    rows = []
    for case in CASES:
        if not re.search(options.only, " ".join(case)):
            continue
        rows.append(row_of(case, folder, options))
        print(rows[-1], flush=True)
        write_result(
            options.name,
            claim=f"SmolLM2-135M, {options.samples} x 512 tokens of the bundled mix, "
            f"KL to bf16 over {options.windows} windows of {options.length} tokens of "
            "each text: what scale folding before quantizing changes.",
            figures={"KL in nats": rows},
        )


if __name__ == "__main__":
    main()
