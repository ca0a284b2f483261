"""Triton's kernels, fused models and graphs of generation on a CUDA device.

Run with ``pytest -m gpu`` on a machine with a CUDA device.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from export_fixtures import linears, make_artifact

import compress
from compress.bench.decoding import Generator
from compress.bench.kernels import KernelSettings, bench_kernels
from compress.bench.model import ModelSettings, bench_model
from compress.core.errors import KernelError
from compress.core.scheme import Scheme
from compress.core.tensors import QuantizedTensor
from compress.export.safetensors import SafetensorsExporter, SafetensorsOptions
from compress.runtime.w6a8 import engines, fused, ops, reference
from compress.runtime.w6a8.tiles import TiledWeight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def kernels() -> Any:
    found = engines.triton_kernels(torch.cuda.current_device())
    if isinstance(found, KernelError):
        pytest.skip(str(found))
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    artifact = make_artifact(linears("w6a8-g64"), dtype="bfloat16", hidden=128)
    SafetensorsExporter(SafetensorsOptions()).write(artifact, tmp_path)
    return tmp_path


def inputs(*shape: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to("cuda")


def weight(rows: int, columns: int, group: int | None) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-32, 32, (rows, columns), generator=generator)
    scheme = Scheme.parse("w6a8" if group is None else f"w6a8-g{group}")
    scale = 0.01 * torch.rand(rows, columns // (group or columns), generator=generator)
    scale = scale.bfloat16().to("cuda")
    return QuantizedTensor(codes.to(torch.int8).to("cuda"), scale, None, scheme)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "group"), [(576, 576), (4096, 128), (11008, 32)])
def test_codes_of_inputs_are_the_references(
    kernels: Any, columns: int, group: int, dtype: torch.dtype
) -> None:
    x = inputs(33, columns).to(dtype)
    x[1], x[2, 3], x[3, 5], x[4] = 0, math.nan, -math.inf, 1e-40
    codes, scales = kernels.quantize(x, group)
    expected = reference.quantize_activations(x, group)
    assert torch.equal(codes[:, :columns], expected[0])
    assert not codes[:, columns:].any()
    assert torch.equal(scales.nan_to_num(-1), expected[1].nan_to_num(-1))


@pytest.mark.parametrize("group", [None, 32, 128])
@pytest.mark.parametrize("tokens", [1, 16, 33, 64, 300])
def test_products_are_the_references(
    kernels: Any, group: int | None, tokens: int
) -> None:
    given, x = weight(1000, 4096, group), inputs(tokens, 4096)
    bias = inputs(1000)
    tiled, coded = TiledWeight.from_quantized(given), kernels.quantize(x, 4096)
    found = kernels.linear(coded, tiled, bias, dtype=torch.float32)
    exact = reference.linear(
        reference.quantize_activations(x, None),
        (given.codes, given.scale),
        bias,
        dtype=torch.float32,
    )
    assert torch.allclose(found, exact, rtol=1e-4, atol=1e-3)
    again = kernels.linear(coded, tiled, bias, dtype=torch.float32)
    assert torch.equal(found, again)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoded_weights_are_exact(kernels: Any, dtype: torch.dtype) -> None:
    given = weight(1000, 576, 32)
    found = kernels.decode(TiledWeight.from_quantized(given), dtype=dtype)
    assert torch.equal(found, given.dequantize().to(dtype))


@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("group", [64, 4096])
def test_codes_of_norms_and_activations_are_near_the_pairs(
    kernels: Any, plus_one: bool, group: int
) -> None:
    x, scale = 3 * inputs(9, 4096).bfloat16(), inputs(4096, seed=2).bfloat16()
    normed = fused.rms_norm(x, scale, 1e-5, plus_one=plus_one)
    gate, up = inputs(9, 8192).bfloat16().chunk(2, 1)
    pairs = [
        (fused.rms_norm_quant(x, scale, 1e-5, plus_one, group), normed),
        (
            fused.silu_mul_quant(torch.cat([gate, up], 1), group),
            torch.nn.functional.silu(gate) * up,
        ),
    ]
    for (codes, scales), values in pairs:
        expected = ops.quant_act(values, group)
        steps = (codes.int() - expected[0].int()).abs()
        assert steps.max() <= 2 and steps.float().mean() < 0.02
        assert torch.allclose(scales, expected[1], rtol=1e-2)


def test_a_fused_model_is_near_the_single_layers(folder: Path) -> None:
    ids = torch.arange(12, device="cuda")[None]
    single, together = (
        compress.load(
            folder, dtype=torch.bfloat16, device="cuda", as_served=True, fused=fused_
        )
        for fused_ in (False, True)
    )
    with torch.inference_mode():
        expected, found = single(ids).logits, together(ids).logits
    assert (found - expected).norm() <= 0.05 * expected.norm()


def test_generation_in_graphs_is_that_without(folder: Path) -> None:
    model = compress.load(folder, dtype=torch.bfloat16, device="cuda", as_served=True)
    prompt = torch.arange(14, device="cuda").view(2, 7) + 3
    found = []
    with torch.inference_mode():
        for captured in (False, True):
            generator = Generator(model, prompt, 6)
            generator.prefill()
            if captured:
                generator.capture()
                assert generator.is_captured, generator.refusal
                generator.prefill()
            tokens = [generator.ids.clone()]
            for _ in range(5):
                generator.step()
                tokens.append(generator.ids.clone())
            found.append(torch.cat(tokens, 1))
    assert torch.equal(*found)


def test_the_benchmarks_run(folder: Path) -> None:
    settings = KernelSettings(((1024, 512),), (1, 40), rounds=1, cold_calls=3)
    rows = bench_kernels(settings)["rows"]
    ours = [row for row in rows if row["name"].startswith("w6a8")]
    assert ours and all(row.get("seconds", 0) > 0 for row in ours), rows
    numbers: Any = dict(new_tokens=4, runs=2, warm_up=1, idle_seconds=0.2)
    sizes: Any = dict(batches=(1, 2), prefill_tokens=32, context_tokens=8)
    asked = ModelSettings(folder, device="cuda", **sizes, **numbers)
    outcome = bench_model(asked, apart=False)
    assert [way["way"] for way in outcome["ways"]] == ["dense", "int8", "served"]
    for way in outcome["ways"]:
        assert all(found["cuda_graph"] for found in way["requests"]), way
