"""What a run needs before it is set up: the model, the methods, and checks of both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.calibration.data import CalibrationTokens, load_tokens
from compress.calibration.sources import check_sources
from compress.config import load_config, recover_options, tune_options
from compress.config.plugins import create_chain, create_quantizer
from compress.config.schema import Config
from compress.config.training_options import TrainingOptions
from compress.core.contracts import Quantizer
from compress.core.errors import ConfigError
from compress.evaluation.tasks import check_source
from compress.evaluation.texts import check_evaluation_text
from compress.model.devices import choose_device
from compress.model.loading import ModelHandle, open_model
from compress.recovery.compiled import check_compiler


def prepared(config: Config | Mapping[str, Any] | str | Path) -> Config:
    """Return a checked config, after setting threads and seed of this process."""
    import torch

    loaded = config if isinstance(config, Config) else load_config(config)
    if loaded.run.threads is not None:
        torch.set_num_threads(loaded.run.threads)
    torch.manual_seed(loaded.run.seed)
    return loaded


def check_inputs(config: Config) -> None:
    """Raise if texts, formats or a compiler that a config asks for cannot be had.

    Raises:
        ConfigError: With what to do.
    """
    names = [entry.format for entry in config.export]
    if len(set(names)) < len(names):
        raise ConfigError("export: each format may be named once")
    for name in config.evaluate.perplexity if config.evaluate else ():
        check_evaluation_text(name)
    for source in config.evaluate.tasks if config.evaluate else ():
        check_source(source)
    if config.prune is not None or _quantizing_uses_data(config):
        check_sources(config.calibration.data)
    trainings: list[TrainingOptions] = []
    if config.recover is not None:
        trainings.append(recover_options(config.recover))
    if config.tune is not None:
        trainings.append(tune_options(config.tune))
    for options in trainings:
        if options.compile:
            device = choose_device(config.run.device)
            check_compiler(device, f"{options.section}.options.compile")


def open_original(config: Config, assets: Path) -> ModelHandle:
    """Open the model of a config.

    Args:
        config: Names it.
        assets: Folder for tokenizer files that are made from a GGUF file.
    """
    section = config.model
    return open_model(
        section.path,
        dtype=section.dtype,
        resident=section.resident,
        trust_remote_code=section.trust_remote_code,
        cache=assets,
    )


def calibration_tokens(config: Config, handle: ModelHandle) -> CalibrationTokens:
    """Return the calibration tokens of a config.

    Raises:
        CalibrationError: The text cannot be used.
    """
    section = config.calibration
    return load_tokens(
        section.data if isinstance(section.data, str) else list(section.data),
        handle.tokenizer(),
        samples=section.samples,
        sequence_length=section.sequence_length,
        seed=section.seed,
    )


def quantizers_of(config: Config) -> dict[str, Quantizer]:
    """Return all methods of a config, by name."""
    quantize = config.quantize
    if quantize is None:
        return {}
    return {
        method: create_quantizer(
            method, quantize.options if method == quantize.method else None
        )
        for method in _methods(config)
    }


def _methods(config: Config) -> set[str]:
    quantize = config.quantize
    if quantize is None:
        return set()
    overrides = quantize.overrides.values()
    return {quantize.method, *(o.method for o in overrides if o.method)}


def _quantizing_uses_data(config: Config) -> bool:
    if config.budget is not None:
        return True
    methods = [create_quantizer(method) for method in _methods(config)]
    return create_chain(config.transform_entries, methods).needs_inputs or any(
        method.needs_statistics for method in methods
    )
