"""Decoder blocks that differ: in memory, and in checkpoint folders.

transformers has one ``intermediate_size`` for all blocks, and attention in each. In
memory a model whose blocks differ keeps its ``model_type`` and has more keys in its
config: ``intermediate_size_per_layer``, a width for each block, of which
``intermediate_size`` is the largest; ``attention_per_layer``, whether each block has
attention. A model whose blocks agree does not have the keys.

In a folder, a config with such a key would be misread by transformers, which knows
nothing of it. So there the ``model_type`` is ``compress_llama`` and so on, and
``auto_map`` names classes of a file beside it, ``modeling_compress.py``: stock
transformers loads the folder with ``trust_remote_code=True``. The file is made from a
template here: each class is the family's own, with the MLPs built anew in their widths
and attention taken out where there is none. What stands in for it adds nothing to the
stream, and stores keys of width 1 that are never read: caches count tokens by the keys
of some block.
We ourselves never run the file of a folder to open it; :func:`memory_config` undoes the
names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compress.core.errors import CheckpointError
from compress.core.families import family_of

WIDTHS = "intermediate_size_per_layer"
"""Key of a config that holds the MLP width of each block."""

ATTENTION = "attention_per_layer"
"""Key of a config that holds for each block whether it has attention."""

MODELING_FILE = "modeling_compress.py"
"""Name of the file that lies beside a stored config whose blocks differ."""

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
_MODELING = '''"""{base_model} whose blocks differ.

Written by compress-llm. Load the folder with ``trust_remote_code=True``. The config's
``intermediate_size_per_layer`` holds the width of each MLP, ``intermediate_size`` the
largest; ``attention_per_layer``, if it is there, which blocks have attention.
"""

import copy

import torch
from transformers import {base_config}, {base_model}


class NoAttention(torch.nn.Module):
    """Adds nothing to the stream; caches count tokens by keys that are never read."""

    def __init__(self, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states, past_key_values=None, **_):
        if past_key_values is not None:
            keys = hidden_states[:, None, :, :1].detach()
            past_key_values.update(torch.ones_like(keys), keys, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class Compress{base_config}({base_config}):
    model_type = "{model_type}"


class Compress{base_model}({base_model}):
    config_class = Compress{base_config}

    def __init__(self, config):
        super().__init__(config)
        widths = config.intermediate_size_per_layer
        attends = getattr(config, "attention_per_layer", None) or [True] * len(widths)
        for index, layer in enumerate(self.model.layers):
            own = copy.copy(config)
            own.intermediate_size = widths[index]
            layer.mlp = type(layer.mlp)(own)
            if not attends[index]:
                layer.{attention} = NoAttention(index)
                for norm in {norms}:
                    setattr(layer, norm, torch.nn.Identity())
        self.post_init()
'''


def has_widths(config: Mapping[str, Any]) -> bool:
    """Whether blocks differ in the width of their MLPs."""
    return config.get(WIDTHS) is not None


def lacks_attention(config: Mapping[str, Any]) -> bool:
    """Whether some block has no attention."""
    return config.get(ATTENTION) is not None


def blocks_differ(config: Mapping[str, Any]) -> bool:
    """Whether stock transformers needs code of ours to build the blocks."""
    return has_widths(config) or lacks_attention(config)


def what_differs(config: Mapping[str, Any]) -> tuple[str, str]:
    """Return the key of a config whose blocks differ, and in what, for messages."""
    if lacks_attention(config):
        return ATTENTION, "in whether they have attention"
    return WIDTHS, "in the width of their MLPs"


def attention_flags(config: Mapping[str, Any]) -> tuple[bool, ...]:
    """Return for each block whether it has attention.

    Raises:
        CheckpointError: There is not one truth value for each block, or block 0 has no
            attention, by whose heads llama.cpp knows the width of all.
    """
    blocks = int(config["num_hidden_layers"])
    if not lacks_attention(config):
        return (True,) * blocks
    flags = config[ATTENTION]
    if not isinstance(flags, Sequence) or len(flags) != blocks:
        raise CheckpointError(
            f"{ATTENTION} is {flags!r}; {blocks} blocks need as many entries"
        )
    if any(type(flag) is not bool for flag in flags) or not flags[0]:
        raise CheckpointError(
            f"{ATTENTION} is {flags!r}; entries are true or false, and block 0 has "
            "attention"
        )
    return tuple(flags)


def with_attention(config: Mapping[str, Any], flags: Sequence[bool]) -> dict[str, Any]:
    """Return the config of a model some of whose blocks have no attention.

    Args:
        config: As it is in memory.
        flags: One for each block; if all are true, there is no list in the result.

    Raises:
        CheckpointError: As :func:`attention_flags`.
    """
    changed = {**config, ATTENTION: list(flags)}
    if all(attention_flags(changed)):
        del changed[ATTENTION]
    return changed


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
    if not blocks_differ(config):
        return dict(config)
    kind, (base_config, base_model) = _known(
        str(config["model_type"]), what_differs(config)[1]
    )
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
        CheckpointError: It has a ``model_type`` of ours that is unknown, or lists that
            :func:`mlp_widths` or :func:`attention_flags` refuses.
    """
    config = dict(stored)
    kind = str(config.get("model_type"))
    if kind.startswith(_PREFIX):
        kind, (_, base_model) = _known(
            kind.removeprefix(_PREFIX), what_differs(config)[1]
        )
        config |= {"model_type": kind, "architectures": [base_model]}
        config.pop("auto_map", None)
    if has_widths(config):
        config = with_widths(config, mlp_widths(config))
    if lacks_attention(config):
        config = with_attention(config, attention_flags(config))
    return config


def modeling_files(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the texts that lie beside :func:`stored_config`, by name of the file.

    Raises:
        CheckpointError: As :func:`stored_config`.
    """
    if not blocks_differ(config):
        return {}
    kind, (base_config, base_model) = _known(
        str(config["model_type"]), what_differs(config)[1]
    )
    family = family_of(kind)
    text = _MODELING.format(
        base_config=base_config,
        base_model=base_model,
        model_type=f"{_PREFIX}{kind}",
        attention=family.attention,
        norms=family.attention_norms,
    )
    return {MODELING_FILE: text}


def shapes_obstacle(config: Mapping[str, Any]) -> str | None:
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


def _known(kind: str, what: str) -> tuple[str, tuple[str, str]]:
    if kind not in _CLASSES:
        raise CheckpointError(
            f"blocks of {kind!r} cannot differ {what}, only those of "
            f"{', '.join(_CLASSES)}; prune with `shape: uniform` and whole blocks"
        )
    return kind, _CLASSES[kind]
