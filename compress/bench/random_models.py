"""Models of known shapes with random weights: speed needs no trained ones.

``random:llama-2-7b`` in the place of a folder. Nothing is downloaded and nothing is
written; the model is made on the device, codes included.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from compress.core.errors import ConfigError
from compress.core.families import family_of
from compress.core.scheme import Scheme
from compress.core.tensors import QuantizedTensor
from compress.runtime.w6a8.fuse_model import fuse_
from compress.runtime.w6a8.linear import W6A8Linear

PREFIX = "random:"
_LLAMA_2 = {"vocab_size": 32000, "max_position_embeddings": 4096}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {
        **_LLAMA_2,
        **{"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
        **{"num_attention_heads": 32, "num_key_value_heads": 32},
    },
    "llama-2-13b": {
        **_LLAMA_2,
        **{"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40},
        **{"num_attention_heads": 40, "num_key_value_heads": 40},
    },
    "llama-3-8b": {
        **{"vocab_size": 128256, "max_position_embeddings": 8192},
        **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
        **{"num_attention_heads": 32, "num_key_value_heads": 8},
    },
    "smollm2-135m": {
        **{"vocab_size": 49152, "max_position_embeddings": 8192},
        **{"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30},
        **{"num_attention_heads": 9, "num_key_value_heads": 3},
        "tie_word_embeddings": True,
    },
}
_SCALE = 0.02


def is_random(name: str) -> bool:
    """Whether a name asks for a random model."""
    return name.startswith(PREFIX)


def shape_named(name: str) -> dict[str, Any]:
    """Return the sizes of a Llama by a name such as ``random:llama-2-7b``.

    Raises:
        ConfigError: There is no such shape.
    """
    shape = SHAPES.get(name.removeprefix(PREFIX))
    if shape is None:
        known = ", ".join(PREFIX + key for key in SHAPES)
        raise ConfigError(f"{name} is no known shape; there are {known}")
    return shape


def random_model(
    name: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    served: bool,
    seed: int = 0,
) -> Any:
    """Return a random Llama in evaluation mode, dense or with 6-bit codes.

    Args:
        name: See :func:`shape_named`.
        dtype: Of weights and inputs.
        device: Where it is made.
        served: Give the layers of its blocks random codes, ``w6a8-g128``, or
            ``w6a8-g64`` where 128 does not divide the columns.
        seed: Of all numbers.

    Raises:
        ConfigError: There is no such shape.
    """
    from accelerate import init_empty_weights
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**shape_named(name))
    with init_empty_weights(include_buffers=False):
        model: Any = LlamaForCausalLM._from_config(config, dtype=dtype)
    generator = torch.Generator(device).manual_seed(seed)
    if served:
        for path, module in list(model.model.layers.named_modules()):
            if isinstance(module, nn.Linear):
                codes = _random_codes(module, device, generator)
                model.model.layers.set_submodule(path, W6A8Linear(codes, None))
    model.tie_weights()
    for path, parameter in list(model.named_parameters()):
        made = torch.empty(parameter.shape, dtype=dtype, device=device)
        if made.dim() == 1:
            made.fill_(1.0)
        else:
            made.normal_(std=_SCALE, generator=generator)
        place, _, leaf = path.rpartition(".")
        fresh = nn.Parameter(made, requires_grad=False)
        model.get_submodule(place).register_parameter(leaf, fresh)
    model.tie_weights()
    model.to(device)
    if served:
        fuse_(model, family_of("llama"))
    return model.eval()


def _random_codes(
    layer: nn.Linear, device: torch.device, generator: torch.Generator
) -> QuantizedTensor:
    shape = layer.out_features, layer.in_features
    group = 128 if shape[1] % 128 == 0 else 64
    codes = torch.randint(-32, 32, shape, device=device, generator=generator)
    scale = torch.rand(shape[0], shape[1] // group, device=device, generator=generator)
    # So that weights are as large as those of the dense model: codes spread by 18.
    scale = (scale + 0.5) * (_SCALE / 18)
    scheme = Scheme.parse(f"w6a8-g{group}").with_scales("bfloat16")
    return QuantizedTensor(codes.to(torch.int8), scale.bfloat16(), None, scheme)
