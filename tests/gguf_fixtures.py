"""Tiny random models with a trained tokenizer, ready to be written as GGUF."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.core.artifact import (
    CompressedModel,
    ModelDescription,
    TensorInfo,
    TensorSource,
)
from compress.core.families import family_of
from compress.core.plan import LayerPlan, Plan
from compress.core.scheme import Scheme, Zero
from compress.core.tensors import TORCH_DTYPES, QuantizedTensor
from compress.quantizers.rtn import RoundToNearest

TEXT = (
    "In 2024 the cat's 1234567 friends weren't here; they'd gone to Zürich.\n\n"
    "def f(x):\n    return x ** 2  # a comment\n\tand   spaces  \r\n 日本語 ½ ²"
)
ROWS = 512


class DictSource(TensorSource):
    """Tensors of a dictionary."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = dict(state)

    def tensors(self) -> Mapping[str, TensorInfo]:
        return {name: info_of(tensor) for name, tensor in self.state.items()}

    def read(self, name: str) -> Tensor:
        return self.state[name].clone()


def info_of(tensor: Tensor) -> TensorInfo:
    return TensorInfo(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def random_codes(rows: int, columns: int, scheme: Scheme, seed: int) -> QuantizedTensor:
    """Return codes over the whole grid with positive, negative and zero scales.

    Of float grids, normal weights that are rounded.
    """
    generator = torch.Generator().manual_seed(seed)
    if not scheme.is_integer:
        weight = torch.randn(rows, columns, generator=generator) * 0.1
        return RoundToNearest().quantize(weight, scheme, None)
    codes = torch.randint(
        scheme.lowest, scheme.highest + 1, (rows, columns), generator=generator
    ).to(torch.int8)
    groups = columns // scheme.group_of(columns)
    storage = TORCH_DTYPES[scheme.scale_dtype]
    spread = 0.1 / scheme.highest
    scale = (torch.randn(rows, groups, generator=generator) * spread).to(storage)
    scale[0, 0] = 0.0
    zero = None
    if scheme.zero is Zero.OFFSET:
        zero = (torch.randn(rows, groups, generator=generator) * 0.1).to(storage)
    elif scheme.zero is Zero.INTEGER:
        zero = torch.zeros(rows, groups, dtype=torch.int8)
    return QuantizedTensor(codes, scale, zero, scheme)


def tiny_config(model_type: str, **changes: Any) -> Any:
    """Return a config with two blocks, 64 wide."""
    from transformers import AutoConfig

    values: dict[str, Any] = {
        "vocab_size": ROWS,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
        "initializer_range": 0.2,
    }
    return AutoConfig.for_model(model_type, **(values | changes))


def random_state(config: Any) -> dict[str, Tensor]:
    """Return the parameters of a random model as float16, no vector constant."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    state = {}
    for name, parameter in model.named_parameters():
        noise = 0.1 * torch.randn(parameter.shape)
        vector = parameter.dim() == 1
        value = parameter.detach() + noise if vector else parameter.detach()
        state[name] = value.to(torch.float16)
    return state


def describe(
    config: Any, state: Mapping[str, Tensor], assets: Path | None
) -> ModelDescription:
    dtype = info_of(next(iter(state.values()))).dtype
    return ModelDescription(
        label=f"some/Tiny {config.model_type}",
        config=config.to_dict(),
        family=family_of(config.model_type),
        tensors={name: info_of(tensor) for name, tensor in state.items()},
        dtype=dtype,
        tied=bool(config.tie_word_embeddings),
        assets=assets,
    )


def compressed(
    model_type: str,
    *,
    assets: Path | None,
    scheme: str | None = "q4_0",
    also: Mapping[str, str] | None = None,
    **changes: Any,
) -> CompressedModel:
    """Return a tiny model with random codes in all block linears.

    Args:
        assets: Tokenizer folder.
        scheme: For the linears of the blocks; ``None`` leaves all dense.
        also: Schemes of single modules, which may be the embedding or the head.
        changes: Of the config.
    """
    config = tiny_config(model_type, **changes)
    state = random_state(config)
    description = describe(config, state, assets)
    chosen = {name: scheme for name in description.linears()} if scheme else {}
    layers = {}
    for name, kind in {**chosen, **(also or {})}.items():
        rows, columns = state[f"{name}.weight"].shape
        parsed = Scheme.parse(str(kind)).with_scales("float16")
        layers[name] = LayerPlan(name, (rows, columns), "rtn", parsed)

    def quantized(name: str) -> QuantizedTensor:
        layer = layers[name]
        seed = list(layers).index(name)
        return random_codes(*layer.shape, layer.scheme, seed)

    plan = Plan("tiny", layers)
    return CompressedModel(description, plan, DictSource(state), quantized)


def same_codes(left: QuantizedTensor, right: QuantizedTensor) -> bool:
    zeros = (left.zero, right.zero)
    if zeros != (None, None) and not torch.equal(*zeros):  # type: ignore[arg-type]
        return False
    return torch.equal(left.codes, right.codes) and torch.equal(left.scale, right.scale)


def with_scales(artifact: CompressedModel, dtype: str) -> CompressedModel:
    """Return the same artifact with the plan's scales stored as ``dtype``."""
    layers = {
        name: replace(layer, scheme=layer.scheme.with_scales(dtype))
        for name, layer in artifact.plan.layers.items()
    }
    return replace(artifact, plan=Plan("tiny", layers))


def torch_logits(
    artifact: CompressedModel, windows: Tensor, **stored: Tensor
) -> Tensor:
    """Return float32 logits of transformers' model with the dequantized weights.

    Args:
        stored: Values of tensors that the file rounds, by name with ``__`` for dots.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**artifact.description.config)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    state = {}
    for name in artifact.description.tensors:
        module = name.removesuffix(".weight")
        if module in artifact.plan.layers:
            state[name] = artifact.quantized(module).dequantize()
        else:
            state[name] = artifact.source.read(name).float()
    state |= {name.replace("__", "."): value for name, value in stored.items()}
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    with torch.no_grad():
        logits: Tensor = model(windows).logits
    return logits


def mean_kl(reference: Tensor, other: Tensor) -> float:
    """Return the mean KL divergence over positions, in nats."""
    p = torch.log_softmax(reference.double(), -1)
    q = torch.log_softmax(other.double(), -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def save_tokenizer(folder: Path, pre_tokenizer: str = "smollm", rows: int = 400) -> Any:
    """Train a byte-level BPE with a named pre-tokenizer and save it into ``folder``."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    from compress.export.gguf_tokenizer import PRE_TOKENIZERS

    known = {entry.name: entry for entry in PRE_TOKENIZERS}[pre_tokenizer]
    tokenizer = Tokenizer(models.BPE(ignore_merges=known.ignore_merges))
    if known.normalizers[-1] == "NFC":
        tokenizer.normalizer = normalizers.NFC()
    _set_pre_tokenizer(tokenizer, pre_tokenizer)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=rows,
        show_progress=False,
        special_tokens=["<|end|>", "<|user|>"],
        initial_alphabet=_byte_alphabet(),
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.chat_template = "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"
    fast.save_pretrained(folder)
    return fast


def _byte_alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def _set_pre_tokenizer(tokenizer: Any, name: str) -> None:
    """Set the pre-tokenizer that models of this kind are published with."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    start = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    end = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    plain = ByteLevel(add_prefix_space=False, use_regex=False)
    gpt2 = ByteLevel(add_prefix_space=False)
    digits = Digits(individual_digits=True)
    tokenizer.pre_tokenizer = {
        "gpt-2": lambda: gpt2,
        "smollm": lambda: Sequence([digits, gpt2]),
        "llama-bpe": lambda: Sequence(
            [Split(Regex(start + r"\p{N}{1,3}" + end), "isolated"), plain]
        ),
        "qwen2": lambda: Sequence(
            [Split(Regex(start + r"\p{N}" + end), "isolated"), plain]
        ),
    }[name]()
