"""AQLM checkpoints whose list of dense layers is read by some loaders only.

``linear_weights_not_to_quantize`` names layers that have no codes. transformers 4
matches names of parameters (``lm_head.weight``), transformers 5 names of modules
(``lm_head``). With one form only, the other loader puts an empty coded layer in the
place of a dense one: not-a-number logits, or an AttributeError where embedding and head
are tied. With both forms all load.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compress.core.aqlm_format import QUANT_METHOD
from compress.doctor.faults import Fault
from compress.model.quantized_config import folder_config
from compress.model.sources import read_header, weight_files
from compress.workdir import write_atomically

KIND = "skip-list"
_KEY, _FILE = "linear_weights_not_to_quantize", "config.json"
_WEIGHT, _HEAD = ".weight", "lm_head"


def find(folder: Path) -> list[Fault]:
    """Return the fault if names are missing from the list."""
    missing = _missing(folder)
    if not missing:
        return []
    names = ", ".join(missing[:4]) + (", ..." if len(missing) > 4 else "")
    text = (
        f"quantization_config.{_KEY} lacks {names}: a loader of transformers 4 or 5 "
        "replaces these dense layers by empty ones"
    )
    return [Fault(KIND, _FILE, text)]


def mend(folder: Path) -> None:
    """Put both forms of each name into the list."""
    config = folder_config(folder)
    quantization = config["quantization_config"]
    quantization[_KEY] = [*(quantization.get(_KEY) or ()), *_missing(folder)]
    text = json.dumps(config, indent=2, ensure_ascii=False)
    write_atomically(folder / _FILE, f"{text}\n".encode())


def _missing(folder: Path) -> list[str]:
    """Return the names that the list lacks: of modules, then of their weights."""
    config = folder_config(folder)
    quantization = config.get("quantization_config")
    if not quantization or quantization.get("quant_method") != QUANT_METHOD:
        return []
    listed = [str(name) for name in quantization.get(_KEY) or ()]
    modules = [name.removesuffix(_WEIGHT) for name in listed]
    modules += [n for n in _dense_layers(folder, config) if n not in modules]
    both = [*modules, *(name + _WEIGHT for name in modules)]
    return [name for name in dict.fromkeys(both) if name not in listed]


def _dense_layers(folder: Path, config: dict[str, Any]) -> list[str]:
    """Return the linear layers that have weights, and the head if it shares them."""
    found, coded = [], set()
    for file in weight_files(folder):
        for name, info in read_header(file).items():
            module, _, leaf = name.rpartition(".")
            if leaf == "codes":
                coded.add(module)
            is_embedding = "embed" in module.rpartition(".")[2]
            if leaf == "weight" and len(info.shape) == 2 and not is_embedding:
                found.append(module)
    if config.get("tie_word_embeddings") and _HEAD not in {*found, *coded}:
        found.append(_HEAD)
    return found
