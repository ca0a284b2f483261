"""Predicted memory and time: counts by hand, and what they must depend on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from export_fixtures import linears, make_artifact
from moe_fixtures import opened, save_mixture
from shapes_fixtures import CLOCK, LLAMA_7B, layer, uneven_model

from compress.core.plan import LayerPlan, Plan
from compress.core.scheme import Scheme
from compress.core.statistics import LayerStatistics
from compress.core.tensors import QuantizedTensor
from compress.planning import duration
from compress.planning.estimate import Work, estimate
from compress.planning.memory import peak_bytes, windows_that_fit
from compress.planning.shapes import Shapes
from compress.quantizers.rtn import RoundToNearest


def memory(work: Work, dtype: torch.dtype = torch.float32, **changes: Any) -> int:
    return peak_bytes(replace(LLAMA_7B, **changes), work, dtype=dtype)


def free(_: LayerPlan) -> float:
    return 0.0


def test_rounding_holds_gate_and_up_at_once_and_the_codes_of_a_block() -> None:
    """Stored, coded twice and decoded; then float, error and square of one of them."""
    gate = 11008 * 4096
    expected = 2 * gate * (2 + 1 + 1 + 4) + 3 * gate * 4 + LLAMA_7B.block
    assert memory(Work()) - (400 << 20) == expected


def test_writing_samples_holds_one_whole_model_in_float32() -> None:
    assert memory(Work(generated=40)) - (400 << 20) == 4 * LLAMA_7B.parameters


def test_calibration_grows_with_tokens_and_with_drift() -> None:
    few, more, most = (memory(Work(calibration=(n, 512))) for n in (128, 192, 256))
    assert most - more == more - few > 0
    assert memory(Work(calibration=(192, 512), drift=True)) > more


def test_half_the_width_takes_half_of_states_and_block() -> None:
    """What is solved stays in float32."""
    work = Work(calibration=(16, 512), drift=True)
    whole, half = memory(work), memory(work, torch.bfloat16)
    states = 4 * 16 * 512 * (4096 * 5 + 11008 * 2)
    assert whole - half == (4 * LLAMA_7B.block + states) // 2


def test_a_whole_model_is_the_peak_where_the_consumer_loads_one() -> None:
    streamed = memory(Work(verified=1))
    assert memory(Work(verified=1, loads_whole=True)) > 4 * LLAMA_7B.parameters
    assert streamed < 4 << 30


def test_evaluation_holds_logits_of_one_window() -> None:
    one, many = (memory(Work(evaluation=(n, 2048))) for n in (1, 2))
    assert many - one == 3 * 4 * 2048 * 4096
    assert memory(Work(evaluation=(1, 4096))) - one == 4 * 2048 * (2 * 32000 + 3 * 4096)


def test_layers_of_one_input_are_counted_as_one_matrix() -> None:
    artifact = make_artifact(linears("int4-g32"))
    shapes = Shapes.of(artifact.description, artifact.plan)
    stacks = [[x.name.rpartition(".")[2] for x in stack] for stack in shapes.inside]
    assert stacks == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]
    assert len(shapes.inputs) == 4
    assert shapes.block > sum(x.shape[0] * x.shape[1] for x in shapes.planned) / 2


def test_more_work_takes_more_time_and_memory() -> None:
    artifact = make_artifact(linears("int4-g32"))
    plan, model = artifact.plan, artifact.description
    large = Work(
        (4096, 2048), True, evaluation=(1 << 13, 1 << 11), exports=2, verified=2
    )
    small, more = (
        estimate(model, plan, work, method_seconds=free) for work in (Work(), large)
    )
    assert more.seconds > small.seconds > 0
    assert more.peak_memory_bytes > small.peak_memory_bytes


def test_time_of_the_methods_is_counted_by_weight() -> None:
    artifact = make_artifact(linears("int4-g32"))
    plan, model = artifact.plan, artifact.description
    weights = sum(x.shape[0] * x.shape[1] for x in plan.layers.values())
    times = [
        estimate(model, plan, Work(), method_seconds=lambda _, t=t: t).seconds
        for t in (0.0, 1.0)
    ]
    assert times[1] - times[0] == pytest.approx(weights)


def test_only_the_chosen_experts_take_time(tmp_path: Path) -> None:
    save_mixture(tmp_path, "mixtral")
    model = opened(tmp_path).description
    work = Work(evaluation=(1 << 10, 1 << 10))

    def seconds(chosen: int) -> float:
        config = {**model.config, "num_experts_per_tok": chosen}
        changed = replace(model, config=config)
        return estimate(changed, Plan("x", {}), work, method_seconds=free).seconds

    one, two, four = seconds(1), seconds(2), seconds(4)
    assert four > two > one
    assert four - two == pytest.approx(2 * (two - one))


class Slow(RoundToNearest):
    """Takes a tenth of a second, and remembers what it was given."""

    needs_statistics = True

    def __init__(self) -> None:
        super().__init__()
        self.given: list[tuple[torch.Size, LayerStatistics | None]] = []

    def quantize(
        self, weight: torch.Tensor, scheme: Scheme, statistics: LayerStatistics | None
    ) -> QuantizedTensor:
        self.given.append((weight.shape, statistics))
        CLOCK.now += 0.1
        return super().quantize(weight, scheme, None)


def test_a_method_is_timed_on_a_small_matrix_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(duration, "time", CLOCK)
    method = Slow()
    found = duration.method_seconds(method, Scheme.parse("int4-g64"), 16)
    assert found * 16 * 256 == pytest.approx(0.1)
    assert duration.method_seconds(method, Scheme.parse("int4-g64"), 16) == found
    assert len(method.given) == 3  # one warms up, two are timed
    shape, statistics = method.given[0]
    assert shape == (16, 256)
    assert statistics is not None and statistics.columns == 256
    torch.linalg.cholesky(statistics.hessian)


@pytest.mark.parametrize(
    ("scheme", "columns"), [("int4", 256), ("int4-g32", 256), ("int4-g512", 512)]
)
def test_groups_fit_the_small_matrix(scheme: str, columns: int) -> None:
    method = Slow()
    duration.method_seconds(method, Scheme.parse(scheme), 8)
    assert method.given[0][0] == (8, columns)


@pytest.mark.parametrize(
    ("columns", "tokens", "timed"), [(64, 16, 64), (11008, 2048, 2048), (9000, 8, 4096)]
)
def test_wide_moments_are_timed_by_fewer_columns(
    columns: int, tokens: int, timed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenth of a second for each call, which grows with the square of the width."""
    given = []

    def add(_: object, inputs: torch.Tensor, dense: torch.Tensor | None) -> None:
        given.append((inputs.shape, inputs.dtype, dense is not None))
        CLOCK.now += 0.1

    monkeypatch.setattr(duration.Moments, "add", add)
    monkeypatch.setattr(duration, "time", CLOCK)
    duration.moments_seconds.cache_clear()
    found = duration.moments_seconds(columns, tokens, drift=True, dtype=torch.bfloat16)
    duration.moments_seconds.cache_clear()
    assert set(given) == {((1, tokens, timed), torch.bfloat16, True)}
    assert found == pytest.approx(0.1 * (columns / timed) ** 2)


def test_drift_and_llama_cpp_take_their_time() -> None:
    artifact = make_artifact(linears("int4-g32"))
    plan, model = artifact.plan, artifact.description
    work = Work((64, 64), exports=1, verified=1)

    def seconds(**changes: Any) -> float:
        changed = replace(work, **changes)
        return estimate(model, plan, changed, method_seconds=free).seconds

    assert seconds(drift=True) > seconds()
    assert seconds(loads_whole=1) < seconds()


def test_speeds_are_those_of_this_machine() -> None:
    assert 1e8 < duration.matmul_speed(torch.float32) < 1e16
    assert 1e-12 < duration.pass_time() < 1e-6


def test_blocks_of_different_widths_are_counted_by_their_own() -> None:
    _, description, _ = uneven_model(widths=(32, 96, 64))
    names = description.linears()
    tensors = description.tensors
    plan = Plan(
        "tiny",
        {n: replace(layer(*tensors[f"{n}.weight"].shape), name=n) for n in names},
    )
    shapes = Shapes.of(description, plan)
    widest = [x for x in names if ".1.mlp." in x]
    assert shapes.inner == 96
    assert {x.name for stack in shapes.inside for x in stack} >= set(widest)
    sizes = [
        sum(
            i.elements for n, i in tensors.items() if n.startswith(f"model.layers.{b}.")
        )
        for b in range(3)
    ]
    assert shapes.block == max(sizes) == sizes[1]
    assert shapes.active == sum(sizes) / 3


def test_fewer_windows_at_once_are_predicted_to_take_less() -> None:
    work = Work((128, 2048))
    whole = peak_bytes(LLAMA_7B, work, dtype=torch.float32)
    one = Work((1, 2048))
    least = peak_bytes(LLAMA_7B, one, dtype=torch.float32)
    fit = {
        limit: windows_that_fit(LLAMA_7B, work, dtype=torch.float32, limit_bytes=limit)
        for limit in (least - 1, least, (least + whole) // 2, whole)
    }
    assert list(fit.values())[:2] == [0, 1]
    assert 1 < fit[(least + whole) // 2] < 128
    assert fit[whole] == 128
