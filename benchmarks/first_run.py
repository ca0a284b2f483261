"""What a new user types, one command after the other, and how long each takes.

    python benchmarks/offgrid.py OFFGRID
    python benchmarks/first_run.py OFFGRID/permuted --install [--work DIR]

With ``--install`` the first step is ``make demo`` in a fresh clone: the environment,
and the quickstart. Then a config is written for llama.cpp, planned, and run with
rounding to nearest on one short window of each text; both kinds of files are loaded
and write 16 tokens.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from results import write_result

QUICK = ("quantize.method=rtn", "evaluate.windows=1", "evaluate.sequence_length=512")
PROMPT = "Rivers are fresh and the sea is salt, because"
LLAMA = (
    "import sys; from llama_cpp import Llama; "
    "print(Llama(sys.argv[1], n_ctx=256, verbose=False)"
    "(sys.argv[2], max_tokens=16, temperature=0)['choices'][0]['text'])"
)
TRANSFORMERS = (
    "import sys; from transformers import pipeline; "
    "print(pipeline('text-generation', model=sys.argv[1])"
    "(sys.argv[2], max_new_tokens=16, do_sample=False)[0]['generated_text'])"
)


def main() -> None:
    """Take each step, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/first_run"))
    parser.add_argument("--install", action="store_true")
    arguments = parser.parse_args()
    model, work = arguments.model.resolve(), arguments.work
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    (work / "my_model").symlink_to(model)
    load = os.getloadavg()[0]
    rows = []

    def step(name: str, *command: str, program: str = sys.executable) -> None:
        started = time.perf_counter()
        done = subprocess.run(
            [program, *command], cwd=work, capture_output=True, text=True
        )
        seconds = time.perf_counter() - started
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stderr}")
        rows.append({"step": name, "seconds": round(seconds, 1)})
        print(rows[-1], flush=True)

    def compress(*words: str) -> None:
        step(" ".join(["compress", *words]), "-m", "compress", *words)

    if arguments.install:
        root = Path(__file__).resolve().parents[1]
        subprocess.run(
            ["git", "clone", "-q", str(root), str(work / "clone")], check=True
        )
        step("make demo, in a fresh clone", "-C", "clone", "demo", program="make")
    compress("init", "first.yaml", "--model", "my_model", "--target", "llamacpp")
    compress("run", "first.yaml", "--dry-run")
    compress("run", "first.yaml", *(w for key in QUICK for w in ("--set", key)))
    (gguf,) = (work / "runs/my_model/export/gguf").glob("*.gguf")
    file = str(gguf.relative_to(work))
    step("llama.cpp loads the file and writes 16 tokens", "-c", LLAMA, file, PROMPT)
    compress("export", "runs/my_model", "--to", "safetensors", "--set", "dense=true")
    folder = "runs/my_model/export/safetensors"
    step("transformers loads the folder, 16 tokens", "-c", TRANSFORMERS, folder, PROMPT)
    compress("inspect", file)
    compress("doctor", folder)
    path = write_result(
        "first_run",
        claim="The steps of a first run (docs/first_run.md), seconds by the clock.",
        command="python benchmarks/first_run.py OFFGRID/permuted"
        + (" --install" if arguments.install else ""),
        figures={"Steps": rows, "load of the machine before": round(load, 1)},
    )
    print(path)


if __name__ == "__main__":
    main()
