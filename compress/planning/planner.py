"""From a config to a plan: one scheme and method for each linear layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from compress.config.schema import DENSE, Override, QuantizeSection
from compress.core.artifact import ModelDescription
from compress.core.contracts import Quantizer
from compress.core.errors import CheckpointError, ConfigError, PlanError, SchemeError
from compress.core.plan import LayerPlan, Plan
from compress.core.scheme import Scheme
from compress.core.scheme_names import for_columns


def make_plan(
    section: QuantizeSection | None,
    model: ModelDescription,
    *,
    scale_dtype: str,
    quantizer: Callable[[str], Quantizer],
) -> Plan:
    """Return the plan of a config; reads no weights.

    Args:
        section: The config's ``quantize``; ``None`` keeps everything dense.
        model: What is to be compressed.
        scale_dtype: Storage type of scales.
        quantizer: Returns a method by name, to ask what it supports.

    Raises:
        PlanError: With every reason at once: groups that do not divide, overrides that
            name nothing, schemes that a method cannot make.
        CheckpointError: A matrix is missing.
    """
    if section is None:
        return Plan(model.label, {})
    problems = unused_overrides(section, model)
    layers: dict[str, LayerPlan] = {}
    for name in _matrices(model, section.overrides):
        layer = layer_plan(section, model, name, scale_dtype=scale_dtype)
        if layer is not None:
            layers[name] = layer
            problems += layer_problems(layer, model, quantizer(layer.method))
    if problems:
        raise PlanError(listed(problems))
    return Plan(model.label, layers)


def layer_plan(
    section: QuantizeSection,
    model: ModelDescription,
    name: str,
    *,
    scale_dtype: str,
) -> LayerPlan | None:
    """Return what a config makes of one matrix; ``None`` if it stays dense.

    Raises:
        CheckpointError: The matrix is missing.
    """
    scheme_name, method = section.scheme, section.method
    override = override_of(section, name)
    if override is not None:
        scheme_name = override.scheme or scheme_name
        method = override.method or method
    if scheme_name == DENSE:
        return None
    assert scheme_name is not None, "a config without a budget names a scheme"
    rows, columns = _shape(model, name)
    wanted = Scheme.parse(scheme_name)
    scheme = for_columns(wanted, columns)
    asked = None if scheme == wanted else scheme_name
    scheme = scheme.with_scales(scale_dtype)
    return LayerPlan(name, (rows, columns), method, scheme, asked)


def override_of(section: QuantizeSection, name: str) -> Override | None:
    """Return the first override that names a layer, if one does."""
    for pattern, override in section.overrides.items():
        if _names(pattern, name):
            return override
    return None


def unused_overrides(section: QuantizeSection, model: ModelDescription) -> list[str]:
    """Return a sentence for each override that names no layer."""
    names = _matrices(model, section.overrides)
    return [
        f"quantize.overrides.{pattern}: no layer has this name; layers are named like "
        f"{model.linears()[0]}"
        for pattern in sorted(section.overrides)
        if not any(override_of(section, n) is section.overrides[pattern] for n in names)
    ]


def _matrices(model: ModelDescription, overrides: Mapping[str, Override]) -> list[str]:
    """Return all linears, and embedding or head if an override names them."""
    extra = [model.family.embedding]
    if not model.tied:
        extra.append(model.family.head)
    named = [n for n in extra if any(_names(pattern, n) for pattern in overrides)]
    return [*named, *model.linears()]


def _names(pattern: str, layer: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], layer) is not None
    return pattern == layer


def _shape(model: ModelDescription, layer: str) -> tuple[int, int]:
    info = model.tensors.get(f"{layer}.weight")
    if info is None or len(info.shape) != 2:
        found = "is missing" if info is None else f"has shape {info.shape}"
        raise CheckpointError(
            f"{model.label}: {layer}.weight {found}, a matrix is expected; the "
            "checkpoint is incomplete, or its config.json is of another model"
        )
    return info.shape[0], info.shape[1]


def layer_problems(
    layer: LayerPlan, model: ModelDescription, quantizer: Quantizer
) -> list[str]:
    """Return why a method cannot make a layer's scheme; empty if it can."""
    found = []
    try:
        layer.scheme.check_columns(layer.shape[1], layer.name)
        layer.scheme.check_rank(*layer.shape, layer.name)
    except SchemeError as error:
        found.append(str(error))
    if not quantizer.supports(layer.scheme):
        found.append(
            f"{layer.name}: {quantizer.name} cannot make {layer.scheme.name}; use one "
            f"of {', '.join(quantizer.schemes())}"
        )
    elif not found:
        obstacle = quantizer.obstacle(layer.scheme, layer.shape)
        found += [] if obstacle is None else [f"{layer.name}: {obstacle}"]
    return found


def listed(problems: list[str]) -> str:
    """Join problems, showing one of each kind: thirty blocks have the same ones."""
    kinds: dict[str, list[str]] = {}
    for problem in problems:
        kinds.setdefault(re.sub(r"\.\d+\.", ".N.", problem), []).append(problem)
    lines = []
    for same in kinds.values():
        more = f" (and {len(same) - 1} more layers)" if len(same) > 1 else ""
        lines.append(f"{same[0]}{more}")
    return "\n".join(lines)


def resolve_scale_dtype(
    section: QuantizeSection | None, model: ModelDescription, formats: list[str]
) -> str:
    """Return the storage type of scales: GGUF has only float16.

    Raises:
        ConfigError: float16 was ruled out although a GGUF file is asked for.
    """
    chosen = "auto" if section is None else section.scale_dtype
    if "gguf" in formats:
        if chosen not in ("auto", "float16"):
            raise ConfigError(
                f"quantize.scale_dtype: {chosen} cannot be stored in GGUF; use float16 "
                "or auto, or drop the gguf export"
            )
        return "float16"
    return model.dtype if chosen == "auto" else chosen
