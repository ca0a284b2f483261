"""Decoder blocks whose MLPs differ in width: in memory, and in checkpoint folders.

transformers has one ``intermediate_size`` for all blocks. In memory a model whose
blocks differ keeps its ``model_type`` and has one more key in its config,
``intermediate_size_per_layer``: a width for each block, of which ``intermediate_size``
is the largest. A model whose blocks agree does not have the key.

In a folder, a config with such a key would be misread by transformers, which knows
nothing of it. So there the ``model_type`` is ``compress_llama`` and so on, and
``auto_map`` names classes of a file beside it, ``modeling_compress.py``: stock
transformers loads the folder with ``trust_remote_code=True``. The file is made from a
template here: each class is the family's own, with the MLPs built anew in their widths.
We ourselves never run the file of a folder to open it; :func:`memory_config` undoes the
names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compress.core.errors import CheckpointError

WIDTHS = "intermediate_size_per_layer"
"""Key of a config that holds the MLP width of each block."""

MODELING_FILE = "modeling_compress.py"
"""Name of the file that lies beside a stored config with :data:`WIDTHS`."""

_PREFIX = "compress_"
# Config and model classes of transformers, by model_type: the families whose MLP is
# gated, dense, and built from nothing but the config.
_CLASSES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "mistral": ("MistralConfig", "MistralForCausalLM"),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM"),
    "gemma3_text": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
    "phi3": ("Phi3Config", "Phi3ForCausalLM"),
}
_DIVIDING = ("llama", "gemma2", "gemma3_text")  # their heads divide hidden_size
_MODELING = '''"""{base_model} with an MLP width for each block.

Written by compress-llm. Load the folder with ``trust_remote_code=True``. The config's
``intermediate_size_per_layer`` holds the widths, ``intermediate_size`` the largest.
"""

import copy

from transformers import {base_config}, {base_model}


class Compress{base_config}({base_config}):
    model_type = "{model_type}"


class Compress{base_model}({base_model}):
    config_class = Compress{base_config}

    def __init__(self, config):
        super().__init__(config)
        widths = config.intermediate_size_per_layer
        for layer, width in zip(self.model.layers, widths, strict=True):
            own = copy.copy(config)
            own.intermediate_size = width
            layer.mlp = type(layer.mlp)(own)
        self.post_init()
'''


def has_widths(config: Mapping[str, Any]) -> bool:
    """Whether blocks differ in the width of their MLPs."""
    return config.get(WIDTHS) is not None


def mlp_widths(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the width of each block's MLP, whether they differ or not.

    Raises:
        CheckpointError: There is not one positive width for each block, or the largest
            is not ``intermediate_size``.
    """
    blocks, largest = config["num_hidden_layers"], config["intermediate_size"]
    if not has_widths(config):
        return (int(largest),) * int(blocks)
    widths = _checked(config[WIDTHS], blocks)
    if max(widths) != largest:
        raise CheckpointError(
            f"intermediate_size is {largest}, the largest of {WIDTHS} {max(widths)}"
        )
    return widths


def with_widths(config: Mapping[str, Any], widths: Sequence[int]) -> dict[str, Any]:
    """Return the config of a model whose blocks have these MLP widths.

    Args:
        config: As it is in memory.
        widths: One for each block; if all agree, there is no list in the result.

    Raises:
        CheckpointError: As :func:`mlp_widths`.
    """
    checked = _checked(widths, config["num_hidden_layers"])
    kept = {key: value for key, value in config.items() if key != WIDTHS}
    kept["intermediate_size"] = max(checked)
    return kept | ({WIDTHS: list(checked)} if len(set(checked)) > 1 else {})


def stored_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``config.json`` of a model, from its config in memory.

    It is the same unless blocks differ; then the files of :func:`modeling_files` have
    to lie beside it.

    Raises:
        CheckpointError: Blocks differ, and stock transformers cannot be told so for
            this ``model_type``.
    """
    if not has_widths(config):
        return dict(config)
    kind, (base_config, base_model) = _known(str(config["model_type"]))
    module = MODELING_FILE.removesuffix(".py")
    return {
        **config,
        WIDTHS: list(mlp_widths(config)),
        "model_type": f"{_PREFIX}{kind}",
        "architectures": [f"Compress{base_model}"],
        "auto_map": {
            "AutoConfig": f"{module}.Compress{base_config}",
            "AutoModelForCausalLM": f"{module}.Compress{base_model}",
        },
    }


def memory_config(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config that a stored one has in memory; undoes :func:`stored_config`.

    Raises:
        CheckpointError: It has a ``model_type`` of ours that is unknown, or widths that
            :func:`mlp_widths` refuses.
    """
    config = dict(stored)
    kind = str(config.get("model_type"))
    if kind.startswith(_PREFIX):
        kind, (_, base_model) = _known(kind.removeprefix(_PREFIX))
        config |= {"model_type": kind, "architectures": [base_model]}
        config.pop("auto_map", None)
    return with_widths(config, mlp_widths(config)) if has_widths(config) else config


def modeling_files(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the texts that lie beside :func:`stored_config`, by name of the file.

    Raises:
        CheckpointError: As :func:`stored_config`.
    """
    if not has_widths(config):
        return {}
    kind, (base_config, base_model) = _known(str(config["model_type"]))
    text = _MODELING.format(
        base_config=base_config, base_model=base_model, model_type=f"{_PREFIX}{kind}"
    )
    return {MODELING_FILE: text}


def widths_obstacle(config: Mapping[str, Any]) -> str | None:
    """Return why a folder cannot hold a model whose blocks differ, if it cannot."""
    try:
        stored_config(config)
    except CheckpointError as error:
        return str(error)
    return None


def attention_of(config: Mapping[str, Any]) -> str:
    """Return transformers' attention that computes what a config says.

    Flash and SDPA kernels have no soft cap on scores (Gemma 2); 5.17 takes them anyway.
    """
    return "eager" if config.get("attn_logit_softcapping") else "sdpa"


def heads_obstacle(config: Mapping[str, Any]) -> str | None:
    """Return why transformers refuses a number of heads, if it does.

    Some of its configs ask for one that divides the width of the model, also where
    ``head_dim`` is stated and the rule means nothing (5.23); others do not ask.
    """
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    if config["model_type"] not in _DIVIDING or hidden % heads == 0:
        return None
    return (
        f"transformers opens no {config['model_type']} of {heads} heads and "
        f"hidden_size {hidden}: the heads that are left must divide it; remove more of "
        "them, or fewer"
    )


def heads_fill(config: Mapping[str, Any]) -> bool:
    """Whether all heads together are as wide as the model."""
    width, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    return heads * int(config.get("head_dim") or width // heads) == width


def _checked(widths: Any, blocks: int) -> tuple[int, ...]:
    if not isinstance(widths, Sequence) or len(widths) != blocks:
        raise CheckpointError(f"{WIDTHS} is {widths!r}; {blocks} blocks need as many")
    wrong = [x for x in widths if type(x) is not int or x < 1]
    if wrong or not widths:
        raise CheckpointError(
            f"{WIDTHS} holds {wrong[:1]}; a width is a whole number from 1, a block "
            "that has no MLP is not supported"
        )
    return tuple(widths)


def _known(kind: str) -> tuple[str, tuple[str, str]]:
    if kind not in _CLASSES:
        raise CheckpointError(
            f"blocks of {kind!r} cannot differ in the width of their MLPs, only those "
            f"of {', '.join(_CLASSES)}; prune with `shape: uniform`"
        )
    return kind, _CLASSES[kind]
