"""Recovery from end to end: two models and text in, a checkpoint folder and facts out.

A run that was killed goes on from its last checkpoint, with the same result if steps
end it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress.config.recover_section import (
    DistillOptions,
    RecoverOptions,
    SoftPromptOptions,
)
from compress.core.errors import ConfigError
from compress.distributed.team import Team, team
from compress.model.devices import choose_dtype
from compress.model.loading import ModelHandle
from compress.provenance import digest_of, weights_digest
from compress.recovery.checkpoints import CheckpointFiles
from compress.recovery.compiled import check_compiler
from compress.recovery.distill import Training
from compress.recovery.folder import check_folder, check_weights, write_recovered
from compress.recovery.generate import training_windows
from compress.recovery.learner import AdamLearner
from compress.recovery.lora import LoraWeights, block_ranks, require_peft
from compress.recovery.models import WholeModel
from compress.recovery.soft_prompt import SoftPrompt, new_prompt, save_prompt
from compress.recovery.teacher import Teacher
from compress.recovery.text import RecoveryText
from compress.recovery.trained import FullWeights, Trained
from compress.workdir import WorkDir

_CHECKPOINT = "training.safetensors"
_NO_RESULT = {"checkpoint_minutes", "teacher"}  # options that do not decide it


@dataclass(frozen=True)
class _Job:
    """What one call of :func:`recover` is about."""

    student: ModelHandle
    teacher: ModelHandle
    text: RecoveryText
    options: RecoverOptions
    importances: Sequence[float] | None
    state: Path

    @property
    def ranks(self) -> list[int] | None:
        """Rank of each block, if low-rank changes are trained."""
        options = self.options
        if not isinstance(options, DistillOptions) or options.train != "lora":
            return None
        count = self.student.description.block_count
        return block_ranks(self.importances or [1.0] * count, options.rank)


def recover(
    student: ModelHandle,
    teacher: ModelHandle,
    folder: Path,
    *,
    text: RecoveryText,
    options: RecoverOptions,
    device: str,
    state: Path,
    importances: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Train a compressed model to predict what the original one does.

    Both models are held in memory, as a whole or split. Under torchrun every process
    calls this, with the same arguments; the first one writes.

    Args:
        student: The compressed model; for ``distill``, opened from a folder of
            safetensors.
        teacher: The original model, with the same vocabulary.
        folder: Becomes a checkpoint like the student's, with the trained weights; for
            ``soft_prompt``, a peft adapter.
        text: What is trained on.
        options: Of ``distill`` or ``soft_prompt``.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        state: Folder of the checkpoint, which is deleted when ``folder`` is complete.
        importances: Of each block, for ranks that follow them; ``None`` for one rank.

    Returns:
        Plain data for the report: method, steps, seconds of them and before, tokens,
        held-out KL before and after and each measurement, skipped steps, trained
        values, memory, ranks; ``kl_without`` is that of a model without any prompt.

    Raises:
        ConfigError: The models do not fit together, or ``state`` is of another run.
        CheckpointError: The student is not a folder of safetensors, or is damaged.
        MissingDependencyError: Adapters are wanted and peft is not installed.
    """
    started = time.monotonic()
    job = _Job(student, teacher, text, options, importances, state)
    source = None
    if not isinstance(options, SoftPromptOptions):
        source = check_folder(student.description)
    _check_pair(job)
    with team(device) as (members, own):
        if own.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(own)
        return _train(job, source, folder, members, device=own, started=started)


def _check_pair(job: _Job) -> None:
    sizes = [
        int(handle.description.config["vocab_size"])
        for handle in (job.student, job.teacher)
    ]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"recover: the student's vocabulary has {sizes[0]} tokens and the "
            f"original's {sizes[1]}; they must share one"
        )
    count = job.student.description.block_count
    if job.importances is not None and len(job.importances) != count:
        raise ConfigError(
            f"recover: {len(job.importances)} importances for {count} blocks"
        )
    if job.ranks is not None:
        require_peft()


def _train(
    job: _Job,
    source: Path | None,
    folder: Path,
    members: Team,
    *,
    device: str,
    started: float,
) -> dict[str, Any]:
    options = job.options
    if options.compile:
        check_compiler(device, f"{options.section}.options.compile")
    stored = job.student.description.dtype
    dtype = choose_dtype(options.dtype, stored, device)
    split = None
    if options.shard:
        members.check_split(options.section)
        split = members
    teacher = WholeModel(job.teacher, device=device, dtype=dtype, team=split)
    train = training_windows(
        teacher,
        job.text,
        options,
        team=members,
        weights=job.teacher.source,
        state=job.state,
    )
    trains = isinstance(options, DistillOptions) and options.train == "full"
    student = WholeModel(
        job.student, device=device, dtype=dtype, team=split, trains=trains
    )
    trained = _trained(job, student)
    if source is not None:
        check_weights(source, trained)
    if options.gradient_checkpointing:
        trained.model.checkpoint_blocks()
    if options.compile:
        teacher.compile_blocks()
        trained.model.compile_blocks()
    keep = (len(train), train.shape[1]) if options.teacher == "cache" else None
    training = Training(
        AdamLearner(trained, options),
        Teacher(teacher, keep=keep, section=options.section),
        train=train,
        held_out=job.text.held_out,
        options=options,
        team=members,
        started=started,
        files=CheckpointFiles(
            job.state / _CHECKPOINT,
            _fingerprint(job, members),
            members,
            split=options.shard,
        ),
    )
    about: dict[str, Any] = {"method": "distill"}
    if isinstance(trained, SoftPrompt):
        without = training.held_out_kl(student.states)
        about = {"method": "soft_prompt", "kl_without": without}
    training.run()
    trained.gather()
    if members.rank == 0:
        _write(job, trained, source, folder)
    members.wait()
    training.files.delete()
    return {
        **about,
        **training.record(given=len(job.text.train)),
        "trained_values": sum(p.numel() for p in trained.parameters.values()),
        "ranks": job.ranks,
    }


def _trained(job: _Job, model: WholeModel) -> Trained:
    options, ranks = job.options, job.ranks
    if isinstance(options, SoftPromptOptions):
        return new_prompt(model, options)
    if not isinstance(options, DistillOptions):
        raise ConfigError(f"recover: options of {type(options).__name__}")
    if ranks is None:
        return FullWeights(model, job.student, embeddings=options.embeddings)
    return LoraWeights(
        model,
        job.student,
        ranks=ranks,
        plus=options.lora_plus,
        norms=options.norms,
        seed=options.seed,
    )


def _write(job: _Job, trained: Trained, source: Path | None, folder: Path) -> None:
    if isinstance(trained, SoftPrompt):
        model = job.student.description
        WorkDir(folder.parent).replace_folder(
            folder, lambda part: save_prompt(trained.prompt, model, part)
        )
    else:
        assert source is not None
        write_recovered(source, folder, trained)


def _fingerprint(job: _Job, members: Team) -> Mapping[str, str]:
    """Return a digest of each thing that decides the result, by name."""
    options = job.options.model_dump(mode="json", exclude=_NO_RESULT)
    importances = None if job.importances is None else list(job.importances)
    return {
        "options": digest_of([type(job.options).__name__, options]),
        "text": job.text.digest,
        "student": weights_digest(job.student.source),
        "teacher": weights_digest(job.teacher.source),
        "importances": digest_of(importances),
        "processes": str(members.size),
    }
