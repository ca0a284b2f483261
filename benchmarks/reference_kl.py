"""KL of models to a base model by plain transformers, in float32: no code of ours.

    python reference_kl.py BASE FOLDER [FOLDER ...]
    python reference_kl.py --rtn 64 BASE          # round to nearest, absmax / 7.5

Each window is a forward pass of its own; every position counts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress.evaluation.texts import evaluation_text

TEXTS = ("wikitext2", "tales", "speeches", "code")
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
def divergence(base: Any, other: Any, windows: Tensor) -> dict[str, float]:
    """Return mean KL in nats, its standard error over windows, and top-1 agreement."""
    means, agreements = [], []
    for window in windows:
        p = base(window[None]).logits[0].float().log_softmax(-1)
        q = other(window[None]).logits[0].float().log_softmax(-1)
        means.append((p.exp() * (p - q)).sum(-1).clamp(min=0).double().mean())
        agreements.append((p.argmax(-1) == q.argmax(-1)).double().mean())
    kl = torch.stack(means)
    return {
        "kl": float(kl.mean()),
        "kl_se": float(kl.std() / len(kl) ** 0.5),
        "top1": float(torch.stack(agreements).mean()),
    }


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
    base: Any, others: Iterable[tuple[str, Any]], tokenizer: Any
) -> dict[str, dict[str, dict[str, float]]]:
    """Return the divergence of each model on each text; models come one at a time."""
    texts = {text: windows_of(text, tokenizer) for text in TEXTS}
    rows = {}
    for label, model in others:
        rows[label] = {
            text: divergence(base, model, windows) for text, windows in texts.items()
        }
        figures = "  ".join(
            f"{text} {row['kl']:.4f} ({row['top1']:.1%})"
            for text, row in rows[label].items()
        )
        print(f"{label:24} {figures}", flush=True)
    return rows


def main() -> None:
    """Print the table, and the same as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("folders", type=Path, nargs="*")
    parser.add_argument("--rtn", type=int, metavar="GROUP_SIZE")
    arguments = parser.parse_args()

    def others() -> Iterable[tuple[str, Any]]:
        if arguments.rtn:
            model = round_to_nearest_(load(arguments.base), arguments.rtn)
            yield f"rtn g{arguments.rtn}", model
        for folder in arguments.folders:
            yield folder.name, load(folder)

    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    print(json.dumps(table(load(arguments.base), others(), tokenizer)))


if __name__ == "__main__":
    main()
