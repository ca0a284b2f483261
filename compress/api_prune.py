"""Pruning from Python: ``compress.prune``, of a model in memory or on disk."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from compress import provenance
from compress.api import describe, own_tokenizer
from compress.calibration.given import given_windows
from compress.config import load_config
from compress.core.errors import ConfigError
from compress.model.devices import choose_device
from compress.model.experts import unstacked
from compress.model.loading import ModelHandle, check_tensors, open_model
from compress.model.sources import ModuleSource
from compress.pruning.stage import FOLDER, Pruning
from compress.reshaping import cautions, pruning_of

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrunedModel:
    """A pruned checkpoint, and what was removed.

    Attributes:
        folder: A dense checkpoint that transformers opens.
        record: As ``pruning`` in ``report.json``.
    """

    folder: Path
    record: Mapping[str, Any]

    def load(self, **options: Any) -> nn.Module:
        """Return the model; ``options`` are those of ``compress.load``."""
        from compress.runtime.load import load

        model: nn.Module = load(self.folder, **options)
        return model


def prune(
    model: nn.Module | str | Path,
    folder: str | Path,
    *,
    method: str = "taylor",
    sparsity: float | None = None,
    calibration: Tensor | Iterable[str] | None = None,
    tokenizer: Any = None,
    device: str = "auto",
    seed: int = 0,
    **section: Any,
) -> PrunedModel:
    """Prune a model into a folder; what was given stays as it is.

    A run of ``compress.run`` does the same with checkpoints, reports and exports.

    Args:
        model: A causal language model of transformers, or what ``model.path`` takes.
        folder: For the pruned checkpoint; must be empty or absent.
        method: Name of a pruner.
        sparsity: Share of the MLP neurons to remove; or give another unit.
        calibration: int64 ``[N, T]`` tokens; or texts, such as a column of a
            ``datasets.Dataset``; if absent and needed, the bundled ``mix``.
        tokenizer: Of a model in memory: saved beside the weights, and for texts; if
            absent, the one where the model was loaded from.
        device: Where blocks run.
        seed: Of random choices.
        section: Other keys of the section ``prune``, such as ``parameters=0.2``.

    Raises:
        CompressError: As ``compress.run`` does.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} is not empty; give a new folder")
    in_memory = isinstance(model, nn.Module)
    if isinstance(model, nn.Module):
        tokenizer = tokenizer or own_tokenizer(model)
    if sparsity is not None:
        section["sparsity"] = sparsity
    config = load_config(
        {
            "model": {"path": "in memory" if in_memory else str(model)},
            "prune": {"method": method, **section},
            "run": {"device": device, "seed": seed},
        }
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="compress-", dir=target.parent) as made:
        root = Path(made)
        handle = _opened(model, tokenizer, root / "source")
        pruning = pruning_of(config, handle, root=root, device=choose_device(device))
        assert pruning is not None
        _check(pruning, handle)
        windows = None
        if pruning.needs_windows:
            known = tokenizer if in_memory else handle.tokenizer()
            windows = given_windows(calibration, known)
        for caution in cautions(pruning, pruning.tokens(windows)):
            _log.warning(caution)
        record = pruning.run(windows, {"compress": provenance.versions()["compress"]})
        os.replace(root / FOLDER, target)
    return PrunedModel(target, record)


def _opened(model: nn.Module | str | Path, tokenizer: Any, cache: Path) -> ModelHandle:
    if not isinstance(model, nn.Module):
        return open_model(str(model), cache=cache)
    described = describe(model, tokenizer)
    return ModelHandle(described, unstacked(ModuleSource(model), described.family))


def _check(pruning: Pruning, handle: ModelHandle) -> None:
    """Raise what would stop the work later."""
    if pruning.section.shape == "padded":
        raise ConfigError(
            "shape padded is for runs, which fill up what they write; use per-layer"
        )
    pruning.provisional()
    check_tensors(handle)
