"""Random models whose blocks differ in width or attention, and their folders."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from export_fixtures import StateDictSource, round_to_nearest
from safetensors.torch import save_file
from streaming_fixtures import model_of

from compress.core.artifact import CompressedModel, ModelDescription, TensorInfo
from compress.core.plan import LayerPlan, Plan
from compress.core.scheme import Scheme
from compress.core.shapes import (
    modeling_files,
    stored_config,
    with_attention,
    with_widths,
)
from compress.core.tensors import TORCH_DTYPES, QuantizedTensor
from compress.model.skeleton import rebuild_blocks_
from compress.planning.shapes import Shapes

WIDTHS = (96, 32, 64)


class Clock:
    """Stands in for the module ``time``; only what is timed moves it on."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


CLOCK = Clock()


def uneven_model(
    kind: str = "llama",
    *,
    widths: tuple[int, ...] = WIDTHS,
    silent: tuple[int, ...] = (),
    dtype: str = "float32",
    **changes: Any,
) -> tuple[Any, ModelDescription, StateDictSource]:
    """Return a random model with an MLP width for each block, as ``model_of`` does.

    Blocks in ``silent`` have no attention.
    """
    model, description, _ = model_of(kind, dtype=dtype, **changes)
    config = with_widths(description.config, widths)
    config = with_attention(config, [i not in silent for i in range(len(widths))])
    torch.manual_seed(1)
    rebuild_blocks_(model, config)
    model = model.eval().to(TORCH_DTYPES[dtype])
    state = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mlp." in name:  # louder than a fresh layer is: its part must show
                parameter.mul_(3)
            state[name] = parameter.detach().clone()
    tensors = {n: TensorInfo(tuple(t.shape), dtype) for n, t in state.items()}
    described = replace(description, config=config, tensors=tensors)
    return model, described, StateDictSource(state)


def save_uneven(
    folder: Path, kind: str = "llama", **changes: Any
) -> tuple[Any, ModelDescription, StateDictSource]:
    """Save such a model as a folder that stock transformers opens, and return it."""
    model, description, source = uneven_model(kind, **changes)
    folder.mkdir(exist_ok=True)
    config = stored_config(description.config) | {"dtype": description.dtype}
    (folder / "config.json").write_text(json.dumps(config, default=str))
    for name, text in modeling_files(description.config).items():
        (folder / name).write_text(text)
    save_file(source.state, folder / "model.safetensors", metadata={"format": "pt"})
    return model, description, source


def uneven_artifact(
    kind: str = "llama",
    *,
    scheme: str | None = None,
    assets: Path | None = None,
    dtype: str = "float32",
    scale_dtype: str = "float16",
    **changes: Any,
) -> tuple[Any, CompressedModel]:
    """Return such a model with codes in the linears of its blocks, and their values.

    Args:
        kind: ``model_type``.
        scheme: Of the linears; ``None`` leaves them dense.
        assets: Tokenizer folder.
        dtype: Of the weights.
        scale_dtype: Of the scales.
        changes: As for :func:`uneven_model`.

    Returns:
        A transformers model with the values of the codes, and the artifact.
    """
    model, description, source = uneven_model(kind, dtype=dtype, **changes)
    layers = {}
    for name in description.linears() if scheme else ():
        rows, columns = source.state[f"{name}.weight"].shape
        parsed = Scheme.parse(str(scheme)).with_scales(scale_dtype)
        layers[name] = LayerPlan(name, (rows, columns), "rtn", parsed)

    def quantized(name: str) -> QuantizedTensor:
        return round_to_nearest(source.state[f"{name}.weight"], layers[name].scheme)

    with torch.no_grad():
        for name in layers:
            weight = model.get_submodule(name).weight
            weight.copy_(quantized(name).dequantize())
    described = replace(description, assets=assets)
    return model, CompressedModel(described, Plan("tiny", layers), source, quantized)


def layer(rows: int, columns: int) -> LayerPlan:
    return LayerPlan("layer", (rows, columns), "rtn", Scheme.parse("int4-g128"))


LLAMA_7B = Shapes(
    hidden=4096,
    inner=11008,
    vocabulary=32000,
    blocks=32,
    block=4 * 4096**2 + 3 * 4096 * 11008,
    active=4 * 4096**2 + 3 * 4096 * 11008,
    parameters=6738415616,
    largest=32000 * 4096,
    stored_bytes=2,
    inside=(
        (layer(4096, 4096), layer(4096, 4096), layer(4096, 4096)),
        (layer(4096, 4096),),
        (layer(11008, 4096), layer(11008, 4096)),
        (layer(4096, 11008),),
    ),
    inputs=((4096, 1.0), (4096, 1.0), (4096, 1.0), (11008, 1.0)),
    outside=(),
    planned=(),
)
