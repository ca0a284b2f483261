"""Virtual tokens in front of every text, trained while no weight changes.

min_E loss(model(E, x)): ``n x C`` values, which stand where the embedding layer's
output would; the loss counts real tokens only. It is the smallest artefact, for models
whose weights must stay as they are. Texts have n tokens less room, and a runtime has to
be able to take embeddings instead of ids.

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

from compress.core.artifact import ModelDescription
from compress.core.errors import ConfigError
from compress.recovery.models import WholeModel
from compress.recovery.trained import Trained

_KEY = "prompt_embeddings"


class SoftPrompt(Trained):
    """Virtual tokens; the model's weights are not touched."""

    def __init__(self, model: WholeModel, tokens: int) -> None:
        vocabulary = int(model.description.config["vocab_size"])
        if tokens > vocabulary:
            raise ConfigError(
                f"recover.options.tokens: {tokens} virtual tokens, and the vocabulary "
                f"they begin with has {vocabulary}; ask for less"
            )
        ids = torch.arange(tokens, device=model.device)
        with torch.no_grad():
            start = model.embedding(ids).float()
        super().__init__(model, {"prompt": nn.Parameter(start)})

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
    save_file({_KEY: values}, folder / "adapter_model.safetensors")
    text = json.dumps(config, indent=2) + "\n"
    (folder / "adapter_config.json").write_text(text, "utf-8")


def read_prompt(folder: Path) -> Tensor:
    """Return the virtual tokens that :func:`save_prompt` wrote, float32 ``[n, C]``."""
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")[_KEY]
