"""Prune MLP neurons with torch-pruning, in an environment of its own.

    python torchpruning_prune.py MODEL OUT --method magnitude --sparsity 0.1 0.2
                                           [--tokens FILE]

One checkpoint for each sparsity, ``OUT/METHOD-PERCENT``, and ``peer.json`` in it. It is
the recipe of ``examples/LLMs/prune_llm.py`` (local ranking, a graph from a traced
forward pass) held to the neurons of the MLPs: embeddings, heads and everything on the
residual stream are ``ignored_layers``. The recipe's own default prunes the hidden size
as well. Importances:

* ``magnitude``: ``GroupMagnitudeImportance(p=2)``, mean over gate, up and down.
* ``taylor``: ``GroupTaylorImportance``, gradients of the loss on all windows of FILE.
* ``activation``: ``ActivationImportance``. It keeps the last forward pass only, so all
  windows go in one batch.

``pip install --no-deps torch-pruning==1.6.1`` on top of an environment that has torch
and transformers.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch_pruning
from safetensors.torch import load_file
from torch import Tensor
from torch_pruning.pruner.importance import ActivationImportance
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 4


def load(model: Path, device: str = "cpu") -> Any:
    """Return a float32 model whose graph can be traced: without a cache."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loaded.config.use_cache = False
    return loaded.eval().to(device)


def gradients_of(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """Return the gradient of the mean loss over all windows, by parameter."""
    for rows in tokens.split(BATCH):
        loss = model(input_ids=rows, labels=rows).loss
        (loss * len(rows) / len(tokens)).backward()
    return {
        name: parameter.grad.cpu()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def activations_of(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """Return the package's importance of the inputs of each linear, by module."""
    importance = ActivationImportance(p=2, target_types=[torch.nn.Linear])
    with torch.no_grad(), importance.compute_importance(model):
        model(input_ids=tokens, logits_to_keep=1)
    return {
        name: module._importance.cpu()
        for name, module in model.named_modules()
        if hasattr(module, "_importance")
    }


def importance_of(model: Any, method: str, measured: dict[str, Tensor]) -> Any:
    """Return the package's importance, with what was measured put in its place."""
    if method == "magnitude":
        return torch_pruning.importance.GroupMagnitudeImportance(p=2)
    if method == "taylor":
        for name, parameter in model.named_parameters():
            parameter.grad = measured[name].clone() if name in measured else None
        return torch_pruning.importance.GroupTaylorImportance()
    for name, values in measured.items():
        model.get_submodule(name)._importance = values
    return ActivationImportance(p=2, target_types=[torch.nn.Linear])


def prune_(model: Any, sparsity: float, importance: Any) -> None:
    """Remove ``sparsity`` of the neurons of each block."""
    neurons = {
        module
        for name, module in model.named_modules()
        if name.endswith(("mlp.gate_proj", "mlp.up_proj"))
    }
    leaves = [m for m in model.modules() if not list(m.children()) and m not in neurons]
    heads = {}
    for name, module in model.named_modules():
        if name.endswith("self_attn"):
            heads[module.q_proj] = model.config.num_attention_heads
            heads[module.k_proj] = model.config.num_key_value_heads
            heads[module.v_proj] = model.config.num_key_value_heads
    pruner = torch_pruning.pruner.BasePruner(
        model,
        example_inputs=torch.arange(8)[None],
        importance=importance,
        global_pruning=False,
        output_transform=lambda outputs: outputs.logits,
        pruning_ratio=sparsity,
        ignored_layers=leaves,
        num_heads=heads,
    )
    for group in pruner.step(interactive=True):
        group.prune()
    widths = {b.mlp.gate_proj.out_features for b in model.model.layers}
    assert len(widths) == 1, f"widths differ by block: {widths}"
    model.config.intermediate_size = widths.pop()


def main() -> None:
    """Write a pruned checkpoint for each sparsity."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    methods = ("magnitude", "taylor", "activation")
    parser.add_argument("--method", choices=methods, default="magnitude")
    parser.add_argument("--sparsity", type=float, nargs="+", required=True)
    parser.add_argument("--tokens", type=Path)
    parser.add_argument("--device", default="cpu", help="of the pass over FILE")
    arguments = parser.parse_args()
    method, started = arguments.method, time.perf_counter()
    measured: dict[str, Tensor] = {}
    tokens = torch.empty(0)
    if method != "magnitude":
        if arguments.tokens is None:
            parser.error(f"{method} needs --tokens")
        measure = gradients_of if method == "taylor" else activations_of
        tokens = load_file(arguments.tokens)["tokens"].to(arguments.device)
        measured = measure(load(arguments.model, arguments.device), tokens)
    calibration = time.perf_counter() - started
    for sparsity in arguments.sparsity:
        started = time.perf_counter()
        model = load(arguments.model)
        prune_(model, sparsity, importance_of(model, method, measured))
        seconds = calibration + time.perf_counter() - started
        folder = arguments.out / f"{method}-{round(100 * sparsity)}"
        model.config.use_cache = True
        model.to(torch.bfloat16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(arguments.model).save_pretrained(folder)
        figures = {
            "tool": f"torch-pruning {version('torch-pruning')}",
            "method": method,
            "sparsity": sparsity,
            "tokens": tokens.numel(),
            "seconds": round(seconds, 2),
        }
        (folder / "peer.json").write_text(json.dumps(figures, indent=1))
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
