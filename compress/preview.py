"""What a run would do: the plan, the size of each file, memory and time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from compress.config.training_checks import recover_options, tune_options
from compress.core.errors import ConfigError
from compress.core.plan import Plan
from compress.core.sizes import parse_size
from compress.evaluation.texts import evaluation_text
from compress.model.devices import choose_dtype
from compress.model.spill import Room
from compress.planning.budget import breakdown, dense_bytes, linear_bits_per_weight
from compress.planning.duration import method_seconds
from compress.planning.estimate import (
    StageEstimate,
    Work,
    estimate,
    estimate_pruning,
    estimate_recovery,
)
from compress.planning.memory import peak_bytes, windows_that_fit
from compress.planning.pruning import PruneWork
from compress.planning.shapes import Shapes
from compress.reshaping import importance_tokens

if TYPE_CHECKING:
    from compress.config.schema import EvaluateSection
    from compress.pipeline import Run

_WINDOW = {"hf2048": 2048, "llamacpp512": 512}  # protocols that take the whole text
_CHARACTERS_A_TOKEN = 4


@dataclass(frozen=True)
class PlanPreview:
    """A plan with its predictions.

    Attributes:
        plan: The decisions.
        sizes: Bytes of weights: of the base, of what pruning leaves, of each export.
        parts: The same split into embedding, attention, mlp and other.
        peak_memory_bytes: Predicted for the process.
        device_memory_bytes: Predicted for a GPU; 0 on the CPU.
        seconds: Predicted for the run.
        stages: What of it goes into ``prune`` and ``recover``, where they are.
        budget: Name of the allocator and bytes of the file, if the run has a budget:
            it then chooses another plan than this uniform one.
    """

    plan: Plan
    sizes: Mapping[str, int]
    parts: Mapping[str, Mapping[str, int]]
    peak_memory_bytes: int
    device_memory_bytes: int
    seconds: float
    stages: Mapping[str, StageEstimate]
    budget: tuple[str, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        import json

        return {
            "plan": json.loads(self.plan.to_json()),
            "size_breakdown": self.parts,
            "predicted": {
                "size_bytes": dict(self.sizes),
                "peak_memory_bytes": self.peak_memory_bytes,
                "device_memory_bytes": self.device_memory_bytes,
                "seconds": self.seconds,
                "stages": {name: asdict(x) for name, x in self.stages.items()},
            },
        }

    def text(self) -> str:
        """Return tables for a terminal: layers by kind, then sizes and predictions."""
        kinds: dict[tuple[str, str, str, tuple[int, int]], int] = {}
        for layer in self.plan.layers.values():
            path = ".".join("*" if p.isdecimal() else p for p in _tail(layer.name))
            key = (path, layer.method, layer.scheme.name, layer.shape)
            kinds[key] = kinds.get(key, 0) + 1
        lines = [f"Plan for {self.plan.model}", ""]
        if self.budget is not None:
            method, size = self.budget
            lines += [
                f"The run will choose a plan of at most {size:,} bytes ({method}).",
                "This one is the uniform choice; --search shows what it will choose.",
                "",
            ]
        lines.append(f"{'layers':>6}  {'name':<26} {'shape':<14} {'method':<8} scheme")
        for (path, method, scheme, (rows, columns)), count in kinds.items():
            shape = f"{rows} x {columns}"
            lines.append(f"{count:>6}  {path:<26} {shape:<14} {method:<8} {scheme}")
        if not kinds:
            lines.append("     0  (nothing is quantized)")
        lines += _stand_ins(self.plan)
        bits = linear_bits_per_weight(self.plan)
        if bits is not None:
            lines += ["", f"bits per weight of coded layers: {bits:.4f}"]
        lines += ["", f"{'weights of':<14} {'bytes':>14}"]
        lines += [f"{name:<14} {size:>14,}" for name, size in self.sizes.items()]
        lines += [
            "",
            f"estimated peak memory: {_memory(self)}",
            f"estimated time:        {self.seconds:.0f} s",
        ]
        for name, stage in self.stages.items():
            label = f"{name}:"
            lines.append(
                f"  of which {label:<12} {stage.seconds:.0f} s, {_memory(stage)}"
            )
        return "\n".join(lines)


def _memory(found: PlanPreview | StageEstimate) -> str:
    """Return both peaks in words."""
    words = f"{found.peak_memory_bytes / (1 << 30):.2f} GiB"
    if not found.device_memory_bytes:
        return words
    return f"{words}, {found.device_memory_bytes / (1 << 30):.2f} GiB on the device"


def _stand_ins(plan: Plan) -> list[str]:
    """Return a line for each scheme that takes the place of one that does not fit."""
    pairs = Counter(
        (layer.scheme.name, layer.asked)
        for layer in plan.layers.values()
        if layer.asked
    )
    return [
        f"{count:>6}  layers get {scheme}: {asked} cannot hold rows of their length"
        for (scheme, asked), count in pairs.items()
    ]


def _tail(layer: str) -> list[str]:
    """Return the last parts of a name; three for experts, which a number separates."""
    parts = layer.split(".")
    return parts[-3:] if len(parts) > 2 and parts[-2].isdecimal() else parts[-2:]


def predict(run: Run) -> PlanPreview:
    """Return the preview of a run that has been set up but not started."""
    sizes = {"base": dict(dense_bytes(run.base))}
    if run.pruning is not None:
        sizes["pruned"] = dict(dense_bytes(run.subject.description))
    for name, exporter in run.exporters.items():
        sizes[name] = dict(exporter.tensor_bytes(run.plan, run.model))
    written = sum(sum(sizes[name].values()) for name in run.exporters)
    work = replace(_work(run), written=written)
    room = run.runner.room
    shown = work
    if room is not None and work.calibration is not None:
        shown = replace(work, calibration=(room.windows, work.calibration[1]))
    predicted = estimate(
        run.model,
        run.plan,
        work,
        method_seconds=lambda layer: method_seconds(
            run.quantizers[layer.method], layer.scheme, *layer.shape, run.device
        ),
        dtype=run.runner.dtype,
        device=run.device,
        in_memory=shown,
    )
    stages = _reshaping(run)
    parts = [predicted, *stages.values()]
    return PlanPreview(
        run.plan,
        {name: sum(table.values()) for name, table in sizes.items()},
        {name: breakdown(table, run.model) for name, table in sizes.items()},
        max(part.peak_memory_bytes for part in parts),
        max(part.device_memory_bytes for part in parts),
        sum(part.seconds for part in parts) + _tuning_seconds(run),
        stages,
        (run.search.section.method, run.search.budget) if run.search else None,
    )


def _work(run: Run) -> Work:
    """Return what a run does besides its plan."""
    calibration, section = run.config.calibration, run.config.evaluate
    verified = len(run.exporters) if run.config.run.verify else 0
    return Work(
        calibration=(calibration.samples, calibration.sequence_length)
        if run.runner.needs_calibration
        else None,
        drift=run.runner.needs_drift,
        order=run.runner.order,
        evaluation=_evaluation(section) if section is not None else (0, 0),
        generated=section.generate if section is not None else 0,
        exports=len(run.exporters),
        verified=verified,
        loads_whole=sum(
            verified > 0 and exporter.consumer == "transformers"
            for exporter in run.exporters.values()
        ),
    )


def room_of(run: Run) -> Room | None:
    """Return where states lie if a run is to take less memory than it would.

    Raises:
        ConfigError: ``run.max_memory`` is less than the run needs in any case.
    """
    limit = run.config.run.max_memory
    if limit is None:
        return None
    most, work = parse_size(str(limit)), _work(run)
    shapes, dtype = Shapes.of(run.model, run.plan), run.runner.dtype
    needed = peak_bytes(shapes, work, dtype=dtype)
    if needed <= most:
        return None
    fits = 0
    if work.calibration is not None and run.model.family.experts is None:
        fits = windows_that_fit(shapes, work, dtype=dtype, limit_bytes=most)
        one = replace(work, calibration=(1, work.calibration[1]))
        needed = peak_bytes(shapes, one, dtype=dtype)
    if not fits:
        raise ConfigError(
            f"run.max_memory: {limit} does not suffice: about "
            f"{needed / (1 << 30):.2f} GiB are needed however the calibration text is "
            "cut; give that much, or lower evaluate.sequence_length and "
            "calibration.sequence_length, or set run.verify to false"
        )
    return Room(run.workdir.root / "spill", fits)


def _tuning_seconds(run: Run) -> float:
    """Return the time that tuning may take; nothing is known where steps end it."""
    section = run.config.tune
    return 0.0 if section is None else tune_options(section).seconds or 0.0


def _evaluation(section: EvaluateSection) -> tuple[int, int]:
    """Return windows over all texts, and tokens a window."""
    if section.protocol == "windows":
        return section.windows * len(section.perplexity), section.sequence_length
    length = _WINDOW[section.protocol]
    texts = [evaluation_text(name).raw for name in section.perplexity]
    return sum(len(t) // _CHARACTERS_A_TOKEN // length for t in texts), length


def _reshaping(run: Run) -> dict[str, StageEstimate]:
    """Return the predictions of pruning and of recovery."""
    pruning, section = run.pruning, run.config.recover
    calibration = run.config.calibration
    windows = (calibration.samples, calibration.sequence_length)
    found = {}
    if pruning is not None:
        found["prune"] = estimate_pruning(
            run.base,
            PruneWork.of(pruning, windows),
            dtype=pruning.dtype,
            device=run.device,
        )
    if section is not None:
        ranked = importance_tokens(pruning, windows) if pruning is not None else 0
        options = recover_options(section)
        found["recover"] = estimate_recovery(
            run.subject.description,
            run.base,
            options,
            importances=ranked if section.trains_weights else 0,
            dtype=choose_dtype(options.dtype, run.base.dtype, run.device),
            device=run.device,
        )
    return found
