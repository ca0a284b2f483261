"""The stage ``recover`` by a soft prompt: after all codes are made, before evaluation.

The prompt learns from the original model what the compressed one, pruned, quantized and
tuned as it is, has lost. It lies in ``WORKDIR/prompt`` as a peft adapter; no weight and
no export changes. Inputs of layers are exact while it is trained, also where an engine
rounds them, since rounding has no gradient; it is evaluated as the model is served.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from compress import provenance
from compress.calibration.sources import check_sources
from compress.config.recover_section import SoftPromptOptions
from compress.config.training_checks import recover_options
from compress.core.errors import ConfigError
from compress.model.loading import ModelHandle
from compress.recovery.recover import recover
from compress.recovery.soft_prompt import WEIGHTS, prompt_tokens, read_prompt
from compress.recovery.text import load_recovery_text
from compress.workdir import REPORTS, WorkDir

if TYPE_CHECKING:
    from compress.pipeline import Run

FOLDER, STATE = "prompt", "prompting"
_RECORD = "record"
_NO_PROMPT = ("gguf",)
"""Formats whose runtimes take ids alone."""


@dataclass(frozen=True)
class LearnedPrompt:
    """The result of the stage.

    Attributes:
        values: float32 ``[n, C]``.
        record: For the report.
    """

    values: Tensor
    record: Mapping[str, Any]


def options_of(run: Run) -> SoftPromptOptions | None:
    """Return the options of the prompt that a run trains, if it does."""
    section = run.config.recover
    if section is None or section.trains_weights:
        return None
    options = recover_options(section)
    assert isinstance(options, SoftPromptOptions)
    return options


def check(run: Run) -> None:
    """Raise if the prompt that a config wants cannot be trained; reads no weight.

    Raises:
        ConfigError: It does not fit the model, or would be split over processes.
        CheckpointError: The prompt it begins with is none.
        CalibrationError: The text is not there.
    """
    options = options_of(run)
    if options is None:
        return
    check_sources(run.config.calibration.data)
    room = int(run.model.config["max_position_embeddings"])
    if options.start is not None:
        width = read_prompt(Path(options.start)).shape[1]
        if width != int(run.model.config["hidden_size"]):
            raise ConfigError(
                f"recover.options.start: {options.start} has {width} values a token, "
                f"the model {run.model.config['hidden_size']}; a prompt goes with "
                "sizes of one model only"
            )
    if prompt_tokens(options) + options.sequence_length > room:
        raise ConfigError(
            f"recover.options: {prompt_tokens(options)} virtual tokens and texts of "
            f"{options.sequence_length} are more than the {room} positions of "
            "the model; lower tokens or sequence_length"
        )


def carry_out(run: Run, fingerprint: Mapping[str, str]) -> LearnedPrompt | None:
    """Train the prompt of a run, unless that was done; ``None`` if it wants none.

    Args:
        run: With its final plan.
        fingerprint: Of its codes.

    Raises:
        ConfigError: An unfinished training here is of another config.
    """
    options = options_of(run)
    if options is None:
        return None
    section, root = run.config.recover, run.workdir.root
    assert section is not None
    work = WorkDir(root / STATE, run.team)
    made_from = {
        **fingerprint,
        "plan": provenance.digest_of(run.plan.to_json()),
        "recover": provenance.digest_of(_told(run, options)),
    }
    if run.redo:
        run.team.alone(lambda: _forget_changed(run, work, made_from))
    work.begin(made_from, overwrite=False)

    def train() -> dict[str, Any]:
        data = run.config.calibration.data
        sources = data if isinstance(data, str) else list(data)
        with run.timed("recover"):
            record = recover(
                ModelHandle(run.model, run.compressed_source()),
                run.handle,
                root / FOLDER,
                text=load_recovery_text(sources, run.handle.tokenizer(), options),
                options=options,
                device=run.device,
                state=work.root,
            )
        return record | {"served": _served(run, options)}

    record = work.stage(_RECORD, train)
    return LearnedPrompt(read_prompt(root / FOLDER), record)


def _told(run: Run, options: SoftPromptOptions) -> list[Any]:
    """Return what decides a prompt besides the model it is put before."""
    told = options.model_dump(mode="json", exclude={"checkpoint_minutes"})
    start = None
    if options.start is not None:
        start = provenance.file_digest(Path(options.start) / WEIGHTS)
    data = run.config.calibration.model_dump(mode="json", include={"data"})
    return [told, start, data]


def _forget_changed(run: Run, work: WorkDir, made_from: Mapping[str, str]) -> None:
    if work.changed(made_from):
        run.workdir.drop((FOLDER, STATE, *REPORTS))


def _served(run: Run, options: SoftPromptOptions) -> dict[str, Any]:
    """Return what the prompt costs whoever serves the model."""
    file = run.workdir.root / FOLDER / WEIGHTS
    return {
        "folder": FOLDER,
        "tokens": prompt_tokens(options),
        "context_tokens": int(run.model.config["max_position_embeddings"]),
        "bytes": file.stat().st_size,
        "cannot_carry": [name for name in run.exporters if name in _NO_PROMPT],
    }


def cautions(record: Mapping[str, Any]) -> list[str]:
    """Return what the user of a prompt should know, as sentences.

    Args:
        record: Of a :class:`LearnedPrompt`.
    """
    served = record["served"]
    tokens, room = served["tokens"], served["context_tokens"]
    found = [
        f"The soft prompt takes {tokens} of {room} tokens of context before every "
        "text; a runtime with a prefix cache computes it once. The figures of the "
        "compressed model are without it; those with it stand beside them."
    ]
    found += [
        f"{name}: the file cannot carry the soft prompt, and runs without it; peft's "
        f"PeftModel.from_pretrained(model, {served['folder']!r}) puts it before a "
        "model of transformers"
        for name in served["cannot_carry"]
    ]
    after, without = record["kl_after"], record["kl_without"]
    if after >= without:
        found.append(
            f"The soft prompt does not help: on held-out text the KL is {after:.4f} "
            f"with it and {without:.4f} without; train for longer, or leave recover out"
        )
    return found
