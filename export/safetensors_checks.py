"""What a safetensors checkpoint cannot hold, and what its users should know.

Told from the plan alone, before a weight is read. Problems stop an export: no stock
loader reads the scheme, or the runtime that was asked for does not. Notes go to the
report and the model card.

What transformers loads was tried with compressed-tensors 0.20 (``core``'s
``compressed_tensors.schemes``); two limits are its own: a coded embedding, and packed
integer zero points beside other schemes. Experts have limits of their own, in
``experts``; what vLLM loads is in ``vllm_rules``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from compress.core import compressed_tensors as ct
from compress.core.artifact import CompressedModel, ModelDescription
from compress.core.contracts import Problem
from compress.core.errors import ExportError, SchemeError
from compress.core.plan import LayerPlan, Plan
from compress.core.scheme import Scales, Scheme, Zero
from compress.core.shapes import (
    MODELING_FILE,
    blocks_differ,
    shapes_obstacle,
    what_differs,
)
from compress.export import vllm_rules
from compress.export.experts import (
    expert_notes,
    expert_problems,
    vllm_expert_problems,
)
from compress.export.model_card import groups_of


def problems(
    plan: Plan, model: ModelDescription, *, runtime: str, dense: bool
) -> list[Problem]:
    """List what stops an export.

    Args:
        plan: What is to be written.
        model: What it belongs to.
        runtime: ``transformers``, or ``vllm`` for what both load.
        dense: Whether decoded values are written, which every runtime loads.
    """
    found = [
        Problem(name, message)
        for name, layer in plan.layers.items()
        if (message := _layer_problem(layer, model, dense=dense)) is not None
    ]
    found += shape_problems(model, runtime)
    if dense:
        return found
    found += expert_problems(plan, model)
    schemes = groups_of(plan.layers)
    if len(schemes) > 1:
        # transformers 5.23 reads packed zero points only with dequantize=True, and
        # there it decodes every layer with the first group's bits.
        found += [
            Problem(
                names[0],
                f"{scheme.name} beside other schemes: stock transformers loads "
                "integer zero points only if the whole plan is one scheme; use "
                f"int{scheme.bits} without -asym, or {scheme.name} everywhere",
            )
            for scheme, names in schemes.items()
            if _has_packed_zeros(scheme)
        ]
    if runtime == "vllm" and not found:
        found = vllm_rules.problems(plan, model)
        found += vllm_expert_problems(plan, model)
    return found


def notes(plan: Plan, model: ModelDescription, *, dense: bool) -> tuple[str, ...]:
    """Return what a user of the files should know."""
    layers = plan.layers.values()
    schemes = list(groups_of(plan.layers))
    found: list[str] = []
    if blocks_differ(model.config):
        found.append(
            f"Blocks differ {what_differs(model.config)[1]}, which transformers loads "
            f"with trust_remote_code=True only: the few lines that it then runs are "
            f"{MODELING_FILE} of this folder."
        )
    if dense:
        return (*found, *_dense_notes(schemes, model))
    if any(_has_packed_zeros(scheme) for scheme in schemes):
        found.append(
            "Integer zero points: load in transformers with "
            "CompressedTensorsConfig(dequantize=True); its default load fails. The "
            "product with the scale is then computed in the scale's type."
        )
    scales = sorted(
        {s.scale_dtype for s in schemes if _has_float_scales(s)} - {model.dtype}
    )
    if scales:
        found.append(
            f"Scales are {', '.join(scales)} in a {model.dtype} model; vLLM and "
            f"transformers round them to the type they load in ({model.dtype})."
        )
    odd = sorted({s.bits for s in schemes if s.is_integer} - {2, 4, 8})
    if odd:
        found.append(
            f"Codes of {', '.join(map(str, odd))} bits need compressed-tensors "
            "0.20 or newer: releases before 0.18 pack them differently."
        )
    found += _scheme_notes(schemes, model)
    if model.family.head in plan.layers:
        found.append(
            f"{model.family.head} is coded; transformers loads it, not every "
            "release of vLLM does."
        )
    found += expert_notes(plan, model)
    found += vllm_rules.notes(plan, model, layers)
    return tuple(found)


def shape_problems(model: ModelDescription, runtime: str) -> list[Problem]:
    """List what a folder or the runtime cannot be told about blocks that differ."""
    if not blocks_differ(model.config):
        return []
    key, what = what_differs(model.config)
    obstacle = shapes_obstacle(model.config)
    if obstacle is not None:
        return [Problem(key, obstacle)]
    if runtime == "vllm":
        return [
            Problem(
                key,
                f"in vLLM's own {model.family.name} blocks cannot differ {what}; prune "
                "with `shape: uniform` or `shape: padded`, or set runtime: "
                "transformers",
            )
        ]
    return []


def check_input_amax(artifact: CompressedModel) -> None:
    """Raise unless the inputs were measured for each layer that needs it.

    Raises:
        ExportError: With the first layer that lacks it; nothing is written yet.
    """
    missing = [
        name
        for name, layer in artifact.plan.layers.items()
        if layer.scheme.inputs is not None
        and layer.scheme.inputs.two_level
        and name not in artifact.input_amax
    ]
    if missing:
        raise ExportError(
            f"{missing[0]} (and {len(missing) - 1} more): the largest input, which "
            f"{artifact.plan.layers[missing[0]].scheme.name} stores, was not measured; "
            "use nvfp4 to leave the inputs alone"
        )


def _layer_problem(
    layer: LayerPlan, model: ModelDescription, *, dense: bool
) -> str | None:
    """Return why one layer cannot be stored, with the remedy."""
    message = mismatch(layer, model)
    if message is not None or dense:
        return message
    if layer.name == model.family.embedding:
        # transformers 5.17 and 5.23 with compressed-tensors 0.19 and 0.20 stop with
        # "'Embedding' object has no attribute 'weight'" when the codes replace it.
        return (
            f"stock transformers cannot load a coded embedding ({layer.scheme.name}); "
            "remove its override so that it stays dense, or export to gguf only"
        )
    return ct.obstacle(layer.scheme) or _width_problem(layer)


def mismatch(layer: LayerPlan, model: ModelDescription) -> str | None:
    """Return why an entry of a plan is not about this model, with the remedy."""
    info = model.tensors.get(f"{layer.name}.weight")
    if info is None:
        tied = " (the head shares the embedding's weight)" if model.tied else ""
        return f"the model stores no {layer.name}.weight{tied}; remove it from the plan"
    if info.shape != layer.shape:
        return f"the plan says {layer.shape}, the model {info.shape}; plan it again"
    try:
        layer.scheme.check_columns(layer.shape[1], layer.name)
    except SchemeError as error:
        return str(error)
    return None


def _width_problem(layer: LayerPlan) -> str | None:
    """Return why rows do not fill bytes, for floats of 4 and 6 bits."""
    unit = {"e2m1": 2, "e2m3": 4}.get(layer.scheme.grid, 1)
    columns = layer.shape[1]
    group = layer.scheme.inputs.group_size if layer.scheme.inputs else None
    if columns % unit:
        return f"{layer.scheme.name} is stored {unit} codes at a time, not {columns}"
    if group and columns % group:
        return (
            f"inputs in groups of {group} do not divide the {columns} columns; use "
            "inputs without a group"
        )
    return None


def _has_packed_zeros(scheme: Scheme) -> bool:
    # int-quantized keeps them plain, and these load.
    if scheme.zero is not Zero.INTEGER or ct.obstacle(scheme) is not None:
        return False
    return ct.layout_of(scheme).format == "pack-quantized"


def _has_float_scales(scheme: Scheme) -> bool:
    return scheme.scales in (Scales.FREE, Scales.RATIO)


def _scheme_notes(schemes: Iterable[Scheme], model: ModelDescription) -> list[str]:
    found = []
    formats: Mapping[str, Scheme] = {ct.layout_of(s).format: s for s in schemes}
    rounded = sorted({s.name for s in schemes if s.inputs is not None})
    if rounded:
        found.append(
            f"Inputs are rounded at run time too ({', '.join(rounded)}). transformers "
            "emulates that in float, slowly; integer or FP8 arithmetic is vLLM's."
        )
    small = [name for name in formats if name.startswith(("nvfp", "mxfp"))]
    if small and model.dtype != "bfloat16":
        found.append(
            f"{', '.join(small)}: compressed-tensors decodes it to bfloat16; load the "
            f"model in bfloat16, a {model.dtype} one stops in its first product."
        )
    ratios = [s.name for s in schemes if s.scales is Scales.RATIO]
    if ratios:
        found.append(
            f"The ratios of {', '.join(ratios)} are written out as "
            "scales of 16 bits a group; values are the same, the file is larger."
        )
    return found


def _dense_notes(schemes: Iterable[Scheme], model: ModelDescription) -> tuple[str, ...]:
    names = ", ".join(scheme.name for scheme in schemes)
    if not names:
        return ()
    found = [
        f"Decoded values of {names}, in {model.dtype}: as accurate as the codes, as "
        "large as the original, and rounded once more to that type."
    ]
    if any(scheme.inputs is not None for scheme in schemes):
        found.append("Inputs are not rounded by anything that loads these files.")
    return tuple(found)
