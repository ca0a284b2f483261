"""The stage ``tune`` of a run: after the codes are made, before anything reads them.

Tuned codes lie in ``WORKDIR/tuned``, as others do in ``blocks``, beside the dense
weights that were trained along. They take the place of the calibrated ones for
evaluation and every export; the calibrated ones stay where they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from compress.calibration.sources import check_sources
from compress.config.schema import Config
from compress.config.training_checks import tune_options
from compress.config.tune_section import TuneOptions
from compress.core.artifact import ModelDescription, TensorInfo, TensorSource
from compress.core.errors import CheckpointError, ConfigError
from compress.core.plan import Plan
from compress.core.tensors import QuantizedTensor
from compress.model.loading import ModelHandle
from compress.recovery.text import load_recovery_text
from compress.transform import part_of_layer
from compress.tuning.tune import Tuned, problem_of, tune
from compress.workdir import LayerRecord, WorkDir, write_atomically

if TYPE_CHECKING:
    from compress.pipeline import Run

FOLDER, STATE = "tuned", "tuning"
_DENSE = "dense.safetensors"


def check(config: Config, plan: Plan, model: ModelDescription) -> None:
    """Raise if what a config wants tuned cannot be; reads no weight.

    Raises:
        ConfigError: No layer is tuned, or a scheme cannot be.
        CalibrationError: The text is not there.
    """
    if config.tune is None:
        return
    options = tune_options(config.tune)
    check_sources(config.calibration.data)
    layers = layers_of(plan, model, options)
    if not layers:
        raise ConfigError(
            "tune: the plan codes no linear layer; quantize some, or leave tune out"
        )
    for name in layers:
        layer = plan.layers[name]
        problem = problem_of(options, layer.scheme, layer.shape)
        if problem is not None:
            raise ConfigError(f"tune: {name}: {problem}, or leave tune out")


def layers_of(plan: Plan, model: ModelDescription, options: TuneOptions) -> list[str]:
    """Return the layers that are tuned: all coded ones, the embedding if wanted."""
    skipped = None if options.embeddings else model.family.embedding
    return [name for name in plan.layers if name != skipped]


@dataclass(frozen=True)
class TunedLayers:
    """The result of the stage, in the work directory.

    Attributes:
        folder: Of the files.
        model: The model.
        layers: That were tuned.
        record: For the report.
    """

    folder: WorkDir
    model: ModelDescription
    layers: frozenset[str]
    record: Mapping[str, Any]

    def read(self, layer: str) -> QuantizedTensor:
        """Return the codes of a layer that was tuned."""
        return self.folder.read_layer(part_of_layer(layer, self.model), layer)

    def source(self, source: TensorSource) -> TensorSource:
        """Return dense tensors with those that were trained in their place."""
        return _Replaced(source, self.folder.root / _DENSE)


def carry_out(run: Run) -> TunedLayers | None:
    """Tune the codes of a run, unless that was done; ``None`` without the section."""
    section = run.config.tune
    if section is None:
        return None
    check(run.config, run.plan, run.model)
    options = tune_options(section)
    names = layers_of(run.plan, run.model, options)
    target = run.workdir.root / FOLDER

    def compute() -> dict[str, Any]:
        data = run.config.calibration.data
        sources = data if isinstance(data, str) else list(data)
        with run.timed("tune"):
            found = tune(
                ModelHandle(run.model, run.compressed_source()),
                run.handle,
                {name: run.codes(name) for name in names},
                originals=run.artifact.source,
                text=load_recovery_text(sources, run.handle.tokenizer(), options),
                options=options,
                device=run.device,
                state=run.workdir.root / STATE,
                save=lambda tuned: run.workdir.replace_folder(
                    target, lambda part: _write(run, tuned, part)
                ),
            )
        return dict(found.record)

    record = run.workdir.stage(STATE, compute)
    return TunedLayers(WorkDir(target), run.model, frozenset(names), record)


def _write(run: Run, tuned: Tuned, folder: Path) -> None:
    from safetensors.torch import save

    parts: dict[str, dict[str, QuantizedTensor]] = {}
    for name, tensor in tuned.codes.items():
        parts.setdefault(part_of_layer(name, run.model), {})[name] = tensor
    work = WorkDir(folder)
    for part, tensors in parts.items():
        records = run.workdir.records(part)
        kept = ("error", "weight_error", "seconds", "tokens")
        work.save_part(
            part,
            tensors,
            {n: LayerRecord(**{k: records[n][k] for k in kept}) for n in tensors},
        )
    dense = {name: tensor.contiguous() for name, tensor in tuned.dense.items()}
    write_atomically(folder / _DENSE, save(dense))


class _Replaced(TensorSource):
    """Another source's tensors, some of which are read from a file instead."""

    def __init__(self, source: TensorSource, file: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self._source, self._file = source, file
        try:
            with safe_open(file, framework="pt") as opened:
                self._names = frozenset(opened.keys())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file} is damaged ({error}); delete results/{STATE}.json and run "
                "again with --resume"
            ) from error

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Describe every tensor."""
        return self._source.tensors()

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        from safetensors import safe_open

        if name not in self._names:
            return self._source.read(name)
        with safe_open(self._file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name).clone()
        return tensor

    def read_index(self, name: str, index: int) -> Tensor:
        """Return one entry along the first axis."""
        if name in self._names:
            return super().read_index(name, index)
        return self._source.read_index(name, index)
