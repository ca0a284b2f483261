"""Load a written checkpoint as an ordinary transformers model."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress.core.artifact import TensorSource
from compress.core.errors import CheckpointError
from compress.core.families import family_of
from compress.core.scheme import Scheme
from compress.core.shapes import attention_of, memory_config
from compress.model.coded_source import CodedSource, open_coded
from compress.model.experts import (
    ActiveExperts,
    split_experts_,
    stacked,
    unstacked,
)
from compress.model.quantized_config import folder_config, quantization_of
from compress.model.skeleton import as_transformers, rebuild_blocks_
from compress.model.sources import SafetensorsSource
from compress.runtime.w6a8.fuse_model import fuse_
from compress.runtime.w6a8.linear import W6A8Linear
from compress.runtime.w6a8.tiles import obstacle

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LOG = logging.getLogger(__name__)


def load(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = torch.float32,
    device: str | torch.device = "cpu",
    as_served: bool = False,
    fused: bool = True,
) -> PreTrainedModel:
    """Return the model of a folder, dense or as it is served, in evaluation mode.

    Codes are decoded in float32 and then rounded once to ``dtype``, so with the default
    the weights are exactly what the codes say. No library of a format is
    used. Memory is that of the dense model in ``dtype`` and one more tensor.

    As it is served, layers with 6-bit weights keep their codes; those with int8 inputs
    (``w6a8``) round them, with GPU kernels where there are any, and those with exact
    inputs (``int6``) decode their weight in each pass; see ``runtime/w6a8``. Experts
    are layers of their own then. All other layers are decoded, and a warning says why.

    Args:
        folder: Our safetensors output, or any dense safetensors folder.
        dtype: Type of all weights; ``None`` takes the type that the config states.
        device: Where the weights go.
        as_served: Keep the codes of layers with 6-bit weights.
        fused: Compute norms, q/k/v, gate/up and SiLU of such layers together; see
            ``runtime/w6a8/fusion``.

    Raises:
        CheckpointError: The folder is missing or damaged, holds pickled weights, is
            quantized in a way that is not read here, or is to be served and has no
            layer that can be.
    """
    path = Path(folder)
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: not a folder; give a folder with config.json and safetensors"
        )
    packed = quantization_of(path) is not None
    source: TensorSource = open_coded(path) if packed else SafetensorsSource(path)
    model = _skeleton(path, dtype)
    kept: dict[str, W6A8Linear] = {}
    family = family_of(str(model.config.model_type))
    if as_served:
        split_experts_(model, family, kind=ActiveExperts)
        kept = _keep_codes_(model, source, path, device)
    source = unstacked(source, family)
    if not as_served:
        source = stacked(source, family)
    _fill_(model, source, kept, dtype=dtype or model.dtype, device=device)
    model.to(device)
    if kept and fused:
        fuse_(model, family)
    if kept:  # what is saved again has codes, and must say so
        model.config.quantization_config = quantization_of(path)
    if (path / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(path)
    return model.eval()


def _skeleton(path: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    """Return the model with its weights on the meta device and its buffers computed."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    stored = folder_config(path)
    stored.pop("quantization_config", None)
    try:
        config = as_transformers(memory_config(stored))
        config.name_or_path = str(path)
        # Buffers such as rotary frequencies are in no file: they must be computed.
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config,
                attn_implementation=attention_of(config.to_dict()),
                dtype=dtype or config.dtype or torch.float32,
            )
            rebuild_blocks_(model, config.to_dict())
    except Exception as error:  # each model class has checks of its own
        raise CheckpointError(
            f"{path}/config.json: transformers cannot build this model: {error}"
        ) from error
    return model


def _keep_codes_(
    model: PreTrainedModel, source: TensorSource, path: Path, device: Any
) -> dict[str, W6A8Linear]:
    """Put the layers that are served with their codes into ``model``, by name."""
    kept: dict[str, W6A8Linear] = {}
    reasons: Counter[str] = Counter()
    modules = dict(model.named_modules())
    for name, scheme in _schemes(source).items():
        assert isinstance(source, CodedSource)
        rows, columns = source.tensors()[f"{name}.weight"].shape
        reason = obstacle(scheme, (rows, columns))
        original = modules.get(name)
        if reason is None and not isinstance(original, nn.Linear):
            reason = f"they are a {type(original).__name__}, not a linear layer"
        if reason is not None or original is None:
            reasons[str(reason)] += 1
            continue
        codes = source.codes(name)
        moved = replace(
            codes, codes=codes.codes.to(device), scale=codes.scale.to(device)
        )
        kept[name] = W6A8Linear(moved, original.bias)
        model.set_submodule(name, kept[name])
    for reason, count in reasons.items():
        _LOG.warning("%s: %d layers are decoded: %s", path, count, reason)
    if not kept:
        raise CheckpointError(
            f"{path}: no layer has 6-bit weights around zero; leave out as_served, or "
            "quantize with a scheme such as w6a8-g128"
        )
    return kept


def _schemes(source: TensorSource) -> Mapping[str, Scheme]:
    return source.schemes if isinstance(source, CodedSource) else {}


def _expected(model: nn.Module) -> dict[str, Tensor]:
    """Return what a checkpoint may fill; the state would encode all codes anew."""
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for path, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                found[f"{path}.{name}"] = buffer
    return found


def _fill_(
    model: PreTrainedModel,
    source: TensorSource,
    kept: Collection[str],
    *,
    dtype: torch.dtype,
    device: str | torch.device,
) -> None:
    """Put the checkpoint's tensors into ``model``; every parameter must be covered."""
    expected = _expected(model)
    state: dict[str, Tensor] = {}
    for name, info in source.tensors().items():
        if name.removesuffix(".weight") in kept:
            continue
        if name not in expected:
            _LOG.warning("%s is in the checkpoint but not in the model: not used", name)
            continue
        if tuple(expected[name].shape) != info.shape:
            raise CheckpointError(
                f"{name} is {list(info.shape)} in the checkpoint, the config makes it "
                f"{list(expected[name].shape)}"
            )
        tensor = source.read(name).to(device)
        state[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    absent = [
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.is_meta
    ]
    if absent:
        raise CheckpointError(
            f"the checkpoint lacks {len(absent)} weights of the model, such as "
            f"{absent[0]}; it is damaged or its config.json is of another model"
        )
