"""accelerate: a model that transformers has loaded, with our linear layers in it."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from compress.core import compressed_tensors as ct
from compress.core.errors import CheckpointError, CompressError
from compress.core.families import family_of
from compress.core.scheme import Scheme
from compress.core.tensors import QuantizedTensor
from compress.runtime.w6a8.fuse_model import fuse_
from compress.runtime.w6a8.linear import W6A8Linear
from compress.runtime.w6a8.tiles import SCALE_DTYPES, obstacle

_LOG = logging.getLogger(__name__)
_Model = TypeVar("_Model", bound=nn.Module)


def accelerate(model: _Model, *, fused: bool = True) -> _Model:
    """Put layers that keep their codes in the places of those with 6-bit weights.

    For models that transformers has just loaded from a compressed-tensors folder: the
    library decodes all weights in the first forward pass, and then there are no codes.
    What is left as it is, and why, is logged.

    Args:
        model: Changed in place.
        fused: Compute norms, q/k/v, gate/up and SiLU of such layers together; see
            ``runtime/w6a8/fusion``. Families are those of ``core/families``.

    Returns:
        The same model.

    Raises:
        CheckpointError: No layer could be replaced, or codes are damaged.
    """
    reasons: Counter[str] = Counter()
    replaced = 0
    for name, module in list(model.named_modules()):
        if getattr(module, "quantization_scheme", None) is None:
            continue
        reason = _reason_against(module)
        if reason is not None:
            reasons[reason] += 1
            continue
        try:
            model.set_submodule(name, W6A8Linear(_quantized(module), module.bias))
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from error
        replaced += 1
    for reason, count in reasons.items():
        _LOG.warning("%d layers stay as they are: %s", count, reason)
    if not replaced:
        raise CheckpointError(
            "the model has no layer that can be replaced: "
            + ("; ".join(reasons) or "none is quantized by compressed-tensors")
        )
    saved = _fuse_(model) if fused else 0
    _LOG.info("%d layers keep their codes, %d calls are saved", replaced, saved)
    return model


def _fuse_(model: nn.Module) -> int:
    config = getattr(model, "config", None)
    try:
        family = family_of(str(getattr(config, "model_type", None)))
    except CheckpointError as error:
        _LOG.warning("layers are computed one by one: %s", error)
        return 0
    return fuse_(model, family)


def _reason_against(module: nn.Module) -> str | None:
    if not isinstance(module, nn.Linear):
        return f"a {type(module).__name__} is not a linear layer"
    if "weight_packed" not in dict(module.named_parameters(recurse=False)) | dict(
        module.named_buffers(recurse=False)
    ):
        return (
            "their codes are gone or of another format; call accelerate before the "
            "first forward pass, on packed weights"
        )
    try:
        scheme = _scheme(module)
    except CompressError as error:
        return str(error)
    return obstacle(scheme, (module.out_features, module.in_features))


def _scheme(module: nn.Module) -> Scheme:
    described: Any = module.quantization_scheme  # a pydantic model of the library
    entry = described.model_dump(mode="json")
    scale = str(_scales(module).dtype).removeprefix("torch.")
    return ct.scheme_of_group(entry, "pack-quantized", scale)


def _scales(module: nn.Module) -> Tensor:
    """Return the scales as the file had them: loading in float32 makes them wider."""
    given = module.get_parameter("weight_scale").detach()
    for dtype in SCALE_DTYPES:
        narrow = given.to(dtype)
        if torch.equal(narrow.to(given.dtype), given):
            return narrow
    return given


def _quantized(module: nn.Linear) -> QuantizedTensor:
    scheme = _scheme(module)
    shape = (module.out_features, module.in_features)
    layout = ct.layout_named("pack-quantized")
    stored = {s: getattr(module, s).detach() for s in layout.tensors(scheme, shape)}
    return layout.decode(stored | {ct.SCALE: _scales(module)}, scheme, shape)
