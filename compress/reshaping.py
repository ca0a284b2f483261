"""What makes another model before the rest of a run: pruning, and recovery from it.

A run is set up twice. First with a description of the size to come, so that whatever
the config asks for is checked before any work; then, when ``WORKDIR/pruned`` (or
``WORKDIR/recovered``) is there, with that folder as its model. The original stays what
results are compared with, and what recovery learns from.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import provenance
from compress.config.plugins import create_pruner
from compress.config.recover_section import RecoverSection
from compress.config.schema import Config
from compress.config.training_checks import recover_options
from compress.core.errors import SchemeError
from compress.core.scheme import Scheme
from compress.model.devices import choose_dtype
from compress.model.loading import ModelHandle, locate, open_model
from compress.model.padding import padded
from compress.planning.budget import parameter_count
from compress.pruning.budgets import cfsp_weights
from compress.pruning.checks import check_pruning
from compress.pruning.depth import turns_of
from compress.pruning.exchange import TOKENS
from compress.pruning.stage import FOLDER as PRUNED
from compress.pruning.stage import WORK, Pruning
from compress.pruning.target import target_of
from compress.recovery.recover import recover
from compress.recovery.text import load_recovery_text
from compress.workdir import WorkDir

if TYPE_CHECKING:
    from torch import Tensor

    from compress.pipeline import Run

_log = logging.getLogger(__name__)
RECOVERED, RECOVERY = "recovered", "recovery"
_UNIT = 64
_SUPER_BLOCK = 256
# Below this, least squares made SmolLM2-135M worse than no repair.
_TOKENS_A_NEURON = 4
# A correction also fits what went wrong before, of which no matrix explains much: with
# 21 tokens a neuron SmolLM2 was worse for it, with 875 better.
_TOKENS_A_CORRECTION = 128
_IMPORTANCE_WINDOWS = 32


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
    check_pruning(pruning)
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
    model = pruning.provisional()
    if pruning.section.shape == "padded":
        model, _ = padded(model, pruning.source)
    return replace(handle, description=model)


def carry_out(run: Run) -> tuple[ModelHandle, dict[str, Any]]:
    """Prune what a run is about, train it if asked to, and return model and record.

    Args:
        run: Set up on a provisional model.
    """
    pruning = run.pruning
    assert pruning is not None
    windows, fingerprint = _inputs(run, pruning)
    chosen = provenance.reshaping_fingerprint(run.config)
    if run.redo:
        run.team.alone(lambda: _forget_changed(run, fingerprint))
    run.team.alone(lambda: run.workdir.compare(chosen, only=True))
    for caution in cautions(pruning, pruning.tokens(windows)):
        _log.warning(caution)
    with run.timed("prune"):
        record = run.team.alone(lambda: pruning.run(windows, fingerprint))
    neurons = record["neurons"]
    _log.info(
        "pruned: %s of %s neurons and %s of %s blocks stay",
        neurons["after"],
        neurons["before"],
        len(record["blocks"]),
        run.base.block_count,
    )
    folder = pruning.root / PRUNED
    recovery = None
    section = run.config.recover
    if section is not None and section.trains_weights:
        with run.timed("recover"):
            recovery = _recovered(run, section, windows, fingerprint)
        folder = pruning.root / RECOVERED
    subject = _opened(folder, run.handle, pads=pruning.section.shape == "padded")
    return subject, {**record, "recovery": recovery, "folder": folder.name}


def cautions(pruning: Pruning, tokens: int) -> list[str]:
    """Return what a user of this pruning should know, as sentences.

    Args:
        pruning: As the config says.
        tokens: Of text that is looked at; 0 without any.
    """
    found = []
    widest = max(pruning.target.widths)
    repairs = pruning.measures_blocks and pruning.repair == "least_squares"
    if repairs and tokens < _TOKENS_A_NEURON * widest:
        found.append(
            f"prune.repair least_squares solves for up to {widest:,} neurons on "
            f"{tokens:,} tokens of calibration text, and fits their noise: give more "
            "calibration.samples, or set prune.repair to mask or none."
        )
    if pruning.corrects and tokens < _TOKENS_A_CORRECTION * widest:
        found.append(
            f"prune.propagate corrected fits up to {widest:,} neurons to {tokens:,} "
            f"tokens; on less than some {_TOKENS_A_CORRECTION} a neuron the model may "
            "be worse for it: set prune.generated, give more calibration.samples, or "
            "set prune.propagate: dense."
        )
    if pruning.section.exchanges and tokens < TOKENS:
        found.append(
            f"prune.exchanges go by {tokens:,} tokens, which they learn by heart below "
            f"some {TOKENS:,}: set prune.generated, or give more calibration.samples."
        )
    if pruning.pruner.needs_activations:
        return found
    found.append(
        f"prune.method {pruning.pruner.name} looks at no data. Data-driven scores are "
        "better: on calibration text taylor, comp or cfsp lose far less at the same "
        "size."
    )
    if pruning.section.kv_groups and not pruning.measures_blocks:
        found.append(
            "Attention heads were chosen by the norms of their weights. What they do "
            "on calibration text says more: set prune.repair to least_squares, or take "
            "a method that uses data."
        )
    return found


def _inputs(run: Run, pruning: Pruning) -> tuple[Tensor | None, dict[str, str]]:
    """Return calibration windows, and a digest of each thing that decides a pruning."""
    tokens = run.load_tokens() if pruning.needs_windows else None
    chosen = [pruning.section.model_dump(mode="json"), pruning.target.unit]
    return tokens.tokens if tokens else None, {
        "model": provenance.model_digest(run.base, locate(run.config.model.path)),
        "calibration": tokens.digest if tokens else "none",
        "calibration.dtype": str(pruning.dtype) if tokens else "none",
        "prune": provenance.digest_of(chosen),
        "run.seed": str(run.config.run.seed),
        "compress version": provenance.versions()["compress"],
    }


def _recovered(
    run: Run,
    section: RecoverSection,
    windows: Tensor | None,
    pruned: Mapping[str, str],
) -> dict[str, Any]:
    """Train the pruned model into ``WORKDIR/recovered``, if it is not there."""
    assert run.pruning is not None
    root, data = run.pruning.root, run.config.calibration.data
    options = recover_options(section)
    student = _opened(root / PRUNED, run.handle)
    work = WorkDir(root / RECOVERY, run.team)
    work.begin(_recovery_fingerprint(section, pruned), overwrite=False)

    def train() -> dict[str, Any]:
        sources = data if isinstance(data, str) else list(data)
        return recover(
            student,
            run.handle,
            root / RECOVERED,
            text=load_recovery_text(sources, run.handle.tokenizer(), options),
            options=options,
            device=run.device,
            state=work.root,
            importances=run.team.alone(
                lambda: _importances(run.pruning, student, windows)
            ),
        )

    stored: dict[str, Any] = work.stage("record", train)
    return stored


def _recovery_fingerprint(
    section: RecoverSection, pruned: Mapping[str, str]
) -> dict[str, str]:
    chosen = {"recover": provenance.digest_of(section.model_dump(mode="json"))}
    return {**pruned, **chosen}


def _forget_changed(run: Run, fingerprint: Mapping[str, str]) -> None:
    """Remove what a changed config or model makes invalid, from pruning on."""
    root, section = run.workdir.root, run.config.recover
    changed = WorkDir(root / WORK).changed(fingerprint)
    if changed:
        _log.info("%s changed: the model is pruned again", ", ".join(changed))
        run.workdir.forget_pruning()
        return
    if section is not None and section.trains_weights:
        wanted = _recovery_fingerprint(section, fingerprint)
        changed = WorkDir(root / RECOVERY).changed(wanted)
    known = provenance.reshaping_fingerprint(run.config)
    if changed or run.workdir.changed(known, only=True):
        _log.info("recover changed: what follows pruning is done again")
        run.workdir.forget_recovery()


def _importances(
    pruning: Pruning | None, student: ModelHandle, windows: Tensor | None
) -> list[float] | None:
    """Return how much each block turns the stream, which ranks of adapters follow."""
    if pruning is None or windows is None:
        return None
    model = pruning.streamed(student.description, student.source)
    angles = [turn.angle for turn in turns_of(model, windows[:_IMPORTANCE_WINDOWS])]
    return cfsp_weights(angles).tolist()


def importance_tokens(pruning: Pruning, windows: tuple[int, int]) -> int:
    """Return how much text the importances of blocks are measured on.

    Args:
        pruning: As the config says.
        windows: Calibration windows and tokens a window.
    """
    count = min(windows[0], _IMPORTANCE_WINDOWS) if pruning.needs_windows else 0
    return count * windows[1]


def _opened(folder: Path, original: ModelHandle, *, pads: bool = False) -> ModelHandle:
    """Return the model of a folder of ours, under the original's name."""
    found = open_model(str(folder), cache=folder)
    description, source = found.description, found.source
    if pads:
        description, source = padded(description, source)
    named = replace(description, label=original.description.label)
    return replace(original, description=named, source=source)


def share(config: Config, finished: Iterable[Config]) -> None:
    """Give a run the pruned model of a finished one that prunes and recovers alike.

    Files are linked where the file system can, else copied. Nothing happens if there is
    no such run, or the run has a pruned model already.
    """
    target = WorkDir(config.run.workdir)
    if config.prune is None or (target.root / PRUNED).exists():
        return
    for other in finished:
        source = other.run.workdir
        if _reshaping_key(other) != _reshaping_key(config):
            continue
        if not (source / PRUNED).is_dir():
            continue
        # The last one says that all is there.
        for name in (WORK, RECOVERY, RECOVERED, PRUNED):
            if (source / name).is_dir():
                _link_folder(source / name, target)
        return


def _reshaping_key(config: Config) -> str:
    """Return a digest of all that decides a pruned model."""
    run = config.run.model_dump(mode="json", include={"seed", "device", "threads"})
    sections = config.model_dump(
        mode="json", include={"model", "calibration", "prune", "recover"}
    )
    return provenance.digest_of([sections, run, unit_of(config)])


def _link_folder(source: Path, work: WorkDir) -> None:
    def fill(part: Path) -> None:
        shutil.copytree(source, part, copy_function=_link, dirs_exist_ok=True)

    work.replace_folder(work.root / source.name, fill)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


def about(record: Mapping[str, Any] | None, run: Run) -> dict[str, Any] | None:
    """Return the entry ``pruning`` of a report."""
    if record is None:
        return None
    counts = {
        "before": parameter_count(run.base),
        "after": parameter_count(run.subject.description),
    }
    kept = {key: value for key, value in record.items() if key != "recovery"}
    return {**kept, "parameters": counts}
