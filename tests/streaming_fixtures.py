"""Random models of all families, as transformers' modules and as streamed ones."""

from __future__ import annotations

from typing import Any

import torch
from export_fixtures import StateDictSource

from compress.core.artifact import ModelDescription, TensorInfo
from compress.core.families import family_of
from compress.core.tensors import TORCH_DTYPES

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "smollm3": {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 8},
    "gemma3_text": {"sliding_window": 8},
    "phi3": {"pad_token_id": 0},
}
WINDOWS = torch.randint(3, 128, (3, 24), generator=torch.Generator().manual_seed(1))


def model_of(
    kind: str, *, tied: bool = False, dtype: str = "float32", **changes: Any
) -> tuple[Any, ModelDescription, StateDictSource]:
    """Return a random transformers model, its description and its tensors."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = SIZES | FAMILIES[kind] | {"tie_word_embeddings": tied} | changes
    config = AutoConfig.for_model(kind, **values)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = model.eval().to(TORCH_DTYPES[dtype])
    state = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # no norm is all ones
                parameter.add_(0.1 * torch.randn_like(parameter))
            state[name] = parameter.detach().clone()
    description = ModelDescription(
        label=kind,
        config=config.to_dict(),
        family=family_of(kind),
        tensors={n: TensorInfo(tuple(t.shape), dtype) for n, t in state.items()},
        dtype=dtype,
        tied=tied,
    )
    return model, description, StateDictSource(state)
