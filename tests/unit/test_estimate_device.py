"""Predictions for a run on a GPU, beside what an H200 took."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from shapes_fixtures import LLAMA_7B, layer

from compress.core.scheme import Scheme
from compress.planning import duration
from compress.planning.device import batches, device_bytes, host_bytes
from compress.planning.duration import Speeds
from compress.planning.shapes import Work
from compress.quantizers.rtn import RoundToNearest
from compress.report import tables

HALF = torch.bfloat16
GPTQ = Work((128, 2048), drift=True, exports=1)
SPEEDS = Speeds(blocks=1e15, exact=1e14, double=5e13, device_pass=1e-12, host_pass=0.0)


@pytest.mark.parametrize(
    ("order", "measured"), [("layer", 4_925_513_216), ("block", 4_857_536_000)]
)
def test_gpu_memory_of_7b_is_that_of_the_run(order: str, measured: int) -> None:
    """``benchmarks/results/scaling_8_blocks.json`` and ``scaling_32_blocks.json``."""
    found = device_bytes(LLAMA_7B, replace(GPTQ, order=order), dtype=HALF)
    assert found == pytest.approx(measured, rel=0.25)


@pytest.mark.parametrize(
    ("windows", "measured"), [(128, 7_609_462_784), (64, 5_648_932_864)]
)
def test_host_memory_holds_states_that_wait(windows: int, measured: int) -> None:
    work = replace(GPTQ, calibration=(windows, 2048))
    assert host_bytes(LLAMA_7B, work, dtype=HALF) == pytest.approx(measured, rel=0.25)


def test_few_states_stay_on_the_gpu() -> None:
    few, more = (replace(GPTQ, calibration=(n, 2048)) for n in (1, 32))
    assert host_bytes(LLAMA_7B, few, dtype=HALF) == host_bytes(
        LLAMA_7B, more, dtype=HALF
    )
    assert device_bytes(LLAMA_7B, few, dtype=HALF) < device_bytes(
        LLAMA_7B, more, dtype=HALF
    )
    assert [batches(LLAMA_7B, w, dtype=HALF) for w in (few, more)] == [1, 16]


def test_evaluation_and_rounding_take_memory_of_the_gpu() -> None:
    plain, head = Work(), replace(LLAMA_7B, vocabulary=256_000)
    rounded = device_bytes(LLAMA_7B, plain, dtype=HALF)
    assert rounded >= 22016 * 4096 * (2 + 4)  # gate and up, stored and as floats
    scored = device_bytes(head, replace(plain, evaluation=(8, 2048)), dtype=HALF)
    assert scored >= 2 * 4 * 256_000 * 4096


def test_a_method_on_a_gpu_is_timed_by_its_columns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A hundredth of a second to start, and 100 microseconds a column."""

    def taken(*given: Any) -> tuple[int, float]:
        columns = given[3]
        return columns, 0.01 + 1e-4 * columns

    monkeypatch.setattr(duration, "_method", taken)
    scheme = Scheme.parse("int4-g128")
    for rows, columns in ((4096, 11008), (12288, 4096)):
        found = duration.method_seconds(RoundToNearest(), scheme, rows, columns, "cuda")
        assert found * rows * columns == pytest.approx(0.01 + 1e-4 * columns)


def test_a_slow_method_on_a_gpu_is_timed_on_a_small_matrix_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A microsecond a weight: all rows would delay the start of a run."""
    asked = []

    def taken(*given: Any) -> tuple[int, float]:
        asked.append(given[2:4])
        return given[3], 1e-6 * given[2] * given[3]

    monkeypatch.setattr(duration, "_method", taken)
    scheme = Scheme.parse("int4-g128")
    found = duration.method_seconds(RoundToNearest(), scheme, 22016, 4096, "cuda")
    assert found == pytest.approx(1e-6)
    assert asked == [(2048, 256)]


def test_time_on_a_gpu_counts_stacks_and_hides_the_disk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(duration, "speeds_of", lambda *_: SPEEDS)
    monkeypatch.setattr(duration, "moments_seconds", lambda *_, **__: 0.0)
    shapes = replace(LLAMA_7B, planned=(layer(1, 2_000_000_000),))  # 10 s to store
    asked = []

    def seconds(work: Work, each: float) -> float:
        def method(stack: Any) -> float:
            asked.append(stack.shape)
            return each / (stack.shape[0] * stack.shape[1])

        return duration.seconds(
            shapes, work, method_seconds=method, dtype=HALF, device="cuda"
        )

    stored = seconds(Work(), 0.0)
    assert set(asked) == {(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)}
    assert stored == pytest.approx(8 + 10)
    assert seconds(Work(), 1.0) == pytest.approx(8 + 32 * 4, abs=0.1)
    layers, block = (
        seconds(replace(GPTQ, order=order, exports=0), 1.0)
        for order in ("layer", "block")
    )
    products = 2 * 128 * 2048 * LLAMA_7B.active * 32 / 1e15
    passes = 25 * 128 * 2048 * 4096 * 32 * 1e-12
    assert layers - block == pytest.approx(
        (2 * 2.4 - 3) * (products + passes), rel=0.01
    )


def test_the_report_shows_the_gpu_that_took_most() -> None:
    report = {
        "predicted": {"device_memory_bytes": 3 << 30},
        "processes": [{"device_peak_bytes": 1 << 30}, {"device_peak_bytes": 2 << 30}],
    }
    rows = tables.run_table(report).rows
    assert ("peak GPU memory", "3.00 GiB", "2.00 GiB") in [tuple(r) for r in rows]
    assert not any("GPU" in row[0] for row in tables.run_table({}).rows)
