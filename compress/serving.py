"""What a served model does besides its weights: rounded inputs, a cache in few bits.

After the codes are made, static scales are measured, inputs that lose too much get
finer scales, and the model is evaluated as an engine would run it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compress import provenance
from compress.calibration.observe import observe
from compress.calibration.sources import check_sources
from compress.core.artifact import CompressedModel
from compress.core.errors import ConfigError
from compress.core.plan import Plan
from compress.core.scheme import InputScheme
from compress.evaluation.asking import Asked, figures_of_tasks
from compress.evaluation.generations import PROMPTS, generations, round_inputs_
from compress.evaluation.likelihood import likelihoods
from compress.evaluation.measure import (
    PreparedText,
    evaluate_candidates,
    prepare_texts,
)
from compress.evaluation.perplexity import TokenWindows
from compress.evaluation.rounding import rounding_of
from compress.evaluation.tasks import load_tasks
from compress.kvcache.measure import measure_types, recommended, rounded_cache
from compress.kvcache.names import FP8, CachePair
from compress.kvcache.scales import ScaleRule
from compress.model.loading import ModelHandle, end_tokens
from compress.model.streaming import Rewrite, StreamedModel
from compress.planning.input_upgrades import shared_inputs, with_inputs
from compress.recovery.models import WholeModel
from compress.upgrading import Upgrader

if TYPE_CHECKING:
    from compress.pipeline import Run

COMPRESSED = "compressed"
WEIGHTS_ONLY = "weights_only"
CACHED = "with_cache"
PROMPTED = "with_prompt"


def needs_tokens(run: Run) -> bool:
    """Whether calibration text is read for anything but the codes."""
    quantize, cache = run.config.quantize, run.config.kv_cache
    upgrades = quantize is not None and quantize.upgrade_inputs is not None
    return (
        upgrades
        or bool(static_inputs(run.plan))
        or (cache is not None and cache.scheme == FP8)
    )


def check(run: Run) -> None:
    """Raise if the config asks for what this plan or model has not.

    Raises:
        ConfigError: No input can be upgraded, a cache type does not fit the model, or
            calibration text that is needed is not there.
    """
    quantize, cache = run.config.quantize, run.config.kv_cache
    if needs_tokens(run):
        check_sources(run.config.calibration.data)
    if quantize is not None and quantize.upgrade_inputs is not None:
        if not shared_inputs(run.plan, run.model):
            raise ConfigError(
                "quantize.upgrade_inputs: the plan rounds no inputs to integers "
                f"({quantize.scheme}) outside of experts; use a scheme such as "
                "w6a8-g128, or leave upgrade_inputs out"
            )
    if cache is None:
        return
    if run.config.evaluate is None or not run.config.evaluate.perplexity:
        if cache.scheme == "none":
            raise ConfigError(
                "kv_cache: there is nothing to do without evaluate.perplexity (a text "
                "to measure cache types on) and with scheme none"
            )
    for name in cache.types:
        pair = CachePair.parse(name)
        if pair.uses_fp8:
            raise ConfigError(
                f"kv_cache.types: {name}: fp8 is measured with kv_cache.scheme: fp8"
            )
        rounded_cache(run.model, pair, {})


def static_inputs(plan: Plan) -> list[str]:
    """Return the layers whose inputs have a static outer scale."""
    return [
        name
        for name, layer in plan.layers.items()
        if layer.scheme.inputs is not None and layer.scheme.inputs.two_level
    ]


class Serving:
    """Settles what a run's model does at run time, and measures the model so.

    Args:
        run: With all codes made.
        tokens: int64 ``[N, T]`` calibration tokens, if :func:`needs_tokens`.
    """

    def __init__(self, run: Run, tokens: Tensor | None) -> None:
        self._run, self._tokens = run, tokens
        self.input_amax: dict[str, float] = {}
        self.kv_scales: dict[str, Tensor] = {}
        self.upgrades: Mapping[str, Any] | None = None

    def settle(self) -> tuple[Plan, CompressedModel]:
        """Measure static scales, upgrade inputs; return the final plan and model."""
        run = self._run
        plan = run.plan
        if needs_tokens(run):
            assert self._tokens is not None
            self._observe(self._tokens)
            plan = self._upgraded(self._tokens)
        scheme = None
        if self.kv_scales and run.config.kv_cache is not None:
            scheme = {
                "num_bits": 8,
                "type": "float",
                "strategy": run.config.kv_cache.strategy,
                "symmetric": True,
                "dynamic": False,
            }
        codes = run.artifact.quantized
        return plan, replace(
            run.artifact,
            plan=plan,
            quantized=lambda layer: replace(
                codes(layer), scheme=plan.layers[layer].scheme
            ),
            kv_scales=self.kv_scales,
            kv_cache_scheme=scheme,
            input_amax=self.input_amax,
        )

    def _observe(self, tokens: Tensor) -> None:
        run, cache = self._run, self._run.config.kv_cache
        static = static_inputs(run.plan)
        rule, samples = None, len(tokens)
        if cache is not None and cache.scheme == FP8:
            rule = ScaleRule(cache.strategy, cache.scale, cache.percentile)
            samples = len(tokens) if static else cache.samples
        if rule is None and not static:
            return

        def compute() -> dict[str, Any]:
            with run.timed("static scales"):
                found = observe(self.build, tokens[:samples], layers=static, rule=rule)
            scales = {name: scale.tolist() for name, scale in found.kv_scales.items()}
            return {"input_amax": found.input_amax, "kv_scales": scales}

        key = provenance.digest_of([str(rule), samples, static])[:12]
        stored = run.workdir.stage(
            f"static-scales-{key}", partial(run.team.alone, compute)
        )
        self.input_amax = dict(stored["input_amax"])
        self.kv_scales = {k: torch.tensor(v) for k, v in stored["kv_scales"].items()}

    def _upgraded(self, tokens: Tensor) -> Plan:
        run, quantize = self._run, self._run.config.quantize
        section = quantize.upgrade_inputs if quantize else None
        if section is None:
            return run.plan

        def compute() -> dict[str, Any]:
            subject = run.subject
            base = StreamedModel(subject.description, subject.source, device=run.device)
            upgrader = Upgrader(
                base,
                self.build(),
                run.plan,
                tokens[: section.samples],
                input_amax=self.input_amax,
            )
            with run.timed("upgrade inputs"):
                found = upgrader.run(
                    factor=section.factor,
                    limit=section.limit,
                    draws=section.draws,
                    seed=run.config.run.seed,
                )
            layers = {n: vars(s) if s else None for n, s in found.inputs.items()}
            return {**found.record, "layers": layers}

        key = provenance.digest_of(section.model_dump(mode="json"))[:12]
        stored = dict(
            run.workdir.stage(f"upgrade-inputs-{key}", partial(run.team.alone, compute))
        )
        layers = stored.pop("layers")
        self.upgrades = stored
        chosen = {n: InputScheme(**s) if s else None for n, s in layers.items()}
        return with_inputs(run.plan, chosen)

    def build(
        self,
        *,
        rounding: Mapping[str, Rewrite] | None = None,
        new_cache: Callable[[], Any] | None = None,
        prompt: Tensor | None = None,
    ) -> StreamedModel:
        """Return the compressed model, by default with exact inputs and cache."""
        coded = self._coded
        return coded.with_source(
            coded.source, rounding=rounding, new_cache=new_cache, prompt=prompt
        )

    @cached_property
    def _coded(self) -> StreamedModel:
        run = self._run
        source = run.compressed_source()
        return StreamedModel(run.model, source, device=run.device)

    def rounding(self) -> dict[str, Rewrite]:
        """Return what the plan does to inputs, once it is settled."""
        layers = self._run.plan.layers
        inputs = {name: layer.scheme.inputs for name, layer in layers.items()}
        return rounding_of(inputs, self.input_amax)

    def served(self, *, cache: bool = False) -> StreamedModel:
        """Return the model as an engine runs it, its cache exact unless wanted."""
        new_cache = None
        if cache and self.kv_scales:
            new_cache = rounded_cache(
                self._run.model, CachePair.parse(FP8), self.kv_scales
            )
        return self.build(rounding=self.rounding(), new_cache=new_cache)

    def _texts(self) -> list[PreparedText]:
        section = self._run.config.evaluate
        assert section is not None
        return prepare_texts(
            section.perplexity,
            self._run.handle.tokenizer(),
            protocol=section.protocol,
            count=section.windows,
            length=section.sequence_length,
        )

    def evaluate(self) -> dict[str, Any]:
        """Return figures of the base, and of the compressed model as it is served.

        Where inputs or cache are rounded, those of its weights alone, and of all
        together, stand beside them; so do those with a soft prompt before each window.
        """
        run, section = self._run, self._run.config.evaluate
        if section is None or not section.perplexity:
            return {"base": None, COMPRESSED: None}
        models = {}
        changed = run.chain.transforms or run.pruned is not None
        if run.plan.layers or self.kv_scales or changed:
            models[COMPRESSED] = self.served()
        if self.rounding():
            models[WEIGHTS_ONLY] = self.build()
        if self.kv_scales:
            models[CACHED] = self.served(cache=True)
        if run.prompt is not None:
            values = run.prompt.values
            models[PROMPTED] = self.build(rounding=self.rounding(), prompt=values)
        base = StreamedModel(run.base, run.handle.source, device=run.device)
        own, others = evaluate_candidates(
            self._texts(),
            partial(base.logits, name="base"),
            {n: partial(model.logits, name=n) for n, model in models.items()},
            hidden_size=int(run.model.config["hidden_size"]),
            kl=section.kl,
            team=run.team,
        )
        return {"base": own, COMPRESSED: None, **others}

    def measure_tasks(self) -> dict[str, dict[str, Any]]:
        """Return figures of each task by model, if tasks are asked for."""
        run, section = self._run, self._run.config.evaluate
        if section is None or not section.tasks:
            return {}
        tasks = load_tasks(section.tasks, limit=section.task_limit or None)
        base = StreamedModel(run.base, run.handle.source, device=run.device)
        compressed = ModelHandle(run.model, run.compressed_source())
        models = {
            "base": Asked(
                partial(likelihoods, base, name="base"),
                partial(self._whole, run.handle),
            ),
            COMPRESSED: Asked(
                partial(likelihoods, self.served(), name=COMPRESSED),
                partial(self._whole, compressed, self.rounding()),
            ),
        }
        return run.team.alone(
            lambda: figures_of_tasks(
                tasks,
                models,
                run.handle.tokenizer(),
                longest=int(run.model.config["max_position_embeddings"]),
                most=section.answer_tokens,
                ends=end_tokens(run.handle),
            )
        )

    def write_samples(self) -> dict[str, Any] | None:
        """Return what base and compressed model write after prompts, if wanted.

        Where a model does not fit the device, ``skipped`` says so: the run goes on.
        """
        run, section = self._run, self._run.config.evaluate
        if section is None or not section.generate:
            return None
        compressed = ModelHandle(run.model, run.compressed_source())
        try:
            return generations(
                {
                    "base": partial(self._whole, run.handle),
                    COMPRESSED: partial(self._whole, compressed, self.rounding()),
                },
                run.handle.tokenizer(),
                section.prompts or PROMPTS,
                tokens=section.generate,
            )
        except torch.OutOfMemoryError as error:
            reason = f"the whole model does not fit {run.device}: {error}"
            return {"skipped": reason.partition("\n")[0]}

    def _whole(
        self, handle: ModelHandle, rounding: Mapping[str, Rewrite] | None = None
    ) -> WholeModel:
        device = self._run.device
        dtype = torch.float32 if device == "cpu" else self._run.runner.dtype
        model = WholeModel(handle, device=device, dtype=dtype)
        round_inputs_(model.module, rounding or {})
        return model

    def measure_cache(self) -> dict[str, Any] | None:
        """Return what cache types cost beside an exact cache, and which to take."""
        run, section = self._run, self._run.config.kv_cache
        evaluation = run.config.evaluate
        if section is None:
            return None
        result: dict[str, Any] = {
            "scheme": section.scheme,
            "strategy": section.strategy,
            "scale": section.scale,
            "samples": section.samples if self.kv_scales else None,
        }
        if evaluation is None or not evaluation.perplexity:
            return result
        text = _first_windows(self._texts()[0], section.windows)
        pairs = [CachePair.parse(name) for name in section.types]
        pairs += [CachePair.parse(FP8)] if self.kv_scales else []
        # With exact inputs: where these are rounded, any change of the cache, however
        # small, moves values over ties, and that noise is all that would be seen.
        entries = run.team.alone(
            lambda: measure_types(text, self.build, pairs, self.kv_scales)
        )
        return result | {
            "text": text.name,
            "protocol": text.windows.protocol,
            "windows": len(text.windows.ids),
            "tokens": text.windows.predictions,
            "types": entries,
            "recommended": recommended(entries, section.limit),
            "recommended_tight": recommended(entries, section.tight_limit),
        }


def _first_windows(text: PreparedText, count: int) -> PreparedText:
    windows, ids = text.windows, text.windows.ids[:count]
    protocol = windows.protocol
    if protocol.startswith("windows"):  # the name of this one says how many
        protocol = f"windows{len(ids)}x{ids.shape[1]}"
    kept = TokenWindows(protocol, ids, windows.first)
    return PreparedText(text.name, kept, text.counted_bytes)
