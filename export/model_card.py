"""The model card: what the checkpoint is, how each part is stored, how to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from compress.core import compressed_tensors as ct
from compress.core.artifact import CompressedModel
from compress.core.plan import LayerPlan
from compress.core.scheme import Scales, Scheme, Zero
from compress.core.shapes import attention_flags, blocks_differ, has_widths, mlp_widths


@dataclass(frozen=True)
class CardLayout:
    """What a card says about a layout that is not compressed-tensors.

    Attributes:
        name: Of the layout; also a tag.
        loading: Lines about how to load the folder.
    """

    name: str
    loading: str


def model_card(
    artifact: CompressedModel,
    *,
    size_bytes: int,
    notes: Sequence[str],
    dense: bool = False,
    layout: CardLayout | None = None,
) -> str:
    """Return the text of ``README.md``.

    Args:
        artifact: What was written.
        size_bytes: Of the weight files.
        notes: Warnings that a user of the files should read.
        dense: Whether decoded values were written instead of codes.
        layout: Of the codes, if it is not compressed-tensors.
    """
    description, layers = artifact.description, artifact.plan.layers
    schemes = groups_of(layers)
    licence = known_licence(description.assets)
    # Only a hub id can be a `base_model` link; a path would be a dead one.
    hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", description.label)
    tag = layout.name if layout else ct.QUANT_METHOD
    front = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        *([f"license: {licence}"] if licence else []),
        *([f"base_model: {description.label}"] if hub_id else []),
        *([f"tags: [{tag}, quantized]"] if layers and not dense else []),
        "---",
    ]
    sections = [
        "\n".join(front),
        _what(artifact, size_bytes, dense=dense),
        _table(schemes, description.dtype, layout, dense=dense),
        _cache(artifact),
        f"## How to load\n\n{layout.loading}"
        if layout and layers
        else _loading(
            {} if dense else schemes, own_code=blocks_differ(description.config)
        ),
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


def _what(artifact: CompressedModel, size_bytes: int, *, dense: bool) -> str:
    description, layers = artifact.description, artifact.plan.layers
    methods = ", ".join(sorted({layer.method for layer in layers.values()}))
    coded = "No matrix is quantized; everything"
    if dense and layers:
        coded = (
            f"{len(layers)} weight matrices were quantized (method: {methods}) and are "
            f"stored decoded, as ordinary {description.dtype} weights: these files are "
            "for measuring and for loaders that know no codes, they save no memory. "
            "Everything"
        )
    elif layers:
        coded = (
            f"{len(layers)} weight matrices are codes (method: {methods}); everything "
            "else"
        )
    shape = ""
    if has_widths(description.config):
        widths = mlp_widths(description.config)
        shape = f", whose MLPs are {min(widths)} to {max(widths)} neurons wide"
    without = attention_flags(description.config).count(False)
    if without:
        shape += f", {without} of them without attention"
    moved = ""
    if description.transforms:
        names = ", ".join(description.transforms)
        moved = f" Before that its weights went through {names}, which is exact."
    weights = sum(info.elements for info in description.tensors.values())
    return (
        f"# {description.label}, compressed\n\n"
        f"A {description.config.get('model_type', 'language')} model of "
        f"{description.block_count} blocks{shape}. {coded} is {description.dtype}."
        f"{moved} The weight files take {size_bytes:,} bytes, "
        f"{size_bytes * 8 / weights:.2f} bits for each weight of the model. "
        "Measured quality is in the "
        "`report.md` of the run that made these files."
    )


def _table(
    schemes: Mapping[Scheme, Sequence[str]],
    dtype: str,
    layout: CardLayout | None,
    *,
    dense: bool,
) -> str:
    if not schemes:
        return ""

    def stored_as(scheme: Scheme) -> str:
        if layout is not None:
            return layout.name
        return dtype if dense else ct.layout_of(scheme).format

    rows = [
        f"| `{scheme.name}` | {stored_as(scheme)} | "
        f"{_scale_type(scheme)} | {len(names)} | {_kinds(names)} |"
        for scheme, names in schemes.items()
    ]
    head = "| scheme | stored as | scales | layers | which |\n|---|---|---|---|---|"
    return "\n".join([head, *rows, f"| dense | {dtype} | | | everything else |"])


def _scale_type(scheme: Scheme) -> str:
    return {
        Scales.POWER: "powers of two",
        Scales.TWO_LEVEL: "E4M3 under one float32",
    }.get(scheme.scales, scheme.scale_dtype)


def _cache(artifact: CompressedModel) -> str:
    scheme = artifact.kv_cache_scheme
    if scheme is None:
        return ""
    return (
        f"The key-value cache is to be held in {scheme.get('num_bits')} bits "
        f"({scheme.get('type')}, a scale for each {scheme.get('strategy')}); its "
        f"{len(artifact.kv_scales)} scales are in the files. vLLM does that with "
        "`--kv-cache-dtype fp8`; transformers emulates it in float."
    )


def _kinds(names: Sequence[str]) -> str:
    """Return the last parts of the names, such as ``q_proj``, without repeats."""
    return ", ".join(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))


def _loading(schemes: Mapping[Scheme, Sequence[str]], *, own_code: bool) -> str:
    formats = {ct.layout_of(scheme).format for scheme in schemes}
    packed = "pack-quantized" in formats
    asymmetric = packed and any(scheme.zero is Zero.INTEGER for scheme in schemes)
    extra = ", CompressedTensorsConfig" if asymmetric else ""
    trust = ", trust_remote_code=True" if own_code else ""
    serve = " --model-impl transformers --trust-remote-code" if own_code else ""
    decoding = "CompressedTensorsConfig(dequantize=True)"
    option = f", quantization_config={decoding}" if asymmetric else ""
    lines = ["## How to load", ""]
    if schemes:
        names = ", ".join(f"`{name}`" for name in sorted(formats))
        lines += [
            f"The layout is {names} of compressed-tensors "
            "(`pip install 'compressed-tensors>=0.20'`).",
            "",
        ]
    lines += [
        "```python",
        f"from transformers import AutoModelForCausalLM, AutoTokenizer{extra}",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("FOLDER"{trust}{option})',
        f'tokenizer = AutoTokenizer.from_pretrained("FOLDER"{trust})',
        "```",
        "",
        f"In vLLM, which we have not run: `vllm serve FOLDER{serve}`; the notes say "
        "what it does not load. Without compressed-tensors: "
        '`compress.load("FOLDER")`.',
    ]
    return "\n".join(lines)


def _origin(provenance: Mapping[str, str], licence: str | None) -> str:
    rows = [f"| {key} | `{value}` |" for key, value in provenance.items()]
    stated = licence or "unknown; the licence of the base model applies"
    table = "\n".join(["| | |", "|---|---|", f"| licence | {stated} |", *rows])
    return f"## Origin\n\n{table}"
