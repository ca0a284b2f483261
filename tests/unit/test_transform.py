"""Carrying out a plan, against the same done slowly with a whole transformers model."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from export_fixtures import StateDictSource
from model_fixtures import random_model
from pipeline_fixtures import windows
from torch import Tensor

from compress.config.schema import QuantizeSection
from compress.core.artifact import ModelDescription, TensorInfo
from compress.core.errors import CalibrationError, CheckpointError
from compress.core.statistics import LayerStatistics
from compress.core.tensors import QuantizedTensor
from compress.model import states
from compress.planning.planner import make_plan
from compress.quantizers.gptq import GPTQ, GPTQOptions
from compress.quantizers.rtn import RoundToNearest
from compress.transform import CompressedSource, PlanRunner, part_of_layer
from compress.workdir import WorkDir

WINDOWS = windows(6, 24)


def runner_of(
    folder: Path,
    model: ModelDescription,
    source: StateDictSource,
    *,
    drift: float = 0.0,
    propagate: str = "quantized",
    dtype: torch.dtype = torch.float32,
    **section: Any,
) -> PlanRunner:
    methods = {"gptq": GPTQ(GPTQOptions(drift=drift)), "rtn": RoundToNearest()}
    checked = QuantizeSection.model_validate({"scheme": "int4-g32", **section})
    plan = make_plan(
        checked, model, scale_dtype="float32", quantizer=methods.__getitem__
    )
    work = WorkDir(folder)
    return PlanRunner(
        model, source, plan, methods, work, propagate=propagate, dtype=dtype
    )


def codes_of(runner: PlanRunner, layer: str) -> QuantizedTensor:
    part = part_of_layer(layer, runner.description)
    return runner.workdir.read_layer(part, layer)


def input_of(model: Any, layer: str) -> Tensor:
    """Return the inputs ``[n, C]`` of a layer for all windows."""
    seen: list[Tensor] = []
    hook = model.get_submodule(layer).register_forward_pre_hook(
        lambda _module, args: seen.append(args[0].detach())
    )
    with torch.no_grad():
        for window in WINDOWS:
            model(window[None])
    hook.remove()
    return torch.cat([x.flatten(0, -2) for x in seen])


def slowly(
    model: Any,
    description: ModelDescription,
    *,
    drift: float,
    fed_back: Callable[[str], QuantizedTensor] | None,
) -> dict[str, QuantizedTensor]:
    """Quantize group by group, running the whole model anew for each shared input.

    What later groups see of a layer are the codes that ``fed_back`` gives, so that a
    weight that tips somewhere has no followers elsewhere; ``None`` leaves it dense.
    """
    dense, family = copy.deepcopy(model), description.family
    quantizer, found = GPTQ(GPTQOptions(drift=drift)), {}
    scheme = QuantizeSection.model_validate({"scheme": "int4-g32"}).scheme
    from compress.core.scheme import Scheme

    grid = Scheme.parse(scheme).with_scales("float32")
    for index in range(description.block_count):
        for shared in dict.fromkeys(linear.input for linear in family.linears):
            names = [
                f"{family.block(index)}.{linear.path}"
                for linear in family.linears
                if linear.input == shared
            ]
            x = input_of(model, names[0])
            y = input_of(dense, names[0])
            moved = 2 * (y - x).T @ x if drift else None
            statistics = LayerStatistics(2 * x.T @ x, len(x), moved)
            for name in names:
                weight = model.get_submodule(name).weight
                found[name] = quantizer.quantize(weight.detach(), grid, statistics)
                if fed_back is not None:
                    weight.data = fed_back(name).dequantize()
    return found


@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3"])
@pytest.mark.parametrize(
    ("propagate", "drift"), [("fp", 0.0), ("quantized", 0.0), ("quantized", 0.5)]
)
def test_one_pass_gives_what_many_give(
    kind: str, propagate: str, drift: float, tmp_path: Path
) -> None:
    model, description, source = random_model(kind)
    runner = runner_of(tmp_path, description, source, drift=drift, propagate=propagate)
    runner.run(WINDOWS)
    fed_back = partial(codes_of, runner) if propagate == "quantized" else None
    expected = slowly(model, description, drift=drift, fed_back=fed_back)
    assert list(expected) == list(runner.plan.layers)
    for name, other in expected.items():
        found = codes_of(runner, name)
        # Sums in another order tip a weight between two codes now and then, and what
        # follows in its row with it.
        assert float((found.codes != other.codes).float().mean()) < 0.02, name
        # A group whose ends are alike may have either sign, with its codes mirrored.
        assert torch.allclose(found.scale.abs(), other.scale.abs(), rtol=0.06), name


def test_the_dense_model_runs_beside_only_where_drift_is_corrected(
    tmp_path: Path,
) -> None:
    _, description, source = random_model()

    def needs(**options: Any) -> bool:
        return runner_of(tmp_path, description, source, **options).needs_drift

    assert needs(drift=0.5)
    assert not needs(drift=0.0)
    assert not needs(drift=0.5, propagate="fp")
    assert not needs(drift=0.5, method="rtn")


def test_rounding_needs_no_data_and_reads_only_its_layers(tmp_path: Path) -> None:
    _, description, source = random_model()
    runner = runner_of(tmp_path, description, source, method="rtn")
    assert not runner.needs_calibration
    runner.run(None)
    assert source.reads == [f"{name}.weight" for name in runner.plan.layers]


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_that_are_there_are_not_computed_again(
    bounded: bool,
    dtype: torch.dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if bounded:
        monkeypatch.setitem(states._BATCH_BYTES, "cpu", 1)
    _, description, source = random_model()
    runner_of(tmp_path, description, source, drift=0.5, dtype=dtype).run(WINDOWS)
    blocks = sorted((tmp_path / "blocks").iterdir())
    first = [path.read_bytes() for path in blocks]
    blocks[-1].unlink()
    kept = blocks[0].stat().st_mtime_ns
    runner_of(tmp_path, description, source, drift=0.5, dtype=dtype).run(WINDOWS)
    assert blocks[0].stat().st_mtime_ns == kept
    again = codes_bytes(blocks[-1])
    blocks[-1].write_bytes(first[-1])
    assert again == codes_bytes(blocks[-1])


def codes_bytes(path: Path) -> dict[str, bytes]:
    from safetensors.torch import load_file

    return {k: v.contiguous().numpy().tobytes() for k, v in load_file(path).items()}


def test_a_dense_layer_is_left_alone_and_others_see_it(tmp_path: Path) -> None:
    _, description, source = random_model()
    dense = "model.layers.0.mlp.gate_proj"
    runner = runner_of(
        tmp_path, description, source, overrides={dense: {"scheme": "dense"}}
    )
    runner.run(WINDOWS)
    view = CompressedSource(source, runner.plan, lambda n: codes_of(runner, n))
    assert torch.equal(view.read(f"{dense}.weight"), source.state[f"{dense}.weight"])
    up = "model.layers.0.mlp.up_proj"
    assert torch.equal(view.read(f"{up}.weight"), codes_of(runner, up).dequantize())
    assert view.tensors() == source.tensors()


def test_methods_can_be_mixed_inside_a_block(tmp_path: Path) -> None:
    _, description, source = random_model()
    runner = runner_of(
        tmp_path, description, source, overrides={r"re:.*\.mlp\.": {"method": "rtn"}}
    )
    runner.run(WINDOWS)
    name = "model.layers.1.mlp.down_proj"
    plain = RoundToNearest().quantize(
        source.state[f"{name}.weight"], runner.plan.layers[name].scheme, None
    )
    assert torch.equal(codes_of(runner, name).codes, plain.codes)
    record = runner.workdir.records("0001")[name]
    assert record["error"] is not None  # statistics were at hand


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_weights_that_are_not_finite_stop_the_run(method: str, tmp_path: Path) -> None:
    _, description, source = random_model()
    name = "model.layers.1.mlp.up_proj.weight"
    source.state[name][3, 4] = float("nan")
    runner = runner_of(tmp_path, description, source, method=method)
    with pytest.raises(CheckpointError, match=f"{name} has 1 NaN"):
        runner.run(WINDOWS if method == "gptq" else None)


def test_activations_that_overflow_name_the_layer(tmp_path: Path) -> None:
    _, description, source = random_model()
    source.state["model.layers.0.mlp.down_proj.weight"].fill_(3e38)
    runner = runner_of(tmp_path, description, source, propagate="fp")
    with pytest.raises(
        CalibrationError, match=r"inputs of model\.layers\.1\.self_attn"
    ):
        runner.run(WINDOWS)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_bfloat16_arithmetic_changes_little(
    stored: torch.dtype, tmp_path: Path
) -> None:
    _, description, source = random_model()
    for name, tensor in source.state.items():
        source.state[name] = tensor.to(stored)
    kind = str(stored).removeprefix("torch.")
    infos = {n: TensorInfo(i.shape, kind) for n, i in description.tensors.items()}
    description = dataclasses.replace(description, tensors=infos, dtype=kind)
    errors = []
    for dtype in (torch.float32, torch.bfloat16):
        folder = tmp_path / str(dtype)
        runner = runner_of(folder, description, source, drift=0.5, dtype=dtype)
        runner.run(WINDOWS)
        record = runner.workdir.records("0000")["model.layers.0.mlp.down_proj"]
        weight = source.state["model.layers.0.mlp.down_proj.weight"].float()
        values = codes_of(runner, "model.layers.0.mlp.down_proj").dequantize()
        plain = float((weight - values).square().sum() / weight.square().sum())
        # What is recorded is the distance to the weight as stored, not as rounded.
        assert record["weight_error"] == pytest.approx(plain, rel=1e-5)
        errors.append(
            [
                row["error"]
                for i in "01"
                for row in runner.workdir.records(f"000{i}").values()
            ]
        )
    found = torch.tensor(errors)
    # Inputs are off by 2^-9 of their size; errors are squares of a few percent.
    assert torch.allclose(found[1], found[0], rtol=0.2)


def test_stacked_layers_get_the_codes_of_separate_ones(tmp_path: Path) -> None:
    _, description, source = random_model()
    stacked = runner_of(tmp_path / "stacked", description, source, drift=0.5)
    stacked.run(WINDOWS)
    apart = runner_of(tmp_path / "apart", description, source, drift=0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.parts._stacks", lambda _layer: False)
        apart.run(WINDOWS)
    for name in stacked.plan.layers:
        assert torch.equal(codes_of(stacked, name).codes, codes_of(apart, name).codes)
        assert torch.equal(codes_of(stacked, name).scale, codes_of(apart, name).scale)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_layers_that_a_runtime_fuses_share_the_scale_of_a_matrix(
    method: str, tmp_path: Path
) -> None:
    _, description, source = random_model()
    runner = runner_of(tmp_path, description, source, method=method, scheme="nvfp4")
    runner.run(WINDOWS if method == "gptq" else None)
    outer = [
        float(codes_of(runner, f"model.layers.0.{path}").outer)
        for path in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj")
    ]
    assert outer[0] == outer[1] != outer[2]
