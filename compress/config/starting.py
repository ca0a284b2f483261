"""A first config, with comments, from what a user knows: model, target and size."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from compress.config.budget_sections import budget_assignments
from compress.config.loader import load_config
from compress.core.foreign import MALFORMED, parse_json

_GROUPS = (128, 64, 32)
_WIDTHS = ("hidden_size", "intermediate_size", "moe_intermediate_size")


@dataclass(frozen=True)
class Target:
    """What is to run the result.

    Attributes:
        says: One line for people.
        export: Entry of the section ``export``.
        scheme: Where no size is asked for; ``gN`` becomes the widest group that fits.
        why: A comment on the scheme.
    """

    says: str
    export: str
    scheme: str
    why: str


TARGETS = {
    "llamacpp": Target(
        "llama.cpp and what is built on it: one .gguf file",
        "{format: gguf}",
        "q4_k",
        "llama.cpp's own type; q5_k, q6_k and q8_0 are larger and closer",
    ),
    "transformers": Target(
        "transformers with compressed-tensors: a folder",
        "{format: safetensors}",
        "int4-gN",
        "4 bits, one scale for each N weights of a row; smaller N: closer, larger",
    ),
    "vllm": Target(
        "vLLM: a folder that its kernels take",
        "{format: safetensors, runtime: vllm}",
        "int4-gN",
        "weights in 4 bits; fp8-w8a8 and w8a8 make long inputs faster",
    ),
}

_TEMPLATE = """\
# {target}
#
#     compress run {file} --dry-run    # sizes, memory and time; computes nothing
#     compress run {file}              # --resume goes on after an interruption
#
# All keys: docs/config.md, or `compress schema`; methods: `compress list`.

model:
  path: {model} # HF folder or id, .gguf file, or builtin:NAME

# Text that methods look at. Not only one kind of it: what is missing here gets worse.
calibration:
  data: {data} # or own.txt, own.jsonl, hf:NAME, [{{source: mix}}, {{source: own.txt}}]
  samples: 128 # fewer is faster, more is better
  sequence_length: 512
{prune}
quantize:
  method: gptq
{size}
# Before and after, on texts that calibration has not seen.
evaluate:
  perplexity: [wikitext2, speeches, code] # or your own .txt file
  windows: 10
  sequence_length: 1024
  generate: 0 # tokens to write after a few prompts, for the report; 40 is plenty

export:
  - {export}

run:
  workdir: {workdir} # report.html and export/ will lie here
  device: auto
  seed: 0
"""

_PRUNE = """
# Neurons that go for good; the others take over what they can.
prune:
  method: cfsp # `compress list pruners`; taylor is better and wants a GPU
  sparsity: {sparsity}

# Training towards the original afterwards gives a part back:
# recover: {{method: distill, options: {{minutes: 10}}}}
"""

_SCHEME = """\
  scheme: {scheme} # {why}
"""

_BUDGET = """
# A scheme for each layer, searched so that the whole file has this size.
budget:
  {budget}
allocate:
  method: ilp # evolution measures whole models: slower, a little better
"""


def starting_config(
    *,
    model: str,
    target: str,
    size: str | None = None,
    sparsity: float = 0.0,
    data: str = "mix",
    file: str = "compress.yaml",
) -> str:
    """Return the YAML text of a config that is valid as it stands.

    Args:
        model: As ``model.path``.
        target: One of :data:`TARGETS`.
        size: Of the file: ``95MB``, ``4.25bpw`` or ``0.3x``; without, all layers get
            the target's usual scheme.
        sparsity: Share of the MLP neurons to remove.
        data: As ``calibration.data``.
        file: What the comments call the config.

    Raises:
        ConfigError: A value is none that the config takes.
    """
    from ruamel.yaml import YAML

    chosen = TARGETS[target]
    if size is None:
        scheme = chosen.scheme.replace("gN", f"g{_group_size(model)}")
        size_part = _SCHEME.format(scheme=scheme, why=chosen.why)
    else:
        size_part = _BUDGET.format(budget=_budget(size))
    text = _TEMPLATE.format(
        target=f"For {chosen.says}.",
        file=file,
        model=_scalar(model),
        data=_scalar(data),
        prune=_PRUNE.format(sparsity=f"{sparsity:g}") if sparsity else "",
        size=size_part,
        export=chosen.export,
        workdir=_scalar(f"runs/{_name(model)}"),
    )
    load_config(YAML(typ="safe", pure=True).load(text))
    return text


def _budget(size: str) -> str:
    """Return the key and value that say a size, as ``budget`` has them."""
    said = [text.partition(".")[2] for text in budget_assignments(size)]
    key, _, value = next(
        pair.partition("=") for pair in said if pair and not pair.endswith("=null")
    )
    return f"{key}: {size.strip() if key == 'bytes' else value}"


def _scalar(text: str) -> str:
    """Return text as YAML: as it is where that is text, else in quotes."""
    plain = re.fullmatch(r"[A-Za-z./~][\w./~:+-]*(?<!:)", text)
    is_word = text.lower() in ("null", "true", "false", "~", "yes", "no")
    return text if plain and not is_word else json.dumps(text)


def _name(model: str) -> str:
    """Return a folder's name for the results of a model."""
    last = model.rstrip("/").rpartition("/")[2].rpartition(":")[2]
    name = re.sub(r"[^\w.-]+", "_", last.removesuffix(".gguf"))
    return name.strip(".") or "model"


def _group_size(model: str) -> int:
    """Return the widest usual group that divides the widths of a local checkpoint."""
    try:
        config = parse_json((Path(model) / "config.json").read_text("utf-8"))
        widths = [int(config[key]) for key in _WIDTHS if config.get(key)]
    except (OSError, *MALFORMED):
        return 64  # nearly every model has multiples of it; the run checks
    fitting = [g for g in _GROUPS if all(width % g == 0 for width in widths)]
    return fitting[0] if fitting else _GROUPS[-1]
