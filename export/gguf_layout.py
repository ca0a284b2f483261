"""Decides, without reading weights, how each tensor is stored in a GGUF file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from compress.core.artifact import ModelDescription
from compress.core.contracts import Problem
from compress.core.plan import LayerPlan, Plan
from compress.export.experts import expert_layers, routers
from compress.export.gguf_blocks import (
    CODED_TYPES,
    DENSE_TYPES,
    coded_type,
    holds_columns,
    row_bytes,
)
from compress.export.gguf_experts import Stack, expert_stacks, members_of
from compress.export.gguf_float_blocks import applies_factor, scale_name
from compress.export.gguf_metadata import (
    ROPE_TENSOR,
    config_notes,
    head_width,
    rope_parameters,
)
from compress.export.gguf_names import name_finder, rotary_heads
from compress.export.gguf_writer import TensorRow

_ENDS = ("token_embd.weight", "output.weight")
_BUFFERS = (".rotary_emb.inv_freq", ".attention.masked_bias", ".attention.bias")


@dataclass(frozen=True)
class Placement:
    """How one tensor of the model is stored.

    Attributes:
        source: Transformers' tensor name; ``None`` for a tensor that the config
            implies, or that is copied from a template.
        target: GGUF name.
        type: Lower-case GGUF type.
        shape: As torch has it.
        size_bytes: Bytes of the data.
        heads: Heads whose rows are interleaved; 0 for none.
        layer: Module name if the plan has codes for it.
        is_exact: Whether the codes of ``layer`` are written as they are.
        stack: Module names of the experts that the tensor holds one after another;
            ``layer`` is the first of them if they have codes.
        scales: Module names of the layers whose factors the tensor holds, a float32
            each; see :mod:`compress.export.gguf_float_blocks`.
    """

    source: str | None
    target: str
    type: str
    shape: tuple[int, ...]
    size_bytes: int
    heads: int = 0
    layer: str | None = None
    is_exact: bool = False
    stack: tuple[str, ...] = ()
    scales: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Module name of a weight, else the name of the tensor."""
        return (self.source or self.target).removesuffix(".weight")

    @property
    def row(self) -> TensorRow:
        """The entry of the tensor table."""
        return TensorRow(self.target, self.type, self.shape, self.size_bytes)


@dataclass(frozen=True)
class Layout:
    """All placements in file order, what cannot be held, and what to report."""

    placements: tuple[Placement, ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]


def layer_type(
    layer: LayerPlan, reencode: str | None, *, factor: bool
) -> tuple[str | None, bool]:
    """Return the GGUF type for a layer of the plan and whether it holds the codes.

    The type is ``None`` when neither the codes nor ``reencode`` fit.

    Args:
        layer: Of the plan.
        reencode: Type for codes that GGUF cannot hold, or ``None``.
        factor: Whether the runtime would apply that of an ``nvfp4`` matrix.
    """
    exact = coded_type(layer.scheme)
    if exact == "nvfp4" and not factor:
        exact = None
    columns = layer.shape[1]
    if exact is not None and holds_columns(exact, columns):
        return exact, True
    if reencode is not None and holds_columns(reencode, columns):
        return reencode, False
    return None, False


def unheld(layer: LayerPlan, reencode: str | None) -> Problem:
    """Return the message for a layer that GGUF cannot hold."""
    scheme = layer.scheme
    what = f"GGUF has no type for {scheme.name} with {scheme.scale_dtype} scales"
    if coded_type(scheme) == "nvfp4":
        what = (
            "GGUF has nvfp4 in runs of 64 columns, and llama.cpp applies its outer "
            "scale in attention, and in MLPs without bias of llama, mistral and qwen3"
        )
    near = f"{', '.join(CODED_TYPES)} (with float16 scales)"
    if reencode is not None:
        return Problem(
            layer.name,
            f"{what}, and {layer.shape[1]} columns do not fit `reencode: {reencode}`; "
            "use `reencode: f16`",
        )
    return Problem(
        layer.name, f"{what}; use {near}, or set `reencode: q8_0` on the gguf export"
    )


def own_layout(
    plan: Plan, model: ModelDescription, *, embedding: str, reencode: str | None
) -> Layout:
    """Return the layout of a family that our own writer knows.

    Args:
        plan: What is coded.
        model: Its family names a GGUF architecture.
        embedding: Type of the embedding and the head where the plan has no codes.
        reencode: Type of layers whose codes GGUF cannot hold, or ``None``.
    """
    architecture = model.gguf_architecture
    assert architecture is not None, "check() refuses families without one"
    find = name_finder(architecture, model.block_count)
    placements: list[Placement] = []
    problems: list[Problem] = []
    notes = config_notes(model.config)
    experts = set(expert_layers(model))
    for name, info in model.tensors.items():
        if name.endswith(_BUFFERS) or name.removesuffix(".weight") in experts:
            continue
        target = find(name)
        if target is None:
            problems.append(
                Problem(name, f"GGUF's {architecture} has no such tensor; use template")
            )
            continue
        module = name.removesuffix(".weight")
        layer = plan.layers.get(module)
        if layer is not None:
            biased = f"{module}.bias" in model.tensors
            factor = applies_factor(architecture, target, biased=biased)
            kind, exact = layer_type(layer, reencode, factor=factor)
            if kind is None:
                problems.append(unheld(layer, reencode))
                continue
        else:
            kind, exact = _dense_type(module, info.shape, model, embedding), False
        if layer is None and module in (model.family.embedding, model.family.head):
            notes += _embedding_notes(name, kind, embedding)
        if layer is not None and not exact:
            notes.append(f"{name}: {layer.scheme.name} re-encoded as {kind}")
        heads = rotary_heads(
            architecture, model.family, model.config, name.rpartition(".")[0]
        )
        size = row_bytes(kind, info.shape[-1]) * _rows(info.shape)
        held = None if layer is None else module
        placements += with_factors(
            Placement(name, target, kind, info.shape, size, heads, held, exact)
        )
    for stack in expert_stacks(model, find):
        found = _stacked(stack, plan, model, reencode)
        if isinstance(found, Problem):
            problems.append(found)
            continue
        placements += with_factors(found)
        if found.layer is not None and not found.is_exact:
            notes.append(f"{stack.target}: experts re-encoded as {found.type}")
    placements += _rope_placement(model)
    return Layout(tuple(placements), tuple(problems), tuple(notes))


def with_factors(placement: Placement) -> list[Placement]:
    """Return a placement, and that of its factors if its type wants any."""
    if placement.type != "nvfp4" or not placement.is_exact:
        return [placement]
    scales = placement.stack or (str(placement.layer),)
    target, count = scale_name(placement.target), len(scales)
    return [
        placement,
        Placement(None, target, "f32", (count,), 4 * count, scales=scales),
    ]


def _stacked(
    stack: Stack, plan: Plan, model: ModelDescription, reencode: str | None
) -> Placement | Problem:
    """Return where the experts of a block go, or why they cannot."""
    layers = members_of(stack, plan)
    if isinstance(layers, Problem):
        return layers
    architecture = str(model.gguf_architecture)
    factor = applies_factor(architecture, stack.target, biased=False)
    types = [layer_type(layer, reencode, factor=factor) for layer in layers]
    for layer, (kind, _) in zip(layers, types, strict=True):
        if kind is None:
            return unheld(layer, reencode)
        if kind != types[0][0]:
            return Problem(
                layer.name,
                f"{layer.scheme.name}, and {layers[0].scheme.name} in "
                f"{layers[0].name}: GGUF stores {stack.target} in one type; give the "
                "experts of a block one scheme",
            )
    chosen = types[0][0] if types else DENSE_TYPES[model.dtype]
    assert chosen is not None
    return Placement(
        source=f"{stack.members[0]}.weight",
        target=stack.target,
        type=chosen,
        shape=stack.shape,
        size_bytes=row_bytes(chosen, stack.shape[-1]) * _rows(stack.shape),
        layer=stack.members[0] if layers else None,
        is_exact=all(exact for _, exact in types),
        stack=stack.members,
    )


def main_type(placements: Iterable[Placement]) -> str:
    """Return the type that holds most weights of the matrices inside the blocks."""
    elements: dict[str, int] = {}
    for placement in placements:
        if len(placement.shape) > 1 and placement.target not in _ENDS:
            count = _rows(placement.shape) * placement.shape[-1]
            elements[placement.type] = elements.get(placement.type, 0) + count
    return max(elements, key=lambda kind: elements[kind], default="f32")


def main_scheme(plan: Plan) -> str:
    """Return the scheme that most weights of the plan have, or ``dense``."""
    elements: dict[str, int] = {}
    for layer in plan.layers.values():
        count = layer.shape[0] * layer.shape[1]
        elements[layer.scheme.name] = elements.get(layer.scheme.name, 0) + count
    return max(elements, key=lambda name: elements[name], default="dense")


def missing_layers(plan: Plan, found: Iterable[str]) -> list[Problem]:
    """List layers of the plan that no tensor of the file stands for."""
    known = set(found)
    return [
        Problem(name, "the model has no such weight; edit the plan")
        for name in plan.layers
        if name not in known
    ]


def sizes(placements: Sequence[Placement]) -> Mapping[str, int]:
    """Return the bytes of each stored tensor by module or tensor name."""
    return {placement.key: placement.size_bytes for placement in placements}


def _dense_type(
    module: str, shape: tuple[int, ...], model: ModelDescription, embedding: str
) -> str:
    if len(shape) == 1 or module in routers(model):
        return "f32"  # llama.cpp wants norms, biases and routers in full
    if module in (model.family.embedding, model.family.head):
        return embedding if holds_columns(embedding, shape[-1]) else "f16"
    return DENSE_TYPES[model.dtype]


def _embedding_notes(name: str, kind: str, embedding: str) -> list[str]:
    if kind == embedding:
        return []
    return [f"{name}: its columns are no multiple of 32, so {kind}, not {embedding}"]


def _rope_placement(model: ModelDescription) -> list[Placement]:
    if rope_parameters(model.config)["rope_type"] != "llama3":
        return []
    width = head_width(model.config) // 2
    return [Placement(None, ROPE_TENSOR, "f32", (width,), 4 * width)]


def _rows(shape: tuple[int, ...]) -> int:
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return rows
