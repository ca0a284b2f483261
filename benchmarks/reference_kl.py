"""KL of models to a base model by plain transformers, in float32: no code of ours.

    python reference_kl.py BASE FOLDER [FOLDER ...]
    python reference_kl.py --rtn 64 BASE          # round to nearest, absmax / 7.5

Each window is a forward pass of its own; every position counts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress.evaluation.texts import evaluation_text

TEXTS = ("wikitext2", "tales", "code")
WINDOWS, LENGTH = 10, 1024


def load(folder: Path) -> Any:
    """Return the model of a folder with float32 arithmetic."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def windows_of(text: str, tokenizer: Any) -> Tensor:
    """Return int64 ``[10, 1024]``: the first windows of a text, without overlap."""
    ids = tokenizer(evaluation_text(text).joined, verbose=False)["input_ids"]
    return torch.tensor(ids[: WINDOWS * LENGTH]).view(WINDOWS, LENGTH)


@torch.no_grad()
def divergence(p: Tensor, q: Tensor) -> tuple[float, float]:
    """Return mean KL in nats and top-1 agreement of ``[T, V]`` log-probabilities."""
    kl = (p.exp() * (p - q)).sum(-1).clamp(min=0)
    agreement = (p.argmax(-1) == q.argmax(-1)).double().mean()
    return float(kl.double().mean()), float(agreement)


@torch.no_grad()
def log_softmax(model: Any, window: Tensor) -> Tensor:
    """Return float32 ``[T, V]`` log-probabilities of one window."""
    logits: Tensor = model(window[None].to(model.device)).logits[0]
    return logits.float().log_softmax(-1)


@torch.no_grad()
def round_to_nearest_(model: Any, group_size: int) -> Any:
    """Round every decoder linear to 16 levels of absmax / 7.5 a group, in place."""
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            groups = module.weight.view(module.out_features, -1, group_size)
            scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 7.5
            groups.copy_((groups / scale).round().clamp(-8, 7) * scale)
    return model


def table(
    base: Any, others: Mapping[str, Any], tokenizer: Any, *, windows: int = WINDOWS
) -> dict[str, dict[str, dict[str, float]]]:
    """Return KL, its standard error over windows, and top-1 agreement.

    All models are in memory together, so that the base runs once for all of them; only
    the first ``windows`` of each text are measured.

    Returns:
        ``{model: {text: {kl, kl_se, top1}}}``.
    """
    rows: dict[str, dict[str, dict[str, float]]] = {label: {} for label in others}
    for text in TEXTS:
        figures: dict[str, list[tuple[float, float]]] = {label: [] for label in others}
        for window in tqdm(windows_of(text, tokenizer)[:windows], desc=text):
            p = log_softmax(base, window)
            for label, model in others.items():
                figures[label].append(divergence(p, log_softmax(model, window)))
        for label, values in figures.items():
            kl, top1 = torch.tensor(values, dtype=torch.float64).T
            row = {
                "kl": float(kl.mean()),
                "kl_se": float(kl.std() / len(kl) ** 0.5),
                "top1": float(top1.mean()),
            }
            rows[label][text] = row
            print(
                f"{text:10} {label:30} {row['kl']:.4f} +- {row['kl_se']:.4f} "
                f"top-1 {row['top1']:.1%}",
                flush=True,
            )
    return rows


def main() -> None:
    """Print the table, and the same as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("folders", type=Path, nargs="*")
    parser.add_argument("--rtn", type=int, metavar="GROUP_SIZE")
    arguments = parser.parse_args()

    others = {folder.name: load(folder) for folder in arguments.folders}
    if arguments.rtn:
        rounded = round_to_nearest_(load(arguments.base), arguments.rtn)
        others[f"rtn g{arguments.rtn}"] = rounded
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    print(json.dumps(table(load(arguments.base), others, tokenizer)))


if __name__ == "__main__":
    main()
