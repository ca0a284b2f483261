"""What changes the shape of a model before the rest of a run: pruning.

A run is set up twice. First with a description of the size to come, so that whatever
the config asks for is checked before any work; then, when ``WORKDIR/pruned`` is there,
with that folder as its model. The original stays what results are compared with.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import provenance
from compress.config.plugins import create_pruner
from compress.config.schema import Config
from compress.core.artifact import ModelDescription
from compress.core.errors import SchemeError
from compress.core.scheme import Scheme
from compress.model.devices import choose_dtype
from compress.model.loading import ModelHandle, locate, open_model
from compress.model.padding import padded
from compress.pruning.dealing import check_budgets
from compress.pruning.stage import FOLDER, Pruning
from compress.pruning.target import target_of

if TYPE_CHECKING:
    from compress.pipeline import Run

_log = logging.getLogger(__name__)
_UNIT = 64
_SUPER_BLOCK = 256


def pruning_of(
    config: Config, handle: ModelHandle, *, root: Path, device: str
) -> Pruning | None:
    """Return the pruning of a config, checked; ``None`` without one.

    Raises:
        ConfigError: It cannot be done; said before anything is computed.
    """
    section = config.prune
    if section is None:
        return None
    pruner = create_pruner(section.method, section.options, path=("prune", "options"))
    model = handle.description
    unit = section.round_to or unit_of(config)
    pruning = Pruning(
        model,
        handle.source,
        section,
        pruner,
        target_of(section, pruner, model, unit),
        root,
        device=device,
        dtype=choose_dtype(config.calibration.dtype, model.dtype, device),
        seed=config.run.seed,
    )
    check_budgets(pruning)
    return pruning


def unit_of(config: Config) -> int:
    """Return the multiple that widths should have for the schemes of a config.

    K-quants have super-blocks of 256 columns; kernels want whole groups.
    """
    names = []
    if config.quantize is not None:
        names += [config.quantize.scheme]
        names += [override.scheme for override in config.quantize.overrides.values()]
    if config.allocate is not None:
        names += config.allocate.schemes or ()
    elif config.budget is not None and any(e.format == "gguf" for e in config.export):
        return _SUPER_BLOCK
    found = _UNIT
    for name in names:
        if name is None:
            continue
        try:
            scheme = Scheme.parse(name)
        except SchemeError:
            continue  # `dense`
        if name.endswith("_k") or name.startswith("iq4_xs"):
            return _SUPER_BLOCK
        found = max(found, scheme.group_size or 0)
    return found


def provisional(pruning: Pruning, handle: ModelHandle) -> ModelHandle:
    """Return a model of the size to come, to be described and never read."""
    return replace(handle, description=_shaped(pruning, pruning.provisional()))


def _shaped(pruning: Pruning, model: ModelDescription) -> ModelDescription:
    if pruning.section.shape != "padded":
        return model
    return padded(model, pruning.source)[0]


def carry_out(run: Run) -> tuple[ModelHandle, dict[str, Any]]:
    """Prune what a run is about, and return the pruned model and what was done.

    Args:
        run: Set up on a provisional model.
    """
    pruning = run.pruning
    assert pruning is not None
    tokens = run.load_tokens() if pruning.needs_windows else None
    section = run.config.prune
    assert section is not None
    fingerprint = {
        "model": provenance.model_digest(run.base, locate(run.config.model.path)),
        "calibration": tokens.digest if tokens else "none",
        "calibration.dtype": str(pruning.dtype) if tokens else "none",
        "prune": provenance.digest_of(
            [section.model_dump(mode="json"), pruning.target.unit]
        ),
        "run.seed": str(run.config.run.seed),
        "compress version": provenance.versions()["compress"],
    }
    with run.timed("prune"):
        record = pruning.run(tokens.tokens if tokens else None, fingerprint)
    neurons = record["neurons"]
    _log.info(
        "pruned: %s of %s neurons and %s of %s blocks stay",
        neurons["after"],
        neurons["before"],
        len(record["blocks"]),
        run.base.block_count,
    )
    return opened(pruning, run.handle), record


def opened(pruning: Pruning, original: ModelHandle) -> ModelHandle:
    """Return the model of the pruned folder, under the original's name."""
    folder = pruning.root / FOLDER
    found = open_model(str(folder), cache=folder)
    description, source = found.description, found.source
    if pruning.section.shape == "padded":
        description, source = padded(description, source)
    named = replace(description, label=original.description.label)
    return replace(original, description=named, source=source)


def about(record: Mapping[str, Any] | None, run: Run) -> dict[str, Any] | None:
    """Return the entry ``pruning`` of a report."""
    if record is None:
        return None
    from compress.planning.budget import parameter_count

    counts = {
        "before": parameter_count(run.base),
        "after": parameter_count(run.subject.description),
    }
    return {**record, "parameters": counts}
