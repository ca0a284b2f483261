"""Quantize a model with llm-compressor's GPTQModifier, in an environment of its own.

    python llmcompressor_gptq.py MODEL TOKENS.npy OUT [--group-size 64]

INT4 symmetric, every linear layer of the decoder, GPTQModifier otherwise at its
defaults (static act-order, dampening 0.01, block 128). TOKENS holds int64 ``[N, T]``.
OUT receives an ordinary float32 checkpoint of the dequantized weights, so that the
measurement adds no rounding of its own, and ``peer.json``: seconds of the call to
``oneshot`` and the peak resident memory of this process.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer


def quantize_(model: Any, tokens: numpy.ndarray, group_size: int) -> float:
    """Run GPTQ on ``model`` in place and return the seconds that it took."""
    weights = QuantizationArgs(
        num_bits=4, type="int", symmetric=True, strategy="group", group_size=group_size
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    recipe = GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])
    rows = Dataset.from_dict(
        {
            "input_ids": tokens.tolist(),
            "attention_mask": numpy.ones_like(tokens).tolist(),
        }
    )
    start = time.perf_counter()
    oneshot(
        model=model,
        dataset=rows,
        recipe=recipe,
        num_calibration_samples=len(tokens),
        max_seq_length=tokens.shape[1],
        shuffle_calibration_samples=False,
    )
    return time.perf_counter() - start


def dequantized_state(model: Any) -> dict[str, torch.Tensor]:
    """Return float32 weights under the names of the dense model."""
    state = {}
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None:
            continue
        weight = fake_quantize(
            x=module.weight,
            scale=module.weight_scale,
            zero_point=getattr(module, "weight_zero_point", None),
            args=scheme.weights,
        )
        state[f"{name}.weight"] = weight.detach().float()
    return state


def main() -> None:
    """Quantize, put the result into a fresh dense model and save that."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--group-size", type=int, default=64)
    arguments = parser.parse_args()

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(
            arguments.model, dtype=torch.float32
        )

    model = load()
    tokens = numpy.load(arguments.tokens)
    seconds = quantize_(model, tokens, arguments.group_size)
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    weights = dequantized_state(model)
    dense = load()
    missing = dense.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys, missing.unexpected_keys
    dense.save_pretrained(arguments.out)
    AutoTokenizer.from_pretrained(arguments.model).save_pretrained(arguments.out)
    figures = {
        "seconds": seconds,
        "peak_memory_bytes": peak_bytes,
        "layers": len(weights),
        "tokens": int(tokens.size),
        "versions": {
            name: version(name)
            for name in ("llmcompressor", "compressed-tensors", "torch", "transformers")
        },
    }
    (arguments.out / "peer.json").write_text(json.dumps(figures, indent=1))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
