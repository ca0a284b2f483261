"""Threads of operations: as many as are asked for, and as before afterwards."""

import pytest
import torch

from compress.core.packing import pack_bytes, pack_codes, unpack_bytes, unpack_codes
from compress.core.threads import on_threads


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_an_error_puts_the_number_back():
    with pytest.raises(RuntimeError), on_threads(1):
        assert torch.get_num_threads() == 1
        raise RuntimeError
    assert torch.get_num_threads() == 2


def test_packing_takes_one_thread(monkeypatch):
    counts = []
    or_in_place = torch.Tensor.__ior__

    def counted(self, other):
        counts.append(torch.get_num_threads())
        return or_in_place(self, other)

    monkeypatch.setattr(torch.Tensor, "__ior__", counted)
    codes = torch.randint(0, 8, (4, 24), dtype=torch.uint8)
    for pack, unpack in ((pack_codes, unpack_codes), (pack_bytes, unpack_bytes)):
        assert torch.equal(unpack(pack(codes, 3), 3, 24), codes)
    assert set(counts) == {1}
    assert torch.get_num_threads() == 2
