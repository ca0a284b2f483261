"""Each expert is calibrated on the tokens that its router sends it, and no others."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_fixtures import (
    KINDS,
    expert_layer,
    inner,
    opened,
    plan_of,
    routed,
    save_mixture,
)
from pipeline_fixtures import windows
from torch import Tensor

from compress.calibration import walk
from compress.calibration.experts import FEW_TOKENS, round_to_nearest, tokens_needed
from compress.calibration.observe import observe
from compress.core.errors import CalibrationError, PlanError
from compress.core.scheme import Scheme
from compress.core.statistics import LayerStatistics
from compress.core.tensors import QuantizedTensor
from compress.model.experts import weight_of
from compress.model.streaming import StreamedModel
from compress.quantizers.gptq import GPTQ, GPTQOptions
from compress.quantizers.rtn import RoundToNearest, RoundToNearestOptions
from compress.transform import PlanRunner, part_of_layer
from compress.workdir import WorkDir

MANY = windows(32, 32)


class Spy(GPTQ):
    """GPTQ that keeps what it was handed."""

    def __init__(self, options: GPTQOptions | None = None) -> None:
        super().__init__(options)
        self.calls: list[tuple[Tensor, LayerStatistics]] = []
        self.together: list[int] = []

    def quantize_alike(
        self,
        weights: Sequence[Tensor],
        scheme: Scheme,
        statistics: Sequence[LayerStatistics | None],
    ) -> list[QuantizedTensor]:
        for weight, known in zip(weights, statistics, strict=True):
            assert known is not None
            self.calls.append((weight.clone(), known))
        self.together.append(len(weights))
        return super().quantize_alike(weights, scheme, statistics)

    def of(self, weight: Tensor) -> LayerStatistics:
        """Return the statistics for a weight, alone or on top of a stack of rows."""
        rows = len(weight)
        found = [s for w, s in self.calls if torch.equal(w[:rows], weight)]
        assert len(found) == 1
        return found[0]


class Run:
    """A tiny mixture, quantized block by block."""

    def __init__(
        self, folder: Path, kind: str, quantizer: Any, tokens: Tensor, propagate: str
    ) -> None:
        self.kind, self.model = kind, save_mixture(folder / "model", kind)
        handle = opened(folder / "model")
        self.description, self.family = handle.description, handle.description.family
        self.plan = plan_of(handle, "method")
        self.workdir = WorkDir(folder / "work")
        PlanRunner(
            self.description,
            handle.source,
            self.plan,
            {"method": quantizer},
            self.workdir,
            propagate=propagate,
        ).run(tokens if quantizer.needs_statistics else None)

    def codes(self, layer: str) -> QuantizedTensor:
        return self.workdir.read_layer(part_of_layer(layer, self.description), layer)

    def weight(self, *place: Any) -> Tensor:
        layer = expert_layer(self.kind, *place)
        return weight_of(self.model, self.family, layer).detach()

    def set_codes_(self, model: Any, layers: list[str]) -> None:
        for layer in layers:
            values = self.codes(layer).dequantize()
            weight_of(model, self.family, layer).data.copy_(values)


def gram(x: Tensor) -> Tensor:
    return 2 * x.T @ x


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_run_over_the_tokens_routed_to_an_expert(
    kind: str, tmp_path: Path
) -> None:
    spy = Spy(GPTQOptions(drift=0))
    run = Run(tmp_path, kind, spy, MANY, "fp")
    for block in range(2):
        states, chosen = routed(run.model, block, MANY)
        for expert in range(4):
            x = states[(chosen == expert).any(1)]
            assert 64 <= len(x) < len(states)
            for role in ("gate", "down"):
                found = spy.of(run.weight(block, expert, role))
                expected = x
                if role == "down":
                    expected = inner(run.model, run.family, kind, (block, expert))(x)
                assert found.tokens == len(x)
                assert close(found.hessian, gram(expected))


@pytest.mark.parametrize("kind", KINDS)
def test_drift_compares_with_the_dense_model_on_the_same_tokens(
    kind: str, tmp_path: Path
) -> None:
    spy = Spy(GPTQOptions(drift=0.5))
    run = Run(tmp_path, kind, spy, MANY, "quantized")
    dense_states, _ = routed(run.model, 0, MANY)
    coded = copy.deepcopy(run.model)
    first = [n for n in run.plan.layers if n.startswith("model.layers.0.self_attn")]
    run.set_codes_(coded, first)
    states, chosen = routed(coded, 0, MANY)
    for expert in range(4):
        rows = (chosen == expert).any(1)
        x, y = states[rows], dense_states[rows]
        gate = spy.of(run.weight(0, expert, "gate"))
        assert gate.drift is not None
        assert close(gate.drift, 2 * (y - x).T @ x)
        names = [expert_layer(kind, 0, expert, role) for role in ("gate", "up")]
        run.set_codes_(coded, names)
        inner_y = inner(run.model, run.family, kind, (0, expert))(y)
        inner_x = inner(coded, run.family, kind, (0, expert))(x)
        down = spy.of(run.weight(0, expert, "down"))
        assert down.drift is not None
        assert close(down.hessian, gram(inner_x))
        assert close(down.drift, 2 * (inner_y - inner_x).T @ inner_x)


@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_gets_the_codes_that_its_matrix_gets_alone(
    kind: str, tmp_path: Path
) -> None:
    spy = Spy()
    run = Run(tmp_path, kind, spy, MANY, "quantized")
    for block, expert in ((0, 0), (1, 3)):
        for role in ("gate", "up", "down"):
            weight = run.weight(block, expert, role)
            # gate and up share their statistics, whoever is first of the stack
            first = "gate" if role == "up" else role
            statistics = spy.of(run.weight(block, expert, first))
            layer = expert_layer(kind, block, expert, role)
            scheme = run.plan.layers[layer].scheme
            alone = GPTQ().quantize(weight, scheme, statistics)
            found = run.codes(layer)
            assert torch.equal(found.codes, alone.codes), layer
            assert torch.equal(found.scale, alone.scale), layer


@pytest.mark.parametrize("kind", KINDS)
def test_how_many_experts_are_coded_together_changes_no_code(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = 16 * 64**2  # of one input of gate and up, and of less than one of down
    codes, found = [], []
    for number, most in enumerate((0, 3 * room, 1 << 28)):
        monkeypatch.setattr(walk, "_EXPERT_BYTES_ELSEWHERE", most)
        spy = Spy()
        run = Run(tmp_path / str(number), kind, spy, MANY, "quantized")
        codes.append({layer: run.codes(layer) for layer in run.plan.layers})
        found.append(max(spy.together))
    assert found == [1, 3, 4]
    for layer, alone in codes[0].items():
        for together in codes[1:]:
            assert torch.equal(alone.codes, together[layer].codes), layer
            assert torch.equal(alone.scale, together[layer].scale), layer


@pytest.mark.parametrize("kind", KINDS)
def test_experts_with_few_tokens_are_rounded_and_noted(
    kind: str, tmp_path: Path
) -> None:
    tokens = windows(8, 17)  # 136 tokens, so 68 an expert: some get less than 64
    run = Run(tmp_path, kind, GPTQ(GPTQOptions(drift=0)), tokens, "fp")
    rounded = RoundToNearest(RoundToNearestOptions(search=True))
    few = many = 0
    for block in range(2):
        _, chosen = routed(run.model, block, tokens)
        records = run.workdir.records(f"{block:04d}")
        for expert in range(4):
            count = int((chosen == expert).sum())
            for role in ("gate", "up", "down"):
                layer = expert_layer(kind, block, expert, role)
                notes, codes = records[layer]["notes"], run.codes(layer)
                assert records[layer]["tokens"] == count
                if count >= 64:
                    assert notes == []
                    many += 1
                    continue
                few += 1
                assert notes == [f"{FEW_TOKENS} ({count}; 64 are needed)"]
                weight = run.weight(block, expert, role)
                expected = rounded.quantize(weight, codes.scheme, None)
                assert torch.equal(codes.codes, expected.codes)
                assert torch.equal(codes.scale, expected.scale)
    assert few and many


@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_that_no_token_reached_is_rounded(kind: str, tmp_path: Path) -> None:
    run = Run(tmp_path, kind, GPTQ(), windows(1, 1), "quantized")
    records = run.workdir.records("0000")
    unreached = [r for r in records.values() if r["tokens"] == 0]
    assert len(unreached) == 2 * 3  # one token goes to two of four
    assert all(r["error"] is None for r in unreached)
    assert all(r["notes"][0].startswith(FEW_TOKENS) for r in unreached)


def test_the_number_of_tokens_that_is_needed() -> None:
    assert [tokens_needed(c) for c in (64, 1024, 1025, 14336)] == [64, 64, 65, 896]


@pytest.mark.parametrize("kind", KINDS)
def test_error_feedback_beats_rounding_in_the_experts_outputs(
    kind: str, tmp_path: Path
) -> None:
    errors = {}
    for name, quantizer in (
        ("gptq", GPTQ(GPTQOptions(drift=0))),
        ("rtn", RoundToNearest()),
    ):
        run = Run(tmp_path / name, kind, quantizer, MANY, "fp")
        states, chosen = routed(run.model, 1, MANY)
        coded = copy.deepcopy(run.model)
        run.set_codes_(coded, [n for n in run.plan.layers if "experts" in n])
        lost = total = 0.0
        for expert in range(4):
            x = states[(chosen == expert).any(1)]
            outputs = [
                inner(model, run.family, kind, (1, expert))(x)
                @ weight_of(model, run.family, expert_layer(kind, 1, expert, "down"))
                .detach()
                .T
                for model in (run.model, coded)
            ]
            lost += float((outputs[0] - outputs[1]).square().sum())
            total += float(outputs[0].square().sum())
        errors[name] = lost / total
    assert errors["gptq"] < 0.8 * errors["rtn"], errors


@pytest.mark.parametrize("kind", KINDS)
def test_largest_inputs_are_known_of_experts_that_tokens_reached(
    kind: str, tmp_path: Path
) -> None:
    model = save_mixture(tmp_path, kind)
    handle = opened(tmp_path)
    build = partial(StreamedModel, handle.description, handle.source)
    tokens = torch.arange(6).view(1, 6)
    states, chosen = routed(model, 0, tokens)
    reached = sorted(set(chosen.flatten().tolist()))
    layers = [expert_layer(kind, 0, number, "gate") for number in reached]
    found = observe(build, tokens, layers=layers).input_amax
    for number, layer in zip(reached, layers, strict=True):
        seen = states[(chosen == number).any(-1)]
        assert found[layer] == pytest.approx(float(seen.abs().max()), rel=1e-5)

    # One token reaches two experts of four, and nothing is known of the others alone.
    _, few = routed(model, 0, tokens[:, :1])
    idle = sorted({0, 1, 2, 3} - set(few.flatten().tolist()))
    assert len(idle) == 2
    others = [expert_layer(kind, 0, number, "gate") for number in idle]
    with pytest.raises(CalibrationError, match="no token .* reached this expert"):
        observe(build, tokens[:, :1], layers=others)


@pytest.mark.parametrize("name", ["int4-g32", "fp8-block", "nvfp4", "fp4-g32-lorc4"])
def test_an_expert_with_few_tokens_is_rounded_as_by_rtn(name: str) -> None:
    scheme = Scheme.parse(name)
    weight = torch.randn(128, 128, generator=torch.Generator().manual_seed(1))
    expected = RoundToNearest(RoundToNearestOptions(search=True)).quantize(
        weight, scheme, None
    )
    found = round_to_nearest(weight, scheme, "few")
    assert torch.equal(found.dequantize(), expected.dequantize())
    assert found.scheme == scheme
    assert "few" in found.notes


def test_the_layers_of_a_mixture_are_not_measured_at_once(tmp_path: Path) -> None:
    save_mixture(tmp_path / "tiny", "mixtral")
    handle = opened(tmp_path / "tiny")
    with pytest.raises(PlanError, match=r"quantize\.order: block: .* is a mixture"):
        PlanRunner(
            handle.description,
            handle.source,
            plan_of(handle, "gptq"),
            {},
            WorkDir(tmp_path / "work"),
            order="block",
        )
