"""Blocks without attention: choice, models, folders, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from moe_fixtures import opened, save_mixture
from pruning_fixtures import WINDOWS, loaded, pruned, pruning_of
from streaming_fixtures import FAMILIES, model_of
from torch import Tensor, nn

import compress
from compress.core.artifact import ModelDescription
from compress.core.errors import CheckpointError, ConfigError
from compress.core.families import family_of
from compress.core.shapes import ATTENTION, attention_flags, with_attention
from compress.model.loading import ModelHandle, check_tensors, open_model
from compress.model.padding import padded
from compress.model.streaming import StreamedModel
from compress.pruning.depth import UNITS, choose_units, turns_of
from compress.pruning.surgery import without_attention, without_blocks
from compress.recovery.models import WholeModel

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
FULL, SLIDING = "full_attention", "sliding_attention"
HALF: dict[str, Any] = {
    "method": "maw",
    "parameters": 0.12,
    "depth_unit": "attention",
    "depth_share": 1.0,
    "shape": "per-layer",
    "budgets": "uniform",
}


def silenced(model: Any, *indices: int) -> Any:
    """Let attention of some blocks write zeros, in a stock model."""
    with torch.no_grad():
        for index in indices:
            attention = model.model.layers[index].self_attn
            attention.o_proj.weight.zero_()
            if attention.o_proj.bias is not None:
                attention.o_proj.bias.zero_()
    return model


def logits_of(model: Any, windows: Tensor = WINDOWS) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(windows, use_cache=False).logits
    return logits


def share_of(description: ModelDescription, count: int) -> float:
    """Return the share of all weights that some attentions have, norms included."""
    prefix, family = "model.layers.1.", description.family
    one = sum(
        info.elements
        for name, info in description.tensors.items()
        if name.startswith(prefix)
        and family.is_attention(name.removeprefix(prefix).rpartition(".")[0])
    )
    return count * one / sum(info.elements for info in description.tensors.values())


def loss_of(model: Any) -> float:
    logits = logits_of(model)[:, :-1].flatten(0, 1)
    return float(nn.functional.cross_entropy(logits, WINDOWS[:, 1:].flatten()))


def turn_by_hand(model: Any, index: int) -> float:
    """Return 1 - mean cos(h, h + what attention adds) of a stock model's block."""
    block, seen = model.model.layers[index], {}
    has_norm = hasattr(block, "post_feedforward_layernorm")
    writer = block.post_attention_layernorm if has_norm else block.self_attn
    hooks = [
        block.input_layernorm.register_forward_pre_hook(
            lambda _m, inputs: seen.update(h=inputs[0])
        ),
        writer.register_forward_hook(
            lambda _m, _i, out: seen.update(y=out[0] if isinstance(out, tuple) else out)
        ),
    ]
    logits_of(model)
    for hook in hooks:
        hook.remove()
    h, y = seen["h"].double(), seen["y"].double()
    return float((1 - torch.cosine_similarity(h, h + y, dim=-1)).mean())


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("by", ["importance", "perplexity"])
def test_chosen_attention_is_that_of_trying_all(by: str, kind: str) -> None:
    gone: list[int] = []
    for _ in range(2):
        cost = {}
        for index in (i for i in range(1, 5) if i not in gone):
            model, _, _ = model_of(kind, num_hidden_layers=5)
            if by == "perplexity":
                cost[index] = loss_of(silenced(model, *gone, index))
            else:
                cost[index] = turn_by_hand(silenced(model, *gone), index)
        gone.append(min(cost, key=lambda i: cost[i]))
    _, description, source = model_of(kind, num_hidden_layers=5)
    found = choose_units(
        description,
        source,
        WINDOWS,
        unit=UNITS["attention"],
        count=2,
        by=by,
        streamed=StreamedModel,
    )
    assert found == gone


def test_a_block_without_attention_turns_nothing_by_it() -> None:
    _, description, source = model_of("llama")
    changed = without_attention(description, source, [1])
    turns = turns_of(StreamedModel(*changed), WINDOWS, UNITS["attention"])
    assert turns[1].importance == pytest.approx(0, abs=1e-6)
    assert min(turns[0].importance, turns[2].importance) > 1e-3


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_pruned_folder_is_the_model_whose_attention_writes_zeros(
    kind: str, tmp_path: Path
) -> None:
    """Streamed, in stock transformers, and generating with a cache."""
    changes: dict[str, Any] = {"num_hidden_layers": 4}
    if kind.startswith("gemma"):
        changes["layer_types"] = [SLIDING, FULL, FULL, SLIDING]
    model, description, source = model_of(kind, **changes)
    section = HALF | {"parameters": share_of(description, 2)}
    record, _ = pruned(description, source, tmp_path, **section)
    gone = record["attention_removed"]
    assert (
        len(gone) == 2
        and record["dropped"] == []
        and record["depth_by"] == "perplexity"
    )
    assert record["neurons"]["after"] == record["neurons"]["before"]
    expected = logits_of(silenced(model, *gone))
    found = loaded(tmp_path)
    torch.testing.assert_close(logits_of(found), expected, **CLOSE)
    handle = open_model(str(tmp_path / "pruned"), cache=tmp_path)
    check_tensors(handle)
    flags = handle.description.config[ATTENTION]
    assert [index for index, flag in enumerate(flags) if not flag] == gone
    streamed = StreamedModel(handle.description, handle.source)
    torch.testing.assert_close(
        torch.stack(list(streamed.logits(WINDOWS))), expected, **CLOSE
    )
    text = WINDOWS[:1, :12]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    again = text
    for _ in range(6):
        again = torch.cat([again, logits_of(found, again)[:, -1:].argmax(-1)], 1)
    for runs in (found, compress.load(tmp_path / "pruned")):
        written = runs.generate(text, use_cache=True, pad_token_id=0, **options)
        assert torch.equal(written, again)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("index", [1, 2])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3_text"])
def test_a_cache_counts_tokens_whatever_block_is_asked(
    kind: str, index: int, cache: str
) -> None:
    """The first block of a kind of attention may be one that has none."""
    changes: dict[str, Any] = {}
    if kind != "llama":
        changes["layer_types"] = [SLIDING, SLIDING, SLIDING]
        changes["layer_types"][index] = FULL
    model, description, source = model_of(kind, **changes)
    described, cut = without_attention(description, source, [index])
    whole = WholeModel(
        ModelHandle(described, cut), device="cpu", dtype=torch.float32
    ).module
    options: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False}
    options |= {"eos_token_id": None, "pad_token_id": 0, "disable_compile": True}
    if cache != "dynamic":
        options["cache_implementation"] = cache
    found, expected = (
        some.generate(WINDOWS[:2, :12], **options)
        for some in (whole, silenced(model, index))
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2"])
def test_padded_attention_of_zeros_computes_the_same(kind: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model, description, source = model_of(kind)
    changed, cut = without_attention(description, source, [1])
    assert len(changed.tensors) < len(description.tensors)
    wide, filled = padded(changed, cut)
    assert ATTENTION not in wide.config
    assert {n: i.shape for n, i in wide.tensors.items()} == {
        n: i.shape for n, i in description.tensors.items()
    }
    data = dict(wide.config)
    stock = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(data.pop("model_type"), **data),
        attn_implementation="eager",
    ).eval()
    stock.load_state_dict({name: filled.read(name) for name in wide.tensors})
    expected = logits_of(silenced(model, 1))
    torch.testing.assert_close(logits_of(stock), expected, **CLOSE)


def test_a_share_of_the_weights_goes_as_attention(tmp_path: Path) -> None:
    _, description, source = model_of("llama", num_hidden_layers=8)
    whole = sum(info.elements for info in description.tensors.values())
    one = 2 * 64 * 64 + 2 * 64 * 32 + 64
    section = HALF | {"parameters": 0.2, "depth_share": 0.5}
    record, _ = pruned(description, source, tmp_path, **section)
    count = len(record["attention_removed"])
    assert count == round(0.5 * 0.2 * whole / one)
    handle = open_model(str(tmp_path / "pruned"), cache=tmp_path)
    left = sum(info.elements for info in handle.description.tensors.values())
    assert abs(left - 0.8 * whole) <= 8 * 192 / 2 + 192  # half a unit of one block
    assert 0 not in record["attention_removed"]


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
def test_without_a_share_it_is_the_equation_of_2ssp(
    sparsity: float, tmp_path: Path
) -> None:
    _, description, source = model_of("llama", num_hidden_layers=6)
    mlp, attention = 3 * 64 * 96, 2 * 64 * 64 + 2 * 64 * 32 + 64
    share = sparsity * mlp / (mlp + attention + 64)
    count = round(6 * share ** (mlp / attention / 1.5))
    assert count > 0
    section = {"method": "maw", "sparsity": sparsity, "depth_unit": "attention"}
    made = pruning_of(description, source, tmp_path, shape="per-layer", **section)
    assert made.target.attentions == count


def test_heads_go_from_the_attention_that_is_left(tmp_path: Path) -> None:
    _, description, source = model_of("llama")
    section = HALF | {"kv_groups": 1, "parameters": 0.3, "depth_share": 0.4}
    record, _ = pruned(description, source, tmp_path, **section)
    (gone,) = record["attention_removed"]
    tensors = open_model(str(tmp_path / "pruned"), cache=tmp_path).description.tensors
    for index in range(3):
        name = f"model.layers.{index}.self_attn.k_proj.weight"
        assert (name in tensors) == (index != gone)
        if index != gone:
            assert tensors[name].shape == (16, 64)
    assert torch.isfinite(logits_of(loaded(tmp_path))).all()


def test_what_lost_attention_can_be_pruned_again(tmp_path: Path) -> None:
    _, description, source = model_of("llama", num_hidden_layers=6)
    once = without_attention(description, source, [2, 4])
    record, _ = pruned(*once, tmp_path / "a", **HALF)
    again = open_model(str(tmp_path / "a/pruned"), cache=tmp_path).description
    more = record["attention_removed"]
    assert more and not set(more) & {0, 2, 4}
    assert attention_flags(again.config).count(False) == 2 + len(more)
    blocks, _ = without_blocks(*once, [2])
    assert attention_flags(blocks.config) == (True, True, True, False, True)
    assert ATTENTION not in without_blocks(*once, [2, 4])[0].config


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"shape": "uniform", "budgets": "auto"}, "set shape: per-layer"),
        ({"depth_share": None, "blocks": 1}, "leave blocks"),
        ({"parameters": None, "expansion_ratio": 1.0, "depth_share": None}, "give one"),
        ({"parameters": 0.9}, r"\d+ of 3 attentions would go; at most 2 can.*lower"),
    ],
)
def test_what_cannot_be_is_refused(
    section: dict[str, Any], message: str, tmp_path: Path
) -> None:
    _, description, source = model_of("llama")
    with pytest.raises((ConfigError, ValueError), match=message):
        pruning_of(description, source, tmp_path, **HALF | section)
    assert source.reads == []


def test_a_mixture_of_experts_is_refused_by_name(tmp_path: Path) -> None:
    save_mixture(tmp_path, "mixtral")
    handle = opened(tmp_path)
    message = "depth_unit attention: blocks of 'mixtral' cannot differ in whether"
    with pytest.raises(ConfigError, match=message):
        pruning_of(handle.description, handle.source, tmp_path / "run", **HALF)


@pytest.mark.parametrize(
    "flags", [[True, False], [False, True, True], [1, 0, 1], "yes"]
)
def test_lists_that_make_no_model_are_refused(flags: Any) -> None:
    config = {"num_hidden_layers": 3, ATTENTION: flags}
    with pytest.raises(CheckpointError, match=ATTENTION):
        attention_flags(config)


def test_attention_everywhere_leaves_no_list() -> None:
    config = {"num_hidden_layers": 2}
    assert with_attention(config, [True, True]) == config
    assert with_attention(config, [True, False])[ATTENTION] == [True, False]


@pytest.mark.parametrize("kind", FAMILIES)
def test_tensors_of_attention_are_those_that_nothing_else_uses(kind: str) -> None:
    _, description, _ = model_of(kind)
    family = family_of(kind)
    inside = {
        name.removeprefix("model.layers.1.").rpartition(".")[0]
        for name in description.tensors
        if name.startswith("model.layers.1.")
    }
    left = {path for path in inside if not family.is_attention(path)}
    norms = {path for path in left if not path.startswith("mlp.")}
    assert norms == {family.mlp_norm, *family.output_norms[1:]}
