"""The config's sections: every key, its type, its default and its limits.

All models are frozen and refuse unknown keys. Values are not converted: ``"128"`` is
text, not a number. A section that is left out (or null) takes its defaults;
``quantize`` and ``evaluate`` are only done when they are present.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from compress.config.budget_sections import (
    AllocateSection,
    BudgetSection,
)
from compress.config.fields import (
    DENSE as DENSE,
)
from compress.config.fields import (
    PathText,
    Section,
    Text,
    check_scheme,
)
from compress.config.prune_section import PruneSection
from compress.config.recover_section import RecoverSection
from compress.config.run_section import RunSection
from compress.config.tune_section import TuneSection
from compress.core.errors import ConfigError
from compress.kvcache.names import DEFAULT_PAIRS, CachePair


def _check_override_scheme(name: str) -> str:
    return name if name == DENSE else check_scheme(name)


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


def _check_cache_type(name: str) -> str:
    try:
        CachePair.parse(name)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return name


def _kind_of_data(value: object) -> str:
    return "<list>" if isinstance(value, list | tuple) else "<text>"


def _kind_of_transform(value: object) -> str:
    return "<text>" if isinstance(value, str) else "<options>"


def _check_not_empty(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not values:
        raise ValueError("the list is empty; name at least one source")
    return values


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
    imatrix: PathText | None = Field(
        default=None,
        description="Importance matrix of llama.cpp (GGUF, or the older binary form) "
        "that columns are weighed by, instead of statistics; for rtn.",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="Arithmetic of the forward passes; auto is bfloat16 for 16-bit "
        "checkpoints where the device has matrix units for it (a GPU; a CPU with AMX). "
        "Layers are solved, and results evaluated, in float32 always.",
    )


class TransformEntry(BaseModel):
    """An exact change of the weights before they are quantized, with its options."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    name: Text = Field(
        description="rotation, scale_folding, smoothquant or awq; a name alone takes "
        "the default options."
    )

    @property
    def options(self) -> Mapping[str, Any]:
        """All keys but ``name``, for the transform's ``Options``."""
        return dict(self.model_extra or {})


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


class UpgradeInputsSection(Section):
    """Finer scales for the inputs that lose most, after the weights are coded."""

    factor: float = Field(
        default=5.0,
        gt=1,
        description="An input is an outlier above this many times the median KL.",
    )
    limit: float = Field(
        default=0.005,
        gt=0,
        description="Relative rise of perplexity against the original, on calibration "
        "text, from which inputs are upgraded.",
    )
    samples: int = Field(
        default=16, ge=1, description="Calibration sequences that are measured on."
    )
    draws: int = Field(
        default=2, ge=1, description="Random labels for each position of the estimate."
    )


class QuantizeSection(Section):
    """Method and scheme of the decoder's linear layers."""

    method: Text = Field(
        default="gptq", description="Name of a quantizer (compress list)."
    )
    scheme: Annotated[Text, AfterValidator(check_scheme)] | None = Field(
        default=None,
        description="Grid, bits and group size, such as int4-g64 or q4_0. Required, "
        "except with a budget, where it is chosen for each layer.",
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
    order: Literal["layer", "block"] = Field(
        default="layer",
        description="Whether layers of a block are measured one after the other, each "
        "on what the coded ones before it feed it, or all at once, on what the block "
        "itself feeds them: fewer passes, and processes can share the layers.",
    )
    scale_dtype: Literal["auto", "float16", "bfloat16", "float32"] = Field(
        default="auto",
        description="Storage type of scales; auto is float16 when a GGUF file is "
        "asked for, else the model's.",
    )
    upgrade_inputs: UpgradeInputsSection | None = Field(
        default=None,
        description="With rounded inputs: give outliers finer scales, or none; null "
        "leaves all as the scheme says.",
    )


class KVCacheSection(Section):
    """Static scales of the key-value cache, and what its types cost."""

    scheme: Literal["none", "fp8"] = Field(
        default="none",
        description="fp8 stores calibrated scales in the safetensors export.",
    )
    strategy: Literal["tensor", "attn_head"] = Field(
        default="tensor", description="One scale for a block's keys, or one a head."
    )
    scale: Literal["amax", "percentile", "mse"] = Field(
        default="amax", description="What a scale covers; mse searches."
    )
    percentile: float = Field(
        default=99.99, gt=0, le=100, description="Of magnitudes, for scale percentile."
    )
    samples: int = Field(
        default=32, ge=1, description="Calibration sequences for the scales."
    )
    types: Annotated[
        tuple[Annotated[Text, AfterValidator(_check_cache_type)], ...],
        Field(strict=False),
    ] = Field(
        default=DEFAULT_PAIRS,
        description="Cache types to measure: a llama.cpp type, or KEYS/VALUES.",
    )
    windows: int = Field(
        default=4,
        ge=1,
        description="Windows of the first evaluation text that types are measured on.",
    )
    limit: float = Field(
        default=0.001, gt=0, description="KL in nats that a recommended type may cost."
    )
    tight_limit: float = Field(
        default=0.01, gt=0, description="The same where memory is short."
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
    tasks: Annotated[tuple[PathText, ...], Field(strict=False)] = Field(
        default=(),
        description="Questions for base and compressed model: JSONL files, folders of "
        "them, or hub:NAME, as in compress compare.",
    )
    task_limit: int = Field(
        default=100,
        ge=0,
        description="Questions of each task, evenly spread over it; 0 takes all.",
    )
    answer_tokens: int = Field(
        default=1280,
        ge=1,
        description="Most tokens of an answer, for tasks that want written text.",
    )
    generate: int = Field(
        default=0,
        ge=0,
        le=512,
        description="Tokens that base and compressed model write after each prompt, "
        "greedily, for the report. Each model is in memory as a whole for that; 0 "
        "writes nothing.",
    )
    prompts: Annotated[tuple[Text, ...], Field(strict=False, min_length=1)] | None = (
        Field(
            default=None,
            description="Plain texts that `generate` goes on with; null takes four "
            "stored ones.",
        )
    )


class ExportEntry(BaseModel):
    """One export: its format, and options that the exporter checks."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    format: Text = Field(description="Name of an exporter (compress list).")

    @property
    def options(self) -> Mapping[str, Any]:
        """All keys but ``format``, for the exporter's ``Options``."""
        return dict(self.model_extra or {})


class Config(Section):
    """A whole run."""

    model: ModelSection
    calibration: CalibrationSection = CalibrationSection()
    transforms: Annotated[
        tuple[
            Annotated[
                Annotated[Text, Tag("<text>")]
                | Annotated[TransformEntry, Tag("<options>")],
                Discriminator(_kind_of_transform),
            ],
            ...,
        ],
        Field(strict=False),
    ] = ()
    prune: PruneSection | None = None
    quantize: QuantizeSection | None = None
    budget: BudgetSection | None = None
    allocate: AllocateSection | None = None
    recover: RecoverSection | None = None
    tune: TuneSection | None = None
    kv_cache: KVCacheSection | None = None
    evaluate: EvaluateSection | None = None
    export: Annotated[tuple[ExportEntry, ...], Field(strict=False)] = ()
    run: RunSection = RunSection()

    @property
    def transform_entries(self) -> tuple[TransformEntry, ...]:
        """All transforms with their options, whichever way they were written."""
        return tuple(
            TransformEntry(name=entry) if isinstance(entry, str) else entry
            for entry in self.transforms
        )

    @model_validator(mode="before")
    @classmethod
    def _null_is_left_out(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        return {key: value for key, value in data.items() if value is not None}
