"""What the scaling transforms choose, against their formulas and a slow search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transforms_fixtures import WINDOWS, apply, chain_of, model_of, plan_of

from compress.core.plan import Plan
from compress.core.scheme import Scheme
from compress.quantizers.rtn import RoundToNearest
from compress.transforms.awq import AWQ, AWQOptions, output_error
from compress.transforms.contract import Inputs, Reader
from compress.transforms.places import Place, storable
from compress.transforms.scale_folding import ScaleFolding, ScaleFoldingOptions
from compress.transforms.smoothquant import SmoothQuant, SmoothQuantOptions

NORM = Place("norm", "input_layernorm", ("a", "b"), "attention", 64)
HEADS = Place("value", "v", ("o",), "attention_output", 32, width=16, repeats=2)


def inputs_of(tokens: int = 500, columns: int = 64) -> tuple[Inputs, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, columns, generator=generator)
    x *= torch.exp(1.5 * torch.randn(columns, generator=generator))
    return Inputs(x.abs().mean(0), x.abs().amax(0), 2 * x.T @ x), x


def weight_of(rows: int = 24, seed: int = 3) -> Tensor:
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed))


def scheme_of(name: str) -> Scheme:
    return Scheme.parse(name).with_scales("float32")


@pytest.mark.parametrize("power", [None, 0.5, 0.3])
def test_scale_folding_is_its_formula(power: float | None) -> None:
    inputs, x = inputs_of()
    options = {} if power is None else {"power": power}
    made = ScaleFolding(ScaleFoldingOptions.model_validate(options))
    scale = made.choose(NORM, inputs, []).scale
    spans = x.abs().amax(0) ** (power or 0.5)  # RAMP's is the square root
    assert scale is not None and torch.allclose(scale, spans / spans.mean())


def test_a_channel_that_is_never_fed_keeps_a_positive_scale() -> None:
    inputs, _ = inputs_of()
    inputs.largest[3] = 0
    folded = ScaleFolding().choose(NORM, inputs, []).scale
    assert folded is not None and float(folded.min()) > 0
    inputs.largest.zero_()
    assert ScaleFolding().choose(NORM, inputs, []).scale is None


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_smoothquant_is_its_formula(alpha: float) -> None:
    inputs, x = inputs_of()
    weights = [weight_of(), weight_of(8, 4)]
    readers = [Reader(weight, None) for weight in weights]
    made = SmoothQuant(SmoothQuantOptions(alpha=alpha))
    scale = made.choose(NORM, inputs, readers).scale
    rows = torch.cat(weights).abs().amax(0)
    expected = x.abs().amax(0) ** alpha / rows ** (1 - alpha)
    assert scale is not None and torch.allclose(scale, expected, rtol=1e-5)


def test_with_alpha_one_half_both_ranges_are_equal() -> None:
    inputs, x = inputs_of()
    weight = weight_of()
    even = SmoothQuant(SmoothQuant.Options(alpha=0.5))
    scale = even.choose(NORM, inputs, [Reader(weight, None)]).scale
    assert scale is not None
    left, right = (x / scale).abs().amax(0), (weight * scale).abs().amax(0)
    assert torch.allclose(left, right, rtol=1e-4)


@pytest.mark.parametrize("scheme", ["int4-g32", "int3-g16-asym", "fp4-g32", "mxfp4"])
def test_the_error_is_that_of_the_rounded_layer(scheme: str) -> None:
    inputs, x = inputs_of()
    weight, grid = weight_of(), scheme_of(scheme)
    scale = torch.exp(0.3 * weight_of(1, 9)[0])
    coded = RoundToNearest().quantize(weight * scale, grid, None).dequantize()
    outputs = x @ (coded / scale - weight).T
    expected = 2 * float(outputs.square().sum())
    assert inputs.hessian is not None
    found = output_error([(weight, grid)], scale, inputs.hessian)
    assert found == pytest.approx(expected, rel=1e-3)


def slow_search(x: Tensor, weights: list[Tensor], grid: Scheme, steps: int) -> float:
    """Return the least output error over all candidates of the paper's search."""

    def loss(scale: Tensor) -> float:
        total = 0.0
        for weight in weights:
            coded = RoundToNearest().quantize(weight * scale, grid, None).dequantize()
            total += 2 * float((x @ (coded / scale - weight).T).square().sum())
        return total

    fed = x.abs().mean(0)
    size = grid.group_of(64)
    relative = []
    for weight in weights:
        for row in weight.abs():
            parts = row.view(-1, size)
            relative.append((parts / parts.amax(1, keepdim=True)).flatten())
    share = torch.stack(relative).mean(0)
    losses = [loss(torch.ones(64))]
    for i in range(steps):
        alpha = i / steps
        for scale in (fed**alpha, fed**alpha / (share ** (1 - alpha) + 1e-4)):
            bounded = scale.clamp(min=1e-4)
            losses.append(loss(bounded / (bounded.max() * bounded.min()).sqrt()))
    return min(losses)


@pytest.mark.parametrize("scheme", ["int4-g32", "int3-g16", "fp4-g32"])
def test_awq_finds_what_a_slow_search_finds(scheme: str) -> None:
    inputs, x = inputs_of()
    grid, weights = scheme_of(scheme), [weight_of(), weight_of(8, 4)]
    readers = [Reader(weight, grid) for weight in weights]
    choice = AWQ(AWQOptions(steps=10)).choose(NORM, inputs, readers)
    assert choice.scale is not None and inputs.hessian is not None
    coded = [(weight, grid) for weight in weights]
    found = output_error(coded, choice.scale, inputs.hessian)
    assert found == pytest.approx(slow_search(x, weights, grid, 10), rel=1e-3)
    start = output_error(coded, torch.ones(64), inputs.hessian)
    assert choice.facts["gain"] == pytest.approx(1 - found / start, rel=1e-6)
    assert 0 < choice.facts["gain"] < 1


def test_a_place_that_gains_nothing_is_left_alone() -> None:
    inputs, x = inputs_of()
    grid = scheme_of("int8-g32")
    steps = torch.randint(-127, 128, (24, 64), generator=torch.Generator()).float()
    steps.view(24, 2, 32)[:, :, 0] = 127.5  # on the grid already: no error at all
    choice = AWQ().choose(NORM, inputs, [Reader(steps, grid)])
    assert choice.scale is None
    assert (choice.facts["alpha"], choice.facts["gain"]) == (0.0, 0.0)


def test_dense_layers_do_not_count_but_a_place_without_codes_is_skipped() -> None:
    inputs, _ = inputs_of()
    grid = scheme_of("int4-g32")
    alone = AWQ().choose(NORM, inputs, [Reader(weight_of(), grid)])
    both = [Reader(weight_of(), grid), Reader(weight_of(8, 4), None)]
    beside = AWQ().choose(NORM, inputs, both)
    assert alone.scale is not None and beside.scale is not None
    assert torch.equal(alone.scale, beside.scale)
    assert AWQ().choose(NORM, inputs, both[1:]).scale is None


def test_heads_that_share_values_get_one_scale() -> None:
    inputs, x = inputs_of()
    scale = ScaleFolding().choose(HEADS, inputs, []).scale
    largest = x.abs().amax(0).view(2, 2, 16).amax(1).flatten()
    assert scale is not None and scale.shape == (32,)
    assert torch.allclose(scale, (largest.sqrt() / largest.sqrt().mean()))
    assert HEADS.spread(torch.arange(32.0)).tolist() == [
        *range(16),
        *range(16),
        *range(16, 32),
        *range(16, 32),
    ]


@pytest.mark.parametrize("offset", [0, 1])
def test_what_is_stored_times_the_scale_is_the_gain(offset: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(200, generator=generator)
    weight[:3] = torch.tensor([0.0, -offset, 1e-30])
    weight = weight.bfloat16().float()  # as a checkpoint has it
    wanted = torch.exp(torch.randn(200, generator=generator))
    scale = storable(wanted, weight, offset=offset, dtype=torch.bfloat16)
    stored = ((weight + offset) / scale - offset).bfloat16().float()
    assert torch.allclose(scale * (stored + offset), weight + offset, rtol=1e-6)
    assert float(scale.min()) > 0
    # Half a unit of what is stored, beside what it is stored with.
    error = (wanted - scale).abs() * (stored + offset).abs() / wanted
    moved = scale != 1  # those that no stored number could express are left
    assert bool((error <= 2.0**-8 * stored.abs() * 1.01)[moved].all())
    assert int(moved.sum()) > 190


def measured(folder: Path, **options: Any) -> list[dict[str, Any]]:
    _, description, source = model_of("llama")
    chain = chain_of("awq", steps=5, **options)
    _, made = apply(chain, description, source, folder)
    return list(made.reports[0]["places"])


def test_scales_are_kept_in_the_work_directory(tmp_path: Path) -> None:
    _, description, source = model_of("llama")
    chain = chain_of("scale_folding", "awq", steps=5)
    _, first = apply(chain, description, source, tmp_path)
    name = "model.layers.1.mlp.gate_proj.weight"
    values = first.source.read(name)
    stamp = (tmp_path / "transforms.safetensors").stat().st_mtime_ns
    source.reads.clear()
    _, second = apply(chain, description, source, tmp_path)
    assert source.reads == []  # nothing is measured again
    assert (tmp_path / "transforms.safetensors").stat().st_mtime_ns == stamp
    assert torch.equal(second.source.read(name), values)
    assert second.reports == first.reports


def test_a_later_transform_sees_what_the_earlier_made(tmp_path: Path) -> None:
    alone = measured(tmp_path / "a")
    _, description, source = model_of("llama")
    chain = chain_of("rotation", "awq", steps=5)
    _, made = apply(chain, description, source, tmp_path / "b")
    assert [p["gain"] for p in made.reports[1]["places"]] != [p["gain"] for p in alone]


def test_places_can_be_chosen(tmp_path: Path) -> None:
    kinds = {place["kind"] for place in measured(tmp_path, places=("value",))}
    assert kinds == {"value"}


def test_only_one_block_is_read_at_a_time(tmp_path: Path) -> None:
    _, description, source = model_of("llama")
    apply(chain_of("awq", steps=2), description, source, tmp_path)
    inside = [name for name in source.reads if ".layers." in name]
    assert sorted(inside) == sorted(n for n in source.state if ".layers." in n)
    assert WINDOWS.shape[0] > 1  # whatever the number of windows


def test_a_plan_without_codes_leaves_awq_nothing_to_do(tmp_path: Path) -> None:
    _, description, source = model_of("llama")
    empty = Plan("tiny", {})
    _, made = apply(chain_of("awq"), description, source, tmp_path, empty)
    assert not any(place["changed"] for place in made.reports[0]["places"])
    assert plan_of(description).layers
