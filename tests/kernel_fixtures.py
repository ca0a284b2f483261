"""The W6A8 kernels' source compiled for a CPU, and what their tests share."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compress.core.scheme import Scheme
from compress.core.tensors import QuantizedTensor
from compress.runtime.w6a8 import reference
from compress.runtime.w6a8.arguments import Values
from compress.runtime.w6a8.build import SOURCES
from compress.runtime.w6a8.fused import rms_norm
from compress.runtime.w6a8.tiles import TiledWeight

EMULATED = Path(__file__).parent / "emulated"


@cache
def emulated_kernels() -> ctypes.CDLL:
    """Compile and open them, or skip the test."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.so"
        command = ["g++", "-O1", "-std=c++17", "-shared", "-fPIC"]
        command += ["-Wno-unknown-pragmas", f"-I{EMULATED}", f"-I{SOURCES}"]
        done = subprocess.run(
            [*command, "-o", str(path), str(EMULATED / "w6a8_emulated.cpp")],
            capture_output=True,
            text=True,
        )
        if "_Float16" in done.stderr:
            pytest.skip("this g++ has no _Float16")
        assert done.returncode == 0, done.stderr
        return ctypes.CDLL(str(path))


def weight(n: int, k: int, group: int | None, dtype: str = "float16") -> TiledWeight:
    generator = torch.Generator().manual_seed(n + k)
    codes = torch.randint(-32, 32, (n, k), generator=generator).to(torch.int8)
    scale = torch.rand(n, k // (group or k), generator=generator) * 0.01 + 0.001
    scheme = Scheme(6, group, scale_dtype=dtype)
    stored = scale.to(getattr(torch, dtype))
    return TiledWeight.from_quantized(QuantizedTensor(codes, stored, None, scheme))


def codes_of(weight: TiledWeight) -> tuple[Tensor, Tensor]:
    group = weight.group if weight.group < weight.shape[1] else None
    dtype = str(weight.scales.dtype).removeprefix("torch.")
    tensor = weight.quantized(Scheme(6, group, scale_dtype=dtype))
    return tensor.codes, tensor.scale


def padded(codes: Tensor) -> Tensor:
    return torch.nn.functional.pad(codes, (0, -codes.shape[1] % 128))


def check(
    found: Tensor,
    given: tuple[Tensor, Tensor],
    weight: TiledWeight,
    bias: Tensor | None = None,
) -> None:
    """Within the rounding of the result and 1e-5 of the sum of all magnitudes."""
    qw, sw = codes_of(weight)
    exact = reference.linear(given, (qw, sw), bias, dtype=torch.float32)
    magnitude = reference.linear(
        (given[0].abs(), given[1].abs()), (qw.abs(), sw.abs()), None, dtype=exact.dtype
    )
    ulp = torch.finfo(found.dtype).eps * exact.abs()
    assert bool(((found.float() - exact).abs() <= 1e-5 * magnitude + 2 * ulp).all())


def values_of(kind: str, rows: int, columns: int, dtype: torch.dtype) -> Values:
    """Inputs of every size, and a norm that is not far from one."""
    generator = torch.Generator().manual_seed(columns)
    width = 2 * columns if kind == "gated" else columns
    x = 2 * torch.randn(rows, width, generator=generator)
    norm = 1 + 0.1 * torch.randn(columns, generator=generator)
    given = norm.to(dtype) if kind.startswith("norm") else None
    return Values(x.to(dtype), kind, given, 1e-5)


def exact_of(values: Values) -> Tensor:
    """What is rounded, as plain torch computes it."""
    x = values.inputs
    if values.kind == "gated":
        gate, up = x.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up
    if values.norm is None:
        return x
    plus_one = values.kind == "norm_plus_one"
    return rms_norm(x, values.norm, values.epsilon, plus_one=plus_one)
