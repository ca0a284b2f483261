"""Our folders in stock transformers, for verification.

transformers opens a compressed-tensors folder lazily and decodes it in the first
forward pass. Two things about that matter when logits are compared:

* Groups with ``input_activations`` really round the inputs of their layers, by
  emulation in float. :func:`logits` can switch that off through the library's own
  switch, ``quantization_enabled``, so that the weights of the file can be compared
  alone; nothing of the file or its config is changed.
* The ``nvfp4`` and ``mxfp`` formats are decoded to bfloat16 whatever type the model was
  loaded in (0.20), and a float32 model then stops in its first product. We let the
  library decode and move the result to float32.

Integer zero points that are bit-packed load with ``dequantize=True`` only.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.core import aqlm_format
from compress.core import compressed_tensors as ct
from compress.core.errors import CheckpointError, MissingDependencyError
from compress.core.foreign import parse_json
from compress.core.shapes import attention_of, memory_config, modeling_files

_LOG = logging.getLogger(__name__)


def logits(folder: Path, windows: Tensor, *, as_served: bool) -> Iterator[Tensor]:
    """Run a folder in transformers, in float32 on the CPU.

    Args:
        folder: Of :class:`SafetensorsExporter`.
        windows: int64 ``[N, T]`` token ids; each row is a forward pass of its own.
        as_served: Keep what the config says about inputs and the key-value cache.

    Yields:
        float32 logits ``[T, V]`` for each window.

    Raises:
        MissingDependencyError: compressed-tensors is not installed.
    """
    model = _load(folder)
    if not as_served:
        for module in model.modules():
            if hasattr(module, "quantization_scheme"):
                module.quantization_enabled = False
    for window in windows:
        with torch.inference_mode():
            # A cache is made, since only then its quantization runs.
            output: Tensor = model(window[None].long(), use_cache=as_served).logits[0]
        yield output.float()


def rounds_more_than_weights(folder: Path) -> bool:
    """Whether the folder's config asks to round inputs or the key-value cache."""
    quantization = read_config(folder).get("quantization_config") or {}
    groups = quantization.get("config_groups", {}).values()
    inputs = any(group.get("input_activations") for group in groups)
    # With dequantize=True nothing but weights is left.
    return not _needs_dequantize(quantization) and (
        inputs or bool(quantization.get("kv_cache_scheme"))
    )


def read_config(folder: Path) -> dict[str, Any]:
    """Return ``config.json`` of a folder.

    Raises:
        CheckpointError: There is none that can be read.
    """
    try:
        config: dict[str, Any] = parse_json((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}/config.json: {error}") from error
    return config


def _needs_dequantize(quantization: dict[str, Any]) -> bool:
    return any(
        not group["weights"]["symmetric"] and group["format"] == "pack-quantized"
        for group in quantization.get("config_groups", {}).values()
    )


def _load(folder: Path) -> Any:
    """Load the folder as any user of transformers would, and have it decoded."""
    from transformers import AutoModelForCausalLM

    config = read_config(folder)
    quantization = config.get("quantization_config")
    options: dict[str, Any] = {}
    packed = False
    if quantization:
        packed = quantization.get("quant_method") == ct.QUANT_METHOD
        check_library(str(quantization.get("quant_method")))
        if packed and _needs_dequantize(quantization):
            from transformers import CompressedTensorsConfig

            _LOG.info("integer zero points: loading with dequantize=True")
            options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    with _no_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation=attention_of(config),
            trust_remote_code=_has_own_code(folder, config),
            **options,
        ).eval()
        if packed and not options:
            model.hf_quantizer.compressor.decompress_model(model)
            for parameter in model.parameters():
                # 5.17 decodes experts to the type of their scales.
                if parameter.dtype in (torch.bfloat16, torch.float16):
                    parameter.data = parameter.data.float()
    return model


def check_library(method: str) -> None:
    """Raise unless what transformers needs for a ``quant_method`` is installed."""
    needed = {
        ct.QUANT_METHOD: {"compressed_tensors": ("compressed-tensors", "verify")},
        aqlm_format.QUANT_METHOD: {
            "aqlm": ("aqlm", "aqlm"),
            "numba": ("numba", "aqlm"),  # its kernels for a CPU
            "scipy": ("scipy", "aqlm"),  # products in these
        },
    }
    for module, (distribution, extra) in needed.get(method, {}).items():
        try:
            import_module(module)
        except ImportError as error:
            raise MissingDependencyError(
                distribution, extra=extra, purpose="loading this checkpoint"
            ) from error


def _has_own_code(folder: Path, config: dict[str, Any]) -> bool:
    """Whether the code of a folder is what we write there, to the letter."""
    files = modeling_files(memory_config(config))
    return bool(files) and all(
        (folder / name).is_file() and (folder / name).read_text("utf-8") == text
        for name, text in files.items()
    )


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep the bars of the loading libraries out of the output of ours.

    They show one bar for each stage, some of which no option switches off.
    """
    from tqdm import tqdm

    original = tqdm.__init__

    def silent(bar: Any, *values: Any, **options: Any) -> None:
        original(bar, *values, **{**options, "disable": True})

    tqdm.__init__ = silent
    try:
        yield
    finally:
        tqdm.__init__ = original
