"""The section ``prune``: neurons, heads and blocks that are removed for good."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from compress.config.fields import Section, Text
from compress.core.sizes import parse_size

_UNITS = ("sparsity", "parameters", "expansion_ratio", "size")


def _check_size(size: int | str) -> int | str:
    parse_size(str(size))
    return size


class PruneSection(Section):
    """How much goes, by which criterion, and what the rest does about it.

    One of ``sparsity``, ``parameters``, ``expansion_ratio`` and ``size`` says how much;
    with ``blocks`` or ``kv_groups`` alone, only these go.
    """

    method: Text = Field(
        default="taylor", description="Name of a pruner (compress list pruners)."
    )
    sparsity: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="Share of the MLP neurons to remove; where whole blocks go as "
        "well, as many weights.",
    )
    parameters: float | None = Field(
        default=None, gt=0, lt=1, description="Share of all weights to remove."
    )
    expansion_ratio: float | None = Field(
        default=None,
        gt=0,
        description="MLP width over hidden size that is left; blocks go only if "
        "`blocks` says so.",
    )
    size: Annotated[int | str, AfterValidator(_check_size)] | None = Field(
        default=None, description="Bytes of the pruned, dense checkpoint, such as 1GB."
    )
    blocks: int | None = Field(
        default=None,
        ge=0,
        description="Whole blocks to remove, instead of what depth_share comes to.",
    )
    kv_groups: int = Field(
        default=0,
        ge=0,
        description="Key-value heads that each block loses, with the query heads that "
        "read them.",
    )
    depth_share: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Share of the removed weights that goes as whole blocks, or as "
        "attention; null asks the method (0, but 0.5 for comp), and 2SSP's equation "
        "for attention.",
    )
    depth_unit: Literal["block", "attention"] = Field(
        default="block",
        description="What depth_share removes: whole blocks, or their attention alone, "
        "which needs shape per-layer or padded.",
    )
    depth_by: Literal["auto", "importance", "perplexity"] = Field(
        default="auto",
        description="Drop what changes the residual stream least, or that without "
        "which calibration text is predicted best; both anew after each one. auto is "
        "importance for blocks, perplexity for attention.",
    )
    budgets: Literal[
        "auto", "uniform", "cfsp", "standardised", "effect", "measured", "learned"
    ] = Field(
        default="auto",
        description="How neurons are dealt to blocks; auto asks the method. Shape "
        "uniform has one width for all; learned holds the whole model on the device.",
    )
    exchanges: int = Field(
        default=0,
        ge=0,
        description="Rounds in which neurons that stay are exchanged for ones that "
        "went, by the KL of the repaired model; some 12, on a GPU, with much text. "
        "Holds the whole model on the device.",
    )
    generated: int = Field(
        default=0,
        ge=0,
        description="Windows that the original writes, beside those of calibration, "
        "for all that pruning measures. Holds the whole model on the device.",
    )
    shape: Literal["uniform", "per-layer", "padded"] = Field(
        default="uniform",
        description="uniform loads anywhere; per-layer needs trust_remote_code in "
        "transformers, and becomes a deci GGUF; padded fills up with zeros, for tests.",
    )
    round_to: int | None = Field(
        default=None,
        ge=1,
        description="Widths are multiples of this; null takes 256 for K-quants, 128 "
        "for groups of 128, else 64.",
    )
    repair: Literal["auto", "least_squares", "mask", "bias", "none"] = Field(
        default="auto",
        description="What the neurons and heads that stay take over: auto is "
        "least_squares with calibration text, else none.",
    )
    propagate: Literal["dense", "pruned", "corrected"] = Field(
        default="dense",
        description="What blocks are repaired on: inputs as the original model has "
        "them, or as the pruned blocks before give them. corrected takes these, and "
        "fits o and down to the original's stream, so that they make good what went "
        "wrong before.",
    )
    options: dict[str, Any] = Field(default={}, description="Options of the method.")

    @model_validator(mode="after")
    def _says_how_much(self) -> PruneSection:
        given = [name for name in _UNITS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} contradict; give one of them")
        if not given and not self.blocks and not self.kv_groups:
            raise ValueError(
                f"say how much to remove: one of {', '.join(_UNITS)}, or blocks or "
                "kv_groups"
            )
        other = "blocks" if self.blocks is not None else "expansion_ratio"
        if self.depth_share is not None and getattr(self, other) is not None:
            raise ValueError(
                f"depth_share and {other} contradict; blocks says how many go"
            )
        if self.depth_unit == "attention":
            if self.blocks is not None or self.total is None:
                raise ValueError(
                    "depth_unit attention takes its share of sparsity, parameters or "
                    "size; give one of them, and leave blocks and expansion_ratio out"
                )
            if self.shape == "uniform":
                raise ValueError(
                    "depth_unit attention: blocks with and without attention are no "
                    "uniform ones; set shape: per-layer"
                )
        return self

    @property
    def total(self) -> str | None:
        """What limits blocks and neurons together, as it was written."""
        for name in ("sparsity", "parameters", "size"):
            if getattr(self, name) is not None:
                return f"{name}: {getattr(self, name)}"
        return None
