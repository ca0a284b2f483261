"""What every registered quantizer that makes tables of its own has to return."""

from __future__ import annotations

import pytest
import torch

from compress import registry
from compress.core.codebooks import from_stored
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
    if not quantizer.supports(scheme):
        pytest.skip(f"{quantizer.name} does not do {name}")
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


PALETTES = (
    *("palette2", "palette3-r1", "palette4-tensor", "palette3-r32", "palette3-scaled"),
    *("palette-2x6", "palette-4x8-r24", "palette-2x9"),
)


@pytest.mark.parametrize("name", PALETTES)
def test_palettes_have_the_shapes_of_the_scheme(name: str) -> None:
    scheme = Scheme.parse(name)
    book = scheme.codebook
    assert book is not None
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    inputs = torch.randn(300, COLUMNS, generator=torch.Generator().manual_seed(1))
    statistics = LayerStatistics(2 * inputs.T @ inputs, 300)
    coded = registry.get_quantizer("kmeans")().quantize(weight, scheme, statistics)
    runs = -(-ROWS // scheme.rows_of_scale(ROWS))
    assert coded.scheme == scheme and coded.shape == (ROWS, COLUMNS)
    assert coded.tables is not None and coded.tables.dtype == torch.float16
    assert coded.tables.shape == (runs, 1, 1 << scheme.bits, book.vector)
    assert coded.codes.dtype == (torch.uint8 if scheme.bits <= 8 else torch.int16)
    assert int(from_stored(coded.codes).max()) < 1 << scheme.bits
    assert coded.scale.shape == ((ROWS, 1) if book.scaled else (1, 1))
    assert coded.zero is None and coded.dequantize().isfinite().all()
    if book.vector == 1:
        assert (coded.tables.float().diff(dim=2) >= 0).all()
