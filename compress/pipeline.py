"""All stages in order: load, plan, calibrate, quantize, evaluate, export, report.

The only module that knows them all. Plug-ins are found by name; what was computed lies
in the work directory, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import (
    exporting,
    guarding,
    preparing,
    preview,
    prompting,
    provenance,
    reshaping,
    serving,
)
from compress.allocation.outcome import Outcome
from compress.allocation.search import Search
from compress.calibration.data import CalibrationTokens
from compress.calibration.importance import importances_of
from compress.calibration.sources import check_sources
from compress.config import Config
from compress.config.plugins import create_chain, create_exporter
from compress.core.artifact import CompressedModel, ModelDescription
from compress.core.plan import Plan
from compress.core.tensors import QuantizedTensor
from compress.distributed.team import Team, own_device, team
from compress.locking import locked
from compress.model.devices import choose_device, choose_dtype
from compress.model.loading import ModelHandle, check_tensors
from compress.planning.planner import make_plan, resolve_scale_dtype
from compress.planning.rerun import config_of_export
from compress.report import write_report
from compress.reporting import build_report
from compress.result import Result
from compress.scoring import evaluate, inspect
from compress.stopping import explained
from compress.timing import timed
from compress.transform import CompressedSource, PlanRunner, part_of_layer
from compress.transforms.chain import Transformed
from compress.transforms.source import TransformedSource
from compress.tuning import stage as tuning
from compress.workdir import WorkDir

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Result",
    "dry_run",
    "evaluate",
    "export",
    "inspect",
    "plan",
    "run",
]


class Run:
    """One config on its way through the stages.

    Args:
        config: What to do.
        command: How it was started, for the report.
        assets: Folder for tokenizer files made from a GGUF source.
        pruned: The model that pruning made, and what it did; without it, a config that
            prunes is set up on a model of the size to come, and cannot be executed.
        team: The processes that execute it together.
        redo: Replace what an earlier run made from another config.
        force: Export a result however bad it is.
    """

    def __init__(
        self,
        config: Config,
        command: str | None = None,
        assets: Path | None = None,
        pruned: tuple[ModelHandle, Mapping[str, Any]] | None = None,
        team: Team | None = None,
        redo: bool = False,
        force: bool = False,
    ) -> None:
        self.config = config
        self.command = command
        self.team = team or Team()
        self.redo, self.force = redo, force
        self.held_back: str | None = None
        self.workdir = WorkDir(config.run.workdir, self.team)
        self.seconds: dict[str, float] = {}
        self.device = own_device(choose_device(config.run.device))
        preparing.check_inputs(config)
        with self.timed("load"):
            self.handle = preparing.open_original(config, assets or self.workdir.assets)
        self.pruning = reshaping.pruning_of(
            config, self.handle, root=self.workdir.root, device=self.device
        )
        self.subject = self.handle
        self.pruned: Mapping[str, Any] | None = None
        if pruned is not None:
            self.subject, self.pruned = pruned
        elif self.pruning is not None:
            self.subject = reshaping.provisional(self.pruning, self.handle)
        self.quantizers = preparing.quantizers_of(config)
        self.chain = create_chain(config.transform_entries, self.quantizers.values())
        self.base: ModelDescription = self.handle.description
        self.model = self.chain.describe(self.subject.description)
        original = TransformedSource(self.subject.source, self.model.dtype)
        self.transformed = Transformed(original, [])
        self.exporters = {
            entry.format: create_exporter(
                entry.format, entry.options, path=("export", index)
            )
            for index, entry in enumerate(config.export)
        }
        if any(e.needs_input_squares for e in self.exporters.values()):
            check_sources(config.calibration.data)
        self.scale_dtype = resolve_scale_dtype(
            config.quantize, self.model, list(self.exporters)
        )
        self.allocation: Mapping[str, Any] | None = None
        self.search = Search(self, config.budget) if config.budget else None
        self.plan = self._plan()
        exporting.check_exports(self.exporters, self.plan, self.model)
        tuning.check(config, self.plan, self.model)
        self.tuned: tuning.TunedLayers | None = None
        self.prompt: prompting.LearnedPrompt | None = None
        prompting.check(self)
        serving.check(self)
        self.runner = PlanRunner(
            self.model,
            self.subject.source,
            self.plan,
            self.quantizers,
            self.workdir,
            device=self.device,
            propagate=config.quantize.propagate if config.quantize else "quantized",
            order=config.quantize.order if config.quantize else "layer",
            dtype=choose_dtype(config.calibration.dtype, self.model.dtype, self.device),
            importances=importances_of(config, self.model, self.plan, self.quantizers),
            team=self.team,
        )
        self.artifact = CompressedModel(
            self.model,
            self.plan,
            self.subject.source,
            self.codes,
            {"compress": provenance.versions()["compress"]},
            input_squares=partial(exporting.input_squares, self),
        )
        self.runner.room = preview.room_of(self)

    def timed(self, stage: str) -> AbstractContextManager[None]:
        """Add the time of a block of code to a stage."""
        return timed(self.seconds, stage)

    def _plan(self) -> Plan:
        if self.search is not None:
            return self.search.provisional
        return make_plan(
            self.config.quantize,
            self.model,
            scale_dtype=self.scale_dtype,
            quantizer=self.quantizers.__getitem__,
        )

    def codes(self, layer: str) -> QuantizedTensor:
        """Return the codes of a layer of the plan, tuned if they were."""
        if self.tuned is not None and layer in self.tuned.layers:
            return self.tuned.read(layer)
        return self.workdir.read_layer(part_of_layer(layer, self.model), layer)

    def execute(self, *, overwrite: bool, write_exports: bool = True) -> Result:
        """Carry out all stages that are not in the work directory yet."""
        check_tensors(self.subject)
        tokens = self._calibration_tokens()
        if tokens is not None:
            self.team.check_windows(len(tokens.tokens))
        fingerprint = self.team.alone(lambda: provenance.fingerprint(self, tokens))
        self.workdir.begin(fingerprint, overwrite=overwrite, redo=self.redo)
        predicted = preview.predict(self).to_dict()["predicted"]
        self.workdir.write_json("results/predicted.json", predicted)
        self.workdir.write_text("plan.json", self.plan.to_json())
        windows = tokens.tokens if tokens else None
        self._transform(windows)
        if self.search is not None:
            assert tokens is not None
            self._allocate(self.search, tokens)
        with self.timed("quantize"):
            self.runner.run(windows if self.runner.needs_calibration else None)
        self.tuned = tuning.carry_out(self)
        if self.tuned is not None:
            source = self.tuned.source(self.artifact.source)
            self.artifact = replace(self.artifact, source=source)
        self.serving = serving.Serving(self, windows)
        self.plan, self.artifact = self.serving.settle()
        exporting.check_exports(self.exporters, self.plan, self.model)
        self.workdir.write_text("plan.json", self.plan.to_json())
        self.prompt = prompting.carry_out(self, fingerprint)
        metrics = self._measured("evaluation", self.serving.evaluate)
        self.cache = self._measured("kv-cache", self.serving.measure_cache)
        self.samples = self._measured("samples", self.serving.write_samples)
        self.tasks = self._measured("tasks", self.serving.measure_tasks)
        if write_exports and not self.force:
            self.held_back = guarding.held_back(metrics, self.config.run)
        wanted = self.exporters if write_exports and not self.held_back else ()
        exports = {name: exporting.export_once(self, name) for name in wanted}
        shared = exporting.compare_once(self, exports)
        processes = self.team.gather(provenance.process(self.team.rank, self.device))
        report = self.team.alone(
            lambda: build_report(
                self,
                tokens=tokens,
                hashes=fingerprint,
                metrics=metrics,
                exports=exports,
                shared=shared,
                processes=processes,
                date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            )
        )
        if self.team.is_first:
            write_report(report, self.workdir.root)
        return Result(report, self.workdir.root)

    def _transform(self, windows: Tensor | None) -> None:
        """Put the transformed weights in the place of the original ones."""
        if not self.chain.transforms:
            return
        with self.timed("transform"):
            self.transformed = self.chain.run(
                self.model,
                self.subject.source,
                self.plan,
                windows=windows,
                workdir=self.workdir,
                device=self.device,
                team=self.team,
            )
        source = self.transformed.source
        self.runner.source = source
        self.artifact = replace(self.artifact, source=source)

    def _allocate(self, search: Search, tokens: CalibrationTokens) -> None:
        """Put the plan that an allocator chooses in the place of the first one."""

        def compute() -> dict[str, Any]:
            outcome = search.choose(tokens)
            return {"plan": outcome.plan.to_json(), "record": dict(outcome.record)}

        with self.timed("allocate"):
            stored = self.workdir.stage("allocation", compute)
        self.allocation = stored["record"]
        self.plan = Plan.from_json(stored["plan"])
        exporting.check_exports(self.exporters, self.plan, self.model)
        self.runner.plan = self.plan
        self.artifact = replace(self.artifact, plan=self.plan)
        self.workdir.write_text("plan.json", self.plan.to_json())

    def search_only(self) -> Outcome:
        """Return what the search chooses, of which nothing is carried out."""
        assert self.search is not None
        check_tensors(self.subject)
        tokens = self._calibration_tokens()
        assert tokens is not None
        self._transform(tokens.tokens)
        return self.search.choose(tokens)

    def _measured(self, name: str, measure: Callable[[], Any]) -> Any:
        """Return the stored result of a measurement, or make it."""
        sections = self.config.evaluate, self.config.kv_cache
        made_with = [s.model_dump(mode="json") if s else None for s in sections]
        prompt = self.prompt.values.tolist() if self.prompt else None
        key = provenance.digest_of([made_with, prompt, self.plan.to_json()])[:12]
        with self.timed("evaluate"):
            return self.workdir.stage(f"{name}-{key}", measure)

    def _calibration_tokens(self) -> CalibrationTokens | None:
        if not (
            self.search is not None
            or self.runner.needs_calibration
            or (self.pruning is not None and self.pruning.needs_windows)
            or self.chain.needs_inputs
            or serving.needs_tokens(self)
        ):
            return None
        return self.load_tokens()

    def load_tokens(self) -> CalibrationTokens:
        """Return the calibration tokens of the config."""
        with self.timed("calibration text"):
            return self.team.alone(
                lambda: preparing.calibration_tokens(self.config, self.handle)
            )

    def compressed_source(self) -> CompressedSource:
        """Return the dense view of the compressed model."""
        return CompressedSource(self.artifact.source, self.plan, self.codes)


def run(
    config: Config | Mapping[str, Any] | str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    redo: bool = False,
    force: bool = False,
    write_exports: bool = True,
    command: str | None = None,
) -> Result:
    """Run a whole config: a YAML file, or the same as plain data.

    Under torchrun every process calls this; they share the work, and all get the
    result.

    Args:
        config: What to do.
        resume: Continue a run that was interrupted.
        overwrite: Replace an earlier run in the work directory.
        redo: Continue a run whose config has changed: what that affects is computed
            again, the rest is kept.
        force: Export a result however bad it is (``run.max_perplexity_ratio``).
        write_exports: Without, exports only bind the plan and are counted for it.
        command: How the run was started, for the report.

    Raises:
        CompressError: One of its children, with what to do.
    """
    loaded = preparing.prepared(config)
    with (
        team(choose_device(loaded.run.device)) as (members, _),
        explained(),
        locked(loaded.run.workdir),
    ):
        work = WorkDir(loaded.run.workdir, members)
        work.check(resume=resume or redo, overwrite=overwrite)
        current = members.ahead(
            lambda: Run(loaded, command, team=members, redo=redo, force=force)
        )
        if current.pruning is not None:
            current, overwrite = with_pruned(current, overwrite=overwrite), False
        return current.execute(overwrite=overwrite, write_exports=write_exports)


def with_pruned(first: Run, *, overwrite: bool) -> Run:
    """Prune, and return the run that goes on with the pruned model."""
    check_tensors(first.handle)
    members = first.team
    if overwrite:
        members.alone(first.workdir.clear)
    made = reshaping.carry_out(first)
    final = members.ahead(
        lambda: Run(
            first.config,
            first.command,
            pruned=made,
            team=members,
            redo=first.redo,
            force=first.force,
        )
    )
    final.seconds = first.seconds | final.seconds
    return final


def plan(config: Config | Mapping[str, Any] | str | Path) -> preview.PlanPreview:
    """Return the plan of a config with sizes and predictions; computes nothing."""
    with tempfile.TemporaryDirectory() as assets:
        return preview.predict(Run(preparing.prepared(config), assets=Path(assets)))


dry_run = plan


def export(workdir: str | Path, to: str, options: Mapping[str, Any]) -> Result:
    """Write another format from a finished run.

    Args:
        workdir: Of the run.
        to: Name of the format.
        options: Of its exporter.

    Raises:
        ConfigError: There is no finished run.
        PlanError: The format cannot hold the plan.
    """
    data = config_of_export(Path(workdir), to, options)
    return run(data, resume=True, command=f"compress export {workdir} --to {to}")
