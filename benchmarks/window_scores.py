"""Perplexity, KL and top-1 agreement of pruned models on windows of three texts.

The measurement alone, by plain transformers: the base model runs once and leaves its
last hidden states (a few MB, where log-probabilities would be GB); the head makes the
logits of both models from them again, a few hundred positions at a time. What is
measured may be a folder, a state dict or a model; widths may differ by block, and
attention may be missing: its matrices are then zeros.

    reference = reference_of(folder, tokenizer, windows={512: 8, 2048: 2})
    score(pruned_folder, reference)["wikitext2"]["512"]["rise"]
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from reference_kl import TEXTS
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from compress.evaluation.texts import evaluation_text

Scores = dict[str, dict[str, dict[str, float]]]
Source: TypeAlias = Path | torch.nn.Module | Mapping[str, Tensor]

# Tokens of one forward pass, and positions whose logits are held at once.
_TOKENS = {"cpu": 4096, "cuda": 32768}
_POSITIONS = {"cpu": 512, "cuda": 8192}


@dataclass(frozen=True)
class Reference:
    """What pruned models are measured against.

    Attributes:
        config: Of the base model.
        head: ``[V, H]`` weight that makes the base's logits.
        ids: int64 ``[N, T]`` windows by text and length.
        hidden: The base's last hidden states ``[N, T, H]`` of each.
        perplexity: Of the base, by text and length.
        device: Where models run.
        dtype: Of their arithmetic; softmax is float32 in any case.
    """

    config: Any
    head: Tensor
    ids: dict[tuple[str, int], Tensor]
    hidden: dict[tuple[str, int], Tensor]
    perplexity: dict[tuple[str, int], float]
    device: str
    dtype: torch.dtype


def reference_of(
    base: Path,
    tokenizer: Any,
    *,
    windows: Mapping[int, int],
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Reference:
    """Run the base model over the windows.

    Args:
        base: Folder of the dense model.
        tokenizer: Its tokenizer.
        windows: How many windows of each length; evenly spread over each text, without
            overlap, fewer where a text is short.
        device: Where models run.
        dtype: Of their arithmetic.
    """
    model = open_model(base, None).to(device, dtype)
    head = model.get_output_embeddings().weight
    ids, hidden, perplexity = {}, {}, {}
    for text in TEXTS:
        row = tokenizer(evaluation_text(text).joined, verbose=False)["input_ids"]
        for length, count in windows.items():
            cut = spread_windows(torch.tensor(row), length, count).to(device)
            states = _hidden_states(model, cut)
            nll = [
                _compare(p, p, head, head, w)[0]
                for p, w in zip(states, cut, strict=True)
            ]
            key = text, length
            ids[key], hidden[key] = cut, states
            perplexity[key] = math.exp(float(torch.stack(nll).mean()))
    return Reference(model.config, head, ids, hidden, perplexity, device, dtype)


def spread_windows(ids: Tensor, length: int, count: int) -> Tensor:
    """Return ``[N, length]``: at most ``count`` windows, evenly spread over ``[n]``."""
    available = len(ids) // length
    count = min(count, available)
    whole = ids[: available * length].view(available, length)
    return whole[[part * available // count for part in range(count)]]


def score(source: Source, reference: Reference) -> Scores:
    """Return the figures of a model by text and length of windows.

    Args:
        source: A folder of any Hugging Face checkpoint of the base's family (also one
            whose widths differ by block), its tensors by name, or the model itself.
        reference: Made by :func:`reference_of`.

    Returns:
        ``{text: {length: {perplexity, rise, kl, kl_se, top1}}}``: ``rise`` is the ratio
        of perplexities less 1; ``kl`` is nats a token, its error that over windows.
    """
    model = open_model(source, reference.config)
    model = model.to(reference.device, reference.dtype)
    head = model.get_output_embeddings().weight
    found: Scores = {text: {} for text in TEXTS}
    for (text, length), ids in reference.ids.items():
        base, mine = reference.hidden[text, length], _hidden_states(model, ids)
        rows = [
            torch.stack(_compare(p, q, reference.head, head, window))
            for p, q, window in zip(base, mine, ids, strict=True)
        ]
        nll, kl, top1 = torch.stack(rows).double().cpu().T
        perplexity = math.exp(float(nll.mean()))
        error = float(kl.std() / len(kl) ** 0.5) if len(kl) > 1 else None
        found[text][str(length)] = {
            "perplexity": perplexity,
            "rise": perplexity / reference.perplexity[text, length] - 1,
            "kl": float(kl.mean()),
            "kl_se": error,
            "top1": float(top1.mean()),
        }
    return found


def open_model(source: Source, base: Any) -> Any:
    """Return a float32 model in memory; linears take the shapes of their tensors.

    Args:
        source: Folder, tensors by name, or a model.
        base: Config for tensors without one of their own.
    """
    if isinstance(source, torch.nn.Module):
        return source.eval()
    if isinstance(source, Path):
        files = sorted(source.glob("*.safetensors"))
        state = {k: v for file in files for k, v in load_file(file).items()}
        config = _config_of(source)
    else:
        state, config = dict(source), copy.deepcopy(base)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, module in list(model.named_modules()):
        weight = state.get(f"{name}.weight")
        if isinstance(module, torch.nn.Linear) and weight is not None:
            bias = f"{name}.bias" in state
            if module.weight.shape != weight.shape or (module.bias is not None) != bias:
                rows, columns = weight.shape
                model.set_submodule(name, torch.nn.Linear(columns, rows, bias))
    flags = getattr(config, "attention_per_layer", None) or []
    silent = tuple(f"model.layers.{i}." for i, flag in enumerate(flags) if not flag)
    for name, parameter in model.named_parameters():
        if name.startswith(silent) and name not in state:
            state[name] = torch.zeros_like(parameter)
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = ["lm_head.weight"] if config.tie_word_embeddings else []
    if unexpected or set(missing) - set(tied):
        raise SystemExit(f"{source}: tensors missing {missing}, unknown {unexpected}")
    model.tie_weights()
    return model.eval()


def _config_of(folder: Path) -> Any:
    """Return the family's own config, also of a folder that brings modelling code."""
    settings = json.loads((folder / "config.json").read_text())
    settings.pop("auto_map", None)
    family = settings.pop("model_type").removeprefix("compress_")
    return AutoConfig.for_model(family, **settings)


@torch.inference_mode()
def _hidden_states(model: Any, ids: Tensor) -> Tensor:
    """Return the states ``[N, T, H]`` that the head turns into logits."""
    at_once = max(1, _TOKENS[ids.device.type] // ids.shape[1])
    parts = [
        model.base_model(rows, use_cache=False).last_hidden_state
        for rows in ids.split(at_once)
    ]
    return torch.cat(parts)


@torch.inference_mode()
def _compare(
    p_states: Tensor, q_states: Tensor, p_head: Tensor, q_head: Tensor, ids: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean negative log-likelihood, KL and top-1 agreement of one window.

    Args:
        p_states: The base's states ``[T, H]``.
        q_states: The candidate's.
        p_head: The base's head ``[V, H]``.
        q_head: The candidate's.
        ids: int64 ``[T]``; the last position predicts nothing.
    """
    sums = []
    for start, stop in _chunks(len(ids) - 1, _POSITIONS[ids.device.type]):
        a = (p_states[start:stop] @ p_head.T).float()
        b = (q_states[start:stop] @ q_head.T).float()
        true = ids[start + 1 : stop + 1, None]
        total_a, total_b = a.logsumexp(-1), b.logsumexp(-1)
        nll = total_b - b.gather(1, true)[:, 0]
        same = a.argmax(-1) == b.argmax(-1)
        p = (a - total_a[:, None]).exp_()
        kl = p.mul_(a.sub_(b)).sum(-1) - total_a + total_b
        sums.append(torch.stack([nll.sum(), kl.clamp(min=0).sum(), same.sum()]))
    nll, kl, top1 = torch.stack(sums).double().sum(0) / (len(ids) - 1)
    return nll, kl, top1


def _chunks(count: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, count, size):
        yield start, min(start + size, count)
