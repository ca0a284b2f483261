"""An importance matrix of llama.cpp in the place of calibration.

It holds the mean square of each input column of the original model, the diagonal of the
Hessian over ``2 T``: enough for methods that weigh columns one by one, too little for
those that let one column make up for another.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from compress.config import Config
from compress.core.artifact import ModelDescription
from compress.core.contracts import Quantizer
from compress.core.errors import CheckpointError, ConfigError
from compress.core.plan import Plan
from compress.export.gguf_experts import expert_stacks
from compress.export.gguf_names import name_finder
from compress.export.imatrix_reader import read_imatrix


def importances_of(
    config: Config,
    model: ModelDescription,
    plan: Plan,
    quantizers: Mapping[str, Quantizer],
) -> dict[str, Tensor]:
    """Return the importances that a config names, float32 ``[C]``, by module name.

    Args:
        config: Without ``calibration.imatrix`` there are none.
        model: That will be quantized.
        plan: What its layers become.
        quantizers: The methods of the plan, by name.

    Raises:
        ConfigError: The config has a budget, transforms or no layers to quantize, or a
            method that needs more than importances.
        CheckpointError: As :func:`read_importances`.
    """
    path = config.calibration.imatrix
    if path is None:
        return {}
    _check(config, model, plan, quantizers)
    return read_importances(Path(path), model, plan)


def _check(
    config: Config,
    model: ModelDescription,
    plan: Plan,
    quantizers: Mapping[str, Quantizer],
) -> None:
    if config.budget is not None:
        raise ConfigError(
            "calibration.imatrix: a budget needs losses measured on text; leave out "
            "one of them"
        )
    if not plan.layers:
        raise ConfigError(
            "calibration.imatrix: no layer is quantized; leave it out, or add quantize"
        )
    for layer in plan.layers.values():
        if not quantizers[layer.method].takes_importance(layer.scheme):
            raise ConfigError(
                f"calibration.imatrix: {layer.method} on {layer.scheme.name} "
                f"({layer.name}) does not work from importances of columns alone; use "
                "method rtn with a K or IQ4 type, or with `search: true` under "
                "quantize.options, or leave calibration.imatrix out"
            )
    if model.transforms:
        raise ConfigError(
            "calibration.imatrix: it describes inputs of the original model, and "
            f"{', '.join(model.transforms)} changes them; leave transforms out"
        )


def read_importances(
    path: Path, model: ModelDescription, plan: Plan
) -> dict[str, Tensor]:
    """Return the importances of a plan's layers, float32 ``[C]``, by module name.

    Embedding and head have some only if the file does: ``llama-imatrix`` leaves them
    out by default.

    Raises:
        ConfigError: GGUF has no names for this family.
        CheckpointError: The file is damaged, or of another model: a layer is missing
            or has another width.
    """
    names = _gguf_names(model)
    entries = read_imatrix(path).entries
    found = {}
    inside = set(model.linears())
    for layer in plan.layers.values():
        name, row, rows = names.get(layer.name, ("", 0, 1))
        if name not in entries:
            if layer.name not in inside:
                continue
            raise CheckpointError(
                f"{path}: no importances of {layer.name} ({name}); give a matrix of "
                f"{model.label}, made from all of its blocks"
            )
        means = entries[name].means()
        columns = layer.shape[1]
        if means.size != rows * columns:
            raise CheckpointError(
                f"{path}: {name} has {means.size} importances, {layer.name} wants "
                f"{rows} x {columns}; give a matrix of {model.label}"
            )
        values = torch.from_numpy(means.reshape(rows, columns)[row])
        found[layer.name] = values.float().contiguous()
    return found


def _gguf_names(model: ModelDescription) -> dict[str, tuple[str, int, int]]:
    """Return GGUF name, place in a stack and its height, by module name."""
    architecture = model.family.gguf_architecture
    if architecture is None:
        raise ConfigError(
            f"calibration.imatrix: GGUF's names of {model.family.name} are not known "
            "here; leave it out, and calibrate on text"
        )
    find = name_finder(architecture, model.block_count)
    names = {}
    for stack in expert_stacks(model, find):
        for row, member in enumerate(stack.members):
            names[member] = (stack.target, row, len(stack.members))
    for name in model.tensors:
        module = name.removesuffix(".weight")
        if module not in names and (target := find(name)) is not None:
            names[module] = (target, 0, 1)
    return names
