"""Virtual tokens in front of every text, trained while no weight changes.

min_E loss(model(E, x)): ``n x C`` values, which stand where the embedding layer's
output would; the loss counts real tokens only. It is the smallest artefact, for models
whose weights must stay as they are. Texts have n tokens less room, and a runtime has to
be able to take embeddings instead of ids: GGUF files cannot hold a prompt.

A prompt may be put before any model of the same hidden size whose embedding has the
same basis: one that was learned on few bits before the same model in more bits, or
pruned. A rotation changes the basis.

Source: Xu et al. (2023), "Compress, then prompt", arXiv 2305.11186; E begins as the
embeddings of the first n tokens of the vocabulary, as in its release. What differs: KL
to the original model is the default loss.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.config.recover_section import SoftPromptOptions
from compress.core.artifact import ModelDescription
from compress.core.errors import CheckpointError, ConfigError
from compress.core.foreign import MALFORMED, parse_json
from compress.recovery.models import WholeModel
from compress.recovery.trained import Trained

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_KEY = "prompt_embeddings"
_TOKENS = 64


class SoftPrompt(Trained):
    """Virtual tokens; the model's weights are not touched.

    Args:
        model: That they are put before.
        tokens: How many there are, where they begin as the vocabulary's first ones.
        start: What they begin as instead, float32 ``[n, C]``.

    Raises:
        ConfigError: They do not fit the model.
    """

    def __init__(
        self, model: WholeModel, tokens: int = _TOKENS, start: Tensor | None = None
    ) -> None:
        if start is None:
            vocabulary = int(model.description.config["vocab_size"])
            if tokens > vocabulary:
                raise ConfigError(
                    f"recover.options.tokens: {tokens} virtual tokens, and the "
                    f"vocabulary they begin with has {vocabulary}; ask for less"
                )
            ids = torch.arange(tokens, device=model.device)
            with torch.no_grad():
                start = model.embedding(ids)
        check_prompt(start, model.description)
        values = start.detach().to(model.device, torch.float32, copy=True)
        super().__init__(model, {"prompt": nn.Parameter(values)})

    @property
    def prompt(self) -> Tensor:
        """Return the virtual tokens, float32 ``[n, C]``."""
        return self.parameters["prompt"]

    def states(self, ids: Tensor) -> Tensor:
        """Return the head's input for ids that come after the virtual tokens."""
        return self.model.states_after(self.prompt, ids)

    @property
    def weights(self) -> frozenset[str]:
        """Return nothing: no tensor of the checkpoint changes."""
        return frozenset()

    def dense(self, name: str, stored: Tensor) -> Tensor:
        """Return the tensor as it is."""
        return stored


def new_prompt(model: WholeModel, options: SoftPromptOptions) -> SoftPrompt:
    """Return the virtual tokens that options ask for, before any training.

    Raises:
        ConfigError: They do not fit the model.
        CheckpointError: ``options.start`` is no prompt.
    """
    if options.start is not None:
        return SoftPrompt(model, start=read_prompt(Path(options.start)))
    return SoftPrompt(model, options.tokens or _TOKENS)


def prompt_tokens(options: SoftPromptOptions) -> int:
    """Return the number of virtual tokens that options ask for.

    Raises:
        CheckpointError: ``options.start`` is no prompt.
    """
    if options.start is not None:
        return len(read_prompt(Path(options.start)))
    return options.tokens or _TOKENS


def check_prompt(prompt: Tensor, model: ModelDescription) -> None:
    """Raise if virtual tokens ``[n, C]`` cannot be put before a model's texts.

    Raises:
        ConfigError: Their width is another one, or they leave no room for a text.
    """
    width = int(model.config["hidden_size"])
    if prompt.shape[1] != width:
        raise ConfigError(
            f"the prompt has {prompt.shape[1]} values a token, and {model.label} has a "
            f"hidden size of {width}; a prompt goes with sizes of one model only"
        )
    room = int(model.config["max_position_embeddings"])
    if len(prompt) >= room:
        raise ConfigError(
            f"the prompt has {len(prompt)} tokens, and {model.label} has room for "
            f"{room}, texts included; ask for less"
        )


def save_prompt(prompt: Tensor, model: ModelDescription, folder: Path) -> None:
    """Write virtual tokens as an adapter that ``peft.PeftModel`` loads.

    Args:
        prompt: float32 ``[n, C]``.
        model: What they were trained for.
        folder: Exists.
    """
    from safetensors.torch import save_file

    config: dict[str, Any] = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.label,
        "inference_mode": True,
        "num_virtual_tokens": len(prompt),
        "token_dim": prompt.shape[1],
        "num_transformer_submodules": 1,
        "num_attention_heads": int(model.config["num_attention_heads"]),
        "num_layers": model.block_count,
        "prompt_tuning_init": "RANDOM",
    }
    values = prompt.detach().cpu().contiguous()
    save_file({_KEY: values}, folder / WEIGHTS)
    text = json.dumps(config, indent=2) + "\n"
    (folder / CONFIG).write_text(text, "utf-8")


def read_prompt(folder: Path) -> Tensor:
    """Return the virtual tokens of a peft adapter, float32 ``[n, C]``.

    Raises:
        CheckpointError: The folder holds no soft prompt, or a damaged one.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (folder / CONFIG).is_file():
        raise CheckpointError(
            f"{folder}: no soft prompt here ({CONFIG} is missing); give the folder "
            "`prompt` of a run with recover.method soft_prompt"
        )
    try:
        kind = parse_json((folder / CONFIG).read_text("utf-8"))["peft_type"]
        if kind != "PROMPT_TUNING":
            raise ValueError(f"an adapter of type {kind}, not PROMPT_TUNING")
        prompt = load_file(folder / WEIGHTS)[_KEY].float()
        if prompt.dim() != 2 or not bool(torch.isfinite(prompt).all()):
            raise ValueError(f"{_KEY} is no matrix of finite numbers")
    except (SafetensorError, OSError, *MALFORMED) as error:
        raise CheckpointError(f"{folder} is no soft prompt: {error}") from error
    return prompt
