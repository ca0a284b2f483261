"""``compress bench kernels``: what follows from times, and what a CPU is told."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from compress.bench import kernels
from compress.bench.contenders import Contender, contenders
from compress.bench.kernels import KernelSettings, Limits, figures, with_ratios
from compress.bench.page import as_page, as_text
from compress.bench.tables import ratio_to_bf16, series_of
from compress.cli import app
from compress.core.errors import KernelError
from compress.runtime.w6a8.tiles import unpack_tiles

LIMITS = Limits(1e12, {"bf16": 1e14, "int8": 2e14})
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without")


def contender(name: str, weight_bytes: int, kind: str) -> Contender:
    def none(*_: Any) -> Any:
        raise AssertionError("not to be called")

    return Contender(name, weight_bytes, kind, none, none, none)


def row(name: str, tokens: int, seconds: float, rows: int = 100) -> dict[str, Any]:
    way = contender(name, 6000, "int8")
    found = figures(way, tokens, (rows, 80), [seconds], LIMITS)
    start = {"rows": rows, "columns": 80, "tokens": tokens, "name": name}
    return start | found | {"cold_seconds": 2 * seconds}


def test_a_small_batch_is_bound_by_bytes() -> None:
    found = figures(contender("w6a8", 10**8, "int8"), 1, (8192, 8192), [2e-4], LIMITS)
    bytes_ = 10**8 + 2 * (8192 + 8192)
    assert found["gb_per_second"] == pytest.approx(bytes_ / 2e-4 / 1e9)
    assert found["of_limit"] == pytest.approx(bytes_ / 1e12 / 2e-4)


def test_a_large_batch_is_bound_by_operations() -> None:
    way = contender("w6a8", 10**8, "int8")
    found = figures(way, 8192, (8192, 8192), [0.01], LIMITS)
    assert found["tops"] == pytest.approx(2 * 8192**3 / 0.01 / 1e12)
    assert found["of_limit"] == pytest.approx(2 * 8192**3 / 2e14 / 0.01)


def test_the_median_round_counts() -> None:
    way = contender("w6a8", 10**6, "int8")
    found = figures(way, 1, (10, 10), [3e-6, 1e-6, 2e-6], LIMITS)
    assert found["seconds"] == 2e-6 and found["spread"] == pytest.approx(0.5)


def test_ratios_are_to_bf16_of_the_same_call() -> None:
    rows = with_ratios(
        [
            *(row("bf16", 1, 4e-6), row("w6a8", 1, 2e-6), row("w6a8", 2, 2e-6)),
            *(row("bf16", 1, 9e-6, 200), row("w6a8", 1, 1e-6, 200)),
            {"rows": 100, "columns": 80, "tokens": 1, "name": "fp8", "error": "no"},
        ]
    )
    assert [r["times_bf16"] for r in rows] == [1, 2, None, 1, 9, None]
    assert ratio_to_bf16(rows, "w6a8", 1) == pytest.approx(math.sqrt(18))
    assert ratio_to_bf16(rows, "fp8", 1) is None


def test_plots_have_whole_layers_only() -> None:
    rows = [row("w6a8", 1, 2e-6), row("w6a8 product alone", 1, 1e-6)]
    assert series_of(rows, (100, 80)) == {"w6a8": [(1, pytest.approx(2.0))]}


def test_tables_and_page_show_times_and_refusals() -> None:
    rows = [row("bf16", m, m * 4e-6) for m in (1, 16)]
    rows += [row("w6a8-g128", m, m * 2e-6) for m in (1, 16)]
    refused = {"rows": 100, "columns": 80, "tokens": 1, "name": "fp8"}
    rows.append(refused | {"error": "needs compute capability 8.9"})
    data = {
        **{"kind": "kernels", "device": "a GPU", "engine": "compiled kernels"},
        "limits": {
            "bytes_per_second": 1e12,
            "operations_per_second": {"bf16": 1e14, "int8": 2e14},
        },
        **{"clocks": ["1980 MHz", None], "protocol": {}, "versions": {}},
        "rows": with_ratios(rows),
    }
    text, page = as_text(data), as_page(data)
    assert "needs compute capability 8.9" in text
    assert "100 x 80" in text and "2.00" in text
    assert page.count("<svg") >= 2 and "nvidia-smi: 1980 MHz" in page


class Stopwatch:
    """Stands in for a chain: makes each call once and takes no time."""

    def __init__(self, calls: list[Any]) -> None:
        self.results = [call() for call in calls]

    def seconds(self) -> float:
        return 1e-6


def test_all_ways_take_turns_and_refusals_are_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "Chain", Stopwatch)
    monkeypatch.setattr(kernels, "copies_of", lambda *_, **__: 2)
    monkeypatch.setattr(kernels, "cold_seconds", lambda call, *_, **__: 2e-6)
    settings = KernelSettings(((48, 256),), (1, 40), rounds=2)
    rows = kernels.shape_rows((48, 256), settings, LIMITS, torch.empty(1))
    names = [found["name"] for found in rows if found["tokens"] == 40]
    assert names == [
        *("bf16", "int8", "int8 product alone", "fp8", "fp8 product alone"),
        *("w6a8-g128", "w6a8-g128 product alone", "w6a8", "w6a8 product alone"),
    ]
    for found in rows:
        if found["name"].startswith("fp8") and "error" in found:
            continue  # not on every CPU
        assert found["times_bf16"] == 1 and found["rounds"] == [1e-6, 1e-6]
        assert found["copies"] == 2 and found["cold_seconds"] == 2e-6


@pytest.mark.parametrize("tokens", [1, 20])
def test_ways_compute_the_layer_that_they_say(tokens: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(tokens, 256).bfloat16()
    ways = {way.name: way for way in contenders(48, 256, torch.device("cpu"))}

    def run(name: str, weight: Any) -> torch.Tensor:
        return ways[name].call(weight, ways[name].inputs(x))

    codes, scale = weight = ways["int8"].weight()
    exact = x.float() @ (codes.float() * scale)
    found = run("int8", weight)[:tokens].float()
    assert (found - exact).norm() < 0.02 * exact.norm()
    for name in ("w6a8-g128", "w6a8"):
        tiles = ways[name].weight()
        values = unpack_tiles(tiles.tiles, tiles.shape).float()
        values *= tiles.scales[:, :48].t().float().repeat_interleave(tiles.group, 1)
        exact, found = x.float() @ values.t(), run(name, tiles)
        assert (found.float() - exact).norm() < 0.02 * exact.norm()
        assert torch.equal(run(f"{name} product alone", tiles), found)


@on_cpu
def test_a_cpu_is_told_what_to_do_instead() -> None:
    with pytest.raises(KernelError, match="sees no CUDA device"):
        kernels.bench_kernels(KernelSettings.quick())
    result = CliRunner().invoke(app, ["bench", "kernels", "--quick"])
    assert result.exit_code == 1
    assert "compress bench model FOLDER" in result.output


def test_quick_is_a_part_of_the_whole() -> None:
    quick, whole = KernelSettings.quick(), KernelSettings()
    assert set(quick.shapes) <= set(whole.shapes)
    assert set(quick.tokens) <= set(whole.tokens)
    assert len(whole.shapes) == len(set(whole.shapes)) == 15
