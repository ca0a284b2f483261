"""A tiny Llama with its candidates and levels, as a search has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from export_fixtures import StateDictSource
from streaming_fixtures import WINDOWS, model_of

from compress.allocation.candidates import Candidates, find_candidates
from compress.allocation.database import LevelMaker
from compress.allocation.store import Level, LevelStore
from compress.config.schema import QuantizeSection
from compress.core.artifact import ModelDescription
from compress.core.contracts import Exporter, Quantizer
from compress.core.plan import LayerPlan
from compress.export.safetensors import SafetensorsExporter
from compress.registry import get_quantizer

SCHEMES = ("int4-g32", "int6-g32", "int8-g32")


def quantizer(name: str) -> Quantizer:
    plugin: type[Quantizer] = get_quantizer(name)
    return plugin()


def candidates_of(
    model: ModelDescription,
    *,
    exporter: Exporter | None = None,
    schemes: Sequence[str] = SCHEMES,
    scale_dtype: str = "float32",
    **section: Any,
) -> Candidates:
    """Return the candidates of a model under one export."""
    chosen = exporter or SafetensorsExporter()
    return find_candidates(
        QuantizeSection.model_validate({"method": "gptq"} | section),
        model,
        schemes,
        exporters={chosen.name: chosen},
        budget_format=chosen.name,
        scale_dtype=scale_dtype,
        quantizer=quantizer,
    )


@dataclass(frozen=True)
class Searched:
    """A model between calibration and search."""

    module: Any
    source: StateDictSource
    candidates: Candidates
    store: LevelStore
    maker: LevelMaker
    levels: Mapping[LayerPlan, Level]

    @property
    def model(self) -> ModelDescription:
        return self.candidates.model

    @property
    def wanted(self) -> list[LayerPlan]:
        return wanted(self.candidates)


def wanted(candidates: Candidates) -> list[LayerPlan]:
    return [x for u in candidates.units for o in u.options for x in o.layers]


def maker_of(
    model: ModelDescription, source: StateDictSource, store: LevelStore
) -> LevelMaker:
    methods = {name: quantizer(name) for name in ("gptq", "rtn")}
    return LevelMaker(model, source, methods, store, {"text": "made up"})


def searched(folder: Path, **options: Any) -> Searched:
    """Return a tiny Llama whose levels are all made."""
    module, model, source = model_of("llama", num_hidden_layers=2)
    candidates = candidates_of(model, **options)
    store = LevelStore(folder)
    maker = maker_of(model, source, store)
    levels = maker.make(wanted(candidates), WINDOWS)
    return Searched(module, source, candidates, store, maker, levels)


def logits_with(found: Searched, assignment: Sequence[int | None]) -> torch.Tensor:
    """Return transformers' logits ``[N, T, V]`` with the levels of an assignment."""
    pairs = zip(found.candidates.units, assignment, strict=True)
    chosen = [u.options[i].layers for u, i in pairs if i is not None]
    parameters = dict(found.module.named_parameters())
    with torch.no_grad():
        for layer in (x for layers in chosen for x in layers):
            values = found.store.read(found.levels[layer].key).dequantize()
            parameters[f"{layer.name}.weight"].copy_(values)
        logits: torch.Tensor = found.module(WINDOWS).logits
        for name, value in found.source.state.items():
            parameters[name].copy_(value)
    return logits
