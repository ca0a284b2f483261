"""The level database on disk: exact, and safe against damage."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from export_fixtures import round_to_nearest
from hypothesis import given
from hypothesis import strategies as st

from compress.allocation.store import Level, LevelStore, is_table, pack, unpack
from compress.core.errors import CheckpointError
from compress.core.scheme import Scheme

KEY, OTHER = "ab" * 32, "ab" * 31 + "cd"
LEVEL = Level(KEY, 0.25, 3.0, 0.02, 0.01, 1.5, 9.0, 0.125)
SCHEMES = ("int4-g32", "int8-g32", "int3-g32-asym", "fp8", "mxfp4")


WEIGHT = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))


def stored(folder: Path, scheme: str = "int4-g32") -> LevelStore:
    store = LevelStore(folder)
    parsed = Scheme.parse(scheme).with_scales("float16")
    store.write(LEVEL, round_to_nearest(WEIGHT, parsed))
    return store


def path_of(folder: Path, key: str = KEY) -> Path:
    return folder / key[:2] / f"{key}.safetensors"


@given(
    bits=st.integers(1, 8),
    unsigned=st.booleans(),
    shape=st.tuples(st.integers(0, 7), st.integers(1, 33)),
    seed=st.integers(0, 99),
)
def test_codes_survive_packing(
    bits: int, unsigned: bool, shape: tuple[int, int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, shape, generator=generator)
    kind = torch.uint8 if unsigned else torch.int8
    codes = (codes if unsigned else codes - (1 << (bits - 1))).to(kind)
    planes, about = pack(codes)
    assert len(planes) <= bits
    assert torch.equal(unpack(planes, about), codes)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_entry_decodes_to_what_was_stored(tmp_path: Path, scheme: str) -> None:
    store = stored(tmp_path, scheme)
    parsed = Scheme.parse(scheme).with_scales("float16")
    expected = round_to_nearest(WEIGHT, parsed)
    found = store.read(KEY)
    assert torch.equal(found.dequantize(), expected.dequantize())
    assert torch.equal(found.codes, expected.codes)
    assert found.scheme == parsed
    assert store.find(KEY) == LEVEL


def test_codes_take_as_many_bits_as_they_need(tmp_path: Path) -> None:
    stored(tmp_path, "int4-g32")
    codes, scales = 16 * 64 * 4 // 8, 16 * 2 * 2
    assert path_of(tmp_path).stat().st_size < codes + scales + 1500  # the header


def test_an_entry_cut_anywhere_is_made_again(tmp_path: Path) -> None:
    store = stored(tmp_path)
    whole = path_of(tmp_path).read_bytes()
    for length in (0, 1, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path_of(tmp_path).write_bytes(whole[:length])
        assert store.find(KEY) is None, length
        with pytest.raises(CheckpointError, match="damaged"):
            store.read(KEY)
    path_of(tmp_path).write_bytes(whole)
    assert store.find(KEY) == LEVEL


def test_an_entry_under_a_foreign_name_is_made_again(tmp_path: Path) -> None:
    store = stored(tmp_path)
    path_of(tmp_path).rename(path_of(tmp_path, OTHER))
    assert store.find(OTHER) is None
    store.write(replace(LEVEL, key=OTHER), store.read(OTHER))
    assert store.find(OTHER) == replace(LEVEL, key=OTHER)


def test_a_file_of_someone_else_is_no_entry(tmp_path: Path) -> None:
    from safetensors.torch import save

    path_of(tmp_path).parent.mkdir()
    path_of(tmp_path).write_bytes(save({"codes": torch.zeros(3)}))
    assert LevelStore(tmp_path).find(KEY) is None


def test_notes_come_back_and_damaged_ones_do_not(tmp_path: Path) -> None:
    store = LevelStore(tmp_path)
    assert store.noted(KEY) is None
    store.note(KEY, [[0.5, 1.0]])
    assert store.noted(KEY) == [[0.5, 1.0]]
    path_of(tmp_path).with_suffix(".json").write_text("[[0.5,")
    assert store.noted(KEY) is None


@pytest.mark.parametrize("data", [None, {}, [], [[1.0]], [[1.0], [2.0, "x"]], [1, 2]])
def test_losses_of_another_form_are_not_taken(data: object) -> None:
    assert is_table([[1.0], [2.0, 0]], like=[[9.0], [9.0, 9.0]])
    assert not is_table(data, like=[[9.0], [9.0, 9.0]])
