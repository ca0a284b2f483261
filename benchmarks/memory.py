"""Peak memory of quantizing checkpoints that are larger than the memory used.

    python benchmarks/memory.py [--work runs/benchmarks] [--case rtn-7b|gptq-1.1b]

Random Llama checkpoints are written in shards: one of 7B shape (bf16, 13 GB, needs
20 GB of disk in all), quantized by round to nearest, and one of 1.1B shape, quantized
by GPTQ on 16 x 256 tokens. Each run is a process of its own; the figure is the largest
resident size that the operating system saw, Python and its libraries included.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from results import hardware, write_result
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from compress.core.artifact import TensorInfo
from compress.data import MIX, read_text
from compress.export.sharding import Entry, plan_shards, write_shards

LIMIT_BYTES = 3 << 30
SEED = 0


@dataclass(frozen=True)
class Case:
    """A checkpoint and how it is quantized."""

    label: str
    shape: dict[str, int]
    quantize: dict[str, Any]
    calibration: dict[str, Any]


CASES = {
    "rtn-7b": Case(
        "7B shape, rtn int4-g128",
        {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
        },
        {"method": "rtn", "scheme": "int4-g128"},
        {},
    ),
    "gptq-1.1b": Case(
        "1.1B shape, gptq int4-g128, 16 x 256 tokens",
        {
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 22,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
        },
        {"method": "gptq", "scheme": "int4-g128"},
        {"samples": 16, "sequence_length": 256},
    ),
}


def write_checkpoint(
    folder: Path, shape: dict[str, int], *, device: str = "cpu"
) -> int:
    """Write a random bf16 Llama in shards of 5 GB; return its number of parameters."""
    config = LlamaConfig(vocab_size=32000, tie_word_embeddings=False, **shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = ["LlamaForCausalLM"]
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return write_random(folder, config, shapes, device=device)


def write_random(
    folder: Path,
    config: PretrainedConfig,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    device: str = "cpu",
) -> int:
    """Write a random bf16 checkpoint with a tokenizer; return how many parameters."""
    config.dtype = torch.bfloat16
    folder.mkdir(parents=True)
    entries = [
        Entry(name, TensorInfo(shape, "bfloat16")) for name, shape in shapes.items()
    ]
    generator = torch.Generator(device).manual_seed(SEED)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for entry in entries:
            if len(entry.info.shape) == 1:
                yield entry.name, torch.ones(entry.info.shape, dtype=torch.bfloat16)
                continue
            values = torch.randn(entry.info.shape, generator=generator, device=device)
            yield entry.name, values.mul_(0.02).bfloat16().cpu()

    write_shards(folder, plan_shards(entries, 5_000_000_000), tensors())
    config.save_pretrained(folder)
    bpe = ByteLevelBPETokenizer()
    texts = [read_text(f"mix_{part}") for part in MIX]
    bpe.train_from_iterator(texts, vocab_size=8000, show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer).save_pretrained(folder)
    return sum(entry.info.elements for entry in entries)


def measure(case: Case, work: Path) -> dict[str, Any]:
    """Quantize one checkpoint in a process of its own."""
    folder, workdir = work / "model", work / "run"
    shutil.rmtree(work, ignore_errors=True)
    parameters = write_checkpoint(folder, case.shape)
    config = {
        "model": {"path": str(folder)},
        "quantize": case.quantize,
        "export": [{"format": "safetensors"}],
        "run": {"workdir": str(workdir), "verify": False},
    }
    if case.calibration:
        config["calibration"] = case.calibration
    code = "import compress, json, sys; compress.run(json.loads(sys.argv[1]))"
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", code, json.dumps(config)])
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{case.label}: the run failed with status {status}")
    report = json.loads((workdir / "report.json").read_text())
    figures = {
        "case": case.label,
        "parameters": parameters,
        "checkpoint bytes": sum(f.stat().st_size for f in folder.glob("*.safetensors")),
        "export bytes": report["size_bytes"]["safetensors"],
        "peak resident bytes": usage.ru_maxrss * 1024,
        "limit bytes": LIMIT_BYTES,
        "predicted bytes": report["predicted"]["peak_memory_bytes"],
        "seconds": round(seconds, 1),
        "predicted seconds": round(report["predicted"]["seconds"], 1),
        "threads": torch.get_num_threads(),
        "hardware": hardware(),
        "date": report["date"][:10],
    }
    shutil.rmtree(work)
    return figures


def main() -> None:
    """Measure the cases, keeping earlier figures of those that are left out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--case", choices=CASES)
    arguments = parser.parse_args()
    result = Path(__file__).parent / "results" / "memory.json"
    rows: dict[str, dict[str, Any]] = {}
    if result.is_file():
        rows = {r["case"]: r for r in json.loads(result.read_text())["figures"]["runs"]}
    for name in [arguments.case] if arguments.case else CASES:
        case = CASES[name]
        rows[case.label] = measure(case, arguments.work / f"memory-{name}")
    path = write_result(
        "memory",
        claim="Peak resident memory stays below 3 GiB while checkpoints of 2 to 13 GB "
        "are quantized.",
        figures={"runs": list(rows.values())},
        seed=SEED,
        command="python benchmarks/memory.py",
    )
    print(path)


if __name__ == "__main__":
    main()
