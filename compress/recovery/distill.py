"""The training loop: a student learns to predict what its teacher predicts.

Each step takes windows of text, lets the teacher compute its hidden states without
gradients, and hands both models' states and heads to the chunked losses. AdamW without
weight decay (the student is to stay where it is, not to shrink), a rate that rises and
falls by a cosine over the budget of steps or of time, gradients clipped by their norm.

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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from compress.config.recover_section import RecoverOptions
from compress.core.errors import CompressError, ConfigError
from compress.recovery.checkpoints import (
    Checkpoint,
    Progress,
    optimizer_tensors,
    restore_optimizer_,
)
from compress.recovery.losses import IGNORED, linear_ce, linear_kl
from compress.recovery.models import WholeModel
from compress.recovery.parallel import Team
from compress.recovery.text import Order
from compress.recovery.trained import Trained

_log = logging.getLogger(__name__)

_BETAS = (0.9, 0.95)
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
        trained: What changes; its model is the student.
        teacher: What it learns from.
        train: int64 ``[N, T]``.
        held_out: int64 ``[M, T]``.
        options: Loss, schedule and budget.
        team: The processes.
        started: When recovery began, by ``time.monotonic``; the budget counts from it.
        file: Of the checkpoint.
        fingerprint: Digest of each thing that decides the result, by name.
    """

    def __init__(
        self,
        trained: Trained,
        teacher: WholeModel,
        *,
        train: Tensor,
        held_out: Tensor,
        options: RecoverOptions,
        team: Team,
        started: float,
        file: Path,
        fingerprint: Mapping[str, str],
    ) -> None:
        self.trained = trained
        self._teacher = teacher
        self._device = trained.model.device
        room = LOGITS_BYTES.get(self._device.type, LOGITS_BYTES["cpu"])
        self._chunk = max(64, room // (4 * len(teacher.head.weight)))
        self._train, self._held_out = train.to(self._device), held_out.to(self._device)
        self._options, self._team = options, team
        self._file, self._fingerprint = file, fingerprint
        size = options.batch * options.accumulate * team.size
        self._order = Order(len(train), size, options.seed)
        self._names = trained.parameters
        self._parameters = list(self._names.values())
        self._optimizer = torch.optim.AdamW(
            _groups(trained), betas=_BETAS, weight_decay=0.0, fused=True
        )
        now = time.monotonic()
        self.progress = Progress(team.first(now - started, self._device))
        self._best = trained.snapshot()
        # Since the last evaluation, on the device: loss, and steps that were skipped
        # or had no gradient.
        self._sums = torch.zeros(3, device=self._device)
        self._started = self._saved = now
        self._resume()
        self._budget = _budget(options, self.progress)

    def _resume(self) -> None:
        checkpoint = Checkpoint.load(self._file, self._fingerprint)
        if checkpoint is None:
            return
        self.progress = checkpoint.progress
        self._best = dict(checkpoint.best)
        self.trained.restore(checkpoint.now)
        restore_optimizer_(self._optimizer, self._names, checkpoint.optimizer)
        self._started = time.monotonic() - self.progress.seconds
        _log.info("recovery goes on after step %d", self.progress.step)

    def run(self) -> Progress:
        """Train until the budget is used, then put the best state back.

        Raises:
            CompressError: All gradients have vanished.
        """
        progress, options = self.progress, self._options
        if not progress.evaluations:
            self._evaluate(steps=0)
        since = progress.step
        bar = tqdm(
            desc="recovery",
            unit="step",
            initial=progress.step,
            total=options.steps,
            leave=False,
            disable=True if self._team.rank else None,
        )
        with bar:
            while not self._ended():
                used = self._used(progress.step + 0.5)
                self._step(options.learning_rate * rate(used, options.warmup))
                progress.step += 1
                bar.update()
                share = len(progress.evaluations) / options.evaluations
                if self._used(progress.step) >= min(1.0, share):
                    kl = self._evaluate(steps=progress.step - since)
                    since = progress.step
                    bar.set_postfix(held_out_kl=f"{kl:.4f}")
        if progress.step > since:  # the time ran out right after a step
            self._evaluate(steps=progress.step - since)
        self.trained.restore(self._best)
        return progress

    def _ended(self) -> bool:
        """Whether the budget is used, or nothing got better for long enough."""
        progress = self.progress
        late = len(progress.evaluations) - 1 - progress.best
        return late >= self._options.patience or self._used(progress.step) >= 1

    def _used(self, steps: float) -> float:
        seconds = time.monotonic() - self._started
        if self._budget.seconds is not None:
            seconds = self._team.first(seconds, self._device)
        return self._budget.used(steps, seconds)

    def _step(self, learning_rate: float) -> None:
        """Change the parameters once; a gradient that is not finite changes nothing."""
        options = self._options
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate * group["factor"]
        rows = self._team.share(self._order.rows(self.progress.step))
        total = torch.zeros((), device=self._device)
        for part in torch.split(rows, options.batch):
            ids = self._train[part.to(self._device, non_blocking=True)]
            loss = self._loss(ids) / options.accumulate
            torch.autograd.backward(loss)
            total += loss.detach()
        self._team.average_gradients_(self._parameters)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, options.clip)
        # The fused kernels leave weights and moments alone if this is 1, which keeps
        # the decision on the device; torch's GradScaler tells them in the same way.
        skipped = (~torch.isfinite(norm)).float()
        self._optimizer.found_inf = skipped  # type: ignore[attr-defined]
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        kept = torch.where(skipped > 0, 0.0, total)
        self._sums += torch.stack([kept, skipped, (norm == 0).float()])

    def _loss(self, ids: Tensor) -> Tensor:
        options, student = self._options, self.trained.model
        states = self.trained.states(ids)
        loss = torch.zeros((), device=self._device)
        if options.kl:
            loss = loss + options.kl * self._divergence(states, ids)
        if options.ce:
            targets = torch.full_like(ids, IGNORED)
            targets[:, :-1] = ids[:, 1:]
            ce = linear_ce(states, student.head, targets, chunk=self._chunk)
            loss = loss + options.ce * ce
        return loss

    def _divergence(
        self, states: Tensor, ids: Tensor, temperature: float = 0
    ) -> Tensor:
        with torch.no_grad():
            known = self._teacher.states(ids)
        return linear_kl(
            states,
            self.trained.model.head,
            known,
            self._teacher.head,
            temperature=temperature or self._options.temperature,
            chunk=self._chunk,
        )

    @torch.no_grad()
    def _held_out_kl(self) -> float:
        """Return the mean KL at temperature 1 on the held-out windows, in nats."""
        rows = torch.arange(len(self._held_out))[self._team.rank :: self._team.size]
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        for part in torch.split(rows, self._options.batch) if len(rows) else ():
            ids = self._held_out[part.to(self._device)]
            kl = self._divergence(self.trained.states(ids), ids, temperature=1)
            sums += torch.stack([kl.double() * len(ids), kl.new_tensor(len(ids))])
        self._team.average_([sums])
        return float(sums[0] / sums[1])

    def _evaluate(self, *, steps: int) -> float:
        """Measure, note the best state, and write a checkpoint if it is time."""
        kl = self._held_out_kl()
        self._team.average_([self._sums])
        loss, skipped, idle = self._sums.tolist()
        self._sums.zero_()
        progress = self.progress
        progress.skipped += round(skipped)
        progress.idle += round(idle)
        progress.seconds = self._team.first(
            time.monotonic() - self._started, self._device
        )
        entry = {"step": progress.step, "seconds": progress.seconds, "kl": kl}
        if steps > skipped:
            entry["loss"] = loss / (steps - round(skipped))
        progress.evaluations.append(entry)
        if self._team.rank == 0:
            _log.info("held-out KL %.4f after step %d", kl, progress.step)
        if steps and round(idle) == steps:
            raise CompressError(
                f"recovery: no gradient is left after step {progress.step}; the losses "
                "are saturated. Lower recover.options.learning_rate"
            )
        best = progress.evaluations[progress.best]["kl"]
        if len(progress.evaluations) == 1 or kl < best or math.isnan(best):
            progress.best = len(progress.evaluations) - 1
            self._best = self.trained.snapshot()
        if steps and not self._ended():
            self._save()
        return kl

    def _save(self) -> None:
        due = time.monotonic() - self._saved >= 60 * self._options.checkpoint_minutes
        if self._team.rank or not due:
            return
        checkpoint = Checkpoint(
            self.progress,
            now=self.trained.snapshot(),
            best=self._best,
            optimizer=optimizer_tensors(self._optimizer, self._names),
        )
        checkpoint.save(self._file, self._fingerprint)
        self._saved = time.monotonic()


def _budget(options: RecoverOptions, progress: Progress) -> Budget:
    """Return what is left for training, after what came before it."""
    if options.seconds is None:
        return Budget(options.steps, None)
    left = options.seconds - progress.prepared_seconds
    if left <= 0:
        raise ConfigError(
            f"recover.options.minutes: {options.seconds / 60:g}, of which reading the "
            f"models and writing text took {progress.prepared_seconds / 60:.1f}; give "
            "more, or lower recover.options.generated"
        )
    return Budget(options.steps, left)


def _groups(trained: Trained) -> list[dict[str, Any]]:
    """Return the optimizer's groups: parameters that learn equally fast."""
    groups: dict[float, list[Tensor]] = {}
    for name, parameter in trained.parameters.items():
        groups.setdefault(trained.rates.get(name, 1.0), []).append(parameter)
    return [{"params": group, "factor": factor} for factor, group in groups.items()]
