"""Tiny artifacts for export tests: a random Llama, coded by rounding to nearest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compress.core import grids
from compress.core.artifact import (
    CompressedModel,
    ModelDescription,
    TensorInfo,
    TensorSource,
)
from compress.core.codebooks import to_stored
from compress.core.families import family_of
from compress.core.plan import LayerPlan, Plan
from compress.core.scheme import Scheme, Zero
from compress.core.tensors import TORCH_DTYPES, LowRank, QuantizedTensor


class StateDictSource(TensorSource):
    """Tensors of a dictionary, and a count of what was read."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = dict(state)
        self.reads: list[str] = []

    def tensors(self) -> Mapping[str, TensorInfo]:
        return {
            name: TensorInfo(tuple(t.shape), str(t.dtype).removeprefix("torch."))
            for name, t in self.state.items()
        }

    def read(self, name: str) -> Tensor:
        self.reads.append(name)
        return self.state[name].clone()


def round_to_nearest(weight: Tensor, scheme: Scheme) -> QuantizedTensor:
    """Absmax (or min-max) rounding to nearest, with stored scales."""
    if scheme.codebook is not None:
        return random_tables(weight, scheme)
    if not scheme.is_integer or scheme.rank or scheme.zero is Zero.OFFSET:
        return _round_on_grid(weight, scheme)
    rows, columns = weight.shape
    groups = weight.float().view(rows, -1, scheme.group_of(columns))
    storage = TORCH_DTYPES[scheme.scale_dtype]
    if scheme.zero is Zero.NONE:
        scale = groups.abs().amax(-1) / scheme.highest
        zero = None
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = (high - low) / (scheme.highest - scheme.lowest)
        zero = scheme.lowest - low / scale
        zero = zero.round().clamp(scheme.lowest, scheme.highest).to(torch.int8)
    scale = scale.clamp(min=1e-6).to(storage)
    codes = (groups / scale.float()[..., None]).round()
    if zero is not None:
        codes = codes + zero[..., None]
    codes = codes.clamp(scheme.lowest, scheme.highest).to(torch.int8)
    return QuantizedTensor(codes.view(rows, columns), scale, zero, scheme)


def random_tables(weight: Tensor, scheme: Scheme) -> QuantizedTensor:
    """Return random codes, tables and scales of a weight's shape, seeded by it."""
    book, (rows, columns) = scheme.codebook, weight.shape
    assert book is not None
    storage = TORCH_DTYPES[scheme.scale_dtype]
    seed = int(weight.float().abs().sum() * 1000)
    generator = torch.Generator().manual_seed(seed)
    runs = scheme.table_runs(rows, columns)
    shape = (runs, book.count, 1 << scheme.bits, book.vector)
    tables = 0.1 * torch.randn(shape, generator=generator)
    size = (rows, columns // book.vector * book.count)
    codes = torch.randint(1 << scheme.bits, size, generator=generator)
    scale = torch.ones(1, 1)
    if book.scaled:
        scale = 0.5 + torch.rand(rows, 1, generator=generator)
    stored = to_stored(codes, scheme.bits)
    return QuantizedTensor(
        stored, scale.to(storage), None, scheme, tables=tables.to(storage)
    )


def _round_on_grid(weight: Tensor, scheme: Scheme) -> QuantizedTensor:
    """Round with the project's own grids, and a correction of the first columns."""
    groups = grids.as_groups(weight, scheme)
    parameters = grids.range_parameters(groups, scheme)
    levels = grids.encode(groups, parameters, scheme).view(weight.shape)
    low_rank = None
    if scheme.rank:
        rows, columns = weight.shape
        ones = torch.ones(rows, scheme.rank, dtype=torch.int8)
        scale = torch.full((1, scheme.rank), 0.01, dtype=torch.float16)
        across = torch.ones(scheme.rank, columns, dtype=torch.int8)
        low_rank = LowRank(ones, scale, across, scale.t().contiguous())
    return grids.assemble(levels, parameters, scheme, low_rank=low_rank)


def tiny_llama(
    *, tied: bool = False, dtype: str = "float32", blocks: int = 2, hidden: int = 64
) -> tuple[dict[str, Tensor], ModelDescription]:
    """Return the state and the description of a random Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=96,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
        architectures=["LlamaForCausalLM"],
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(TORCH_DTYPES[dtype])
    state = {n: p.detach().clone() for n, p in model.named_parameters()}
    infos = {n: TensorInfo(tuple(t.shape), dtype) for n, t in state.items()}
    description = ModelDescription(
        label="tiny",
        config=config.to_dict(),
        family=family_of("llama"),
        tensors=infos,
        dtype=dtype,
        tied=tied,
    )
    return state, description


def make_artifact(
    scheme_of: Callable[[str], str | None],
    *,
    tied: bool = False,
    dtype: str = "float32",
    scale_dtype: str | None = None,
    assets: Path | None = None,
    hidden: int = 64,
) -> CompressedModel:
    """Return a compressed tiny Llama; ``scheme_of`` maps layer names to schemes."""
    state, description = tiny_llama(tied=tied, dtype=dtype, hidden=hidden)
    description = ModelDescription(**{**vars(description), "assets": assets})
    layers = {}
    for name, tensor in state.items():
        layer = name.removesuffix(".weight")
        scheme = scheme_of(layer) if tensor.ndim == 2 else None
        if scheme is not None:
            parsed = Scheme.parse(scheme).with_scales(scale_dtype or dtype)
            shape = (tensor.shape[0], tensor.shape[1])
            layers[layer] = LayerPlan(layer, shape, "rtn", parsed)

    def quantized(layer: str) -> QuantizedTensor:
        return round_to_nearest(state[f"{layer}.weight"], layers[layer].scheme)

    return CompressedModel(
        description,
        Plan("tiny", layers),
        StateDictSource(state),
        quantized,
        input_amax={name: 12.5 for name in layers},
    )


def skip_if_unknown(name: str) -> None:
    """Skip a test of a scheme that the installed compressed-tensors does not have."""
    if "fp6" in name.lower():
        pytest.importorskip("compressed_tensors.compressors.mxfp6")


def linears(scheme: str) -> Callable[[str], str | None]:
    """Give every linear of the blocks ``scheme``."""
    return lambda layer: scheme if ".layers." in layer else None


def dense_logits(artifact: CompressedModel, windows: Tensor) -> Tensor:
    """Return float32 logits of a model whose weights are our dequantized values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**artifact.description.config)).float()
    state = {}
    for name in artifact.description.tensors:
        layer = name.removesuffix(".weight")
        if layer in artifact.plan.layers:
            state[name] = artifact.quantized(layer).dequantize()
        else:
            state[name] = artifact.source.read(name).float()
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    with torch.inference_mode():
        return torch.stack([model(w[None]).logits[0] for w in windows])
