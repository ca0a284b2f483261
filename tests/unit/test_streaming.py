"""One block in memory at a time gives what transformers gives with all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from streaming_fixtures import FAMILIES, WINDOWS, model_of

from compress.core.errors import CheckpointError
from compress.model import devices
from compress.model import states as states_module
from compress.model.devices import choose_dtype
from compress.model.skeleton import build_skeleton
from compress.model.streaming import StreamedModel


def own_logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack([model(window[None]).logits[0] for window in WINDOWS])


def streamed_logits(streamed: StreamedModel) -> torch.Tensor:
    return torch.stack(list(streamed.logits(WINDOWS)))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", FAMILIES)
def test_streamed_logits_are_those_of_transformers(kind: str, tied: bool) -> None:
    model, description, source = model_of(kind, tied=tied)
    expected = own_logits(model)
    found = streamed_logits(StreamedModel(description, source))
    assert float(expected.std()) > 0.05
    assert torch.allclose(found, expected, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_family_table_names_all_linears_and_norms(kind: str) -> None:
    model, description, _ = model_of(kind)
    family = description.family
    block = dict(model.get_submodule(family.block(0)).named_modules())
    linears = [n for n, m in block.items() if isinstance(m, torch.nn.Linear)]
    norms = [n for n, m in block.items() if type(m).__name__.endswith("RMSNorm")]
    assert sorted(linear.path for linear in family.linears) == sorted(linears)
    assert sorted(family.norms) == sorted(norms)


def test_a_half_precision_checkpoint_runs_in_float32() -> None:
    _, description, source = model_of("llama", dtype="bfloat16")
    found = streamed_logits(StreamedModel(description, source))
    model, _, _ = model_of("llama")  # its rotary frequencies are not rounded
    model.load_state_dict({n: t.float() for n, t in source.state.items()})
    assert torch.allclose(found, own_logits(model), atol=1e-4)


def test_scaled_rotary_embeddings_are_kept() -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    model, description, source = model_of("llama", rope_parameters=rope)
    found = streamed_logits(StreamedModel(description, source))
    assert torch.allclose(found, own_logits(model), atol=1e-4)


def test_only_one_block_has_weights_at_a_time() -> None:
    _, description, source = model_of("llama")
    streamed = StreamedModel(description, source)

    def filled() -> list[int]:
        blocks = streamed.model.model.layers
        return [i for i, b in enumerate(blocks) if not next(b.parameters()).is_meta]

    assert filled() == []
    with streamed.block(1):
        assert filled() == [1]
    assert all(p.is_meta for p in streamed.model.parameters())


def test_blocks_are_read_once_for_all_windows() -> None:
    _, description, source = model_of("llama")
    streamed_logits(StreamedModel(description, source))
    inside = [name for name in source.reads if ".layers." in name]
    assert sorted(inside) == sorted(n for n in source.state if ".layers." in n)


def test_all_windows_at_once_give_the_same_states() -> None:
    _, description, source = model_of("gemma2")
    streamed = StreamedModel(description, source)
    states = streamed.embed(WINDOWS)
    twin = streamed.copy(states)
    with streamed.block(0):
        parts = streamed.run_block(0, states)
        again = streamed.run_block(0, states)
        streamed.advance(0, twin)
    assert torch.equal(parts, again)
    assert torch.allclose(parts, twin.hidden, atol=1e-5)


def test_windows_are_batched_by_what_a_block_makes_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, description, source = model_of("llama")
    streamed = StreamedModel(description, source)
    states = streamed.embed(WINDOWS)
    assert streamed.batches(states) == [slice(0, 3)]
    a_window = 24 * (12 * 64 + 4 * 96) * 4
    monkeypatch.setitem(states_module._BATCH_BYTES, "cpu", 2 * a_window)
    assert streamed.batches(states) == [slice(0, 2), slice(2, 3)]
    whole = streamed.copy(states)
    with streamed.block(0):
        streamed.advance(0, states)
        expected = streamed.run_block(0, whole)
    assert torch.allclose(states.hidden, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("wanted", "stored", "amx", "expected"),
    [
        ("auto", "bfloat16", True, torch.bfloat16),
        ("auto", "float16", True, torch.bfloat16),
        ("auto", "float32", True, torch.float32),
        ("auto", "bfloat16", False, torch.float32),
        ("float32", "bfloat16", True, torch.float32),
        ("bfloat16", "float32", False, torch.bfloat16),
    ],
)
def test_bfloat16_is_chosen_where_it_is_fast_and_loses_nothing(
    wanted: str,
    stored: str,
    amx: bool,
    expected: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(devices, "_multiplies_bfloat16", lambda _device: amx)
    assert choose_dtype(wanted, stored, "cpu") is expected


@pytest.mark.parametrize("has", [True, False])
def test_a_cpu_is_asked_for_its_matrix_units(
    has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"amx_bf16": has, "amx_tile": has}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert devices._multiplies_bfloat16("cpu") is has
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as before torch 2.12
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has)
    assert devices._multiplies_bfloat16("cpu") is has


def test_a_misshapen_weight_is_refused() -> None:
    _, description, source = model_of("llama")
    source.state["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 4)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight has shape \(3, 4\)"):
        streamed_logits(StreamedModel(description, source))


def test_integer_weights_are_refused() -> None:
    _, description, source = model_of("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    source.state[name] = source.state[name].to(torch.int8)
    with pytest.raises(
        CheckpointError, match=r"stored as torch\.int8; expected a float"
    ):
        streamed_logits(StreamedModel(description, source))


def test_a_config_that_transformers_refuses_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="cannot build 'no_such_model'"):
        build_skeleton({"model_type": "no_such_model"})


def test_models_of_one_source_share_the_head_while_they_use_it() -> None:
    _, description, source = model_of("llama", tied=False)
    reads: list[str] = []
    read = source.read
    source.read = lambda name: (reads.append(name), read(name))[1]  # type: ignore[method-assign]
    first = StreamedModel(description, source)
    streams = [m.logits(WINDOWS) for m in (first, first.with_source(source))]
    for a, b in zip(*streams, strict=True):
        assert torch.equal(a, b)
    assert reads.count("lm_head.weight") == 1
    list(first.logits(WINDOWS))  # and it is not kept
    assert reads.count("lm_head.weight") == 2
