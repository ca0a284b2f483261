"""Exchanges of neurons: the losses they go by, and what comes of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from grammar_fixtures import WIDTH, grammar, trained_on_grammar
from moe_fixtures import opened, save_mixture
from pruning_fixtures import kept_neurons, pruned, pruning_of, random_mlp, statistics_of
from streaming_fixtures import model_of
from torch import Tensor, nn

from compress.core.compensation import least_squares
from compress.core.errors import CalibrationError, ConfigError
from compress.model.loading import ModelHandle, open_model
from compress.pruning.exchange import Exchange, StandIn
from compress.pruning.places import mlp_places
from compress.recovery.losses import linear_kl
from compress.recovery.models import WholeModel

ROUNDS = 8


@pytest.fixture(scope="module")
def trained() -> ModelHandle:
    return trained_on_grammar()


def stand_in(kept: Sequence[int]) -> tuple[StandIn, Tensor, Tensor, Tensor]:
    """Return a stand-in, the dense weight, its inputs and their second moments."""
    mlp, x = random_mlp(tokens=2000)
    layer = nn.Linear(*mlp.down.shape[::-1], bias=False, dtype=torch.float64)
    layer.weight.data = mlp.down.double()
    gram = statistics_of(x).gram
    found = StandIn(layer, gram)
    found.keep_(kept)
    return found, layer.weight.data, x.double(), gram


def repaired(weight: Tensor, gram: Tensor, kept: Sequence[int]) -> Tensor:
    left = torch.zeros_like(weight)
    index = torch.tensor(sorted(kept))
    left[:, index] = least_squares(weight, gram, index).double()
    return left


def moved(found: StandIn, x: Tensor, neuron: int) -> Tensor:
    """Return the derivative of the output to the number of one neuron, ``[T, H]``."""
    columns = []
    for output in range(12):
        found.forget()
        slopes = torch.zeros(1, 12, dtype=torch.float64)
        slopes[0, output] = 1
        each = []
        for row in x[:4]:
            found.forget()
            found.observe(row[None], slopes)
            each.append(found.slope[neuron])
        columns.append(torch.stack(each))
    return torch.stack(columns, 1).double()


@pytest.mark.parametrize("most", [2, 3])
@pytest.mark.parametrize("neuron", [1, 5, 18, 20])
def test_one_neuron_more_or_less_is_the_repair_with_it_or_without(
    neuron: int, most: int
) -> None:
    kept = [n for n in range(24) if n % 3 < most or n % 2]
    found, weight, x, gram = stand_in(kept)
    there = neuron in kept
    other = [n for n in kept if n != neuron] if there else [*kept, neuron]
    wanted = x[:4] @ repaired(weight, gram, other).T
    change = moved(found, x, neuron)
    reached = found.output(x[:4]) + (-change if there else change)
    # The ridge is part of each system, and not of what the formula says of two.
    torch.testing.assert_close(reached, wanted, rtol=0.02, atol=0.02)
    before = (found.output(x[:4]) - wanted).norm()
    assert (reached - wanted).norm() < 0.02 * before


def test_where_all_stay_one_less_is_repaired_by_the_others() -> None:
    every = list(range(24))
    found, weight, x, gram = stand_in(every)
    wanted = x[:4] @ repaired(weight, gram, every[:-1]).T
    reached = found.output(x[:4]) - moved(found, x, 23)
    torch.testing.assert_close(reached, wanted, rtol=0.02, atol=0.02)


def test_what_stays_is_repaired() -> None:
    kept = list(range(0, 24, 2))
    found, weight, x, gram = stand_in(kept)
    torch.testing.assert_close(
        found.output(x), x @ repaired(weight, gram, kept).T, rtol=1e-4, atol=1e-4
    )


def exchange(handle: ModelHandle, **changes: Any) -> tuple[Exchange, list[list[int]]]:
    """Return an exchange that begins with neurons by lot, three of four."""
    places = [mlp_places(handle.description, i)[0] for i in range(3)]
    model = WholeModel(handle, device="cpu", dtype=torch.float32)
    text = grammar(64, seed=2)
    inputs: list[list[Tensor]] = [[], [], []]
    hooks = [
        model.blocks[i]
        .get_submodule(place.down_path)
        .register_forward_pre_hook(lambda _m, x, i=i: inputs[i].append(x[0]))
        for i, place in enumerate(places)
    ]
    with torch.no_grad():
        model.states(text)
    for hook in hooks:
        hook.remove()
    grams = [statistics_of(torch.cat(x).flatten(0, 1)).gram for x in inputs]
    given: dict[str, Any] = {
        "protected": [torch.tensor([0])] * 3,
        "floors": [24] * 3,
        "rounds": ROUNDS,
        "within": False,
    }
    draw = torch.Generator().manual_seed(5)
    kept = [
        sorted({0, *torch.randperm(WIDTH, generator=draw)[:72].tolist()})[:72]
        for _ in range(3)
    ]
    return Exchange(model, text, places, grams, **given | changes), kept


def after(given: Exchange, kept: list[list[int]]) -> tuple[list[list[int]], list[Any]]:
    halvings, records = 0, []
    for number in range(ROUNDS):
        made = given.round(number, kept, halvings)
        kept, halvings = made["kept"], made["halvings"]
        records.append(made)
    return kept, records


def test_the_slope_is_that_of_the_kl(trained: ModelHandle) -> None:
    given, kept = exchange(trained)
    found = given.measured(0, kept)
    (place,) = mlp_places(trained.description, 1)
    inside = torch.tensor(kept[1])
    neuron = int(inside[found.away[1][inside].argmax()])
    less = [list(block) for block in kept]
    less[1].remove(neuron)
    rise = given.measured(0, less).loss - found.loss
    assert rise == pytest.approx(float(found.away[1][neuron]), rel=0.5)
    assert rise > 0 and place.block == 1
    assert given.measured(0, kept).loss == pytest.approx(found.loss, rel=1e-5)


def test_exchanges_lower_the_kl_on_text_they_have_not_seen(
    trained: ModelHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.pruning.exchange.SHARE", 0.05)
    given, kept = exchange(trained)
    last, records = after(given, kept)
    assert sum(map(len, last)) == sum(map(len, kept))
    assert min(map(len, last)) >= 24 and all(0 in block for block in last)
    assert all(r["after"] <= r["before"] for r in records)
    unseen = grammar(64, seed=3)
    assert kl_of(given, last, unseen) < 0.7 * kl_of(given, kept, unseen)


def kl_of(given: Exchange, kept: list[list[int]], text: Tensor) -> float:
    model = given._model
    with torch.no_grad():
        dense = model.states(text)
        with given._standing(kept):
            pruned_ = model.states(text)
        return float(linear_kl(pruned_, model.head, dense, model.head))


def test_blocks_keep_their_numbers_if_told_to(
    trained: ModelHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.pruning.exchange.SHARE", 0.05)
    given, kept = exchange(trained, within=True)
    last, records = after(given, kept)
    assert [len(block) for block in last] == [len(block) for block in kept]
    assert sum(r["neurons"] for r in records) > 0 and last != kept


def test_the_same_seed_exchanges_the_same(trained: ModelHandle) -> None:
    found = []
    for _ in range(2):
        given, kept = exchange(trained, seed=3)
        found.append(given.round(0, kept, 0))
    assert found[0] == found[1]


def test_a_round_alone_is_as_one_of_many(trained: ModelHandle) -> None:
    given, kept = exchange(trained)
    first = given.round(0, kept, 0)
    second = given.round(1, first["kept"], first["halvings"])
    again, _ = exchange(trained)  # a run that was killed and goes on
    assert again.round(1, first["kept"], first["halvings"]) == second


def test_widths_are_fitted_by_worth(trained: ModelHandle) -> None:
    given, kept = exchange(trained)
    found = given.measured(ROUNDS, kept)
    least = int(found.away[0][kept[0]].argmin())
    alone = exchange(trained, protected=[torch.tensor([kept[0][least]])] * 3)[0]
    assert kept[0][least] not in given.fitted(kept, [71, 72, 72])[0]
    assert kept[0][least] in alone.fitted(kept, [71, 72, 72])[0]
    fitted = given.fitted(kept, [70, 72, 74])
    assert [len(block) for block in fitted] == [70, 72, 74]
    assert set(fitted[0]) < set(kept[0]) < set(range(WIDTH))
    assert set(kept[2]) < set(fitted[2])


def test_the_dense_model_is_itself_again(trained: ModelHandle) -> None:
    given, kept = exchange(trained)
    text = grammar(2, seed=4)
    before = given._model.states(text)
    given.measured(0, kept)
    assert torch.equal(given._model.states(text), before)


def test_a_gradient_that_is_not_finite_is_an_error(trained: ModelHandle) -> None:
    given, kept = exchange(trained)
    given._model.blocks[1].mlp.up_proj.weight.fill_(torch.inf)
    with pytest.raises(CalibrationError, match=r"prune\.exchanges"):
        given.measured(0, kept)


@pytest.mark.parametrize("shape", ["uniform", "per-layer"])
@pytest.mark.parametrize("kind", ["llama", "phi3", "gemma2"])
def test_a_run_exchanges_and_ends_in_widths_of_the_target(
    kind: str, shape: str, tmp_path: Path
) -> None:
    _, description, source = model_of(kind)
    how: dict[str, Any] = {"method": "cfsp", "sparsity": 0.25, "shape": shape}
    record, kept = pruned(description, source, tmp_path, exchanges=2, **how)
    widths = [block["after"] for block in record["blocks"]]
    assert sum(widths) == 216 and [len(k) for k in kept.values()] == widths
    assert all(width % 8 == 0 for width in widths)
    assert len(record["exchanges"]) == 2
    assert open_model(str(tmp_path / "pruned"), cache=tmp_path).description.block_count


def test_a_killed_run_goes_on_with_the_next_round(
    trained: ModelHandle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how: dict[str, Any] = {"method": "cfsp", "sparsity": 0.25, "shape": "per-layer"}
    text, given = grammar(16, seed=2), (trained.description, trained.source)
    whole, wanted = pruned(*given, tmp_path / "whole", windows=text, exchanges=3, **how)
    pruning = pruning_of(*given, tmp_path / "killed", exchanges=3, **how)
    made = Exchange.round

    def killed(self: Exchange, number: int, *rest: Any) -> Any:
        if number == 2:
            raise KeyboardInterrupt
        return made(self, number, *rest)

    monkeypatch.setattr(Exchange, "round", killed)
    with pytest.raises(KeyboardInterrupt):
        pruning.run(text, {})
    monkeypatch.undo()
    numbers = []

    def counted(self: Exchange, number: int, *rest: Any) -> Any:
        numbers.append(number)
        return made(self, number, *rest)

    monkeypatch.setattr(Exchange, "round", counted)
    record = pruning.run(text, {})
    assert numbers == [2]
    assert kept_neurons(tmp_path / "killed") == wanted
    assert record["exchanges"] == whole["exchanges"]


def test_text_of_the_models_own_is_written_once(
    trained: ModelHandle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how: dict[str, Any] = {"method": "cfsp", "sparsity": 0.25, "generated": 12}
    given, text = (trained.description, trained.source), grammar(4, seed=2)
    record, kept = pruned(*given, tmp_path / "a", windows=text, **how)
    assert record["generated"] == 12
    alone = how | {"generated": 0}
    _, other = pruned(*given, tmp_path / "b", windows=text, **alone)
    assert kept != other
    (tmp_path / "a/pruned/model.safetensors.index.json").unlink(missing_ok=True)
    monkeypatch.setattr("compress.recovery.generate.generate_windows", None)
    pruning = pruning_of(*given, tmp_path / "a", **how)
    assert pruning.run(text, {"test": "1"})["checksum"] == record["checksum"]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"repair": "bias"}, "least_squares or none"),
        ({"repair": "mask"}, "least_squares or none"),
        ({"kv_groups": 1, "sparsity": None}, "no neurons"),
        ({"method": "maw", "exchanges": 0, "generated": 4}, "looks at text"),
    ],
)
def test_what_cannot_be_is_refused(
    section: dict[str, Any], message: str, tmp_path: Path
) -> None:
    _, description, source = model_of("llama")
    how = {"sparsity": 0.3, "exchanges": 2} | section
    with pytest.raises(ConfigError, match=message):
        pruning_of(description, source, tmp_path, **how)


def test_a_mixture_is_refused(tmp_path: Path) -> None:
    save_mixture(tmp_path, "mixtral")
    handle = opened(tmp_path)
    with pytest.raises(ConfigError, match="mixture"):
        pruning_of(
            handle.description, handle.source, tmp_path, sparsity=0.3, exchanges=1
        )
