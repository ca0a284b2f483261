import pytest
import torch
from torch import Tensor

from compress.core.codebooks import to_stored
from compress.core.errors import CompressError, SchemeError
from compress.core.scheme import Scheme
from compress.core.tensors import QuantizedTensor
from compress.tuning.dkm.assignment import entries, hard_values, nearest
from compress.tuning.dkm.palette import Schedule, TrainablePalette
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
    tables = []
    for part in torch.split(weight / scale.half().float(), block):
        vectors = part.reshape(-1, book.vector)
        order = vectors[:, 0].argsort()
        places = torch.linspace(0, len(order) - 1, 1 << scheme.bits).long()
        tables.append(vectors[order[places]])
    codes = torch.zeros(rows, columns // book.vector, dtype=torch.int64)
    return QuantizedTensor(
        to_stored(codes, scheme.bits),
        scale.half(),
        None,
        scheme,
        tables=torch.stack(tables).unsqueeze(1).half(),
    )


def palette(scheme: str, **options: object) -> TrainablePalette:
    return TrainablePalette(dense(), started(dense(), scheme), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_stored_is_what_the_layer_used(name: str) -> None:
    trained = palette(name)
    trained.snap_()
    result = trained.result()
    assert result.shape == (40, 24)
    assert result.scheme.name == name
    assert torch.equal(result.dequantize(), trained.weight().detach())
    first = result.tables[..., 0] if result.tables is not None else torch.empty(0)
    assert bool((first.diff(dim=2) >= 0).all())


@pytest.mark.parametrize("name", NAMES)
def test_training_lowers_the_loss_and_the_snap_keeps_it(name: str) -> None:
    target = dense().flip(0)

    def loss(weight: Tensor) -> Tensor:
        return (weight - target).square().mean()

    trained = palette(name)
    before = float(loss(trained.weight(0.0).detach()))
    optimizer = torch.optim.Adam(trained.parameters(), lr=2e-3)
    for step in range(60):
        optimizer.zero_grad()
        loss(trained.weight(step / 59)).backward()
        optimizer.step()
        trained.advance_()
    soft = float(loss(trained.weight(1.0).detach()))
    assert trained.softness() < 0.05
    trained.snap_()
    assert trained.softness() == 0
    hard = float(loss(trained.weight().detach()))
    assert soft < 0.3 * before
    assert hard < 0.35 * before


def test_tables_can_be_tuned_after_the_snap() -> None:
    trained = palette("palette2-tensor")
    trained.snap_()
    codes = trained.result().codes
    (tables,) = trained.parameters()
    trained.weight().sum().backward()
    assert tables.grad is not None
    assert float(tables.grad.sum()) == 40 * 24  # each weight pulls its entry
    with torch.no_grad():
        tables.neg_()  # the order turns around
    result = trained.result()
    assert torch.equal(result.codes, 3 - codes)
    assert torch.equal(result.dequantize(), trained.weight().detach())


def test_rows_that_fill_the_last_group_do_not_count() -> None:
    whole = palette("palette3")  # 40 rows: two groups of 16, and one of 8
    last = dense()[32:]
    alone = TrainablePalette(last, started(last, "palette3-tensor"))
    assert torch.allclose(whole.weight(0.0)[32:], alone.weight(0.0), atol=1e-7)


def test_tables_move_when_the_step_is_done() -> None:
    trained = palette("palette3")
    first = trained.weight(0.0).detach()
    assert torch.equal(trained.weight(0.0).detach(), first)
    trained.advance_()
    assert not torch.equal(trained.weight(0.0).detach(), first)


def test_softness_falls_with_the_share() -> None:
    trained = palette("palette3", schedule=Schedule(first=0.5, last=1e-6))
    trained.weight(0.0)
    soft = trained.softness()
    trained.weight(1.0)
    assert trained.softness() < 0.05 * soft


def test_important_weights_draw_the_tables() -> None:
    importances = torch.full((40, 24), 1e-3)
    importances[:, :4] = 1.0
    errors = []
    for given in (None, importances):
        trained = palette("palette2-tensor", importances=given)
        for _ in range(5):
            trained.weight(1.0)
            trained.advance_()
        trained.snap_()
        errors.append((trained.weight() - dense())[:, :4].square().sum().item())
    assert errors[1] < errors[0]


def test_sums_of_tables_are_refused() -> None:
    scheme = Scheme.parse("aqlm-2x8g8")
    start = QuantizedTensor(
        torch.zeros(40, 6, dtype=torch.uint8),
        torch.ones(40, 1).half(),
        None,
        scheme,
        tables=torch.zeros(1, 2, 256, 8).half(),
    )
    with pytest.raises(SchemeError, match=r"layer has scheme aqlm-2x8g8"):
        TrainablePalette(dense(), start, name="layer")


def test_weights_that_are_not_finite_are_refused() -> None:
    trained = palette("palette3", name="layer")
    with torch.no_grad():
        trained.parameters()[0][0, 0] = torch.nan
    with pytest.raises(CompressError, match="layer: weights are not finite"):
        trained.snap_()


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
