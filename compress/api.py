"""Compressing a model that is already in memory: ``compress.quantize``."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.calibration.given import given_windows
from compress.calibration.observe import observe
from compress.config import load_config
from compress.config.plugins import create_chain, create_exporter, create_quantizer
from compress.core.artifact import CompressedModel, ModelDescription
from compress.core.contracts import ExportResult
from compress.core.errors import ConfigError
from compress.core.families import Family, family_of
from compress.core.plan import Plan
from compress.core.shapes import memory_config
from compress.core.tensors import QuantizedTensor
from compress.exporting import check_exports
from compress.model.devices import choose_dtype
from compress.model.experts import unstacked, weight_of
from compress.model.sources import ModuleSource, SnapshotSource, in_model_order
from compress.model.streaming import StreamedModel
from compress.planning.planner import make_plan
from compress.serving import static_inputs
from compress.transform import CompressedSource, PlanRunner, part_of_layer
from compress.transforms.source import TransformedSource
from compress.workdir import WorkDir


@dataclass(frozen=True, repr=False)
class QuantizedModel:
    """A model with quantized weights, and their codes.

    Attributes:
        model: The module that was given, its weights replaced by the codes' values.
        artifact: Plan and codes.
        records: Errors, notes and seconds of each layer, as in ``report.json``.
    """

    model: nn.Module
    artifact: CompressedModel
    records: Mapping[str, Mapping[str, Any]]

    def __repr__(self) -> str:
        """Return one line: the records of all layers would fill a screen."""
        layers = self.artifact.plan.layers.values()
        schemes = ", ".join(sorted({layer.scheme.name for layer in layers}))
        return (
            f"QuantizedModel({self.artifact.description.label}: "
            f"{len(self.artifact.plan.layers)} layers in {schemes})"
        )

    def save(
        self, folder: str | Path, format: str = "safetensors", **options: Any
    ) -> ExportResult:
        """Export to ``folder``, which must be empty or absent.

        Raises:
            PlanError: The format cannot hold the plan.
            ConfigError: The folder is not empty, or an option is wrong.
        """
        exporter = create_exporter(format, options)
        check_exports({format: exporter}, self.artifact.plan, self.artifact.description)
        target = Path(folder)
        if target.is_dir() and any(target.iterdir()):
            raise ConfigError(f"{target} is not empty; give a new folder")
        work = WorkDir(target.parent)
        result: ExportResult = work.replace_folder(
            target, lambda part: exporter.write(self.artifact, part)
        )
        return ExportResult(
            tuple(target / file.name for file in result.files),
            result.size_bytes,
            result.notes,
        )


def quantize(
    model: nn.Module,
    scheme: str = "int4-g64",
    *,
    method: str = "gptq",
    calibration: Tensor | Iterable[str] | None = None,
    tokenizer: Any = None,
    options: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Mapping[str, str]] | None = None,
    transforms: Sequence[str | Mapping[str, Any]] = (),
    scale_dtype: str = "auto",
    device: str = "cpu",
) -> QuantizedModel:
    """Quantize the linear layers of a transformers model in place.

    Args:
        model: A causal language model of a supported family, on the CPU.
        scheme: Such as ``int4-g64``.
        method: Name of a quantizer.
        calibration: int64 ``[N, T]`` tokens; or texts, such as a column of a
            ``datasets.Dataset``; if absent, the bundled ``mix``.
        tokenizer: Saved beside exports, and used to tokenize texts; if absent, the one
            in the folder or repository that the model was loaded from.
        options: Of the method.
        overrides: As in a config.
        transforms: As in a config; a method may bring more along. What they change
            outside of the quantized layers is replaced in ``model`` as well, and a
            tied head may get a weight of its own.
        scale_dtype: Storage type of scales; ``auto`` takes the model's.
        device: Where layers are solved.

    Raises:
        CompressError: As ``compress.run`` does.
    """
    config = load_config(
        {
            "model": {"path": "in memory"},
            "transforms": list(transforms),
            "quantize": {
                "method": method,
                "scheme": scheme,
                "options": dict(options or {}),
                "overrides": dict(overrides or {}),
            },
        }
    )
    section = config.quantize
    assert section is not None
    tokenizer = tokenizer or own_tokenizer(model)
    described = describe(model, tokenizer)
    stored = unstacked(ModuleSource(model), described.family)
    original = SnapshotSource(stored)
    methods = {method, *(o.method for o in section.overrides.values() if o.method)}
    quantizers = {
        name: create_quantizer(name, options if name == method else None)
        for name in methods
    }
    chain = create_chain(config.transform_entries, quantizers.values())
    description = chain.describe(described)
    plan = make_plan(
        section,
        description,
        scale_dtype=description.dtype if scale_dtype == "auto" else scale_dtype,
        quantizer=quantizers.__getitem__,
    )
    folder = tempfile.TemporaryDirectory(prefix="compress-")
    workdir = WorkDir(Path(folder.name))
    runner = PlanRunner(
        description,
        original,
        plan,
        quantizers,
        workdir,
        device=device,
        dtype=choose_dtype("auto", description.dtype, device),
    )
    windows = None
    static = static_inputs(plan)
    if runner.needs_calibration or chain.needs_inputs or static:
        windows = given_windows(calibration, tokenizer)
    source = chain.run(
        description, original, plan, windows=windows, workdir=workdir, device=device
    ).source
    runner.source = source
    runner.run(windows if runner.needs_calibration else None)
    codes = {
        n: workdir.read_layer(part_of_layer(n, description), n) for n in plan.layers
    }
    records = _records(plan, description, workdir)
    folder.cleanup()
    _replace_changed(model, source, description, plan)
    _replace_weights(model, description.family, codes)
    artifact = CompressedModel(description, plan, source, codes.__getitem__)
    if static:
        assert windows is not None
        coded = CompressedSource(source, plan, codes.__getitem__)
        build = partial(StreamedModel, description, coded, device=device)
        found = observe(build, windows, layers=static)
        artifact = replace(artifact, input_amax=found.input_amax)
    return QuantizedModel(model, artifact, records)


def describe(model: nn.Module, tokenizer: Any) -> ModelDescription:
    """Return the description of a transformers model in memory.

    Args:
        model: Of a supported family.
        tokenizer: Saved in a temporary folder for exports; may be ``None``.

    Raises:
        ConfigError: It is no transformers model.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "model_type"):
        raise ConfigError("expected a transformers model with a config")
    data = memory_config(config.to_dict())
    family = family_of(data["model_type"])
    source = unstacked(ModuleSource(model), family)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    assets = None
    if tokenizer is not None:
        assets = Path(tempfile.mkdtemp(prefix="compress-tokenizer-"))
        atexit.register(shutil.rmtree, assets, ignore_errors=True)
        tokenizer.save_pretrained(assets)
    return ModelDescription(
        label=_label(str(data.get("_name_or_path") or data["model_type"])),
        config={**data, "dtype": dtype},
        family=family,
        tensors=in_model_order(source.tensors(), family),
        dtype=dtype,
        tied=bool(data.get("tie_word_embeddings", False)),
        assets=assets,
    )


def _label(name: str) -> str:
    """Return what a model is called: of a folder its name, of a repository the id."""
    return Path(name).name if Path(name).is_dir() else name


def own_tokenizer(model: nn.Module) -> Any:
    """Return the tokenizer of where a model was loaded from; ``None`` without one.

    Args:
        model: Of transformers; ``from_pretrained`` notes its folder or repository.
    """
    from transformers import AutoTokenizer

    path = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    # transformers makes up an empty tokenizer for a folder that has none.
    if not path or (Path(path).is_dir() and not any(Path(path).glob("tokenizer*"))):
        return None
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError):
        return None  # a folder of weights alone, or no network


def _records(
    plan: Plan, description: ModelDescription, workdir: WorkDir
) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    parts: Sequence[str] = sorted({part_of_layer(n, description) for n in plan.layers})
    for part in parts:
        found |= workdir.records(part)
    return found


def _replace_changed(
    model: Any, source: TransformedSource, description: ModelDescription, plan: Plan
) -> None:
    """Put what transforms changed, and no code replaces, into the model."""
    for name in sorted(source.changed):
        module, _, leaf = name.rpartition(".")
        if module in plan.layers and leaf == "weight":
            continue
        owner = model.get_submodule(module)
        old = owner.get_parameter(leaf)
        if module == description.family.head:  # it may share the embedding's weight
            owner.register_parameter(leaf, nn.Parameter(source.read(name).to(old)))
        else:
            old.data.copy_(source.read(name))
    model.config.tie_word_embeddings = description.tied


def _replace_weights(
    model: nn.Module, family: Family, codes: Mapping[str, QuantizedTensor]
) -> None:
    with torch.no_grad():
        for name, tensor in codes.items():
            weight = weight_of(model, family, name)
            weight.copy_(tensor.dequantize().to(weight))
