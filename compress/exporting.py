"""Writing exports, reading them back with their own consumers, and comparing codes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compress import provenance
from compress.calibration.squares import measure_squares
from compress.core.artifact import CompressedModel
from compress.core.contracts import Exporter
from compress.core.errors import ExportError, MissingDependencyError, PlanError
from compress.core.plan import Plan
from compress.core.scheme import Scales
from compress.core.statistics import InputSquares
from compress.core.tensors import QuantizedTensor
from compress.evaluation.divergence import compare, mean_and_error
from compress.evaluation.perplexity import TokenWindows, cut_windows
from compress.evaluation.texts import evaluation_text
from compress.model.streaming import StreamedModel
from compress.progress import progress_bar
from compress.workdir import WorkDir

if TYPE_CHECKING:
    from compress.pipeline import Run

_log = logging.getLogger(__name__)

# Enough for 1,024 tokens of 64 characters each.
_VERIFY_CHARACTERS = 1 << 16


def check_exports(exporters: Mapping[str, Exporter], plan: Plan, model: Any) -> None:
    """Raise if a format cannot hold the plan; reads no weights.

    Raises:
        PlanError: With every problem of every format.
    """
    lines = []
    for name, exporter in exporters.items():
        same: dict[str, list[str]] = {}
        for problem in exporter.check(plan, model):
            same.setdefault(problem.message, []).append(problem.where)
        for message, places in same.items():
            more = f" (and {len(places) - 1} more)" if len(places) > 1 else ""
            lines.append(f"export.{name}: {places[0]}{more}: {message}")
    if lines:
        raise PlanError("\n".join(lines))


def export_once(run: Run, name: str) -> dict[str, Any]:
    """Write and verify one export of a run, unless that was done; return its entry."""
    exporter = run.exporters[name]
    section, folder = run.config.run, run.workdir.root / "export" / name
    cache = run.config.kv_cache
    made_with = {
        "options": exporter.options.model_dump(mode="json"),
        "verify": [section.verify, section.max_kl],
        "plan": provenance.digest_of(run.plan.to_json()),
        "kv_cache": cache.model_dump(mode="json") if cache else None,
    }
    if exporter.needs_input_squares:
        made_with["calibration"] = run.config.calibration.model_dump(mode="json")

    def finished() -> dict[str, Any] | None:
        # One result a format: the folder holds what was written last.
        stored = run.workdir.stored(f"export-{name}")
        if stored is None or stored["with"] != made_with or not folder.is_dir():
            return None
        return dict(stored["entry"])

    def write() -> dict[str, Any]:
        with run.timed(f"export {name}"):
            _log.info("writing %s", folder)
            entry = write_export(name, exporter, run.artifact, run.workdir)
        with run.timed(f"verify {name}"):
            entry["verify"] = _verified(run, exporter, folder)
        if "failed" not in entry["verify"]:  # a crash may not happen next time
            run.workdir.write_json(
                f"results/export-{name}.json", {"with": made_with, "entry": entry}
            )
        return entry

    known = run.team.alone(finished)
    if known is not None:
        return known
    if exporter.needs_input_squares:  # all processes measure, the first one writes
        with run.timed(f"export {name}"):
            squares = input_squares(run)
        run.artifact = replace(run.artifact, input_squares=lambda: squares)
    return run.team.alone(write)


def _verified(run: Run, exporter: Exporter, folder: Path) -> dict[str, Any]:
    if not run.config.run.verify:
        return {"skipped": "run.verify is false"}
    windows = verification_windows(run.handle.tokenizer())
    coded = run.serving.build()
    return verify_export(
        exporter,
        folder,
        windows=windows,
        in_memory=partial(coded.logits, name=f"verify {exporter.name}"),
        limit=run.config.run.max_kl,
    )


def write_export(
    name: str, exporter: Exporter, artifact: CompressedModel, workdir: WorkDir
) -> dict[str, Any]:
    """Write one export into ``WORKDIR/export/NAME``; return its report entry."""
    target = workdir.root / "export" / name
    names = artifact.plan.layers
    with progress_bar(desc=name, total=len(names), unit="layer", leave=False) as bar:
        waiting = set(names)

        def quantized(layer: str) -> QuantizedTensor:
            if layer in waiting:  # some are read twice
                waiting.remove(layer)
                bar.update()
            return artifact.quantized(layer)

        counted = replace(artifact, quantized=quantized)
        result = workdir.replace_folder(
            target, lambda folder: exporter.write(counted, folder)
        )
    files = [str(Path("export") / name / file.name) for file in result.files]
    return {
        "files": files,
        "size_bytes": result.size_bytes,
        "notes": list(result.notes),
    }


def input_squares(run: Run) -> InputSquares:
    """Run a run's calibration text through its dense model, transforms included."""
    tokens = run.load_tokens()
    model = StreamedModel(
        run.model, run.transformed.source, device=run.device, dtype=run.runner.dtype
    )
    names = [name for name, count in tokens.sources if count]
    return measure_squares(model, tokens.tokens, sources=names, team=run.team)


def verification_windows(tokenizer: Any) -> Tensor:
    """Return the tokens that exports are compared on, int64 ``[4, 256]``.

    They are the beginning of WikiText-2; no more of it is tokenized.
    """
    text = evaluation_text("wikitext2").joined[:_VERIFY_CHARACTERS]
    return cut_windows(
        text, tokenizer, protocol="windows", count=4, length=256, name="wikitext2"
    ).ids


def verify_export(
    exporter: Exporter,
    folder: Path,
    *,
    windows: Tensor,
    in_memory: Callable[[Tensor], Iterable[Tensor]],
    limit: float,
) -> dict[str, Any]:
    """Run an export in its stock consumer and compare it with the model in memory.

    Args:
        exporter: That wrote ``folder``.
        folder: The export.
        windows: int64 ``[N, T]`` tokens to compare on.
        in_memory: Logits of the compressed model.
        limit: KL in nats that passes.

    Returns:
        The report's entry. A consumer that refuses the file or crashes makes a failed
        one: the files and all that was measured before are there all the same.
    """
    found: dict[str, Any] = {"consumer": exporter.consumer}
    try:
        for measured in _measured(exporter, folder, windows, in_memory):
            found |= measured
    except MissingDependencyError as error:
        _log.warning("%s export is not verified: %s", exporter.name, error)
        return {"skipped": str(error)}
    except ExportError as error:
        _log.warning("%s export failed its verification: %s", exporter.name, error)
        return {**found, "limit": limit, "failed": str(error), "passed": False}
    passed = found["kl"] <= limit
    if not passed:
        _log.warning(
            "%s: KL %.2e between the file in %s and the model in memory exceeds %.0e",
            folder,
            found["kl"],
            exporter.consumer,
            limit,
        )
    return {**found, "limit": limit, "passed": passed}


def _measured(
    exporter: Exporter,
    folder: Path,
    windows: Tensor,
    in_memory: Callable[[Tensor], Iterable[Tensor]],
) -> Iterator[dict[str, Any]]:
    """Yield the figures of a file as they come: read by its consumer, and as served."""
    text = TokenWindows("verify", windows)
    _, scores = compare(text, in_memory(windows), exporter.replay(folder, windows))
    assert scores is not None and scores.kl is not None and scores.same_top is not None
    yield {
        "kl": mean_and_error(scores.kl)[0],
        "top1": mean_and_error(scores.same_top)[0],
        "tokens": scores.kl.numel(),
    }
    served = exporter.serve(folder, windows)
    if served is not None:
        _, raw = compare(text, in_memory(windows), served)
        assert raw is not None and raw.kl is not None
        yield {"kl_as_served": mean_and_error(raw.kl)[0]}


def failures(exports: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a sentence for each thing that reading the exports back has disproved."""
    found = []
    for name, entry in exports.items():
        verify = entry.get("verify", {})
        if "failed" in verify:
            found.append(f"{name}: verification failed: {verify['failed']}")
        elif verify.get("passed") is False:
            found.append(
                f"{name}: KL {verify['kl']:.2e} between the file in "
                f"{verify['consumer']} and the model in memory exceeds "
                f"{verify['limit']:.0e}"
            )
        if not entry.get("codes", {}).get("identical", True):
            found.append(f"{name}: the file's codes are not those that were computed")
    return found


def same_codes(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    """Whether two decoded layers agree in every code, scale, zero point and value.

    The one number of an NVFP4 matrix is the same if its inverse is, which is what GGUF
    has of it: its last bit may be another.
    """
    if a.scheme.scales is Scales.TWO_LEVEL and a.outer is not None:
        if b.outer is None or not torch.equal(1 / a.outer, 1 / b.outer):
            return False
        b = replace(b, outer=a.outer)
    zeros = (a.zero is None) == (b.zero is None) and (
        a.zero is None or b.zero is None or torch.equal(a.zero.float(), b.zero.float())
    )
    return (
        zeros
        and torch.equal(a.codes, b.codes)
        and torch.equal(a.scales(), b.scales())
        and torch.equal(a.dequantize(), b.dequantize())
    )


def compare_once(run: Run, exports: dict[str, Any]) -> dict[str, Any] | None:
    """Add to each export's entry whether its codes are those that were computed.

    Returns:
        The same between the files, or ``None`` where there is nothing to compare.
    """
    if not (run.config.run.verify and exports and run.plan.layers):
        return None
    with run.timed("compare codes"):
        per_format, shared = run.team.alone(
            lambda: compare_codes(run.exporters, run.artifact, run.workdir)
        )
    for name, outcome in per_format.items():
        exports[name]["codes"] = outcome
    return shared


def compare_codes(
    exporters: Mapping[str, Exporter], artifact: CompressedModel, workdir: WorkDir
) -> tuple[dict[str, dict[str, Any]], dict[str, Any] | None]:
    """Decode every coded layer from each export, and hold it against the others.

    Returns:
        For each format, how many layers were read and whether all equal the codes that
        were computed; and the same between the files, if there are two or more.
    """
    counts = {name: 0 for name in exporters}
    equal = {name: True for name in exporters}
    shared, agree = 0, True
    for layer in artifact.plan.layers:
        own = artifact.quantized(layer)
        decoded = []
        for name, exporter in exporters.items():
            if not exporter.keeps_codes:
                continue
            read = exporter.read_codes(workdir.root / "export" / name, layer)
            counts[name] += 1
            equal[name] &= same_codes(own, read)
            decoded.append(read)
        if len(decoded) > 1:
            shared += 1
            agree &= all(same_codes(decoded[0], other) for other in decoded[1:])
    per_format = {
        name: {"layers": counts[name], "identical": equal[name]}
        for name in exporters
        if counts[name]
    }
    return per_format, {"layers": shared, "identical": agree} if shared else None
