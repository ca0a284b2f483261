"""Palette checkpoint: bit-packed codes with their tables, and integer grids beside.

The one home for plans that mix tables of any kind, widths and grids, coded embeddings
and heads, tied or not, and experts. The layout is our own (``core/palette_format``):
after ``import compress`` transformers opens such folders as it opens others, with
modules that hold the codes and decode them in each pass.

Source: the layout is ours; what tables are for in Cho et al. (2022), arXiv 2108.12659,
Kim et al. (2023), arXiv 2306.07629 and Egiazarian et al. (2024), arXiv 2401.06118.
Limits: no low-rank corrections, rounded inputs, float grids or ggml types; vLLM and
llama.cpp do not read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from compress.core import palette_format
from compress.core.artifact import CompressedModel, ModelDescription, TensorInfo
from compress.core.contracts import Problem
from compress.core.errors import CheckpointError
from compress.core.plan import LayerPlan, Plan
from compress.core.shapes import blocks_differ
from compress.core.table_products import is_positional
from compress.core.tensors import QuantizedTensor
from compress.export.coded_folder import CodedFolderExporter
from compress.export.model_card import CardLayout
from compress.export.safetensors_checks import mismatch, shape_problems
from compress.export.sharding import ShardOptions, read_tensor
from compress.export.stock_transformers import read_config


class PaletteOptions(ShardOptions):
    """Options of ``palette``.

    Attributes:
        table_logits: Let transformers look logits up in the tables of a head coded as
            ``pq-*``, in the place of decoding it in each pass: the same numbers but
            for the order of sums, in less memory.
    """

    table_logits: bool = False


class PaletteExporter(CodedFolderExporter):
    """Writes checkpoints whose matrices are packed codes and tables."""

    name = "palette"
    summary = "packed codes with tables, for transformers after `import compress`"
    source = "our own layout, version 1"
    Options: ClassVar[type[ShardOptions]] = PaletteOptions
    options: PaletteOptions

    def check(self, plan: Plan, model: ModelDescription) -> list[Problem]:
        """List what the layout cannot hold."""
        found = [
            Problem(name, message)
            for name, layer in plan.layers.items()
            if (message := mismatch(layer, model)) is not None
            or (message := palette_format.obstacle(layer.scheme)) is not None
        ]
        if self.options.table_logits and not _has_table_head(plan, model):
            found.append(
                Problem(
                    "table_logits",
                    f"logits are looked up in tables of {_head(model)}, whose scheme "
                    "is no pq-*; give it one with quantize.overrides, or drop the "
                    "option",
                )
            )
        return found + shape_problems(model, "transformers")

    def read_codes(self, folder: Path, layer: str) -> QuantizedTensor:
        """Decode one layer from the written files with our own reader.

        Raises:
            CheckpointError: The folder holds no codes of ``layer``.
        """
        config = read_config(folder).get("quantization_config") or {}
        layers = palette_format.layers_of(config)
        if layer not in layers:
            raise CheckpointError(f"{folder}: config.json names no codes of {layer}")
        scheme, shape = layers[layer]
        stored = {
            suffix: read_tensor(folder, f"{layer}.{suffix}")
            for suffix in palette_format.tensors(scheme, shape)
        }
        return palette_format.decode(stored, scheme, shape)

    def _stored(self, layer: LayerPlan) -> Mapping[str, TensorInfo]:
        return palette_format.tensors(layer.scheme, layer.shape)

    def _encode(self, layer: str, tensor: QuantizedTensor) -> dict[str, Tensor]:
        return palette_format.encode(tensor)

    def _config(self, artifact: CompressedModel) -> dict[str, Any]:
        layers = {
            name: (layer.scheme, layer.shape)
            for name, layer in artifact.plan.layers.items()
        }
        config = palette_format.config_of(layers)
        if self.options.table_logits:
            config["table_logits"] = True
        return {"quantization_config": config}

    def _card(self, model: ModelDescription) -> CardLayout:
        trust = ", trust_remote_code=True" if blocks_differ(model.config) else ""
        lines = (
            "The layout `palette` belongs to compress (`pip install compress-llm`), "
            "which teaches it to transformers:",
            "",
            "```python",
            "import compress  # before from_pretrained",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("FOLDER"{trust})',
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
            "```",
            "",
            "Codes stay codes and are decoded in each pass, which saves memory and "
            "costs time; `model.dequantize()` decodes them once, and "
            '`compress.load("FOLDER")` returns an ordinary dense model.',
        )
        return CardLayout(palette_format.QUANT_METHOD, "\n".join(lines))


def _head(model: ModelDescription) -> str:
    """Return the name of the matrix that makes logits."""
    return model.family.embedding if model.tied else model.family.head


def _has_table_head(plan: Plan, model: ModelDescription) -> bool:
    layer = plan.layers.get(_head(model))
    return layer is not None and is_positional(layer.scheme)
