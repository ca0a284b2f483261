"""Tuning from end to end: codes, two models and text in, better codes and facts out.

A run that was killed goes on from its last checkpoint, with the same result if steps
end it and nothing is summed without an order (on a GPU, tables are).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.config.tune_section import (
    TUNINGS,
    EdkmOptions,
    PVOptions,
    TuneOptions,
)
from compress.core.artifact import TensorSource
from compress.core.errors import ConfigError
from compress.core.scheme import Scheme
from compress.core.tensors import QuantizedTensor
from compress.core.tunable import tuning_problem
from compress.distributed.team import Team, team
from compress.model.devices import choose_dtype
from compress.model.loading import ModelHandle
from compress.provenance import digest_of, weights_digest
from compress.recovery.checkpoints import CheckpointFiles
from compress.recovery.compiled import check_compiler
from compress.recovery.distill import Training
from compress.recovery.generate import training_windows
from compress.recovery.models import WholeModel
from compress.recovery.teacher import Teacher
from compress.recovery.text import RecoveryText
from compress.tuning.coded import TunedModel
from compress.tuning.dkm.palette import palette_problem
from compress.tuning.edkm import EdkmTuner
from compress.tuning.pv import PVTuner

_CHECKPOINT = "training.safetensors"
_NO_RESULT = {"checkpoint_minutes", "teacher"}  # options that do not decide it


@dataclass(frozen=True)
class Tuned:
    """What tuning made.

    Attributes:
        codes: Of each layer that was tuned.
        dense: Dense weights that were trained, in their storage type.
        record: Plain data for the report: method, options, steps, seconds of them and
            before, tokens, held-out KL before and after and each measurement, skipped
            steps, trained values, changed codes, memory.
        files: Checkpoints, which are needed until this is stored.
    """

    codes: Mapping[str, QuantizedTensor]
    dense: Mapping[str, Tensor]
    record: Mapping[str, Any]
    files: CheckpointFiles


def tune(
    student: ModelHandle,
    teacher: ModelHandle,
    codes: Mapping[str, QuantizedTensor],
    *,
    originals: TensorSource,
    text: RecoveryText,
    options: TuneOptions,
    device: str,
    state: Path,
    save: Callable[[Tuned], None] | None = None,
) -> Tuned:
    """Train codes so that their model predicts what the original one does.

    Both models are held in memory, as a whole or split. Under torchrun every process
    calls this, with the same arguments; the first one gets all codes, and saves.

    Args:
        student: The compressed model: its source has the values of the codes.
        teacher: The original model, with the same vocabulary.
        codes: Of the layers to tune, by name: linear layers and the embedding of the
            student.
        originals: Has the dense weights that the codes stand for.
        text: What is trained on.
        options: Of a method in ``TUNINGS``.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        state: Folder of the checkpoint, which is deleted when the result is saved.
        save: Keeps the result, before the checkpoint is deleted.

    Raises:
        ConfigError: ``state`` is of another run, or memory does not suffice for what
            the teacher's states take.
        SchemeError: A scheme cannot be tuned.
    """
    started = time.monotonic()
    with team(device) as (members, own):
        if own.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(own)
        job = _Job(
            student, teacher, codes, originals, text, options, state, members, own
        )
        found = job.run(started)
        if members.rank == 0 and save is not None:
            save(found)
        members.wait()
        found.files.delete()
    return found


@dataclass(frozen=True)
class _Job:
    """What one call of :func:`tune` is about, in one process."""

    student: ModelHandle
    teacher: ModelHandle
    codes: Mapping[str, QuantizedTensor]
    originals: TensorSource
    text: RecoveryText
    options: TuneOptions
    state: Path
    team: Team
    device: str

    def run(self, started: float) -> Tuned:
        options = self.options
        if options.compile:
            check_compiler(self.device, f"{options.section}.options.compile")
        stored = self.student.description.dtype
        dtype = choose_dtype(options.dtype, stored, self.device)
        split = None
        if isinstance(options, PVOptions) and options.shard:
            self.team.check_split(options.section)
            split = self.team
        original = WholeModel(self.teacher, device=self.device, dtype=dtype, team=split)
        train = training_windows(
            original,
            self.text,
            options,
            team=self.team,
            weights=self.teacher.source,
            state=self.state,
        )
        keep = (len(train), train.shape[1]) if options.teacher == "cache" else None
        teacher = Teacher(original, keep=keep, section=options.section)
        model = WholeModel(self.student, device=self.device, dtype=dtype, team=split)
        if options.gradient_checkpointing:
            model.checkpoint_blocks()
        if options.compile:
            original.compile_blocks()
            model.compile_blocks()
        tuner = self._tuner(model)
        training = Training(
            tuner,
            teacher,
            train=train,
            held_out=self.text.held_out,
            options=options,
            team=self.team,
            started=started,
            files=CheckpointFiles(
                self.state / _CHECKPOINT,
                self._fingerprint(),
                self.team,
                split=split is not None,
            ),
        )
        training.run()
        found = tuner.result()
        record = {
            "method": _method(options),
            **training.record(given=len(self.text.train)),
            "layers": len(found),
            "dense_weights": len(tuner.dense_weights),
            "trained_values": tuner.trained_values(self.team),
            "changed_codes": changed_share(self.codes, found),
        }
        return Tuned(found, tuner.dense(), record, training.files)

    def _tuner(self, model: WholeModel) -> TunedModel:
        """Return what carries out the method."""
        options, source = self.options, self.student.source
        if isinstance(options, PVOptions):
            return PVTuner(model, source, self.codes, options)
        if isinstance(options, EdkmOptions):
            return EdkmTuner(model, source, self.originals, self.codes, options)
        raise ConfigError(f"tune: options of {type(options).__name__}")

    def _fingerprint(self) -> Mapping[str, str]:
        """Return a digest of each thing that decides the result, by name."""
        options = self.options.model_dump(mode="json", exclude=_NO_RESULT)
        return {
            "options": digest_of([_method(self.options), options]),
            "text": self.text.digest,
            "student": weights_digest(self.student.source),
            "teacher": weights_digest(self.teacher.source),
            "processes": str(self.team.size),
        }


def _method(options: TuneOptions) -> str:
    return next(name for name, kind in TUNINGS.items() if type(options) is kind)


def problem_of(
    options: TuneOptions, scheme: Scheme, shape: tuple[int, int]
) -> str | None:
    """Return why a method cannot tune a matrix, and what to take instead.

    Args:
        options: Of the method.
        scheme: Of the matrix's codes.
        shape: ``R``, ``C``.
    """
    if isinstance(options, EdkmOptions):
        return palette_problem(scheme, shape)
    return tuning_problem(scheme)


def changed_share(
    before: Mapping[str, QuantizedTensor], after: Mapping[str, QuantizedTensor]
) -> float:
    """Return the share of units whose codes differ, over all layers.

    A unit is a weight, or what one code of each table stands for.
    """
    changed = total = 0
    for name, tensor in after.items():
        book = tensor.scheme.codebook
        count = 1 if book is None else book.count
        differs = (tensor.codes != before[name].codes.cpu()).view(-1, count).any(1)
        changed += int(differs.sum())
        total += differs.numel()
    return changed / max(1, total)
