"""The training loop: a student learns to predict what its teacher predicts.

Each step takes windows of text, lets the teacher compute its hidden states without
gradients, and hands both models' states and heads to the chunked losses. The rate rises
and falls by a cosine over the budget of steps or of time; what a step does with rate
and gradients is the learner's business: AdamW without weight decay after pruning (the
student is to stay where it is, not to shrink), PV for codes.

A step whose gradient is not finite changes nothing and is counted; if gradients vanish
altogether, training stops with an error. What is kept in the end is the state with the
lowest KL on held-out windows of the same sources. Nothing waits for the device between
two evaluations.

Source: Hinton et al. (2015), arXiv 1503.02531; Muralidharan et al. (2024), Minitron,
arXiv 2407.14679, for distillation on logits after pruning. Limits: windows of equal
length, both models on one device.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.config.training_options import TrainingOptions
from compress.core.errors import CompressError, ConfigError
from compress.distributed.team import Team
from compress.progress import progress_bar
from compress.provenance import device_peak_bytes
from compress.recovery.checkpoints import Checkpoint, CheckpointFiles, Progress
from compress.recovery.compiled import many_kinds, plain_passes
from compress.recovery.learner import Learner
from compress.recovery.losses import IGNORED, linear_ce, linear_kl
from compress.recovery.teacher import Teacher
from compress.recovery.text import Order

_log = logging.getLogger(__name__)

# Logits of one model that are held at once: on a GPU enough to keep it busy.
LOGITS_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}


@dataclass(frozen=True)
class Budget:
    """When training ends.

    Attributes:
        steps: After so many; ``None`` for no such end.
        seconds: After so long; ``None`` for no such end.
    """

    steps: int | None
    seconds: float | None

    def used(self, steps: float, seconds: float) -> float:
        """Return the share of the budget that is used, at most 1."""
        shares = [0.0]
        if self.steps is not None:
            shares.append(steps / self.steps)
        if self.seconds is not None:
            shares.append(seconds / self.seconds)
        return min(1.0, max(shares))


def rate(used: float, warmup: float) -> float:
    """Return the learning rate at a share of the budget, relative to its highest."""
    if used < warmup:
        return used / warmup
    return 0.5 * (1 + math.cos(math.pi * (used - warmup) / (1 - warmup)))


class Training:
    """One run of training.

    Args:
        learner: What changes; its model is the student.
        teacher: What it learns from.
        train: int64 ``[N, T]``.
        held_out: int64 ``[M, T]``.
        options: Loss, schedule and budget.
        team: The processes.
        started: When all began, by ``time.monotonic``; the budget counts from it.
        files: Of checkpoints.
    """

    def __init__(
        self,
        learner: Learner,
        teacher: Teacher,
        *,
        train: Tensor,
        held_out: Tensor,
        options: TrainingOptions,
        team: Team,
        started: float,
        files: CheckpointFiles,
    ) -> None:
        self.learner = learner
        self._teacher = teacher
        self._device = learner.model.device
        room = LOGITS_BYTES.get(self._device.type, LOGITS_BYTES["cpu"])
        self._chunk = max(64, room // (4 * len(teacher.head.weight)))
        self._train, self._held_out = train.to(self._device), held_out.to(self._device)
        self._options, self._team = options, team
        self.files = files
        size = options.batch * options.accumulate * team.size
        self._order = Order(len(train), size, options.seed)
        now = time.monotonic()
        self.progress = Progress(team.tell(now - started))
        self._best = learner.snapshot()
        # Since the last evaluation, on the device: loss, and steps that were skipped
        # or had no gradient.
        self._sums = torch.zeros(3, device=self._device)
        self._started = self._saved = now
        self._resume()
        self._budget = _budget(options, self.progress)

    def _resume(self) -> None:
        checkpoint = self.files.load()
        if checkpoint is None:
            return
        self.progress = checkpoint.progress
        self._best = dict(checkpoint.best)
        self.learner.restore(checkpoint.now)
        self.learner.remember(checkpoint.optimizer)
        self._started = time.monotonic() - self.progress.seconds
        stage = self._options.stage
        _log.info("%s goes on after step %d", stage, self.progress.step)

    def run(self) -> Progress:
        """Train until the budget is used, then put the best state back.

        Raises:
            CompressError: All gradients have vanished.
        """
        progress, options = self.progress, self._options
        if not progress.evaluations:
            self._evaluate(steps=0)
        since = progress.step
        bar = progress_bar(
            desc=options.stage,
            unit="step",
            initial=progress.step,
            total=options.steps,
            leave=False,
            disable=True if self._team.rank else None,
        )
        with bar, many_kinds(compiled=options.compile):
            while not self._ended():
                used = self._used(progress.step + 0.5)
                self._step(rate(self.learner.ready(used), options.warmup))
                progress.step += 1
                if options.steps is None:  # as many as fit the time that is left
                    bar.total = round(progress.step / max(used, 1e-6))
                bar.update()
                share = len(progress.evaluations) / options.evaluations
                if self._used(progress.step) >= min(1.0, share):
                    kl = self._evaluate(steps=progress.step - since)
                    since = progress.step
                    bar.set_postfix(held_out_kl=f"{kl:.4f}")
        if progress.step > since:  # the time ran out right after a step
            self._evaluate(steps=progress.step - since)
        self.learner.restore(self._best)
        return progress

    def record(self, *, given: int) -> dict[str, Any]:
        """Return what the run took and gave back, as plain data for a report.

        Args:
            given: Windows that are no text of the teacher's own.
        """
        progress, options = self.progress, self._options
        evaluations, (windows, length) = progress.evaluations, self._train.shape
        best = evaluations[progress.best]
        per_step = options.batch * options.accumulate * self._team.size * length
        return {
            "options": options.model_dump(mode="json"),
            "steps": progress.step,
            "seconds": progress.seconds,
            "prepared_seconds": progress.prepared_seconds,
            "tokens": progress.step * per_step,
            "windows": {"given": given, "generated": windows - given},
            "held_out_windows": len(self._held_out),
            "kl_before": evaluations[0]["kl"],
            "kl_after": best["kl"],
            "best_step": best["step"],
            "evaluations": evaluations,
            "skipped_steps": progress.skipped,
            "dtype": str(self.learner.model.dtype).removeprefix("torch."),
            "device": str(self._device),
            "processes": self._team.size,
            "peak_memory_bytes": device_peak_bytes(str(self._device)),
        }

    def _ended(self) -> bool:
        """Whether the budget is used, or nothing got better for long enough."""
        progress, patience = self.progress, self._options.patience
        late = len(progress.evaluations) - 1 - progress.best
        if patience is not None and late >= patience:
            return True
        return self._used(progress.step) >= 1

    def _used(self, steps: float) -> float:
        seconds = time.monotonic() - self._started
        if self._budget.seconds is not None:
            seconds = self._team.tell(seconds)
        return self._budget.used(steps, seconds)

    def _step(self, rate: float) -> None:
        """Take the windows of a step, and let the learner use their gradients."""
        options = self._options
        rows = self._team.share(self._order.rows(self.progress.step))
        total = torch.zeros((), device=self._device)
        for part in torch.split(rows, options.batch):
            ids = self._train[part.to(self._device, non_blocking=True)]
            loss = self._loss(ids, part) / options.accumulate
            torch.autograd.backward(loss)
            total += loss.detach()
        flags = self.learner.step(rate, number=self.progress.step, team=self._team)
        kept = torch.where(flags[:1] > 0, 0.0, total)
        self._sums += torch.cat([kept, flags])

    def _loss(self, ids: Tensor, rows: Tensor) -> Tensor:
        options, student = self._options, self.learner.model
        states = self.learner.states(ids)
        loss = torch.zeros((), device=self._device)
        if options.kl:
            known = self._teacher.states(ids, rows)
            loss = loss + options.kl * self._divergence(
                states, known, options.temperature
            )
        if options.ce:
            targets = torch.full_like(ids, IGNORED)
            targets[:, :-1] = ids[:, 1:]
            ce = linear_ce(states, student.head, targets, chunk=self._chunk)
            loss = loss + options.ce * ce
        return loss

    def _divergence(self, states: Tensor, known: Tensor, temperature: float) -> Tensor:
        return linear_kl(
            states,
            self.learner.model.head,
            known,
            self._teacher.head,
            temperature=temperature,
            chunk=self._chunk,
            fused=self._options.compile,
        )

    @torch.no_grad()
    def held_out_kl(self, student: Callable[[Tensor], Tensor]) -> float:
        """Return the mean KL at temperature 1 on the held-out windows, in nats.

        Args:
            student: From ids int64 ``[B, T]`` to the head's input ``[B, T, C]``.
        """
        rows = torch.arange(len(self._held_out))[self._team.rank :: self._team.size]
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        batch, count = self._options.batch, len(self._held_out)
        parts = list(torch.split(rows, batch)) if len(rows) else []
        # Split blocks need as many passes of each process: one more counts nothing.
        most = math.ceil(math.ceil(count / self._team.size) / batch)
        spare = [torch.zeros(1, dtype=torch.int64)] * (most - len(parts))
        for number, part in enumerate(parts + spare):
            ids = self._held_out[part.to(self._device)]
            with plain_passes(compiled=self._options.compile):
                known = self._teacher.states(ids)
                kl = self._divergence(student(ids), known, temperature=1)
            weight = len(ids) if number < len(parts) else 0
            sums += torch.stack([kl.double() * weight, kl.new_tensor(weight)])
        self._team.average_([sums])
        return float(sums[0] / sums[1])

    def _evaluate(self, *, steps: int) -> float:
        """Measure, note the best state, and write a checkpoint if it is time."""
        self.learner.as_stored()
        kl = self.held_out_kl(self.learner.states)
        self._team.average_([self._sums])
        loss, skipped, idle = self._sums.tolist()
        self._sums.zero_()
        progress = self.progress
        progress.skipped += round(skipped)
        progress.idle += round(idle)
        progress.seconds = self._team.tell(time.monotonic() - self._started)
        entry = {"step": progress.step, "seconds": progress.seconds, "kl": kl}
        if steps > skipped:
            entry["loss"] = loss / (steps - round(skipped))
        progress.evaluations.append(entry)
        if self._team.rank == 0:
            _log.info("held-out KL %.4f after step %d", kl, progress.step)
        if steps and round(idle) == steps:
            raise CompressError(
                f"{self._options.stage}: no gradient is left after step "
                f"{progress.step}; the losses are saturated. Lower "
                f"{self._options.section}.options.learning_rate"
            )
        best = progress.evaluations[progress.best]["kl"]
        if len(progress.evaluations) == 1 or kl < best or math.isnan(best):
            progress.best = len(progress.evaluations) - 1
            self._best = self.learner.snapshot()
        if steps and not self._ended():
            self._save()
        return kl

    def _save(self) -> None:
        waited = self._team.tell(time.monotonic() - self._saved)
        others_save = self._team.rank > 0 and not self.files.split
        if others_save or waited < 60 * self._options.checkpoint_minutes:
            return
        checkpoint = Checkpoint(
            self.progress,
            now=self.learner.snapshot(),
            best=self._best,
            optimizer=self.learner.memory(),
        )
        self.files.save(checkpoint)
        self._saved = time.monotonic()


def _budget(options: TrainingOptions, progress: Progress) -> Budget:
    """Return what is left for training, after what came before it."""
    if options.seconds is None:
        return Budget(options.steps, None)
    left = options.seconds - progress.prepared_seconds
    if left <= 0:
        place = f"{options.section}.options"
        raise ConfigError(
            f"{place}.minutes: {options.seconds / 60:g}, of which reading the models "
            f"and writing text took {progress.prepared_seconds / 60:.1f}; give more, "
            f"or lower {place}.generated"
        )
    return Budget(options.steps, left)
