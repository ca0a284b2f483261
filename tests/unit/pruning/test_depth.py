"""Dropping blocks: choice against trying all, and models against skipped blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from pruning_fixtures import WINDOWS, loaded, pruned
from streaming_fixtures import FAMILIES, model_of
from torch import Tensor, nn

from compress.core.errors import CheckpointError
from compress.model.streaming import StreamedModel
from compress.pruning.depth import UNITS, choose_units, turns_of
from compress.pruning.surgery import without_blocks


class Skipped(nn.Module):
    """Stands in for a block and hands its input on."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.attention_type = getattr(block, "attention_type", None)

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


def skipping(model: Any, *indices: int) -> Any:
    """Replace blocks of a transformers model by nothing."""
    for index in indices:
        model.model.layers[index] = Skipped(model.model.layers[index])
    return model


def logits_of(model: Any, windows: Tensor = WINDOWS) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(windows, use_cache=False).logits
    return logits


def loss_of(model: Any) -> float:
    logits = logits_of(model)[:, :-1].flatten(0, 1)
    return float(nn.functional.cross_entropy(logits, WINDOWS[:, 1:].flatten()))


def test_turns_are_those_of_hidden_states() -> None:
    model, description, source = model_of("llama")
    with torch.no_grad():
        states = list(model(WINDOWS, output_hidden_states=True).hidden_states)
        hooked: list[Tensor] = []  # the last state of that list has met the norm
        hook = model.model.norm.register_forward_pre_hook(
            lambda _m, inputs: hooked.append(inputs[0])
        )
        model(WINDOWS)
        hook.remove()
    states[-1] = hooked[0]
    for index, turn in enumerate(turns_of(StreamedModel(description, source), WINDOWS)):
        before, after = states[index].double(), states[index + 1].double()
        cos = torch.cosine_similarity(before, after, dim=-1)
        assert turn.importance == pytest.approx(float((1 - cos).mean()), abs=1e-5)
        angle = float((cos.arccos() / torch.pi).mean())
        assert turn.angle == pytest.approx(angle, abs=1e-4)


def best_by_hand(kind: str, by: str, count: int) -> list[int]:
    """Return blocks of a model of seven that go, by running all candidates."""
    gone: list[int] = []
    for _ in range(count):
        left = [i for i in range(7) if i not in gone]
        model, description, source = model_of(kind, num_hidden_layers=7)
        if by == "perplexity":
            losses = {}
            for index in left[2:-1]:
                model, _, _ = model_of(kind, num_hidden_layers=7)
                losses[index] = loss_of(skipping(model, *gone, index))
            gone.append(min(losses, key=lambda i: losses[i]))
            continue
        changed, renamed = without_blocks(description, source, gone)
        turns = turns_of(StreamedModel(changed, renamed), WINDOWS)
        gone.append(min(left[2:-1], key=lambda i: turns[left.index(i)].importance))
    return gone


@pytest.mark.parametrize("by", ["importance", "perplexity"])
def test_chosen_blocks_are_those_of_trying_all(by: str) -> None:
    _, description, source = model_of("llama", num_hidden_layers=7)
    found = choose_units(
        description,
        source,
        WINDOWS,
        unit=UNITS["block"],
        count=3,
        by=by,
        streamed=StreamedModel,
    )
    assert found == best_by_hand("llama", by, 3)
    assert len(set(found)) == 3
    assert not {0, 1, 6} & set(found)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_model_without_a_block_is_the_model_that_skips_it(
    kind: str, tmp_path: Any
) -> None:
    """Per-layer lists follow, and generation with a cache gives the same tokens."""
    changes: dict[str, Any] = {"num_hidden_layers": 5}
    if kind == "smollm3":
        changes["no_rope_layers"] = [1, 1, 0, 1, 0]
    if kind.startswith("gemma"):
        full, sliding = "full_attention", "sliding_attention"
        changes["layer_types"] = [sliding, full, full, sliding, full]
    model, description, source = model_of(kind, **changes)
    record, _ = pruned(description, source, tmp_path, method="maw", blocks=2)
    gone = record["dropped"]
    found = loaded(tmp_path)
    expected = logits_of(skipping(model, *gone))
    torch.testing.assert_close(logits_of(found), expected, rtol=1e-4, atol=1e-4)
    kept = [i for i in range(5) if i not in gone]
    for key in ("layer_types", "no_rope_layers"):
        if key in changes:
            assert getattr(found.config, key) == [changes[key][i] for i in kept]
    assert [b.self_attn.layer_idx for b in found.model.layers] == [0, 1, 2]
    text = WINDOWS[:1, :12]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    written = found.generate(text, use_cache=True, pad_token_id=0, **options)
    again = text
    for _ in range(6):
        again = torch.cat([again, logits_of(found, again)[:, -1:].argmax(-1)], 1)
    assert torch.equal(written, again)


def test_lists_that_are_not_over_blocks_are_left_alone() -> None:
    _, description, source = model_of(
        "llama", num_hidden_layers=4, eos_token_id=[1, 2, 3, 4]
    )
    changed, _ = without_blocks(description, source, [2])
    assert changed.config["eos_token_id"] == [1, 2, 3, 4]
    assert changed.config["num_hidden_layers"] == 3


def test_experts_that_are_placed_by_number_keep_their_blocks() -> None:
    _, description, source = model_of("llama")
    sparse = {**description.config, "decoder_sparse_step": 2}
    with pytest.raises(CheckpointError, match=r"prune neurons instead \(depth_share"):
        without_blocks(replace(description, config=sparse), source, [1])
