"""Making levels: what the quantizer gives from dense statistics, once."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from allocation_fixtures import Searched, maker_of, quantizer, searched
from streaming_fixtures import WINDOWS

from compress.allocation.store import LevelStore
from compress.core.statistics import LayerStatistics
from compress.parts import relative_errors, row_sums


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Searched:
    return searched(tmp_path_factory.mktemp("levels"))


def inputs_of(found: Searched, layer: str) -> torch.Tensor:
    """Return what transformers' dense model feeds to a layer, float64 ``[T, C]``."""
    seen: list[torch.Tensor] = []
    module = found.module.get_submodule(layer)
    hook = module.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        found.module(WINDOWS)
    hook.remove()
    return seen[0].flatten(0, 1).double()


@pytest.mark.parametrize("path", ["0.self_attn.o_proj", "1.mlp.down_proj"])
def test_a_level_is_what_gptq_gives_on_dense_inputs(found: Searched, path: str) -> None:
    name = f"model.layers.{path}"
    x = inputs_of(found, name)
    statistics = LayerStatistics(hessian=(2 * x.T @ x).float(), tokens=len(x))
    weight = found.source.state[f"{name}.weight"]
    for layer in (w for w in found.wanted if w.name == name):
        assert layer.method == "gptq"
        expected = quantizer("gptq").quantize(weight, layer.scheme, statistics)
        level = found.levels[layer]
        stored = found.store.read(level.key)
        # Sums of the Hessian in another order may turn a code that lies half-way.
        same = (stored.codes == expected.codes).float().mean()
        assert same > 0.99
        sums = row_sums(weight, stored.dequantize(), statistics)
        error, _ = relative_errors(sums, measured=True)
        assert level.error == pytest.approx(error, rel=1e-4)


def test_a_level_of_rounding_is_exact(found: Searched) -> None:
    name = found.model.family.embedding
    weight = found.source.state[f"{name}.weight"]
    layers = [layer for layer in found.wanted if layer.name == name]
    assert {layer.method for layer in layers} == {"rtn"} or not layers
    for layer in layers:
        expected = quantizer("rtn").quantize(weight, layer.scheme, None)
        stored = found.store.read(found.levels[layer].key)
        assert torch.equal(stored.dequantize(), expected.dequantize())


def test_more_bits_lose_less(found: Searched) -> None:
    for unit in found.candidates.units:
        errors = [
            sum(found.levels[layer].error for layer in option.layers)
            for option in unit.options
        ]
        assert errors == sorted(errors, reverse=True)


def test_nothing_is_made_twice(
    found: Searched, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a level was made again")

    monkeypatch.setattr(found.maker, "_make", never)
    assert found.maker.make(found.wanted, WINDOWS) == found.levels


@pytest.mark.parametrize("damage", ["gone", "cut", "foreign"])
def test_a_damaged_entry_alone_is_made_again(
    found: Searched, tmp_path: Path, damage: str
) -> None:
    shutil.copytree(found.store.folder, tmp_path, dirs_exist_ok=True)
    maker = replace(found.maker, store=LevelStore(tmp_path))
    first, second = (found.levels[layer].key for layer in found.wanted[:2])
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    path = tmp_path / first[:2] / f"{first}.safetensors"
    whole = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    else:
        other = tmp_path / second[:2] / f"{second}.safetensors"
        path.write_bytes(other.read_bytes())
    again = maker.make(found.wanted, WINDOWS)
    assert {k: v.key for k, v in again.items()} == {
        k: v.key for k, v in found.levels.items()
    }
    expected = round_trip(whole)
    restored = round_trip(path.read_bytes())
    assert all(torch.equal(restored[name], part) for name, part in expected.items())
    after = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    assert {p for p in before if after[p] != before[p]} == {path}


def round_trip(data: bytes) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    return dict(load(data))


def test_keys_depend_on_weights_text_scheme_and_layer(found: Searched) -> None:
    layers = found.wanted[:4]
    keys = [found.levels[layer].key for layer in found.wanted]
    assert len(set(keys)) == len(keys)
    other = maker_of(found.model, found.source, found.store)
    other.identity = {"text": "another"}
    changed = replace(other, identity={"text": "made up"})
    assert set(changed._keys(layers).values()) <= set(keys)
    assert not set(other._keys(layers).values()) & set(keys)
    source = type(found.source)(found.source.state)
    name = f"{layers[0].name}.weight"
    source.state[name] = source.state[name] + 1
    moved = maker_of(found.model, source, found.store)._keys(layers)
    assert moved[layers[0]] not in keys
