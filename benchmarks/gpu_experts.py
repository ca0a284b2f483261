"""Time and memory of GPTQ on the experts of one block, one by one and side by side.

    python benchmarks/gpu_experts.py [--work runs/benchmarks] [--tiny]

Random checkpoints of one block of the shapes of Qwen3-30B-A3B (128 small experts) and
Mixtral-8x7B (8 large ones) are quantized to INT4 in groups of 128 on 128 x 2048 tokens,
read from disk and exported, each run a process of its own. "One by one" is the same
code with room for one expert. That both write the same files is checked.

The factorizations alone are timed beside it: the Hessians of all experts in one batched
Cholesky and triangular inverse, against one after the other. ``--tiny`` is
a small shape on whatever device is there, to try the script.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_quantize import run_apart, run_here
from memory import write_random
from results import write_result
from transformers import MixtralConfig, PretrainedConfig, Qwen3MoeConfig

from compress import parts
from compress.calibration import walk
from compress.core import feedback

SAMPLES, LENGTH, GROUP = 128, 2048, 128
HEADS = {"num_attention_heads": 32, "vocab_size": 32000, "num_hidden_layers": 1}
SHAPES: dict[str, tuple[PretrainedConfig, int]] = {
    "Qwen3-30B-A3B": (
        Qwen3MoeConfig(
            hidden_size=2048,
            intermediate_size=6144,
            moe_intermediate_size=768,
            num_experts=128,
            num_experts_per_tok=8,
            num_key_value_heads=4,
            head_dim=128,
            **HEADS,
        ),
        48,
    ),
    "Mixtral-8x7B": (
        MixtralConfig(
            hidden_size=4096,
            intermediate_size=14336,
            num_local_experts=8,
            num_experts_per_tok=2,
            num_key_value_heads=8,
            **HEADS,
        ),
        32,
    ),
}
TINY = {
    "tiny": (
        Qwen3MoeConfig(
            hidden_size=128,
            intermediate_size=256,
            moe_intermediate_size=128,
            num_experts=8,
            num_experts_per_tok=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            vocab_size=8000,
            num_hidden_layers=1,
        ),
        1,
    )
}


def shapes_of(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a published checkpoint with one block, and their shapes."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    width = getattr(config, "head_dim", None) or hidden // heads
    block = "model.layers.0"
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "lm_head.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
        f"{block}.input_layernorm.weight": (hidden,),
        f"{block}.post_attention_layernorm.weight": (hidden,),
        f"{block}.self_attn.q_proj.weight": (heads * width, hidden),
        f"{block}.self_attn.o_proj.weight": (hidden, heads * width),
    }
    for name in "kv":
        rows = config.num_key_value_heads * width
        found[f"{block}.self_attn.{name}_proj.weight"] = (rows, hidden)
    if config.model_type == "mixtral":
        count, inner = config.num_local_experts, config.intermediate_size
        mlp, gate, up, down = f"{block}.block_sparse_moe", "w1", "w3", "w2"
    else:
        count, inner = config.num_experts, config.moe_intermediate_size
        mlp, gate, up, down = f"{block}.mlp", "gate_proj", "up_proj", "down_proj"
        found |= {f"{block}.self_attn.{n}_norm.weight": (width,) for n in "qk"}
    found[f"{mlp}.gate.weight"] = (count, hidden)
    for number in range(count):
        expert = f"{mlp}.experts.{number}"
        found |= {f"{expert}.{name}.weight": (inner, hidden) for name in (gate, up)}
        found[f"{expert}.{down}.weight"] = (hidden, inner)
    return found


def measure(model: Path, work: Path, *, alone: bool, tiny: bool) -> dict[str, Any]:
    """Return what one run took, and a digest of what it wrote."""
    _, taken = run_apart(
        __file__,
        model,
        work,
        quantize={"method": "gptq", "scheme": f"int4-g{GROUP}"},
        kind="safetensors",
        windows=(16, 64) if tiny else (SAMPLES, LENGTH),
        flags=("--alone",) if alone else (),
    )
    files = sorted((work / "run" / "export").rglob("*.safetensors"))
    assert files, "the run wrote no file"
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return {**taken, "sha256": digest.hexdigest()}


def seconds_of(work: Callable[[], Any], device: str) -> float:
    """Return the least of three times."""
    taken = []
    for _ in range(3):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return min(taken)


def factors(columns: int, count: int, device: str) -> dict[str, Any]:
    """Return the seconds of all factors of as many Hessians, both ways."""
    generator = torch.Generator(device).manual_seed(0)
    inputs = torch.randn(
        count, 2 * columns, columns, generator=generator, device=device
    )
    hessians = inputs.mT @ inputs
    del inputs
    order = torch.arange(columns, device=device)
    one = torch.eye(columns, device=device).expand_as(hessians)

    def together() -> torch.Tensor:
        lower, _ = torch.linalg.cholesky_ex(hessians)
        return torch.linalg.solve_triangular(lower, one, upper=False)

    def in_turn() -> list[torch.Tensor | None]:
        return [
            feedback._factors(hessian[None], order[None])[0] for hessian in hessians
        ]

    batched, single = seconds_of(together, device), seconds_of(in_turn, device)
    return {
        "columns": columns,
        "matrices": count,
        "one by one s": round(single, 4),
        "batched s": round(batched, 4),
        "batched over one by one": round(batched / single, 2),
    }


def main() -> None:
    """Run both shapes both ways, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--config", help=argparse.SUPPRESS)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.config:
        if arguments.alone:
            walk._EXPERT_BYTES, walk._EXPERT_BYTES_ELSEWHERE = {}, 0
            parts._WEIGHTS_AT_ONCE = 0
        run_here(json.loads(arguments.config))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    work, rows = arguments.work / "gpu_experts", []
    for name, (config, blocks) in (TINY if arguments.tiny else SHAPES).items():
        shutil.rmtree(work, ignore_errors=True)
        kind = "Qwen3Moe" if config.model_type == "qwen3_moe" else "Mixtral"
        config.architectures = [f"{kind}ForCausalLM"]
        write_random(work / "model", config, shapes_of(config), device=device)
        pair = [
            measure(work / "model", work, alone=alone, tiny=arguments.tiny)
            for alone in (True, False)
        ]
        same = pair[0].pop("sha256") == pair[1].pop("sha256")
        for label, figures in zip(("one by one", "side by side"), pair, strict=True):
            rows.append(
                {
                    "shape": f"{name}, 1 of {blocks} blocks",
                    "experts": label,
                    **figures,
                    "same files": same,
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    sizes = [(128, 8)] if arguments.tiny else [(768, 128), (2048, 64), (4096, 8)]
    solving = [factors(columns, count, device) for columns, count in sizes]
    path = write_result(
        "gpu_experts_tiny" if arguments.tiny else "gpu_experts",
        claim="Small experts are quantized side by side in a fraction of the time that "
        "they take one by one, to the same files; their Cholesky factors are not what "
        "takes it.",
        figures={
            "GPU": torch.cuda.get_device_name() if device == "cuda" else "CPU",
            "Runs": rows,
            "Factors": solving,
        },
    )
    print(path)


if __name__ == "__main__":
    main()
