"""Tuning of a block's scales and tables: leaves, training, and its place in a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from export_fixtures import StateDictSource
from model_fixtures import random_model
from pipeline_fixtures import windows
from torch import Tensor

from compress.block_tuning import tune_block
from compress.config.schema import QuantizeSection
from compress.core import codebooks
from compress.core.artifact import ModelDescription
from compress.core.continuous import BlockTuning, Continuous, is_tunable
from compress.core.scheme import Scheme
from compress.core.tensors import QuantizedTensor
from compress.planning.planner import make_plan
from compress.quantizers.aqlm import AQLM, AQLMOptions
from compress.quantizers.rtn import RoundToNearest
from compress.transform import PlanRunner
from compress.workdir import WorkDir

ROWS, COLUMNS = 32, 64
GRIDS = ("int4-g32", "int3-g32-offset", "int4-g32-asym", "fp4-g32", "int3-g32-lorc4")
TABLES = (
    *("aqlm-2x4g4", "palette3", "palette-2x3-r8", "palette3-r8-scaled"),
    *("pq-4x4", "pq-8x3x2-scaled"),
)
WINDOWS = windows(6, 24)


def coded(name: str, dtype: str = "float16") -> QuantizedTensor:
    generator = torch.Generator().manual_seed(0)
    scheme = Scheme.parse(name).with_scales(dtype)
    book = scheme.codebook
    if book is None:
        weight = torch.randn(ROWS, COLUMNS, generator=generator)
        return RoundToNearest().quantize(weight, scheme, None)
    runs = scheme.table_runs(ROWS, COLUMNS)
    shape = (runs, book.count, 1 << scheme.bits, book.vector)
    codes = torch.randint(
        1 << scheme.bits,
        (ROWS, COLUMNS // book.vector * book.count),
        generator=generator,
    )
    scale = (
        torch.rand(ROWS, 1, generator=generator) if book.scaled else torch.ones(1, 1)
    )
    return QuantizedTensor(
        codebooks.to_stored(codes, scheme.bits),
        scale.half(),
        None,
        scheme,
        tables=torch.randn(shape, generator=generator).half(),
    )


@pytest.mark.parametrize("name", [*GRIDS, *TABLES])
def test_leaves_give_the_values_of_the_codes(name: str) -> None:
    tensor = coded(name)
    assert is_tunable(tensor)
    part = Continuous(tensor)
    torch.testing.assert_close(part.values().detach(), tensor.dequantize())
    stored = part.stored().state()
    assert all(torch.equal(x, stored[key]) for key, x in tensor.state().items())


@pytest.mark.parametrize("name", [*GRIDS, *TABLES])
def test_gradients_reach_every_leaf(name: str) -> None:
    part = Continuous(coded(name))
    part.values().square().sum().backward()
    assert part.leaves
    for leaf in part.leaves:
        assert leaf.grad is not None and float(leaf.grad.abs().sum()) > 0


@pytest.mark.parametrize("name", ["fp8-tensor", "nvfp4", "fp4-g32-pow2", "q4_0"])
def test_only_free_scales_of_rows_are_tunable(name: str) -> None:
    assert is_tunable(coded(name)) == (name == "q4_0")


class Toy:
    """A block that is one linear layer beside a residual, and its data."""

    def __init__(self, name: str) -> None:
        generator = torch.Generator().manual_seed(3)
        self.coded = {"layer": coded(name, "float32")}
        exact = self.coded["layer"].dequantize()
        noise = torch.randn(COLUMNS, COLUMNS, generator=generator)[:ROWS]
        self.weight = exact + 0.1 * noise
        self.inputs = torch.randn(16, 24, COLUMNS, generator=generator)

    def forward(self, hidden: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        added = hidden @ weights["layer"].T
        return hidden + torch.nn.functional.pad(added, (0, COLUMNS - ROWS))

    def tuned(self, **settings: float) -> dict[str, QuantizedTensor]:
        wanted = self.forward(self.inputs, {"layer": self.weight})
        tuning = BlockTuning(
            epochs=int(settings.get("epochs", 30)),
            learning_rate=settings.get("learning_rate", 3e-3),
            step_tokens=48,
        )
        return tune_block(
            self.coded,
            self.forward,
            lambda rows: (self.inputs[list(rows)], wanted[list(rows)]),
            shape=(16, 24),
            tuning=tuning,
        )

    def error(self, coded: Mapping[str, QuantizedTensor]) -> float:
        return float((coded["layer"].dequantize() - self.weight).square().sum())


@pytest.mark.parametrize("name", ["int3-g32-offset", "aqlm-2x4g4"])
def test_tuning_lowers_the_error_and_leaves_the_codes(name: str) -> None:
    toy = Toy(name)
    tuned = toy.tuned()
    assert toy.error(tuned) < 0.97 * toy.error(toy.coded)
    assert torch.equal(tuned["layer"].codes, toy.coded["layer"].codes)
    assert any("tuned with its block" in note for note in tuned["layer"].notes)


def test_tuning_that_brings_nothing_keeps_the_start() -> None:
    toy = Toy("aqlm-2x4g4")
    tuned = toy.tuned(learning_rate=0.99)["layer"]
    for key, tensor in toy.coded["layer"].state().items():
        assert torch.equal(tuned.state()[key], tensor)


def test_tuning_is_deterministic() -> None:
    first, again = (Toy("aqlm-2x4g4").tuned()["layer"] for _ in range(2))
    assert all(torch.equal(x, again.state()[k]) for k, x in first.state().items())


# In a run


def runner_of(
    folder: Path, model: ModelDescription, source: StateDictSource, tune: int
) -> PlanRunner:
    options = AQLMOptions(tune=tune, rounds=2, tune_rate=3e-3, allow_large_tables=True)
    methods = {"aqlm": AQLM(options)}
    section = QuantizeSection.model_validate({"method": "aqlm", "scheme": "aqlm-2x4g4"})
    plan = make_plan(
        section, model, scale_dtype="float32", quantizer=methods.__getitem__
    )
    return PlanRunner(model, source, plan, methods, WorkDir(folder))


def state_of(runner: PlanRunner) -> dict[str, Tensor]:
    found = {}
    for index in range(runner.description.block_count):
        prefix = runner.description.family.block(index)
        for layer in runner.plan.layers:
            if layer.startswith(f"{prefix}."):
                state = runner.workdir.read_layer(f"{index:04d}", layer).state()
                found |= {f"{layer}.{key}": tensor for key, tensor in state.items()}
    return found


def test_a_tuned_run_resumes_where_it_stopped(tmp_path: Path) -> None:
    """The second block, coded anew, sees what the tuned first one feeds it."""
    _, description, source = random_model()
    whole = runner_of(tmp_path / "whole", description, source, 4)
    whole.run(WINDOWS)
    expected = state_of(whole)
    part = whole.workdir._part("0001")
    part.unlink()
    whole.run(WINDOWS)
    again = state_of(whole)
    assert expected.keys() == again.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(again[key], tensor, rtol=1e-3, atol=1e-4)


def test_tuning_changes_tables_and_keeps_codes_of_the_first_block(
    tmp_path: Path,
) -> None:
    _, description, source = random_model()
    runs = [
        runner_of(tmp_path / str(tune), description, source, tune) for tune in (0, 4)
    ]
    for run in runs:
        run.run(WINDOWS)
    plain, tuned = map(state_of, runs)
    first = [key for key in plain if ".0." in key]
    same = [key for key in first if torch.equal(plain[key], tuned[key])]
    assert [key for key in first if key.endswith("codes")] == [
        key for key in same if key.endswith("codes")
    ]
    assert len(same) < len(first)
