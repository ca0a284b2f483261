"""W6A8 layers on a CUDA device; ``benchmarks/w6a8/check.py`` does the exhaustive part.

Run with ``pytest -m gpu`` on a machine with a CUDA device and nvcc.
"""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from export_fixtures import linears, make_artifact

import compress
from compress.core.scheme import Scheme
from compress.core.tensors import QuantizedTensor
from compress.export.safetensors import SafetensorsExporter, SafetensorsOptions
from compress.runtime.w6a8 import engines
from compress.runtime.w6a8.abi import Kernels
from compress.runtime.w6a8.linear import W6A8Linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def kernels() -> None:
    found = engines.available(torch.device("cuda"), torch.bfloat16)
    if not isinstance(found, Kernels):
        pytest.skip(str(found))


def layer(scheme: str, rows: int, columns: int) -> W6A8Linear:
    parsed = Scheme.parse(scheme)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-32, 32, (rows, columns), generator=generator)
    groups = columns // parsed.group_of(columns)
    scale = torch.rand(rows, groups, generator=generator).half() * 0.01
    tensor = QuantizedTensor(codes.to(torch.int8), scale, None, parsed)
    return W6A8Linear(tensor, torch.randn(rows, generator=generator))


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("scheme", ["w6a8-g32", "w6a8-g128", "w6a8-g64-group"])
@pytest.mark.parametrize("tokens", [0, 1, 9, 70])
def test_a_layer_is_that_of_the_cpu(
    scheme: str, tokens: int, caplog: pytest.LogCaptureFixture
) -> None:
    module, x = layer(scheme, 1000, 1024), inputs(2, tokens, 1024)
    expected = module(x)
    engines.say_slow.cache_clear()
    caplog.clear()  # of what the CPU's pass said
    with caplog.at_level(logging.WARNING):
        found = module.to("cuda")(x.to("cuda")).cpu()
    assert caplog.records == []  # the kernels ran
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-3)


def test_other_strides_are_the_same_numbers() -> None:
    module, x = layer("w6a8-g128", 64, 256).to("cuda"), inputs(256, 6).to("cuda")
    assert torch.equal(module(x.t()), module(x.t().contiguous()))


def test_compiled_and_captured_it_is_the_same() -> None:
    module = layer("w6a8-g128", 256, 512).to("cuda", torch.bfloat16)
    x = inputs(3, 512).to("cuda", torch.bfloat16)
    expected = module(x)
    compiled = torch.compile(module, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):  # the third call replays a graph
        assert torch.equal(compiled(x), expected)


def test_a_folder_generates_the_same_tokens_as_on_the_cpu(tmp_path: Path) -> None:
    artifact = make_artifact(linears("w6a8-g64"), dtype="bfloat16", hidden=128)
    SafetensorsExporter(SafetensorsOptions()).write(artifact, tmp_path)
    ids = torch.arange(12)[None]
    on_cpu = compress.load(tmp_path, as_served=True)
    on_gpu = compress.load(tmp_path, as_served=True, device="cuda")
    with torch.inference_mode():
        expected, found = on_cpu(ids).logits, on_gpu(ids.to("cuda")).logits.cpu()
    # The device's own float32 arithmetic moves inputs over ties of their rounding.
    assert (found - expected).norm() <= 0.02 * expected.norm()
