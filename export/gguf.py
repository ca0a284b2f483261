"""The GGUF exporter: one file that llama.cpp loads, with the plan's own codes in it.

Two ways to write: our own metadata and names for the families that have a GGUF
architecture in the family table, or ``template: FILE.gguf`` for any architecture. The
codes of a layer are written unchanged where GGUF has the same grid (see
:mod:`compress.export.gguf_blocks`); nothing is rounded again unless ``reencode`` says
so.

The file also lists the plan's layers (``compress.layers``, ``compress.tensors``,
``compress.heads``), so that :meth:`GGUFExporter.read_codes` needs nothing but the file.
llama.cpp ignores these keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar, cast

from torch import Tensor

from compress.core import contracts
from compress.core.artifact import CompressedModel, ModelDescription
from compress.core.contracts import Exporter, ExportResult, Problem
from compress.core.errors import CheckpointError, ExportError
from compress.core.plan import Plan
from compress.core.shapes import blocks_differ, what_differs
from compress.core.tensors import QuantizedTensor
from compress.export.gguf_blocks import (
    CODED_TYPES,
    StoredType,
    unpack_blocks,
)
from compress.export.gguf_data import tensor_data, with_rows
from compress.export.gguf_experts import expert_stacks, mixture_problems
from compress.export.gguf_files import file_stem, only_file, write_beside
from compress.export.gguf_float_blocks import outer_of
from compress.export.gguf_layout import (
    Layout,
    Placement,
    main_type,
    missing_layers,
    own_layout,
    sizes,
)
from compress.export.gguf_metadata import (
    architecture_metadata,
    config_problems,
    copied_metadata,
    stamp,
)
from compress.export.gguf_names import from_gguf_rows, name_finder
from compress.export.gguf_reader import GGUFFile, MetadataValue, open_gguf
from compress.export.gguf_runtime import decoded_logits, llamacpp_logits
from compress.export.gguf_template import (
    open_template,
    template_layout,
    template_metadata,
    with_rotary_heads,
)
from compress.export.gguf_tokenizer import tokenizer_metadata
from compress.export.gguf_writer import file_bytes, text, texts, wholes, write_gguf


class GGUFOptions(contracts.Options):
    """Options of the GGUF exporter.

    Attributes:
        template: A dense GGUF of the same model, made by llama.cpp's converter. Needed
            where our own writer does not know the architecture or the tokenizer.
        embedding: Type of the embedding and the head where the plan has no codes for
            them; ``q8_0`` if not given, or with a template as the template has them.
        reencode: Type for layers whose codes GGUF cannot hold.
        name: Stem of the file's name; by default the model's, and the scheme or
            ``mixed-4.5bpw``.
        imatrix: Write NAME.imatrix.gguf beside the file: what calibration text showed
            of the inputs of the dense model, for ``llama-quantize --imatrix``.
        tensor_types: Write NAME.tensor-types.txt: the type of each matrix, for
            ``llama-quantize --tensor-type-file``.
    """

    template: str | None = None
    embedding: StoredType | None = None
    reencode: StoredType | None = None
    name: str | None = None
    imatrix: bool = False
    tensor_types: bool = False


class GGUFExporter(Exporter):
    """Writes one GGUF file."""

    name = "gguf"
    summary = "one GGUF file for llama.cpp, the plan's codes unchanged"
    source = "GGUF specification 3; llama.cpp convert_hf_to_gguf.py"
    Options: ClassVar[type[contracts.Options]] = GGUFOptions
    consumer = "llama.cpp"

    @property
    def keeps_codes(self) -> bool:
        """Whether no layer is rounded to another type."""
        return self._options.reencode is None

    @property
    def needs_input_squares(self) -> bool:
        """Whether an importance matrix is asked for."""
        return self._options.imatrix

    def check(self, plan: Plan, model: ModelDescription) -> list[Problem]:
        """List what GGUF, or the template, cannot hold."""
        options = self._options
        try:
            if options.template is None:
                problem = _own_problem(model)
                if problem:
                    return [problem]
                problems = config_problems(model.config)
                problems += mixture_problems(model)
                problems += self._tokenizer_problems(model)
                return problems + list(self._layout(plan, model).problems)
            if model.transforms:
                return [_transformed_problem(model)]
            return list(self._layout(plan, model).problems)
        except ExportError as error:
            return [Problem("template", str(error))]

    def tensor_bytes(self, plan: Plan, model: ModelDescription) -> Mapping[str, int]:
        """Return the exact bytes of each stored tensor, by module or tensor name."""
        return sizes(self._layout(plan, model).placements)

    def file_bytes(self, plan: Plan, model: ModelDescription) -> int:
        """Return the bytes of the file: header, metadata, tokenizer and tensors."""
        placements = self._layout(plan, model).placements
        metadata = self._metadata(plan, model, placements)
        rows = [placement.row for placement in placements]
        return file_bytes(metadata, rows=rows)

    def bound_layers(self, model: ModelDescription) -> Sequence[tuple[str, ...]]:
        """Return the experts of each block that are stored as one tensor."""
        architecture = model.gguf_architecture
        if architecture is None:
            return ()
        find = name_finder(architecture, model.block_count)
        return [stack.members for stack in expert_stacks(model, find)]

    def write(self, artifact: CompressedModel, folder: Path) -> ExportResult:
        """Write one ``.gguf`` file, one tensor in memory at a time.

        Raises:
            ExportError: A problem that :meth:`check` lists, a template of other
                weights, weights that are not finite, or a full disk.
        """
        plan, model = artifact.plan, artifact.description
        problems = self.check(plan, model)
        if problems:
            listed = "; ".join(f"{p.where}: {p.message}" for p in problems[:5])
            raise ExportError(f"cannot export to GGUF: {listed}")
        layout = self._layout(plan, model)
        template = self._template()
        placements = layout.placements
        if template is not None:
            placements = with_rotary_heads(placements, artifact, template)
        metadata = self._metadata(plan, model, placements)
        path = folder / f"{self._stem(plan, model, placements)}.gguf"
        data = tensor_data(artifact, placements, template)
        rows = [placement.row for placement in placements]
        write_gguf(path, metadata, rows=rows, data=data)
        beside, notes = write_beside(
            path,
            artifact,
            placements,
            imatrix=self._options.imatrix,
            tensor_types=self._options.tensor_types,
        )
        notes = [*layout.notes, *notes]
        return ExportResult((path, *beside), path.stat().st_size, tuple(notes))

    def read_codes(self, folder: Path, layer: str) -> QuantizedTensor:
        """Decode one layer of the plan from the written file.

        Raises:
            ExportError: The file has no codes for ``layer``.
        """
        try:
            file = open_gguf(only_file(folder))
            layers = list(file.require("compress.layers"))
            index = layers.index(layer)
            target = str(file.require("compress.tensors")[index])
            heads = int(file.require("compress.heads")[index])
            expert = int(file.get("compress.experts", [-1] * len(layers))[index])
            kind = file.tensors[target].type
            if kind not in CODED_TYPES:
                raise ExportError(f"{file.path}: {layer} is {kind}, which has no codes")
            rows = file.tensors[target].shape[-2]
            first = max(expert, 0) * rows
            outer = outer_of(file.factor(target, max(expert, 0)))
            data = file.read(target, start=first, count=rows)
            packed = unpack_blocks(data, kind, outer)
        except (CheckpointError, ValueError, KeyError) as error:
            raise ExportError(f"{folder}: no codes of {layer}: {error}") from error
        return with_rows(packed, partial(from_gguf_rows, heads=heads))

    def replay(self, folder: Path, windows: Tensor) -> Iterator[Tensor]:
        """Run the file in llama.cpp, decoded by llama.cpp to float32 first.

        See :func:`compress.export.gguf_runtime.decoded_logits` for the reason.
        """
        yield from decoded_logits(only_file(folder), windows)

    def serve(self, folder: Path, windows: Tensor) -> Iterator[Tensor]:
        """Run the file as it is: llama.cpp rounds activations to 8 bits."""
        return llamacpp_logits(only_file(folder), windows)

    @property
    def _options(self) -> GGUFOptions:
        return cast(GGUFOptions, self.options)

    def _template(self) -> GGUFFile | None:
        path = self._options.template
        return None if path is None else open_template(path)

    def _stem(
        self, plan: Plan, model: ModelDescription, placements: Iterable[Placement]
    ) -> str:
        return self._options.name or file_stem(plan, model, placements)

    def _metadata(
        self,
        plan: Plan,
        model: ModelDescription,
        placements: tuple[Placement, ...],
    ) -> dict[str, MetadataValue]:
        template = self._template()
        if template is None:
            metadata = architecture_metadata(model) | _tokenizer(model)
        else:
            metadata = template_metadata(template)
        name = self._stem(plan, model, placements)
        metadata |= stamp(name=name, main_type=main_type(placements))
        return metadata | _layer_table(placements)

    def _layout(self, plan: Plan, model: ModelDescription) -> Layout:
        options = self._options
        template = self._template()
        if template is not None and model.family.experts is not None:
            raise ExportError(
                f"templates of {model.family.name} are not treated, its experts are "
                "stacked; leave `template` out"
            )
        if template is not None:
            return template_layout(
                plan,
                model,
                template=template,
                embedding=options.embedding,
                reencode=options.reencode,
            )
        problem = _own_problem(model)
        if problem:
            raise ExportError(f"{problem.where}: {problem.message}")
        layout = own_layout(
            plan,
            model,
            embedding=options.embedding or "q8_0",
            reencode=options.reencode,
        )
        known = {name.removesuffix(".weight") for name in model.tensors}
        missing = missing_layers(plan, known)
        return replace(layout, problems=(*layout.problems, *missing))

    def _tokenizer_problems(self, model: ModelDescription) -> list[Problem]:
        try:
            _tokenizer(model)
        except (ExportError, CheckpointError) as error:
            return [Problem("tokenizer", str(error))]
        return []


def _own_problem(model: ModelDescription) -> Problem | None:
    if model.gguf_architecture is not None:
        return None
    if blocks_differ(model.config):
        key, what = what_differs(model.config)
        return Problem(
            key,
            f"blocks of {model.family.name} cannot differ {what} in llama.cpp; prune "
            "with `shape: uniform` or `shape: padded`",
        )
    return Problem(
        "template",
        f"our own GGUF writer does not know {model.family.name}; give "
        "`template: FILE.gguf`, a GGUF of this model made by llama.cpp's converter",
    )


def _transformed_problem(model: ModelDescription) -> Problem:
    return Problem(
        "template",
        f"it holds the weights before {', '.join(model.transforms)}: its norms and "
        "embedding do not belong to the transformed matrices; leave template out, or "
        "leave transforms out",
    )


def _tokenizer(model: ModelDescription) -> dict[str, MetadataValue]:
    if model.source_gguf is not None:
        return copied_metadata(open_gguf(model.source_gguf))
    rows = model.tensors[f"{model.family.embedding}.weight"].shape[0]
    return tokenizer_metadata(model.assets, rows)


def _layer_table(placements: tuple[Placement, ...]) -> dict[str, MetadataValue]:
    coded = [placement for placement in placements if placement.layer is not None]
    if not coded:
        return {}
    # For each layer its tensor, and its place in a stack of experts; -1 if in none.
    places = [
        (str(layer), placement, number if placement.stack else -1)
        for placement in coded
        for number, layer in enumerate(placement.stack or (placement.layer,))
    ]
    table = {
        "compress.layers": texts([layer for layer, _, _ in places]),
        "compress.tensors": texts([placement.target for _, placement, _ in places]),
        "compress.heads": wholes([placement.heads for _, placement, _ in places]),
        "compress.types": text(" ".join(sorted({p.type for p in coded}))),
    }
    if any(placement.stack for placement in coded):
        table["compress.experts"] = wholes([number for _, _, number in places])
    return table
