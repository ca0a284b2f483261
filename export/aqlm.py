"""AQLM checkpoint: additive codebooks that stock transformers loads with ``aqlm``.

The layout and what moves between tables and scales are in ``core/aqlm_format``. It has
one ``(M, B, g)`` for the whole model; layers stay dense by name. Stock transformers
replaces every other ``nn.Linear``, so each linear without codes is listed.

Source: Egiazarian et al. (2024), "Extreme compression of large language models via
additive quantization", arXiv 2401.06118; transformers 5.23 and aqlm 1.1.7, with which
the folders were tried on a CPU. Limits: on a CPU the library computes in float32 only,
is right with one thread only (see :meth:`AqlmExporter.replay`), and reorders the codes
in place in its first pass, so a model must not be saved after it has run; experts and
embeddings cannot be coded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.core import aqlm_format
from compress.core.artifact import CompressedModel, ModelDescription, TensorInfo
from compress.core.contracts import ExportResult, Options, Problem
from compress.core.errors import CheckpointError
from compress.core.plan import LayerPlan, Plan
from compress.core.scheme import Scheme
from compress.core.shapes import WIDTHS, blocks_differ
from compress.core.tensors import QuantizedTensor
from compress.export import stock_transformers
from compress.export.coded_folder import CodedFolderExporter
from compress.export.experts import expert_layers, routers
from compress.export.model_card import CardLayout
from compress.export.safetensors_checks import mismatch
from compress.export.sharding import has_tensor, read_tensor
from compress.export.stock_transformers import read_config

_REMEDY = "use a palette export, or a safetensors export with dense: true"
_EXPONENTS = "table_exponents"


class AqlmExporter(CodedFolderExporter):
    """Writes the layout of the ``aqlm`` library."""

    name = "aqlm"
    summary = "additive codebooks for stock transformers with aqlm"
    source = "arXiv 2401.06118; transformers 5.23 integrations/aqlm.py, aqlm 1.1.7"

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        self._exponents: dict[str, int] = {}

    def check(self, plan: Plan, model: ModelDescription) -> list[Problem]:
        """List what the layout, or its stock loader, cannot hold."""
        experts = set(expert_layers(model))
        found = [
            Problem(name, message)
            for name, layer in plan.layers.items()
            if (message := _layer_problem(layer, model, experts)) is not None
        ]
        schemes = {layer.scheme: name for name, layer in plan.layers.items()}
        if len(schemes) > 1 and not found:
            names = ", ".join(sorted(scheme.name for scheme in schemes))
            found.append(
                Problem(
                    list(schemes.values())[-1],
                    f"the aqlm layout has one scheme for the whole model, the plan has "
                    f"{names}; give all layers one, or leave some dense, or {_REMEDY}",
                )
            )
        if blocks_differ(model.config):
            found.append(
                Problem(
                    WIDTHS,
                    "blocks that differ in width were not tried with the aqlm library; "
                    f"prune with `shape: uniform`, or {_REMEDY}",
                )
            )
        return found

    def bound_layers(self, model: ModelDescription) -> Sequence[tuple[str, ...]]:
        """Return all layers as one set."""
        return [tuple(model.linears())]

    def notes(self, plan: Plan, model: ModelDescription) -> tuple[str, ...]:
        """Return what a user of the files should know."""
        if not plan.layers:
            return ()
        found = [
            "On a CPU the aqlm library needs numba and computes in float32 only: load "
            "with dtype=torch.float32, and set NUMBA_NUM_THREADS=1, since threads of "
            "its kernel overwrite each other's sums (1.1.7). Its first pass there "
            "reorders the codes in place; do not save a model that has run.",
        ]
        book = next(iter(plan.layers.values())).scheme
        known = {"aqlm-1x16g8", "aqlm-1x16g16", "aqlm-2x8g8", "aqlm-1x8g8"}
        if book.name not in known:
            found.append(
                f"The aqlm library has no CUDA kernel for {book.name}; it falls back "
                "to Triton or decodes."
            )
        return tuple(found)

    def write(self, artifact: CompressedModel, folder: Path) -> ExportResult:
        """Write weights one layer at a time, then config, tokenizer and card."""
        self._exponents = {}
        return super().write(artifact, folder)

    def read_codes(self, folder: Path, layer: str) -> QuantizedTensor:
        """Decode one layer, with what was moved to its scales moved back.

        Raises:
            CheckpointError: The folder holds no codes of ``layer``.
        """
        config = read_config(folder)
        if not has_tensor(folder, f"{layer}.codes"):
            raise CheckpointError(f"{folder}: there are no codes of {layer}")
        stored = {
            suffix: read_tensor(folder, f"{layer}.{suffix}")
            for suffix in aqlm_format.SUFFIXES
        }
        dtype = str(stored["codebooks"].dtype).removeprefix("torch.")
        quantization = config.get("quantization_config") or {}
        scheme = aqlm_format.scheme_of(quantization, dtype)
        moved = (config.get("compress") or {}).get(_EXPONENTS, {})
        return aqlm_format.decode(stored, scheme, exponent=moved.get(layer, 0))

    def replay(self, folder: Path, windows: Tensor) -> Iterator[Tensor]:
        """Run the folder in stock transformers with aqlm, in float32 on the CPU.

        Raises:
            MissingDependencyError: aqlm or numba is not installed.
        """
        stock_transformers.check_library(aqlm_format.QUANT_METHOD)
        import numba

        # Threads of its kernel add to the same numbers at once (aqlm 1.1.7): on two
        # cores logits were wrong by 0.2% to 24%, on one they agree to 1e-6.
        threads = numba.get_num_threads()
        runs = super().replay(folder, windows)
        while True:
            numba.set_num_threads(1)
            try:
                logits = next(runs, None)
            finally:
                numba.set_num_threads(threads)
            if logits is None:
                return
            yield logits

    def _stored(self, layer: LayerPlan) -> Mapping[str, TensorInfo]:
        return aqlm_format.tensors(layer.scheme, layer.shape)

    def _encode(self, layer: str, tensor: QuantizedTensor) -> dict[str, Tensor]:
        stored, exponent = aqlm_format.encode(tensor)
        if exponent:
            self._exponents[layer] = exponent
        return stored

    def _config(self, artifact: CompressedModel) -> dict[str, Any]:
        plan, model = artifact.plan, artifact.description
        scheme = next(iter(plan.layers.values())).scheme
        linears = [*model.linears(), *routers(model), model.family.head]
        dense = [name for name in linears if name not in plan.layers]
        found: dict[str, Any] = {
            "quantization_config": aqlm_format.config_of(scheme, dense)
        }
        if self._exponents:
            found["compress"] = {_EXPONENTS: dict(self._exponents)}
        return found

    def _card(self, model: ModelDescription) -> CardLayout:
        lines = (
            "The layout is that of the aqlm library (`pip install 'aqlm[gpu,cpu]'`).",
            "",
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained("FOLDER")',
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
            "```",
            "",
            'Without the library: `compress.load("FOLDER")`, an ordinary dense model.',
        )
        return CardLayout(aqlm_format.QUANT_METHOD, "\n".join(lines))


def _layer_problem(
    layer: LayerPlan, model: ModelDescription, experts: set[str]
) -> str | None:
    message = mismatch(layer, model) or _scheme_problem(layer.scheme)
    if message is not None:
        return message
    if layer.name == model.family.embedding:
        return f"the aqlm library has no coded embeddings; leave it dense, or {_REMEDY}"
    if layer.name in experts:
        return (
            "transformers 5 stacks experts, which the aqlm library cannot code; leave "
            f"them dense, or {_REMEDY}"
        )
    return None


def _scheme_problem(scheme: Scheme) -> str | None:
    if not aqlm_format.is_additive(scheme):
        return (
            f"the aqlm layout holds aqlm-MxBgG and dense layers, not {scheme.name}; "
            f"{_REMEDY}"
        )
    if scheme.bits not in aqlm_format.WRITTEN_BITS:
        return (
            f"{scheme.name}: the aqlm layout gives each code whole bytes, so only 8 "
            f"and 16 bits take the space of their name; use one of them, or {_REMEDY}"
        )
    if scheme.scale_dtype != aqlm_format.DTYPE:
        return (
            f"{scheme.name} with tables in {scheme.scale_dtype}: the aqlm layout has "
            f"them in float16; set quantize.scale_dtype: float16, or {_REMEDY}"
        )
    return None
