"""The model card: what the checkpoint is, how each part is stored, how to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from compress.core.artifact import CompressedModel
from compress.core.plan import LayerPlan
from compress.core.scheme import Scheme, Zero

_DENSE_BITS = (2, 4, 8)


def model_card(
    artifact: CompressedModel, *, size_bytes: int, notes: Sequence[str]
) -> str:
    """Return the text of ``README.md``.

    Args:
        artifact: What was written.
        size_bytes: Of the weight files.
        notes: Warnings that a user of the files should read.
    """
    description, layers = artifact.description, artifact.plan.layers
    schemes = groups_of(layers)
    licence = known_licence(description.assets)
    # Only a hub id can be a `base_model` link; a path would be a dead one.
    hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", description.label)
    front = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        *([f"license: {licence}"] if licence else []),
        *([f"base_model: {description.label}"] if hub_id else []),
        *(["tags: [compressed-tensors, quantized]"] if layers else []),
        "---",
    ]
    sections = [
        "\n".join(front),
        _what(artifact, size_bytes),
        _table(schemes, description.dtype),
        _loading(schemes, [layer.scheme for layer in layers.values()]),
        "## Notes\n\n" + "\n".join(f"- {note}" for note in notes) if notes else "",
        _origin(artifact.provenance, licence),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def groups_of(layers: Mapping[str, LayerPlan]) -> dict[Scheme, list[str]]:
    """Return the layer names of each distinct scheme, in order of first use."""
    groups: dict[Scheme, list[str]] = {}
    for name, layer in layers.items():
        groups.setdefault(layer.scheme, []).append(name)
    return groups


def known_licence(assets: Path | None) -> str | None:
    """Return the licence that the base model's own card states, if there is one."""
    card = assets / "README.md" if assets else None
    if card is None or not card.is_file():
        return None
    text = card.read_text("utf-8", errors="replace")
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    line = (
        re.search(r"^license:[ \t]*([\w.-]+)[ \t]*$", front[1], re.M) if front else None
    )
    return line[1] if line else None


def _what(artifact: CompressedModel, size_bytes: int) -> str:
    description, layers = artifact.description, artifact.plan.layers
    methods = ", ".join(sorted({layer.method for layer in layers.values()}))
    coded = (
        f"{len(layers)} weight matrices are integer codes (method: {methods}); "
        "everything else"
        if layers
        else "No matrix is quantized; everything"
    )
    moved = ""
    if description.transforms:
        names = ", ".join(description.transforms)
        moved = f" Before that its weights went through {names}, which is exact."
    return (
        f"# {description.label}, compressed\n\n"
        f"A {description.config.get('model_type', 'language')} model of "
        f"{description.block_count} blocks. {coded} is {description.dtype}.{moved} "
        f"The weight files take {size_bytes:,} bytes. Measured quality is in the "
        "`report.md` of the run that made these files."
    )


def _table(schemes: Mapping[Scheme, Sequence[str]], dtype: str) -> str:
    if not schemes:
        return ""
    rows = [
        f"| `{scheme.name}` | {scheme.scale_dtype} | {len(names)} | {_kinds(names)} |"
        for scheme, names in schemes.items()
    ]
    head = "| scheme | scales | layers | which |\n|---|---|---|---|"
    return "\n".join([head, *rows, f"| dense | {dtype} | | everything else |"])


def _kinds(names: Sequence[str]) -> str:
    """Return the last parts of the names, such as ``q_proj``, without repeats."""
    return ", ".join(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))


def _loading(schemes: Mapping[Scheme, Sequence[str]], used: Sequence[Scheme]) -> str:
    asymmetric = any(scheme.zero is Zero.INTEGER for scheme in used)
    extra = ", CompressedTensorsConfig" if asymmetric else ""
    option = (
        '"FOLDER", quantization_config=CompressedTensorsConfig(dequantize=True)'
        if asymmetric
        else '"FOLDER"'
    )
    lines = ["## How to load", ""]
    if schemes:
        bits = sorted({scheme.bits for scheme in schemes} - set(_DENSE_BITS))
        version = (
            f" Codes of {', '.join(map(str, bits))} bits need compressed-tensors 0.20 "
            "or newer: releases before 0.18 pack them differently."
            if bits
            else ""
        )
        lines += [
            "The layout is `pack-quantized` of compressed-tensors "
            f"(`pip install compressed-tensors`).{version}",
            "",
        ]
    lines += [
        "```python",
        f"from transformers import AutoModelForCausalLM, AutoTokenizer{extra}",
        "",
        f"model = AutoModelForCausalLM.from_pretrained({option})",
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
        "```",
        "",
        "In vLLM: `vllm serve FOLDER`. Without compressed-tensors: "
        '`compress.load("FOLDER")`.',
    ]
    return "\n".join(lines)


def _origin(provenance: Mapping[str, str], licence: str | None) -> str:
    rows = [f"| {key} | `{value}` |" for key, value in provenance.items()]
    stated = licence or "unknown; the licence of the base model applies"
    table = "\n".join(["| | |", "|---|---|", f"| licence | {stated} |", *rows])
    return f"## Origin\n\n{table}"
