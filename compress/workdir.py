"""The work directory: checkpoints of each block, results of each stage, atomic writes.

Everything is written to a temporary name in the same folder, flushed to disk and
renamed, so that a file either is whole or is not there. A killed run leaves at most
temporary files, which the next one removes. ``state.json`` holds a fingerprint of all
that decides the codes; a run only resumes into a directory with the same fingerprint.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.checksums import checksum, sealed, unsealed
from compress.core.errors import CheckpointError, ConfigError
from compress.core.foreign import MALFORMED, parse_json
from compress.core.scheme import Scheme
from compress.core.tensors import QuantizedTensor
from compress.distributed.team import Team
from compress.writing import TEMPORARY
from compress.writing import write_atomically as write_atomically  # also from here

_log = logging.getLogger(__name__)
_TRANSFORMS = "transforms.safetensors"
_STATE = "state.json"
# What the stages leave, in their order. Of each the result comes before the state, so
# that no result is ever there without the state that says what it was made from.
_PRUNING = ("pruned", "pruning")
_RECOVERY = ("recovered", "recovery")
_LATER = ("results/tuning.json", "tuned", "tuning", "prompt", "prompting")
_CODES = ("plan.json", "results", _TRANSFORMS, "blocks", *_LATER)
_STAGES = ("pruning", "recovery")  # have a state of their own, before the run's
REPORTS = ("report.json", "report.md", "report.html")


@dataclass(frozen=True)
class LayerRecord:
    """What quantizing one layer gave, for the report.

    Attributes:
        error: ``tr(E H E^T) / tr(W H W^T)``; ``None`` without statistics.
        weight_error: ``|E|^2 / |W|^2``.
        seconds: Time of the solve.
        tokens: That the statistics ran over, if there were any; for an expert, those
            that the router sent to it.
    """

    error: float | None
    weight_error: float
    seconds: float
    tokens: int | None = None


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, by the rest of the name."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


class WorkDir:
    """One run's folder.

    Where several processes work in it, the first one decides what is there
    (:meth:`check`, :meth:`begin`, :meth:`has_part` and :meth:`stage` are asked by all
    of them) and writes what all of them have; each may read, and save parts that only
    it has.

    Args:
        root: The folder; all processes see the same one.
        team: The processes.
    """

    def __init__(self, root: Path, team: Team | None = None) -> None:
        self.root, self._team = root, team or Team()

    @property
    def assets(self) -> Path:
        """Tokenizer files made from a GGUF source."""
        return self.root / "source"

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Raise if the folder cannot take this run.

        Raises:
            ConfigError: It holds a run and the user did not say what to do with it.
        """
        self._team.alone(lambda: self._check(resume=resume, overwrite=overwrite))

    def _check(self, *, resume: bool, overwrite: bool) -> None:
        places = (self.root, *(self.root / name for name in _STAGES))
        has_run = any((place / _STATE).is_file() for place in places)
        if has_run and not (resume or overwrite):
            raise ConfigError(
                f"run.workdir: {self.root} holds an earlier run; continue it with "
                "--resume, replace it with --overwrite, or set another run.workdir"
            )

    def begin(
        self, fingerprint: Mapping[str, str], *, overwrite: bool, redo: bool = False
    ) -> None:
        """Start or continue a run.

        Args:
            fingerprint: Digest of each thing that decides the codes, by name.
            overwrite: Drop whatever an earlier run left.
            redo: Drop what changes invalidate: with ``tune`` alone what was tuned, else
                all codes.

        Raises:
            ConfigError: An unfinished run here was made from something else; the
                message names what changed.
        """

        def begin() -> None:
            if overwrite:
                self.clear()
            self._compare_or_forget(fingerprint, redo=redo)
            if not (self.root / _STATE).is_file():  # nobody vouches for what is here
                self.forget_codes()
            self._sweep()
            state = {"version": 1, "fingerprint": dict(fingerprint)}
            self.write_json(_STATE, state)

        self._team.alone(begin)

    def _compare_or_forget(self, fingerprint: Mapping[str, str], *, redo: bool) -> None:
        changed = self.changed(fingerprint)
        if not redo:
            self.compare(fingerprint)
        elif changed:
            _log.info("%s changed: what follows is computed again", ", ".join(changed))
            self.forget_codes(tuned_only=changed == ["tune"])

    def compare(self, fingerprint: Mapping[str, str], *, only: bool = False) -> None:
        """Raise if an unfinished run here was made from something else.

        Args:
            fingerprint: As for :meth:`begin`.
            only: Compare what is in it and nothing else.

        Raises:
            ConfigError: Names what changed.
        """
        changed = self.changed(fingerprint, only=only)
        if changed:
            raise ConfigError(
                f"cannot resume in {self.root}: {', '.join(changed)} changed since "
                "that run began; --redo keeps what this does not affect and computes "
                "the rest again, --overwrite starts from nothing"
            )

    def changed(
        self, fingerprint: Mapping[str, str], *, only: bool = False
    ) -> list[str]:
        """Return the names of what an unfinished run here was made from differently.

        Args:
            fingerprint: As for :meth:`begin`.
            only: Compare what is in it and nothing else.
        """
        state = self.root / _STATE
        if not state.is_file():
            return []
        try:
            earlier = dict(self._read_json(state)["fingerprint"])
        except MALFORMED as error:
            raise CheckpointError(
                f"{state} is damaged ({error!r}); start again with --overwrite"
            ) from error
        names = sorted({*fingerprint, *(() if only else earlier)})
        return [n for n in names if earlier.get(n) != fingerprint.get(n)]

    def forget_codes(self, *, tuned_only: bool = False) -> None:
        """Remove the codes and all that was made from them.

        Args:
            tuned_only: Keep the calibrated ones, and the plan they follow.
        """
        if tuned_only:
            results = self.root / "results"
            after = [f for f in results.glob("*.json") if f.stem != "allocation"]
            names = [str(file.relative_to(self.root)) for file in after]
            self.drop((*names, *_LATER, *REPORTS))
        else:
            self.drop((*_CODES, *REPORTS))

    def forget_pruning(self) -> None:
        """Remove the pruned model and all that was made from it."""
        self.forget_codes()
        self.drop((_STATE, *_RECOVERY, *_PRUNING))

    def forget_recovery(self) -> None:
        """Remove the recovered model and all that was made from it."""
        self.forget_codes()
        self.drop((_STATE, *_RECOVERY))

    def clear(self) -> None:
        """Remove whatever an earlier run left; nothing of others."""
        self.forget_pruning()
        self.drop(("export",))

    def drop(self, names: Iterable[str]) -> None:
        """Remove files and folders, each of them at once or not at all."""
        for name in names:
            path = self.root / name
            if not path.exists():
                continue
            gone = path.with_name(f"{path.name}.gone{TEMPORARY}")
            if gone.is_dir():
                shutil.rmtree(gone)
            os.replace(path, gone)
            if gone.is_dir():
                shutil.rmtree(gone)
            else:
                gone.unlink()

    def _sweep(self) -> None:
        for leftover in self.root.glob(f"**/*{TEMPORARY}"):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()

    def write_json(self, name: str, data: Any) -> None:
        """Write plain data as ``name``, atomically."""
        self.write_text(name, json.dumps(data, indent=1))

    def write_text(self, name: str, text: str) -> None:
        """Write a file that all processes have the text of, atomically."""
        if self._team.is_first:
            write_atomically(self.root / name, text.encode())

    def _read_json(self, path: Path) -> Any:
        try:
            return parse_json(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path} is damaged ({error}); start again with --overwrite"
            ) from error

    def stage(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return a stage's stored result, or compute and store it (plain data).

        All processes compute, and get what the first one did.
        """
        if self._team.alone((self.root / "results" / f"{name}.json").is_file):
            return self._team.alone(lambda: self.stored(name))
        result = self._team.tell(compute())
        self.write_json(f"results/{name}.json", result)
        return result

    def stored(self, name: str) -> Any | None:
        """Return the stored result of a stage, or ``None``."""
        path = self.root / "results" / f"{name}.json"
        return self._read_json(path) if path.is_file() else None

    def finished(self, name: str) -> Any:
        """Return the stored result of a stage that is known to be done.

        Raises:
            CheckpointError: It is missing or damaged.
        """
        return self._read_json(self.root / "results" / f"{name}.json")

    def has_part(self, part: str) -> bool:
        """Whether the codes of a part (a block, or ``embeddings``) are complete."""
        return self._team.alone(self._part(part).is_file)

    def save_part(
        self,
        part: str,
        tensors: Mapping[str, QuantizedTensor],
        records: Mapping[str, LayerRecord],
    ) -> None:
        """Store the codes of all layers of a part."""
        from safetensors.torch import save

        flat: dict[str, Tensor] = {}
        about: dict[str, Any] = {}
        for name, tensor in tensors.items():
            for key, value in tensor.state().items():
                flat[f"{name}.{key}"] = value.cpu().contiguous()
            prefix = f"{name}."
            about[name] = {
                "checksum": checksum(_below(flat, prefix)),
                "scheme": tensor.scheme.to_dict(),
                "notes": list(tensor.notes),
                **vars(records[name]),
            }
        data = save(flat, metadata={"layers": sealed(json.dumps(about))})
        write_atomically(self._part(part), data)

    def records(self, part: str) -> dict[str, dict[str, Any]]:
        """Return scheme, notes, errors and seconds of each layer of a part."""
        from safetensors import SafetensorError, safe_open

        path = self._part(part)
        try:
            with safe_open(path, framework="pt") as file:
                text = unsealed(file.metadata()["layers"])
            about: dict[str, dict[str, Any]] = parse_json(text)
        except (SafetensorError, OSError, *MALFORMED) as error:
            raise CheckpointError(
                f"{path} is damaged ({error}); delete it and run again with --resume"
            ) from error
        return about

    def read_layer(self, part: str, layer: str) -> QuantizedTensor:
        """Return the stored codes of one layer.

        Raises:
            CheckpointError: They are not there, or not those that were stored.
        """
        from safetensors import SafetensorError, safe_open

        records = self.records(part)
        try:
            about = records[layer]
            with safe_open(self._part(part), framework="pt") as file:
                prefix = f"{layer}."
                parts = {
                    key.removeprefix(prefix): file.get_tensor(key).clone()
                    for key in file.keys()
                    if key.startswith(prefix)
                }
            if checksum(parts) != about["checksum"]:
                raise ValueError(f"the codes of {layer} are not those that were stored")
        except (SafetensorError, OSError, *MALFORMED) as error:
            raise CheckpointError(
                f"{self._part(part)} is damaged ({error}); delete it and run again "
                "with --resume"
            ) from error
        scheme = Scheme.from_dict(about["scheme"])
        return QuantizedTensor.from_state(parts, scheme, tuple(about["notes"]))

    def save_transforms(
        self, scales: Mapping[str, Tensor], records: Mapping[str, Any]
    ) -> None:
        """Store the scales that transforms chose, and what the report says of them."""
        from safetensors.torch import save

        if not self._team.is_first:
            return
        about = {"checksum": checksum(scales), "records": dict(records)}
        data = save(dict(scales), metadata={"about": sealed(json.dumps(about))})
        write_atomically(self.root / _TRANSFORMS, data)

    def read_transforms(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what :meth:`save_transforms` stored; nothing if it did not."""
        from safetensors import SafetensorError, safe_open

        path = self.root / _TRANSFORMS
        if not path.is_file():
            return {}, {}
        try:
            with safe_open(path, framework="pt") as file:
                about = parse_json(unsealed(file.metadata()["about"]))
                scales = {k: file.get_tensor(k).clone() for k in file.keys()}
            if checksum(scales) != about["checksum"]:
                raise ValueError("its scales are not those that were stored")
            return scales, dict(about["records"])
        except (SafetensorError, OSError, *MALFORMED) as error:
            raise CheckpointError(
                f"{path} is damaged ({error}); delete it and run again with --resume"
            ) from error

    def _part(self, part: str) -> Path:
        return self.root / "blocks" / f"{part}.safetensors"

    def replace_folder(self, target: Path, fill: Callable[[Path], Any]) -> Any:
        """Fill a temporary folder and rename it to ``target`` when it is complete."""
        temporary = target.with_name(target.name + TEMPORARY)
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True)
        try:
            result = fill(temporary)
        except BaseException:  # whatever it was, no half folder stays behind
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        # Never half of the old folder under its name: a kill while it is removed would
        # leave what looks like a finished one.
        old = target.with_name(f"{target.name}.old{TEMPORARY}")
        if target.exists():
            os.replace(target, old)
        os.replace(temporary, target)
        shutil.rmtree(old, ignore_errors=True)
        return result
