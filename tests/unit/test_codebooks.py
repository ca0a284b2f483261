import pytest
import torch

from compress.core.codebooks import from_stored, to_stored
from compress.core.errors import SchemeError
from compress.core.scheme import WHOLE, Codebook, Scheme
from compress.core.tensors import QuantizedTensor

NAMES = {
    "palette3": (3, 16, Codebook()),
    "palette4-r1": (4, 1, Codebook()),
    "palette2-tensor": (2, WHOLE, Codebook()),
    "palette4-scaled": (4, 16, Codebook(scaled=True)),
    "palette-2x6": (6, WHOLE, Codebook(1, 2)),
    "palette-4x8-r64": (8, 64, Codebook(1, 4)),
    "aqlm-2x8g8": (8, WHOLE, Codebook(2, 8, scaled=True)),
    "aqlm-1x16g8": (16, WHOLE, Codebook(1, 8, scaled=True)),
    "pq-4x8": (8, WHOLE, Codebook(1, 4, positional=True)),
    "pq-2x9": (9, WHOLE, Codebook(1, 2, positional=True)),
    "pq-8x5x2-scaled": (5, WHOLE, Codebook(2, 8, scaled=True, positional=True)),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_go_both_ways(name: str) -> None:
    scheme = Scheme.parse(name)
    assert (scheme.bits, scheme.row_block, scheme.codebook) == NAMES[name]
    assert scheme.name == name
    assert Scheme.from_dict(scheme.to_dict()) == scheme


@pytest.mark.parametrize(
    "name", ["palette9", "palette0", "aqlm-1x17g8", "aqlm-2x8", "pq-4", "pq-4x17"]
)
def test_names_of_nothing_are_refused(name: str) -> None:
    with pytest.raises(SchemeError):
        Scheme.parse(name)


def test_bits_per_weight_count_tables_and_scales() -> None:
    per_row = Scheme.parse("palette3-r1").bits_per_weight(576, 192)
    assert per_row == pytest.approx(3 + 8 * 16 / 576)
    per_run = Scheme.parse("palette3").bits_per_weight(576, 192)
    assert per_run == pytest.approx(3 + 8 * 16 / (16 * 576))
    bits = Scheme.parse("aqlm-2x8g8").bits_per_weight(576, 1536)
    assert bits == pytest.approx(2 + 2 * 256 * 8 * 16 / (576 * 1536) + 16 / 576)
    bits = Scheme.parse("pq-8x8x2").bits_per_weight(576, 49152)
    assert bits == pytest.approx(2 + 2 * 256 * 576 * 16 / (576 * 49152))


def test_columns_that_vectors_do_not_divide_are_refused() -> None:
    with pytest.raises(SchemeError, match="8 columns at a time"):
        Scheme.parse("aqlm-1x8g8").check_columns(100, "layer")


@pytest.mark.parametrize("bits", [1, 4, 8, 9, 16])
def test_stored_codes_read_back(bits: int) -> None:
    codes = torch.tensor([[0, 1, (1 << bits) - 1, (1 << bits) // 2]])
    assert torch.equal(from_stored(to_stored(codes, bits)), codes)


@pytest.mark.parametrize("name", NAMES)
def test_values_are_sums_of_entries(name: str) -> None:
    scheme = Scheme.parse(name)
    tensor = _random(scheme, rows=64, columns=16)
    assert tensor.shape == (64, 16)
    assert scheme.codebook is not None and tensor.tables is not None
    vector = scheme.codebook.vector
    block = scheme.rows_of_scale(64)
    expected = torch.zeros(64, 16)
    places = from_stored(tensor.codes).view(64, -1, scheme.codebook.count)
    for row in range(64):
        for group in range(16 // vector):
            part = slice(group * vector, (group + 1) * vector)
            for m in range(scheme.codebook.count):
                run = group if scheme.codebook.positional else row // block
                entry = tensor.tables[run, m, places[row, group, m]]
                expected[row, part] += entry.float()
    expected *= tensor.scale.float()
    assert torch.allclose(tensor.dequantize(), expected, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in NAMES if NAMES[n][1] != WHOLE])
def test_parts_of_a_stack_keep_the_values(name: str) -> None:
    tensor = _random(Scheme.parse(name), rows=128, columns=16)
    parts = tensor.split_rows([64, 64])
    whole = torch.cat([part.dequantize() for part in parts])
    assert torch.equal(whole, tensor.dequantize())


@pytest.mark.parametrize("name", NAMES)
def test_states_read_back(name: str) -> None:
    tensor = _random(Scheme.parse(name), rows=64, columns=16)
    again = QuantizedTensor.from_state(tensor.state(), tensor.scheme)
    assert torch.equal(again.dequantize(), tensor.dequantize())


def _random(scheme: Scheme, *, rows: int, columns: int) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(0)
    book = scheme.codebook
    assert book is not None
    runs = scheme.table_runs(rows, columns)
    shape = (runs, book.count, 1 << scheme.bits, book.vector)
    tables = torch.randn(shape, generator=generator).half()
    size = (rows, columns // book.vector * book.count)
    codes = torch.randint(1 << scheme.bits, size, generator=generator)
    scale = torch.ones(1, 1)
    if book.scaled:
        scale = torch.rand(rows, 1, generator=generator)
    stored = to_stored(codes, scheme.bits)
    return QuantizedTensor(stored, scale.half(), None, scheme, tables=tables)
