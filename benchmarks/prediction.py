"""What a dry run predicts, beside what the run then takes: memory and time.

Random models of three sizes and of 32,000 tokens, quantized by GPTQ to 4 bits,
evaluated, exported and verified, each in a process of its own. Nothing is fitted to
these runs: the speeds are those that the dry run measures on the spot. So what other
programs do meanwhile shows: a second dry run, after the run, says whether the machine
was then as fast as before. Take a quiet one; it is some five minutes on two cores.

    python benchmarks/prediction.py [--sizes small,medium,large] [--device cuda]

On a GPU the models are larger, calibration has 128 windows of 2048 tokens, and memory
of the GPU is compared, too (``prediction_gpu.json``).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

from pipeline_fixtures import save_checkpoint, write_config  # noqa: E402
from results import FOLDER, write_result  # noqa: E402

WORK = Path("runs/benchmarks/prediction")
# Hidden size, MLP width, blocks, heads, groups of them.
SIZES = {
    "small": (512, 1536, 6, 8, 4),
    "medium": (1024, 2816, 8, 16, 4),
    "large": (2048, 5632, 6, 32, 4),
}
GPU_SIZES = {
    "gpu-small": (1024, 2816, 8, 16, 4),
    "gpu-medium": (2048, 5632, 8, 32, 4),
    "gpu-large": (4096, 11008, 3, 64, 64),
}
TEXT = {"cpu": (16, 256), "cuda": (128, 2048)}  # calibration windows and tokens of each
_LIMIT = 0.25


def model(name: str) -> Path:
    """Make a random model, once."""
    import torch

    hidden, inner, blocks, heads, groups = (SIZES | GPU_SIZES)[name]
    folder = WORK / name
    if not (folder / "config.json").is_file():
        save_checkpoint(
            folder,
            dtype=torch.bfloat16,
            vocab_size=32000,
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=blocks,
            num_attention_heads=heads,
            num_key_value_heads=groups,
            head_dim=64,
            max_position_embeddings=2048,
            initializer_range=0.02,
        )
    return folder


def config(name: str, device: str) -> Path:
    """Write the config of a size."""
    samples, length = TEXT[device]
    settings = {
        "model": {"path": str(model(name))},
        "calibration": {"data": "mix", "samples": samples, "sequence_length": length},
        "quantize": {"method": "gptq", "scheme": "int4-g128"},
        "evaluate": {"perplexity": ["wikitext2"], "windows": 8, "sequence_length": 256},
        "export": [{"format": "safetensors"}],
        "run": {
            "workdir": str(WORK / f"{name}-run"),
            "device": device,
            "threads": 2 if device == "cpu" else 8,
        },
    }
    return write_config(WORK / f"{name}.yaml", settings)


def compress(*arguments: str) -> str:
    """Call the command with a cache of its own; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "compress", *arguments],
        env={**os.environ, "COMPRESS_CACHE": str(WORK / "cache"), "TQDM_DISABLE": "1"},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return done.stdout


def row(name: str, device: str) -> dict[str, Any]:
    """Run a size; return its row."""
    path, load = config(name, device), os.getloadavg()[0]
    compress("run", str(path), "--overwrite", "--force")
    report = json.loads((WORK / f"{name}-run" / "report.json").read_text())
    predicted = report["predicted"]
    memory = predicted["peak_memory_bytes"] / report["peak_memory_bytes"]
    taken = sum(report["seconds"].values())
    return {
        "size": name,
        "parameters": f"{report['model']['parameters'] / 1e6:.0f} M",
        "GiB predicted": round(predicted["peak_memory_bytes"] / 2**30, 2),
        "GiB measured": round(report["peak_memory_bytes"] / 2**30, 2),
        "memory ratio": round(memory, 2),
        **on_gpu(report),
        "s predicted": round(predicted["seconds"], 1),
        **afterwards(path, device),
        "s measured": round(taken, 1),
        "time ratio": round(predicted["seconds"] / taken, 2),
        "load before": round(load, 1),
        "stages": ", ".join(
            f"{stage} {seconds:.0f}" for stage, seconds in report["seconds"].items()
        ),
    }


def afterwards(path: Path, device: str) -> dict[str, float]:
    """Return what a second dry run says; on a CPU, which others may use as well."""
    if device != "cpu":
        return {}
    elsewhere = ["--set", f"run.workdir={WORK / 'none'}"]
    again = json.loads(compress("run", str(path), "--dry-run", "--json", *elsewhere))
    return {"s predicted afterwards": round(again["predicted"]["seconds"], 1)}


def on_gpu(report: dict[str, Any]) -> dict[str, float]:
    """Return the memory of the GPU, if there was one."""
    taken = report["processes"][0].get("device_peak_bytes")
    if taken is None:
        return {}
    expected = report["predicted"]["device_memory_bytes"]
    return {
        "GPU GiB predicted": round(expected / 2**30, 2),
        "GPU GiB measured": round(taken / 2**30, 2),
        "GPU memory ratio": round(expected / taken, 2),
    }


def main() -> int:
    """Run the sizes; 1 if a prediction is off by more than a quarter."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", help="all of them, if not given")
    parser.add_argument("--device", choices=list(TEXT), default="cpu")
    arguments = parser.parse_args()
    on_cpu = arguments.device == "cpu"
    sizes, where = (SIZES, "the CPU") if on_cpu else (GPU_SIZES, "a GPU")
    result = "prediction" if on_cpu else "prediction_gpu"
    WORK.mkdir(parents=True, exist_ok=True)
    file = FOLDER / f"{result}.json"
    known = json.loads(file.read_text())["figures"]["sizes"] if file.exists() else []
    rows = {entry["size"]: entry for entry in known}
    for name in arguments.sizes.split(",") if arguments.sizes else sizes:
        rows[name] = row(name, arguments.device)
        print(json.dumps(rows[name]), flush=True)
        write_result(
            result,
            claim=f"Peak memory and time that the dry run predicts for a run on {where}"
            ", beside what it took; ratios are predicted over measured, and should lie "
            "between 0.75 and 1.25.",
            figures={"sizes": [rows[size] for size in sizes if size in rows]},
            command="python benchmarks/prediction.py"
            + ("" if on_cpu else " --device cuda"),
        )
    ratios = [r[key] for r in rows.values() for key in r if key.endswith("ratio")]
    return int(any(not 1 - _LIMIT <= ratio <= 1 + _LIMIT for ratio in ratios))


if __name__ == "__main__":
    raise SystemExit(main())
