"""Where a training run stands, in one file that is replaced as a whole.

There is no state of a random generator: the order of windows is a function of seed and
step, and nothing else is random once training has begun.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.checksums import checksum, sealed, unsealed
from compress.core.errors import CheckpointError, ConfigError
from compress.core.foreign import MALFORMED, parse_json
from compress.distributed.team import Team
from compress.workdir import write_atomically


@dataclass
class Progress:
    """What training has done so far.

    Attributes:
        prepared_seconds: What came before the first step: models, the teacher's text.
        step: Steps that are done.
        seconds: That they took.
        skipped: Steps without a finite gradient, which changed nothing.
        idle: Steps whose gradients were all zero.
        evaluations: Measurements in their order: ``step``, ``seconds``, ``kl`` on
            held-out text, and the mean ``loss`` of the steps since the last one.
        best: Number of the measurement with the lowest KL.
    """

    prepared_seconds: float
    step: int = 0
    seconds: float = 0.0
    skipped: int = 0
    idle: int = 0
    evaluations: list[dict[str, float]] = field(default_factory=list)
    best: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """A run that can go on.

    Attributes:
        progress: Numbers.
        now: Values of all trained parameters.
        best: Their values where the held-out KL was lowest.
        optimizer: Step count and moments of each parameter, by ``NAME/KEY``.
    """

    progress: Progress
    now: Mapping[str, Tensor]
    best: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]

    def save(self, file: Path, fingerprint: Mapping[str, str]) -> None:
        """Write the file, atomically."""
        from safetensors.torch import save

        parts = {"now": self.now, "best": self.best, "optimizer": self.optimizer}
        tensors = {
            f"{part}/{name}": tensor.detach().cpu().contiguous()
            for part, values in parts.items()
            for name, tensor in values.items()
        }
        about = {
            "progress": asdict(self.progress),
            "fingerprint": dict(fingerprint),
            "checksum": checksum(tensors),
        }
        metadata = {"run": sealed(json.dumps(about))}
        write_atomically(file, save(tensors, metadata=metadata))

    @classmethod
    def load(cls, file: Path, fingerprint: Mapping[str, str]) -> Checkpoint | None:
        """Return what was written, or ``None`` if nothing was.

        Raises:
            ConfigError: It is of a run with other text, models or options.
            CheckpointError: The file is damaged.
        """
        from safetensors import SafetensorError, safe_open

        if not file.is_file():
            return None
        parts: dict[str, dict[str, Tensor]] = {"now": {}, "best": {}, "optimizer": {}}
        try:
            with safe_open(file, framework="pt") as opened:
                about = parse_json(unsealed(opened.metadata()["run"]))
                tensors = {k: opened.get_tensor(k).clone() for k in opened.keys()}
            if checksum(tensors) != about["checksum"]:
                raise ValueError("its values are not those that were stored")
            for key, tensor in tensors.items():
                part, _, name = key.partition("/")
                parts[part][name] = tensor
            progress = Progress(**about["progress"])
            earlier = about["fingerprint"]
        except (SafetensorError, OSError, *MALFORMED) as error:
            raise CheckpointError(
                f"{file} is damaged ({error}); delete it to start training again"
            ) from error
        names = sorted({*earlier, *fingerprint})
        changed = [n for n in names if earlier.get(n) != fingerprint.get(n)]
        if changed:
            raise ConfigError(
                f"{file}: training cannot go on, {', '.join(changed)} changed since it "
                "began; delete the file, or start the run again with --overwrite"
            )
        return cls(progress, **parts)


@dataclass(frozen=True)
class CheckpointFiles:
    """Where the processes of a run keep checkpoints.

    The first process writes for all, since they are equal, unless models are split:
    then each writes a file of its own for a step, and the first one names the step
    when all of them are there.

    Attributes:
        file: Of one checkpoint for all; others have names like it.
        fingerprint: Digest of each thing that decides the result, by name.
        team: The processes.
        split: Whether models are split over them.
    """

    file: Path
    fingerprint: Mapping[str, str]
    team: Team
    split: bool = False

    @property
    def _pointer(self) -> Path:
        return self.file.with_suffix(".json")

    def _own(self, step: int) -> Path:
        # Not a temporary name: a run that goes on sweeps those away.
        return self.file.with_stem(f"{self.file.stem}-{step}-{self.team.rank}")

    def load(self) -> Checkpoint | None:
        """Return the last complete checkpoint, if there is one.

        Raises:
            ConfigError: It is of a run with other text, models or options.
            CheckpointError: A file is damaged.
        """
        if not self.split:
            return Checkpoint.load(self.file, self.fingerprint)
        if not self._pointer.is_file():
            return None
        try:
            step = int(parse_json(self._pointer.read_text())["step"])
        except (OSError, *MALFORMED) as error:
            raise CheckpointError(
                f"{self._pointer} is damaged ({error}); delete it to start again"
            ) from error
        return Checkpoint.load(self._own(step), self.fingerprint)

    def save(self, checkpoint: Checkpoint) -> None:
        """Replace the last checkpoint; if models are split, all processes call this."""
        if not self.split:
            if self.team.rank == 0:
                checkpoint.save(self.file, self.fingerprint)
            return
        own = self._own(checkpoint.progress.step)
        checkpoint.save(own, self.fingerprint)
        self.team.wait()
        if self.team.rank == 0:
            pointer = json.dumps({"step": checkpoint.progress.step})
            write_atomically(self._pointer, pointer.encode())
        self.team.wait()
        self._delete_others(own)

    def delete(self) -> None:
        """Delete what is there."""
        if self.team.rank == 0:
            self.file.unlink(missing_ok=True)
            self._pointer.unlink(missing_ok=True)
        self._delete_others(None)

    def _delete_others(self, kept: Path | None) -> None:
        for path in self.file.parent.glob(
            f"{self.file.stem}-*-{self.team.rank}{self.file.suffix}"
        ):
            if path != kept:
                path.unlink(missing_ok=True)


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the state of an optimizer, by ``NAME/KEY``."""
    return {
        f"{name}/{key}": value
        for name, parameter in names.items()
        for key, value in optimizer.state[parameter].items()
    }


def restore_optimizer_(
    optimizer: torch.optim.Optimizer,
    names: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
) -> None:
    """Put back what :func:`optimizer_tensors` returned."""
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        parameter = names[name]
        state: dict[str, Any] = optimizer.state[parameter]
        state[entry] = value.to(parameter.device)
