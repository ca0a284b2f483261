"""What it costs to measure the layers of a block at once: KL by ``quantize.order``.

    python benchmarks/order.py --model FOLDER [--samples 32]

GPTQ to INT4 in groups of 64 on windows of 512 tokens of the bundled mix, once with each
order; KL to the original on three texts, eight windows of 512 tokens of each. The
models of ``offgrid.py`` will do.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from results import write_result

import compress

TEXTS = ["wikitext2", "speeches", "code"]


def row(model: Path, workdir: Path, order: str, samples: int) -> dict[str, Any]:
    """Run one order; return KL by text, and seconds."""
    shutil.rmtree(workdir, ignore_errors=True)
    config = {
        "model": {"path": str(model)},
        "calibration": {"data": "mix", "samples": samples, "sequence_length": 512},
        "quantize": {"method": "gptq", "scheme": "int4-g64", "order": order},
        "evaluate": {"perplexity": TEXTS, "windows": 8, "sequence_length": 512},
        "export": [{"format": "safetensors"}],
        "run": {"workdir": str(workdir), "verify": False},
    }
    report = compress.run(config).report
    texts = report["metrics"]["compressed"]["texts"]
    kl = {f"KL {name}": round(texts[name]["kl"], 4) for name in texts}
    return {"order": order, **kl, "quantize s": round(report["seconds"]["quantize"], 1)}


def main() -> None:
    """Run both orders, write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks"))
    arguments = parser.parse_args()
    rows = [
        row(arguments.model, arguments.work / "order" / order, order, arguments.samples)
        for order in ("layer", "block")
    ]
    path = write_result(
        "order",
        claim="Measuring the layers of a block at once, so that processes can share "
        "them, against one after the other: KL of INT4 to the original.",
        command=f"python benchmarks/order.py --model {arguments.model.name} "
        f"--samples {arguments.samples}",
        figures={"model": arguments.model.name, "Orders": rows},
    )
    print(path)


if __name__ == "__main__":
    main()
