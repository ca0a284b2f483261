"""Gathering what a run did into the data that ``report.json`` holds."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compress import preview, prompting, provenance, reshaping
from compress.calibration.data import CalibrationTokens
from compress.calibration.experts import FEW_TOKENS
from compress.core.artifact import ModelDescription
from compress.core.plan import LayerPlan
from compress.evaluation.measure import with_tasks
from compress.exporting import failures
from compress.planning.budget import linear_bits_per_weight, parameter_count
from compress.transform import block_of_layer, part_of_layer

if TYPE_CHECKING:
    from compress.pipeline import Run

_NOTED_ONE_BY_ONE = 3
_WIDTH = {"float32": 32.0, "float16": 16.0, "bfloat16": 16.0}


def build_report(
    run: Run,
    *,
    tokens: CalibrationTokens | None,
    hashes: Mapping[str, str],
    metrics: Mapping[str, Any],
    exports: Mapping[str, Any],
    shared: Mapping[str, Any] | None,
    processes: Sequence[Mapping[str, Any]],
    date: str,
) -> dict[str, Any]:
    """Return the report of a finished run; its keys are described in docs/report.md."""
    model, config = run.model, run.config
    data = config.model_dump(mode="json", exclude_unset=True)
    parameters = parameter_count(run.base)
    shown = preview.predict(run)
    layers = _layers(run)
    dense = [name for name in ("base", "pruned") if name in shown.sizes]
    sizes = {name: shown.sizes[name] for name in dense}
    sizes |= {name: entry["size_bytes"] for name, entry in exports.items()}
    bits = {name: 8 * sizes[name] / parameters for name in dense}
    coded = linear_bits_per_weight(run.plan)
    if coded is not None:
        bits["linears"] = coded
    bits |= {name: sizes[name] * 8 / parameters for name in exports}
    return {
        "version": 1,
        "model": {
            "label": model.label,
            "family": model.family.name,
            "model_type": model.config["model_type"],
            "parameters": parameters,
            "dtype": model.dtype,
            "blocks": model.block_count,
            "path": config.model.path,
        },
        "config": config.model_dump(mode="json"),
        "config_text": _yaml(data),
        "command": run.command or "compress.run(config)",
        "seed": config.run.seed,
        "date": date,
        "versions": provenance.versions(),
        "hashes": dict(hashes) | {"config": provenance.digest_of(data)},
        "hardware": provenance.hardware(run.device),
        "calibration": _calibration(run, tokens),
        "size_bytes": sizes,
        "bits_per_weight": bits,
        "size_breakdown": {k: dict(v) for k, v in shown.parts.items()},
        "metrics": with_tasks(metrics, run.tasks),
        "pruning": reshaping.about(run.pruned, run),
        "recovery": _recovery(run),
        "tuning": dict(run.tuned.record) if run.tuned else None,
        "transforms": run.transformed.reports,
        "inputs": run.serving.upgrades,
        "kv_cache": run.cache,
        "samples": run.samples,
        "allocation": run.allocation,
        "layers": layers,
        "experts": _experts(model, layers),
        "exports": dict(exports),
        "one_plan_two_files": shared,
        "held_back": run.held_back,
        "kept_dense": _kept_dense(run),
        "seconds": run.seconds,
        "peak_memory_bytes": max(p["peak_memory_bytes"] for p in processes),
        "processes": [dict(process) for process in processes],
        "predicted": run.workdir.stored("predicted"),
        "warnings": _warnings(
            run, layers, exports, tokens=tokens.tokens.numel() if tokens else 0
        ),
    }


def _recovery(run: Run) -> dict[str, Any] | None:
    """Return how training went, of weights or of a prompt; ``None`` without any."""
    if run.prompt is not None:
        return dict(run.prompt.record)
    return run.pruned["recovery"] if run.pruned else None


def _kept_dense(run: Run) -> list[str]:
    """Return the linear layers of the blocks that a run that quantizes leaves dense."""
    if not run.plan.layers:
        return []
    return [name for name in run.model.linears() if name not in run.plan.layers]


def _yaml(data: Mapping[str, Any]) -> str:
    from ruamel.yaml import YAML

    stream = io.StringIO()
    YAML(typ="safe", pure=True).dump(dict(data), stream)
    return stream.getvalue()


def _calibration(run: Run, tokens: CalibrationTokens | None) -> dict[str, Any] | None:
    if tokens is None:
        return None
    section = run.config.calibration
    return {
        "data": section.model_dump(mode="json")["data"],
        "sources": [list(pair) for pair in tokens.sources],
        "samples": section.samples,
        "sequence_length": section.sequence_length,
        "tokens": tokens.tokens.numel(),
        "dtype": str(run.runner.dtype).removeprefix("torch."),
    }


def _layers(run: Run) -> list[dict[str, Any]]:
    model = run.model
    roles = {
        linear.path: linear.role
        for index in range(model.block_count)
        for linear in model.block_linears(index)
    }
    width = _WIDTH[model.dtype] / 8
    rows: list[dict[str, Any]] = []
    records: dict[str, Any] = {}
    for name, layer in run.plan.layers.items():
        part = part_of_layer(name, model)
        if name not in records:
            records.update(run.workdir.records(part))
        record = records[name]
        path = name.removeprefix(f"{model.family.blocks}.").partition(".")[2]
        block = block_of_layer(name, model)
        height, columns = layer.shape
        bits = layer.scheme.bits_per_weight(columns, height)
        weights = height * columns
        rows.append(
            {
                "name": name,
                "block": block,
                "role": roles[path] if block is not None else name.rpartition(".")[2],
                "method": layer.method,
                "scheme": layer.scheme.name,
                "shape": list(layer.shape),
                "bits_per_weight": bits,
                "bytes_before": round(weights * width),
                "bytes_after": round(weights * bits / 8),
                "error": record["error"],
                "weight_error": record["weight_error"],
                "seconds": record["seconds"],
                "tokens": record["tokens"],
                "notes": [*record["notes"], *_stand_in(layer)],
            }
        )
    return rows


def _stand_in(layer: LayerPlan) -> list[str]:
    if layer.asked is None:
        return []
    return [
        f"{layer.scheme.name} stands in for {layer.asked}, which cannot hold rows of "
        f"{layer.shape[1]} columns"
    ]


def _has_few_tokens(row: Mapping[str, Any]) -> bool:
    return any(note.startswith(FEW_TOKENS) for note in row["notes"])


def _experts(
    model: ModelDescription, layers: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """Return how calibration reached the experts; ``None`` if there are none."""
    counts = [model.experts(index) for index in range(model.block_count)]
    if not any(counts):
        return None
    names = model.family.experts
    assert names is not None
    coded = [row for row in layers if f".{names.container}." in row["name"]]
    tokens = [row["tokens"] for row in coded if row["tokens"] is not None]
    return {
        "count": sum(counts),
        "coded_layers": len(coded),
        "rounded_layers": sum(map(_has_few_tokens, coded)),
        "fewest_tokens": min(tokens, default=None),
        "most_tokens": max(tokens, default=None),
    }


def _layer_notes(layers: list[dict[str, Any]]) -> list[str]:
    """Return the notes on layers; a note that many share is one line."""
    sharing: dict[str, list[str]] = {}
    for row in layers:
        if not _has_few_tokens(row):
            for note in row["notes"]:
                sharing.setdefault(note, []).append(row["name"])
    lines = []
    for note, names in sharing.items():
        if len(names) > _NOTED_ONE_BY_ONE:
            lines.append(f"{len(names)} layers, such as {names[0]}: {note}")
        else:
            lines += [f"{name}: {note}" for name in names]
    return lines


def _skipped(run: Run) -> list[str]:
    """Return what training and samples left out, a sentence for each."""
    found = []
    stages = {
        "recovery": _recovery(run),
        "tuning": run.tuned.record if run.tuned else None,
    }
    for stage, record in stages.items():
        if record and record["skipped_steps"]:
            found.append(
                f"{stage}: {record['skipped_steps']} of {record['steps']} steps had no "
                "finite gradient and changed nothing; a lower learning_rate helps"
            )
    if run.samples and "skipped" in run.samples:
        found.append(
            f"evaluate.generate: nothing was written: {run.samples['skipped']}"
        )
    return found


def _warnings(
    run: Run, layers: list[dict[str, Any]], exports: Mapping[str, Any], *, tokens: int
) -> list[str]:
    model, found = run.model, [] if run.held_back is None else [run.held_back]
    dense = _kept_dense(run)
    if dense:
        tail = ", ..." if len(dense) > _NOTED_ONE_BY_ONE else ""
        names = ", ".join(dense[:_NOTED_ONE_BY_ONE])
        found.append(f"{len(dense)} linear layers stay dense: {names}{tail}")
    if run.base.tied and not model.tied:
        more = parameter_count(model) - parameter_count(run.base)
        found.append(
            f"A transform untied head and embedding: {more:,} more weights are stored. "
            "Bits per weight are per weight of the original."
        )
    if run.pruning is not None:
        length = run.config.calibration.sequence_length
        own = run.pruning.section.generated * length if tokens else 0
        found += reshaping.cautions(run.pruning, tokens + own)
    if run.base.source_gguf is not None:
        found.append(
            f"The source is a GGUF file ({run.base.source_gguf.name}). If it was "
            "quantized before, its weights lie on a coarse grid already: figures "
            "against it say nothing of the loss against the original model."
        )
    if run.prompt is not None:
        found += prompting.cautions(run.prompt.record)
    found += _skipped(run)
    few = [row["name"] for row in layers if _has_few_tokens(row)]
    if few:
        found.append(
            f"{len(few)} layers of experts, such as {few[0]}, were rounded to nearest: "
            "too few tokens reached them; more or other calibration text reaches more"
        )
    found += _layer_notes(layers)
    found += failures(exports)
    for name, entry in exports.items():
        found += [f"{name}: {note}" for note in entry.get("notes", [])]
    return found
