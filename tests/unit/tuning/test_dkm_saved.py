import gc
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from compress.core.errors import CompressError
from compress.tuning.dkm.assignment import soft_tables, soft_values, temperature
from compress.tuning.dkm.saved import SavedOnHost, SharedIndex
from compress.tuning.dkm.table_domain import rounded
from compress.tuning.dkm.unique import unique_values


def master(groups: int = 2, count: int = 5000, vector: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(groups, count, vector, generator=generator) * 0.02


def plain(weights: Tensor, tables: Tensor) -> Tensor:
    tau = temperature(tables, 0.2)
    return soft_values(weights, soft_tables(weights, tables, tau, iterations=5), tau)


def gradient(weights: Tensor, hooks: SavedOnHost | None) -> Tensor:
    """The gradient of a sum of squares, with the forward under the hooks."""
    weights = weights.clone().requires_grad_()
    tables = rounded(weights[:, :8]).detach().clone()
    if hooks is None:
        soft = plain(rounded(weights), tables)
    else:
        with hooks:
            soft = plain(rounded(weights), tables)
    (found,) = torch.autograd.grad(soft.square().sum(), weights)
    return found


def index(weights: Tensor) -> SharedIndex:
    return SharedIndex(unique_values(rounded(weights).squeeze(-1)))


@pytest.mark.parametrize("vector", [1, 2])
@pytest.mark.parametrize("marshal", [False, True])
def test_gradients_are_equal_to_the_last_bit(marshal: bool, vector: int) -> None:
    weights = master(vector=vector)
    hooks = SavedOnHost(marshal=marshal, least_values=1)
    assert torch.equal(gradient(weights, hooks), gradient(weights, None))
    assert hooks.whole_kept > 10


def test_rows_of_equal_weights_give_gradients_equal_to_the_last_bit() -> None:
    weights = master(groups=3)
    hooks = SavedOnHost(index=index(weights), least_values=5000)
    assert torch.equal(gradient(weights, hooks), gradient(weights, None))
    assert hooks.rows_kept > 10
    assert hooks.whole_kept == 0


def test_rows_that_differ_are_kept_whole() -> None:
    weights = master()
    other = SharedIndex(unique_values(rounded(master().flip(1)).squeeze(-1)))
    hooks = SavedOnHost(index=other, least_values=5000)
    assert torch.equal(gradient(weights, hooks), gradient(weights, None))
    assert hooks.rows_kept == 0


def test_each_means_saves_bytes() -> None:
    weights = master(groups=1, count=1 << 20)
    sizes = []
    for hooks in (
        SavedOnHost(marshal=False),
        SavedOnHost(),
        SavedOnHost(index=index(weights)),
    ):
        gradient(weights, hooks)
        sizes.append(hooks.saved_bytes)
    offloaded, marshaled, unique = sizes
    # Each round saves its shares twice: for the softmax, and for the weighted sum.
    assert offloaded > 1.4 * marshaled
    assert marshaled > 10 * unique


def test_views_of_a_storage_share_one_copy() -> None:
    weights = master(count=300).requires_grad_()
    hooks = SavedOnHost(least_values=1)
    wide = weights * 2
    with hooks:
        product = wide.transpose(0, 1)[3:] * wide[:, 3:].transpose(0, 1)
    assert hooks.saved_bytes == wide.nbytes
    (found,) = torch.autograd.grad(product.sum(), weights)
    expected = 8 * weights.detach()
    expected[:, :3] = 0
    assert torch.allclose(found, expected)


def test_a_storage_that_changed_is_copied_again() -> None:
    weights = master(count=300).requires_grad_()
    hooks = SavedOnHost(least_values=1)
    with hooks:
        wide = weights * 2
        first = wide.square()
        with torch.no_grad():
            wide.mul_(10)
        second = wide.square()
    (found,) = torch.autograd.grad((first + second).sum(), weights)
    assert torch.allclose(found, 2 * (2 * 2 * weights + 2 * 20 * weights))


def test_parameters_and_small_tensors_are_not_copied() -> None:
    weight = nn.Parameter(master(count=300))
    hooks = SavedOnHost(least_values=601)
    with hooks:
        (weight.view(-1) * weight.view(-1)).exp()
    assert hooks.saved_bytes == 0


def test_parameters_that_changed_before_backward_are_refused() -> None:
    weight = nn.Parameter(master(count=300))
    with SavedOnHost():
        loss = weight.square().sum()
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(CompressError, match="changed in place"):
        loss.backward()


@pytest.mark.parametrize("least", [1, 1 << 20])
def test_nothing_outlives_its_use(least: int) -> None:
    weights = master().requires_grad_()
    gc.disable()  # a cycle would keep the tensor until a collection
    try:
        with SavedOnHost(least_values=least):
            middle = (weights * 2).exp()  # saves its own output
            storage = StorageWeakRef(middle.untyped_storage())
            result = middle.sum()
            del middle
            assert storage.expired() == (least == 1)  # copied, so that it can go
        del result
        assert storage.expired()
    finally:
        gc.enable()


SCRIPT = """
import sys
import torch, torch.distributed as dist
from compress.tuning.dkm.assignment import soft_tables, soft_values, temperature
from compress.tuning.dkm.saved import SavedOnHost, SharedIndex
from compress.tuning.dkm.table_domain import rounded
from compress.tuning.dkm.unique import unique_values

dist.init_process_group("gloo")

def learn():  # what holds the group is gone before the group is
    weights = torch.load("weights.pt", weights_only=True).requires_grad_()
    tables = rounded(weights[:, :8]).detach().clone()
    unique = unique_values(rounded(weights).squeeze(-1).detach())
    index = SharedIndex(unique, dist.group.WORLD)
    with SavedOnHost(index=index, least_values=5000):
        tau = temperature(tables, 0.2)
        values = rounded(weights)
        soft = soft_values(values, soft_tables(values, tables, tau, iterations=5), tau)
    (found,) = torch.autograd.grad(soft.square().sum(), weights)
    torch.save((found, torch.tensor(index.nbytes)), f"{dist.get_rank()}.pt")

learn()
dist.barrier()
dist.destroy_process_group()
"""


def test_learners_keep_a_part_of_the_index_each(tmp_path: Path) -> None:
    torch.save(master(count=5001), tmp_path / "weights.pt")
    (tmp_path / "script.py").write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    team = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "3"}
    processes = [
        subprocess.Popen(
            [sys.executable, "script.py"],
            cwd=tmp_path,
            env=os.environ | team | {"RANK": str(rank)},
        )
        for rank in range(3)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    expected = gradient(master(count=5001), None)
    for rank in range(3):
        found, kept = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.equal(found, expected)
        assert int(kept) == 2 * 2 * 5001 / 3
