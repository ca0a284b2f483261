"""What every registered quantizer that makes tables of its own has to return."""

from __future__ import annotations

import pytest
import torch

from compress import registry
from compress.core.contracts import Quantizer
from compress.core.scheme import Scheme
from compress.core.statistics import LayerStatistics

ROWS, COLUMNS = 48, 128
SCHEMES = ("aqlm-1x4g4", "aqlm-2x3g8")
MAKERS = [
    name
    for name in registry.names("quantizers")
    if registry.get_quantizer(name)().supports(Scheme.parse(SCHEMES[0]))
]


@pytest.fixture(params=MAKERS)
def quantizer(request: pytest.FixtureRequest) -> Quantizer:
    return registry.get_quantizer(request.param)()


def test_a_quantizer_makes_tables() -> None:
    assert "aqlm" in MAKERS


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", SCHEMES)
def test_codes_and_tables_have_the_types_of_the_scheme(
    quantizer: Quantizer, name: str, dtype: str
) -> None:
    scheme = Scheme.parse(name).with_scales(dtype)
    book = scheme.codebook
    assert book is not None
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    weight[0] = 0
    inputs = torch.randn(300, COLUMNS, generator=torch.Generator().manual_seed(1))
    statistics = LayerStatistics(2 * inputs.T @ inputs, 300)
    coded = quantizer.quantize(weight, scheme, statistics)
    stored = getattr(torch, dtype)
    assert coded.scheme == scheme and coded.shape == (ROWS, COLUMNS)
    assert coded.codes.dtype == torch.uint8
    assert int(coded.codes.max()) < 1 << scheme.bits
    assert (coded.scale.dtype, coded.scale.shape) == (stored, (ROWS, 1))
    assert coded.tables is not None and coded.tables.dtype == stored
    assert coded.tables.shape == (1, book.count, 1 << scheme.bits, book.vector)
    assert coded.scale.isfinite().all() and coded.dequantize().isfinite().all()
    assert float(coded.dequantize()[0].abs().max()) < 1e-6
    assert coded.zero is None and coded.outer is None and coded.low_rank is None
