"""The config's sections: every key, its type, its default and its limits.

All models are frozen and refuse unknown keys. Values are not converted: ``"128"`` is
text, not a number. A section that is left out (or null) takes its defaults;
``quantize`` and ``evaluate`` are only done when they are present.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from compress.core.errors import SchemeError
from compress.core.scheme import Scheme

DENSE = "dense"
"""The scheme of an override that keeps a layer as it is."""


def _path_text(value: object) -> object:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _check_scheme(name: str) -> str:
    if name == DENSE:
        raise ValueError(
            f"{DENSE!r} is for single layers, under quantize.overrides; "
            "leave the section quantize out to keep the whole model"
        )
    try:
        Scheme.parse(name)
    except SchemeError as error:
        raise ValueError(str(error)) from None
    return name


def _check_override_scheme(name: str) -> str:
    return name if name == DENSE else _check_scheme(name)


def _check_layer_pattern(key: str) -> str:
    if key.startswith("re:"):
        try:
            re.compile(key[3:])
        except re.error as error:
            at = "" if error.pos is None else f" at character {error.pos + 1}"
            raise ValueError(
                f"not a regular expression: {error.msg}{at} of {key[3:]!r}"
            ) from None
    return key


def _kind_of_data(value: object) -> str:
    return "<list>" if isinstance(value, list | tuple) else "<text>"


def _check_not_empty(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not values:
        raise ValueError("the list is empty; name at least one source")
    return values


Text = Annotated[str, Field(min_length=1)]
PathText = Annotated[Text, BeforeValidator(_path_text)]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values are fixed and typed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelSection(Section):
    """Which model, and how its weights are read."""

    path: PathText = Field(
        description="HF folder, HF id, .gguf file, or builtin:NAME for a model that "
        "an installed package ships."
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        default="auto",
        description="Storage type of weights; auto keeps the checkpoint's.",
    )
    resident: bool = Field(
        default=False,
        description="Hold the whole model in memory instead of one block.",
    )
    trust_remote_code: bool = Field(
        default=False,
        description="Let the tokenizer run Python code of the checkpoint.",
    )


class WeightedSource(Section):
    """One of several calibration texts."""

    source: PathText = Field(description="As calibration.data.")
    weight: float = Field(default=1.0, gt=0, description="Share of samples, relative.")


class CalibrationSection(Section):
    """The text that statistics are measured on.

    Tokens are kept in `$COMPRESS_CACHE`, else `$XDG_CACHE_HOME/compress`, else
    `~/.cache/compress`, under a digest of text, tokenizer and this section. The folder
    may be deleted at any time.
    """

    data: Annotated[
        Annotated[PathText, Tag("<text>")]
        | Annotated[
            tuple[WeightedSource, ...],
            Field(strict=False),
            AfterValidator(_check_not_empty),
            Tag("<list>"),
        ],
        Discriminator(_kind_of_data),
    ] = Field(
        default="mix",
        description="Name of a bundled text, .txt or .jsonl file, hf:NAME, or a list "
        "of {source, weight}.",
    )
    samples: int = Field(default=128, ge=1, description="Number of sequences.")
    sequence_length: int = Field(default=512, ge=2, description="Tokens in a sequence.")
    seed: int = Field(default=0, ge=0, description="Which sequences are drawn.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="Arithmetic of the forward passes; auto is bfloat16 for 16-bit "
        "checkpoints where the device has matrix units for it (a GPU; a CPU with AMX). "
        "Layers are solved, and results evaluated, in float32 always.",
    )


class Override(Section):
    """What differs for the layers that a pattern names."""

    scheme: Annotated[Text, AfterValidator(_check_override_scheme)] | None = Field(
        default=None, description="Scheme name, or 'dense' to keep the layer as it is."
    )
    method: Text | None = Field(
        default=None, description="Quantizer, with default options."
    )

    @model_validator(mode="after")
    def _says_something(self) -> Override:
        if self.scheme is None and self.method is None:
            raise ValueError("an override needs scheme, method or both")
        return self


class QuantizeSection(Section):
    """Method and scheme of the decoder's linear layers."""

    method: Text = Field(
        default="gptq", description="Name of a quantizer (compress list)."
    )
    scheme: Annotated[Text, AfterValidator(_check_scheme)] = Field(
        description="Grid, bits and group size, such as int4-g64 or q4_0."
    )
    options: dict[str, Any] = Field(default={}, description="Options of the method.")
    overrides: dict[Annotated[Text, AfterValidator(_check_layer_pattern)], Override] = (
        Field(
            default={},
            description="By full module name, or re:REGEX matched against it.",
        )
    )
    propagate: Literal["quantized", "fp"] = Field(
        default="quantized",
        description="What later blocks are calibrated on: outputs of blocks that are "
        "already compressed, or of the original model.",
    )
    scale_dtype: Literal["auto", "float16", "bfloat16", "float32"] = Field(
        default="auto",
        description="Storage type of scales; auto is float16 when a GGUF file is "
        "asked for, else the model's.",
    )


class EvaluateSection(Section):
    """What is measured before and after."""

    perplexity: Annotated[tuple[Text, ...], Field(strict=False)] = Field(
        default=("wikitext2", "speeches", "code"),
        description="Names of bundled texts, or .txt files.",
    )
    protocol: Literal["hf2048", "llamacpp512", "windows"] = Field(
        default="windows", description="How a text is cut for perplexity."
    )
    windows: int = Field(
        default=10, ge=1, description="Windows a text, for protocol windows and for KL."
    )
    sequence_length: int = Field(
        default=1024,
        ge=2,
        description="Tokens in a window, for protocol windows and for KL.",
    )
    kl: bool = Field(
        default=True, description="KL divergence and agreement with the base."
    )


class ExportEntry(BaseModel):
    """One export: its format, and options that the exporter checks."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    format: Text = Field(description="Name of an exporter (compress list).")

    @property
    def options(self) -> Mapping[str, Any]:
        """All keys but ``format``, for the exporter's ``Options``."""
        return dict(self.model_extra or {})


class RunSection(Section):
    """Where results go, and how the machine is used."""

    workdir: Annotated[Path, Field(strict=False)] = Field(
        default=Path("runs/default"), description="Folder of results and checkpoints."
    )
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
        description="auto, cpu, mps, cuda or cuda:N.",
    )
    seed: int = Field(default=0, ge=0, description="Seed of every random choice.")
    verify: bool = Field(
        default=True, description="Reopen each export with its consumer."
    )
    max_kl: float = Field(
        default=1e-3, gt=0, description="KL in nats that verify allows for an export."
    )
    threads: int | None = Field(
        default=None, ge=1, description="Threads of the CPU; null leaves it to torch."
    )


class Config(Section):
    """A whole run."""

    model: ModelSection
    calibration: CalibrationSection = CalibrationSection()
    quantize: QuantizeSection | None = None
    evaluate: EvaluateSection | None = None
    export: Annotated[tuple[ExportEntry, ...], Field(strict=False)] = ()
    run: RunSection = RunSection()

    @model_validator(mode="before")
    @classmethod
    def _null_is_left_out(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        return {key: value for key, value in data.items() if value is not None}
