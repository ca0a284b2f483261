"""Triton's kernels against the reference, in Triton's interpreter on a CPU.

The interpreter cuts float32 to bfloat16 where a device rounds, so outputs are float32
or float16 here; ``tests/gpu`` has bfloat16.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.core.errors import KernelError
from compress.core.scheme import Scheme
from compress.core.tensors import QuantizedTensor
from compress.runtime.w6a8 import engines, fused, reference
from compress.runtime.w6a8.tiles import TiledWeight

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def calls() -> Any:
    """The module ``triton_calls``, its kernels interpreted (``tests/conftest.py``)."""
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("on a GPU kernels are compiled; tests/gpu has them")
    return importlib.import_module("compress.runtime.w6a8.triton_calls")


@pytest.fixture
def kernels(calls: Any) -> Any:
    return calls.TritonKernels()


def weight(
    rows: int, columns: int, group: int | None, seed: int = 0, bits: str = "random"
) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-32, 32, (rows, columns), generator=generator)
    if bits == "lowest":
        codes = torch.full_like(codes, -32)
    scheme = Scheme.parse("w6a8" if group is None else f"w6a8-g{group}")
    scale = 0.01 * torch.rand(rows, columns // (group or columns), generator=generator)
    return QuantizedTensor(codes.to(torch.int8), scale.bfloat16(), None, scheme)


def inputs(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("columns", "group"), [(96, 96), (160, 32), (256, 128)])
def test_codes_of_inputs_are_the_references(
    kernels: Any, columns: int, group: int, dtype: torch.dtype
) -> None:
    x = inputs(7, columns).to(dtype)
    x[1], x[2, 3], x[3, 5], x[4] = 0, math.nan, -math.inf, 1e-40
    x[5, :40] *= 1000
    codes, scales = kernels.quantize(x, group)
    expected = reference.quantize_activations(x, group)
    assert torch.equal(codes[:, :columns], expected[0])
    assert not codes[:, columns:].any()
    assert torch.equal(scales.nan_to_num(-1), expected[1].nan_to_num(-1))


def test_ties_of_inputs_are_even(kernels: Any) -> None:
    x = torch.arange(-127, 128).float()[None] / 2
    x[0, 0] = -127  # the largest: steps of one
    codes, _ = kernels.quantize(x, 255)
    assert torch.equal(codes[0, 1:255].float(), x[0, 1:].round())


@pytest.mark.parametrize("group", [None, 32, 64, 128])
@pytest.mark.parametrize("input_group", [None, 32])
@pytest.mark.parametrize("tokens", [1, 17])
def test_products_are_the_references(
    kernels: Any, group: int | None, input_group: int | None, tokens: int
) -> None:
    given, x = weight(40, 384, group), inputs(tokens, 384)
    expected = reference.quantize_activations(x, input_group)
    bias = inputs(40)
    found = kernels.linear(
        kernels.quantize(x, input_group or 384),
        TiledWeight.from_quantized(given),
        bias,
        dtype=torch.float32,
    )
    exact = reference.linear(
        expected, (given.codes, given.scale), bias, dtype=torch.float32
    )
    assert torch.allclose(found, exact, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("columns", [32, 96, 160])
def test_rows_and_columns_are_filled_up(kernels: Any, columns: int) -> None:
    given, x = weight(17, columns, 32), inputs(3, columns).half()
    found = kernels.linear(
        kernels.quantize(x, 32), TiledWeight.from_quantized(given), None, dtype=x.dtype
    )
    expected = reference.linear(
        reference.quantize_activations(x, 32),
        (given.codes, given.scale),
        None,
        dtype=x.dtype,
    )
    assert found.dtype == x.dtype
    assert torch.allclose(found, expected, rtol=2e-3, atol=1e-5)


def test_the_largest_sums_are_exact(kernels: Any) -> None:
    given = weight(16, 4096, None, bits="lowest")
    codes = torch.full((2, 4096), -127, dtype=torch.int8)
    ones = torch.ones(16, 1, dtype=torch.bfloat16)
    given = QuantizedTensor(given.codes, ones, None, given.scheme)
    found = kernels.linear(
        (codes, torch.ones(2, 1)),
        TiledWeight.from_quantized(given),
        None,
        dtype=torch.float32,
    )
    assert (found == 32 * 127 * 4096).all()


def test_columns_are_split_in_a_fixed_order(
    kernels: Any, calls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, x = weight(20, 1024, 128), inputs(2, 1024)
    tiled, coded = TiledWeight.from_quantized(given), kernels.quantize(x, 1024)
    bias = inputs(20)
    whole = kernels.linear(coded, tiled, bias, dtype=torch.float32)
    monkeypatch.setattr(calls, "shape_of", lambda *_: (32, 16, 3))
    parts = kernels.linear(coded, tiled, bias, dtype=torch.float32)
    assert torch.allclose(parts, whole, rtol=1e-5, atol=1e-5)
    assert torch.equal(kernels.linear(coded, tiled, bias, dtype=torch.float32), parts)


def test_a_bad_token_spoils_no_other(kernels: Any) -> None:
    given, x = weight(16, 128, 32), inputs(3, 128)
    x[1, 9] = math.inf
    found = kernels.linear(
        kernels.quantize(x, 128), TiledWeight.from_quantized(given), None, dtype=x.dtype
    )
    assert found[1].isnan().all() and found[[0, 2]].isfinite().all()


def test_no_tokens_give_no_rows(kernels: Any) -> None:
    tiled = TiledWeight.from_quantized(weight(16, 128, 32))
    coded = kernels.quantize(torch.zeros(0, 128), 128)
    assert kernels.linear(coded, tiled, None, dtype=torch.float16).shape == (0, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("columns", "group"), [(96, 32), (160, None)])
def test_decoded_weights_are_exact(
    kernels: Any, columns: int, group: int | None, dtype: torch.dtype
) -> None:
    given = weight(21, columns, group)
    found = kernels.decode(TiledWeight.from_quantized(given), dtype=dtype)
    assert torch.equal(found, given.dequantize().to(dtype))


@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("group", [32, 160])
def test_codes_of_norms_are_those_of_the_pair(
    kernels: Any, plus_one: bool, dtype: torch.dtype, group: int
) -> None:
    x, scale = 3 * inputs(4, 160).to(dtype), inputs(160, seed=2).to(dtype)
    found = kernels.rms_norm_quantize(x, scale, 1e-5, group, plus_one=plus_one)
    normed = fused.rms_norm(x, scale, 1e-5, plus_one=plus_one)
    check_near(found, reference.quantize_activations(normed, group))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("group", [32, 96])
def test_codes_of_activations_are_those_of_the_pair(
    kernels: Any, dtype: torch.dtype, group: int
) -> None:
    x = 3 * inputs(4, 192).to(dtype)
    gate, up = x.chunk(2, 1)
    product = torch.nn.functional.silu(gate) * up
    check_near(
        kernels.silu_mul_quantize(x, group),
        reference.quantize_activations(product, group),
    )


def check_near(
    found: tuple[torch.Tensor, torch.Tensor],
    expected: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Sums in another order move a number by its last bit, and so a code by one."""
    columns = expected[0].shape[1]
    steps = (found[0][:, :columns].int() - expected[0].int()).abs()
    assert steps.max() <= 1 and steps.float().mean() < 0.01
    assert not found[0][:, columns:].any()
    assert torch.allclose(found[1], expected[1], rtol=1e-2)


def test_the_probe_finds_wrong_numbers(
    kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels.probe(CPU)
    right = kernels.quantize
    monkeypatch.setattr(
        type(kernels), "quantize", lambda _, x, group: right(x.roll(1, 0), group)
    )
    with pytest.raises(KernelError, match=r"\[False, False, True, False\]"):
        kernels.probe(CPU)


def test_rows_longer_than_a_block_are_refused(kernels: Any) -> None:
    with pytest.raises(KernelError, match="load with fused=False"):
        kernels.silu_mul_quantize(torch.zeros(1, 2 * 70016), 70016)


def test_triton_comes_when_nothing_is_compiled(
    kernels: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engines._say_triton.cache_clear()
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(engines, "kernels_of", lambda _: KernelError("no nvcc"))
    monkeypatch.setattr(engines, "triton_kernels", lambda _: kernels)
    with caplog.at_level(logging.WARNING):
        found = [engines.engine_for(cuda, torch.bfloat16) for _ in range(2)]
    assert found == [kernels, kernels]
    assert [record.message for record in caplog.records] == [
        "W6A8 layers are computed by Triton, not by compiled code: no nvcc"
    ]


def test_both_reasons_are_said_once_where_nothing_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engines.say_slow.cache_clear()
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(engines, "kernels_of", lambda _: KernelError("no nvcc"))
    monkeypatch.setattr(
        engines, "triton_kernels", lambda _: KernelError("Triton is not installed")
    )
    with caplog.at_level(logging.WARNING):
        assert engines.engine_for(cuda, torch.bfloat16) is None
        assert engines.engine_for(cuda, torch.bfloat16) is None
    assert [record.message for record in caplog.records] == [
        "W6A8 layers are computed in plain torch, which is slow: no nvcc; in Triton: "
        "Triton is not installed"
    ]


@pytest.mark.slow
def test_kernels_compile_for_gpus_that_are_not_there(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    script = Path(__file__).parents[1] / "emulated" / "triton_compile.py"
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, str(script), "80", "90"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 20
    for name, architecture, shared, products in lines:
        assert int(shared) <= 99 * 1024  # what every GPU from Ampere on has
        assert (int(products) > 0) == (name == "linear_kernel"), architecture
