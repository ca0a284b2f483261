"""The rulers of benchmarks/ against slow loops."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizer_fixtures import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def window_scores(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import window_scores

    return window_scores


@pytest.fixture
def choice_tasks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import choice_tasks

    return choice_tasks


@pytest.fixture
def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def narrowed(base: LlamaForCausalLM, widths: tuple[int, int]) -> dict[str, Any]:
    """Return the tensors of a model whose blocks keep their first neurons."""
    state = {
        k: v.clone() for k, v in base.state_dict().items() if k != "lm_head.weight"
    }
    for block, width in enumerate(widths):
        start = f"model.layers.{block}.mlp"
        for name in ("gate_proj", "up_proj"):
            key = f"{start}.{name}.weight"
            state[key] = state[key][:width].contiguous()
        key = f"{start}.down_proj.weight"
        state[key] = state[key][:, :width].contiguous()
    return state


def zeroed(base: LlamaForCausalLM, widths: tuple[int, int]) -> LlamaForCausalLM:
    """Return the same function at full width."""
    model = copy.deepcopy(base)
    for block, width in zip(model.model.layers, widths, strict=True):
        block.mlp.down_proj.weight.data[:, width:] = 0
    return model


def test_scores_equal_a_loop_over_log_probabilities(
    window_scores: ModuleType, base: LlamaForCausalLM, tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    base.save_pretrained(folder)
    tokenizer = byte_tokenizer()
    reference = window_scores.reference_of(folder, tokenizer, windows={40: 3})
    pruned = zeroed(base, (40, 24))
    found = window_scores.score(pruned, reference)["tales"]["40"]

    kls, nlls, same = [], [], []
    for window in reference.ids["tales", 40]:
        with torch.no_grad():
            p, q = (m(window[None]).logits[0, :-1].double() for m in (base, pruned))
        p, q = p.log_softmax(-1), q.log_softmax(-1)
        kls += (p.exp() * (p - q)).sum(-1).tolist()
        nlls += (-q.gather(1, window[1:, None])[:, 0]).tolist()
        same += (p.argmax(-1) == q.argmax(-1)).tolist()
    assert found["kl"] == pytest.approx(sum(kls) / len(kls), rel=1e-4)
    assert found["perplexity"] == pytest.approx(
        math.exp(sum(nlls) / len(nlls)), rel=1e-4
    )
    assert found["top1"] == pytest.approx(sum(same) / len(same))
    own = window_scores.score(folder, reference)["tales"]["40"]
    assert own["rise"] == pytest.approx(0, abs=1e-6)
    assert own["kl"] == pytest.approx(0, abs=1e-6)


def test_widths_that_differ_by_block_are_opened_from_tensors_and_folders(
    window_scores: ModuleType, base: LlamaForCausalLM, tmp_path: Path
) -> None:
    state, ids = narrowed(base, (40, 24)), torch.arange(30)[None]
    save_file(state, tmp_path / "model.safetensors")
    settings = base.config.to_dict() | {
        "model_type": "compress_llama",
        "auto_map": {"AutoConfig": "modeling.Config"},
        "intermediate_size": 40,
        "intermediate_size_per_layer": [40, 24],
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with torch.no_grad():
        expected = zeroed(base, (40, 24))(ids).logits
        for source in (state, tmp_path):
            logits = window_scores.open_model(source, base.config)(ids).logits
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_missing_tensors_are_not_made_up(
    window_scores: ModuleType, base: LlamaForCausalLM
) -> None:
    state = narrowed(base, (40, 24))
    del state["model.layers.1.self_attn.q_proj.weight"]
    with pytest.raises(SystemExit, match="q_proj"):
        window_scores.open_model(state, base.config)


def test_windows_are_spread_over_the_text(window_scores: ModuleType) -> None:
    windows = window_scores.spread_windows(torch.arange(95), 10, 3)
    assert windows[:, 0].tolist() == [0, 30, 60]
    assert len(window_scores.spread_windows(torch.arange(95), 10, 30)) == 9


def test_likelihoods_of_answers_equal_those_of_one_at_a_time(
    choice_tasks: ModuleType, base: LlamaForCausalLM, tmp_path: Path
) -> None:
    rows = [
        {"question": "One?", "choices": ["a", "bcd", "ef", "g"], "answer": 1},
        {"question": "A longer one?", "choices": ["x", "yz", "w", "uv"], "answer": 3},
    ]
    file = tmp_path / "mmlu.validation.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    tokenizer = byte_tokenizer()
    task = choice_tasks._task("mmlu", tmp_path, tokenizer, None)
    found = choice_tasks.measure_task(base, task, "cpu")

    bits, size, hits = 0.0, 0, 0
    for row in rows:
        rates = []
        for index, choice in enumerate(row["choices"]):
            start = f"Question: {row['question']}\nAnswer:"
            ids = torch.tensor(tokenizer(f"{start} {choice}")["input_ids"])
            with torch.no_grad():
                logp = base(ids[None]).logits[0].log_softmax(-1)
            nats = sum(float(logp[i - 1, ids[i]]) for i in range(len(start), len(ids)))
            rates.append(nats / (len(choice) + 1))
            if index == row["answer"]:
                bits, size = bits - nats / math.log(2), size + len(choice) + 1
        hits += rates.index(max(rates)) == row["answer"]
    assert found["bits_per_byte"] == pytest.approx(bits / size, rel=1e-4)
    assert found["accuracy"] == hits / 2
