from dataclasses import replace

import pytest
import torch
from torch import Tensor

from compress.core.codebooks import to_stored
from compress.core.scheme import Scheme
from compress.core.tensors import QuantizedTensor
from compress.tuning.dkm.assignment import entries, hard_values, nearest
from compress.tuning.dkm.palette import Schedule, SoftPalettes, palette_problem
from compress.tuning.dkm.snap import member_means, snap

NAMES = ["palette3", "palette2-tensor", "palette3-scaled", "palette-2x4-r16"]


def dense(rows: int = 40, columns: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, columns, generator=generator) * 0.02


def started(weight: Tensor, name: str) -> QuantizedTensor:
    """A palette whose entries are weights of each run of rows."""
    scheme = Scheme.parse(name)
    book = scheme.codebook
    assert book is not None
    rows, columns = weight.shape
    scale = torch.ones(1, 1)
    if book.scaled:
        scale = weight.square().mean(1, keepdim=True).sqrt()
    block = scheme.rows_of_scale(rows)
    tables, codes = [], []
    for part in torch.split(weight / scale.half().float(), block):
        vectors = part.reshape(-1, book.vector)
        order = vectors[:, 0].argsort()
        places = torch.linspace(0, len(order) - 1, 1 << scheme.bits).long()
        tables.append(vectors[order[places]].half())
        found = nearest(vectors[None], tables[-1][None].float())
        codes.append(found.view(len(part), -1))
    return QuantizedTensor(
        to_stored(torch.cat(codes), scheme.bits),
        scale.half(),
        None,
        scheme,
        tables=torch.stack(tables).unsqueeze(1),
    )


def palettes(name: str, schedule: Schedule | None = None) -> SoftPalettes:
    """Two matrices under a palette."""
    weights = torch.stack([dense(), dense().flip(0)])
    starts = [started(weight, name) for weight in weights]
    return SoftPalettes(weights, starts, schedule or Schedule())


@pytest.mark.parametrize("name", NAMES)
def test_a_snap_is_what_is_nearest_in_storage_type(name: str) -> None:
    trained = palettes(name)
    tables, codes = trained.snap(1.0)
    scheme = Scheme.parse(name)
    assert torch.equal(tables, tables.half().float())
    assert bool((tables[..., 0].diff(dim=-1) >= 0).all())
    for number, start in enumerate([dense(), dense().flip(0)]):
        found = started(start, name)
        stored = replace(
            found, codes=codes[number].view(40, -1), tables=tables[number].half()
        )
        master = trained.master.detach()[number]
        values = (master / found.scale.float()).bfloat16().float()
        runs = torch.split(values, scheme.rows_of_scale(40))
        for run, table, wanted in zip(
            runs,
            tables[number, :, 0],
            torch.split(stored.dequantize() / found.scale.float(), len(runs[0])),
            strict=True,
        ):
            vectors = run.reshape(1, -1, table.shape[1])
            nearest_entries = hard_values(vectors, table[None]).view_as(run)
            torch.testing.assert_close(wanted, nearest_entries)


@pytest.mark.parametrize("name", NAMES)
def test_training_lowers_the_loss_and_the_snap_keeps_it(name: str) -> None:
    trained = palettes(name, Schedule(first=0.5, iterations=3))
    target = trained.master.detach().flip(1)

    def loss(weight: Tensor) -> Tensor:
        return (weight - target).square().mean()

    before = float(loss(trained.soft(0.0).detach()))
    optimizer = torch.optim.Adam([trained.master], lr=2e-3)
    for step in range(60):
        optimizer.zero_grad()
        torch.autograd.backward(loss(trained.soft(step / 59)))
        optimizer.step()
        trained.advance_()
    soft = float(loss(trained.soft(1.0).detach()))
    assert trained.softness(1.0) < 0.05
    tables, codes = trained.snap(1.0)
    stored = [
        replace(
            started(dense(), name),
            codes=codes[i].view(40, -1),
            scale=started(weight, name).scale,
            tables=tables[i].half(),
        ).dequantize()
        for i, weight in enumerate([dense(), dense().flip(0)])
    ]
    assert soft < 0.35 * before
    assert float(loss(torch.stack(stored))) < 0.4 * before


def test_matrices_do_not_see_one_another() -> None:
    both = palettes("palette3").soft(0.3).detach()
    start = started(dense(), "palette3")
    alone = SoftPalettes(dense()[None], [start], Schedule()).soft(0.3)
    assert torch.allclose(both[:1], alone, rtol=0, atol=1e-7)


def test_rows_that_fill_the_last_group_do_not_count() -> None:
    whole = palettes("palette3").soft(0.0)  # 40 rows: two groups of 16, and one of 8
    last = dense()[32:]
    start = started(last, "palette3-tensor")
    alone = SoftPalettes(last[None], [start], Schedule()).soft(0.0)
    assert torch.allclose(whole[0, 32:], alone[0], atol=1e-7)


def test_rows_of_zeros_stay_zeros() -> None:
    weight = dense()
    start = started(weight, "palette3-scaled")
    weight[3], start.scale[3] = 0, 0
    trained = SoftPalettes(weight[None], [start], Schedule())
    soft = trained.soft(0.5)
    (gradient,) = torch.autograd.grad(soft.square().sum(), trained.master)
    assert bool(torch.isfinite(gradient).all())
    assert float(soft[0, 3].detach().abs().max()) == 0


def test_vectors_are_computed_in_parts_with_the_same_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results = []
    for most in (1 << 26, 1):
        monkeypatch.setattr("compress.tuning.dkm.palette._MAP_AT_ONCE", most)
        trained = palettes("palette-2x4-r16")
        soft = trained.soft(0.3)
        (gradient,) = torch.autograd.grad(soft.square().sum(), trained.master)
        results.append((soft.detach(), gradient))
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(whole, parts)


@pytest.mark.parametrize("name", NAMES)
def test_codes_that_are_not_the_nearest_are_where_training_starts(name: str) -> None:
    start = started(dense(), name)
    codes = start.codes.clone()
    codes[::3, ::2] ^= 1
    start = replace(start, codes=codes)
    trained = SoftPalettes(dense()[None], [start], Schedule(first=1e-4, last=1e-6))
    before = trained.tables.clone()
    trained.soft(1.0)
    trained.advance_()
    assert not torch.equal(trained.tables, before)
    tables, found = trained.snap(1.0)  # its entries may have another order
    snapped = replace(start, codes=found.view_as(codes), tables=tables[0].half())
    off = snapped.dequantize() - start.dequantize()
    assert float(off.norm() / start.dequantize().norm()) < 0.1


def test_tables_move_when_the_step_is_done() -> None:
    trained = palettes("palette3")
    first = trained.soft(0.0).detach()
    assert torch.equal(trained.soft(0.0).detach(), first)
    trained.advance_()
    assert not torch.equal(trained.soft(0.0).detach(), first)


def test_softness_falls_with_the_share() -> None:
    trained = palettes("palette3", Schedule(first=0.5, last=1e-6))
    assert trained.softness(1.0) < 0.05 * trained.softness(0.0)


@pytest.mark.parametrize(
    "name, shape, reason",
    [
        ("aqlm-2x8g8", (64, 64), "aqlm-2x8g8 is none; use a scheme such as palette3"),
        ("int4-g64", (64, 64), "int4-g64 is none; use a scheme such as palette3"),
        ("palette-2x8-tensor", (4096, 4096), "fewer rows a table, such as -r16"),
    ],
)
def test_other_schemes_are_refused(
    name: str, shape: tuple[int, int], reason: str
) -> None:
    problem = palette_problem(Scheme.parse(name), shape)
    assert problem is not None and reason in problem


@pytest.mark.parametrize("name", [*NAMES, "palette-2x6"])
def test_palettes_are_taken(name: str) -> None:
    assert palette_problem(Scheme.parse(name), (1536, 576)) is None


def test_means_are_those_of_the_members() -> None:
    w = dense().view(4, -1, 1)
    tables = w[:, :5].clone()
    tables[:, 4] = 9.0  # far from all
    f = dense().view(4, -1).abs()
    found = member_means(w, tables, f)
    codes = nearest(w, tables)
    for g in range(4):
        for k in range(4):
            mine = codes[g] == k
            expected = (w[g, mine, 0] * f[g, mine]).sum() / f[g, mine].sum()
            assert float(found[g, k, 0]) == pytest.approx(float(expected), rel=1e-4)
    assert torch.equal(found[:, 4], tables[:, 4])


@pytest.mark.parametrize("nearer", ["soft", "means"])
def test_the_table_nearer_to_the_soft_weights_is_kept(nearer: str) -> None:
    w = dense().view(4, -1, 1)
    tables = w[:, :5].sort(dim=1).values.half().float()
    means = member_means(w, tables)
    wanted = tables if nearer == "soft" else means
    kept, codes = snap(w, tables, hard_values(w, wanted), dtype=torch.float32)
    assert torch.equal(kept, wanted)
    assert torch.equal(entries(kept, codes), hard_values(w, wanted))
