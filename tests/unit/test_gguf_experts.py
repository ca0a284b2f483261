"""Experts in GGUF: stacked for llama.cpp, and each expert's own codes read back."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_fixtures import KINDS, expert_layer, opened, plan_of, save_mixture
from pipeline_fixtures import windows

from compress.core.artifact import CompressedModel
from compress.core.plan import Plan
from compress.core.scheme import Scheme
from compress.export.gguf import GGUFExporter, GGUFOptions
from compress.export.gguf_reader import open_gguf
from compress.model.loading import ModelHandle, open_model
from compress.quantizers.rtn import RoundToNearest


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def handle(kind: str, tmp_path_factory: pytest.TempPathFactory) -> ModelHandle:
    folder = tmp_path_factory.mktemp(kind)
    save_mixture(folder, kind)
    return opened(folder)


def plan(handle: ModelHandle, scheme: str = "q4_0") -> Plan:
    full = plan_of(handle, "rtn")
    grid = Scheme.parse(scheme).with_scales("float16")
    return Plan(
        "tiny", {n: replace(layer, scheme=grid) for n, layer in full.layers.items()}
    )


def changed(plan: Plan, pattern: str, scheme: str | None) -> Plan:
    layers = {}
    for name, layer in plan.layers.items():
        if re.search(pattern, name) is None:
            layers[name] = layer
        elif scheme is not None:
            grid = Scheme.parse(scheme).with_scales("float16")
            layers[name] = replace(layer, scheme=grid)
    return Plan("tiny", layers)


def artifact(handle: ModelHandle, plan: Plan) -> CompressedModel:
    def quantized(layer: str) -> Any:
        weight = handle.source.read(f"{layer}.weight")
        return RoundToNearest().quantize(weight, plan.layers[layer].scheme, None)

    return CompressedModel(handle.description, plan, handle.source, quantized)


def test_each_experts_codes_are_read_back(
    kind: str, handle: ModelHandle, tmp_path: Path
) -> None:
    made = artifact(handle, changed(plan(handle), r"layers\.1\..*experts", "q8_0"))
    exporter = GGUFExporter()
    assert exporter.check(made.plan, handle.description) == []
    result = exporter.write(made, tmp_path)
    file = open_gguf(result.files[0])
    assert file.tensors["blk.0.ffn_gate_exps.weight"].shape == (4, 96, 64)
    assert file.tensors["blk.0.ffn_down_exps.weight"].shape == (4, 64, 96)
    assert file.tensors["blk.0.ffn_up_exps.weight"].type == "q4_0"
    assert file.tensors["blk.1.ffn_up_exps.weight"].type == "q8_0"
    assert file.tensors["blk.0.ffn_gate_inp.weight"].type == "f32"
    for layer in made.plan.layers:
        own, read = made.quantized(layer), exporter.read_codes(tmp_path, layer)
        assert torch.equal(read.codes, own.codes), layer
        assert torch.equal(read.scale, own.scale), layer
    sizes = exporter.tensor_bytes(made.plan, handle.description)
    assert sum(sizes.values()) == sum(t.size_bytes for t in file.tensors.values())


def test_a_stack_is_what_the_gguf_package_decodes(
    kind: str, handle: ModelHandle, tmp_path: Path
) -> None:
    import gguf

    made = artifact(handle, plan(handle))
    path = GGUFExporter().write(made, tmp_path).files[0]
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    for name, role in (("gate", "gate"), ("up", "up"), ("down", "down")):
        tensor = tensors[f"blk.1.ffn_{name}_exps.weight"]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for expert in range(4):
            own = made.quantized(expert_layer(kind, 1, expert, role)).dequantize()
            assert torch.equal(torch.from_numpy(values[expert]), own)


def test_a_dense_file_gives_the_model_back(handle: ModelHandle, tmp_path: Path) -> None:
    exporter = GGUFExporter(GGUFOptions(embedding="f32"))
    path = exporter.write(artifact(handle, Plan("tiny", {})), tmp_path).files[0]
    back = open_model(str(path), cache=tmp_path / "cache")
    description = handle.description
    assert dict(back.description.tensors) == dict(description.tensors)
    for name in description.tensors:
        assert torch.equal(back.source.read(name), handle.source.read(name)), name
    for key in ("num_experts_per_tok", "model_type", "hidden_size", "head_dim"):
        assert back.description.config.get(key) == description.config.get(key), key
    assert back.description.experts(1) == 4


def test_llamacpp_computes_what_transformers_computes(
    kind: str, handle: ModelHandle, tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp")
    from transformers import AutoModelForCausalLM

    exporter = GGUFExporter(GGUFOptions(embedding="f32"))
    exporter.write(artifact(handle, Plan("tiny", {})), tmp_path)
    assert handle.description.assets is not None
    model = AutoModelForCausalLM.from_pretrained(handle.description.assets).eval()
    tokens = windows(2, 16)
    found = torch.stack(list(exporter.replay(tmp_path, tokens))).log_softmax(-1)
    with torch.no_grad():
        expected = model(tokens).logits.log_softmax(-1)
    kl = (expected.exp() * (expected - found)).sum(-1)
    assert float(kl.mean()) < 1e-5


@pytest.mark.parametrize(
    ("pattern", "scheme", "words"),
    [
        (r"experts\.2\.", "q8_0", "GGUF stores blk.0.ffn_gate_exps.weight in one type"),
        (r"experts\.3\.", None, "give the experts of a block one scheme"),
        (r"layers\.1.*experts", "int3-g32", "GGUF has no type for int3-g32"),
    ],
)
def test_experts_of_a_block_must_agree(
    pattern: str, scheme: str | None, words: str, handle: ModelHandle
) -> None:
    mixed = changed(plan(handle), pattern, scheme)
    found = [p.message for p in GGUFExporter().check(mixed, handle.description)]
    assert any(words in message for message in found), found


def test_attention_may_be_coded_alone(handle: ModelHandle) -> None:
    alone = changed(plan(handle), "experts", None)
    assert GGUFExporter().check(alone, handle.description) == []


def test_reencoding_reaches_experts(handle: ModelHandle, tmp_path: Path) -> None:
    odd = changed(plan(handle), r"layers\.1.*experts", "int3-g32")
    exporter = GGUFExporter(GGUFOptions(reencode="q8_0"))
    result = exporter.write(artifact(handle, odd), tmp_path)
    assert any("experts re-encoded as q8_0" in note for note in result.notes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm_topk_prob": False}, "always normalises"),
        ({"mlp_only_layers": [1]}, "expects experts in every block"),
    ],
)
def test_what_llamacpp_cannot_compute_is_refused(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    save_mixture(tmp_path, "qwen3_moe", **changes)
    handle = opened(tmp_path)
    found = GGUFExporter().check(Plan("tiny", {}), handle.description)
    assert any(words in problem.message for problem in found)


def test_a_template_is_refused(handle: ModelHandle, tmp_path: Path) -> None:
    path = GGUFExporter().write(artifact(handle, Plan("tiny", {})), tmp_path).files[0]
    exporter = GGUFExporter(GGUFOptions(template=str(path)))
    found = exporter.check(Plan("tiny", {}), handle.description)
    assert "its experts are stacked" in found[0].message
