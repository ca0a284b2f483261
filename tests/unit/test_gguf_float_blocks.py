"""Four-bit floats in GGUF: blocks, the factor beside an NVFP4 matrix, and refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_fixtures import (
    ROWS,
    compressed,
    mean_kl,
    random_codes,
    same_codes,
    save_tokenizer,
    torch_logits,
)
from moe_fixtures import KINDS, opened, plan_of, save_mixture
from pipeline_fixtures import windows
from shapes_fixtures import uneven_artifact

from compress import exporting
from compress.core.artifact import CompressedModel
from compress.core.plan import Plan
from compress.core.scheme import Scheme
from compress.core.scheme_names import FLOAT_SCHEMES
from compress.core.tensors import QuantizedTensor
from compress.export.gguf import GGUFExporter, GGUFOptions
from compress.export.gguf_blocks import (
    coded_type,
    ggml_type,
    pack_blocks,
    row_bytes,
    unpack_blocks,
)
from compress.export.gguf_reader import open_gguf
from compress.model.gguf_source import GGUFSource
from compress.model.streaming import StreamedModel
from compress.quantizers.rtn import RoundToNearest
from compress.transform import CompressedSource

LAYER = "model.layers.1.self_attn.k_proj"


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    save_tokenizer(folder)
    return folder


@pytest.mark.parametrize("kind", FLOAT_SCHEMES)
def test_gguf_decodes_packed_blocks_to_the_same_values(kind: str) -> None:
    tensor = random_codes(6, 192, Scheme.parse(kind), seed=1)
    values = gguf.quants.dequantize(pack_blocks(tensor), ggml_type(kind))
    if tensor.outer is not None:  # which is no part of the blocks
        tensor = replace(tensor, outer=torch.ones(1))
    assert np.array_equal(values, tensor.dequantize().numpy())


@pytest.mark.parametrize("kind", FLOAT_SCHEMES)
def test_unpack_is_inverse_of_pack(kind: str) -> None:
    tensor = random_codes(5, 128, Scheme.parse(kind), seed=2)
    back = unpack_blocks(pack_blocks(tensor), kind, tensor.outer)
    assert torch.equal(back.codes, tensor.codes)
    assert torch.equal(back.scale.view(torch.uint8), tensor.scale.view(torch.uint8))
    assert torch.equal(back.dequantize(), tensor.dequantize())


@pytest.mark.parametrize("kind", FLOAT_SCHEMES)
def test_row_bytes_is_what_ggml_uses(kind: str) -> None:
    block, size = gguf.GGML_QUANT_SIZES[ggml_type(kind)]
    assert row_bytes(kind, 192) == 192 // block * size


def test_ggml_rounds_no_better_on_its_grid() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(3))
    ours = RoundToNearest().quantize(weight, Scheme.parse("mxfp4"), None).dequantize()
    kind = gguf.GGMLQuantizationType.MXFP4
    theirs = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind)
    errors = [(weight - v).square().sum() for v in (ours, torch.from_numpy(theirs))]
    assert float(errors[0]) <= 1.005 * float(errors[1])


@pytest.mark.parametrize("name", ["nvfp4-w4a4", "mxfp6", "fp4-g32", "fp4-g16-pow2"])
def test_other_floats_have_no_type(name: str) -> None:
    assert coded_type(Scheme.parse(name)) is None


def test_float_scales_that_a_scheme_has_not_do_not_matter() -> None:
    assert coded_type(Scheme.parse("mxfp4").with_scales("bfloat16")) == "mxfp4"


@pytest.mark.parametrize("kind", FLOAT_SCHEMES)
def test_codes_and_values_are_read_back(
    kind: str, assets: Path, tmp_path: Path
) -> None:
    artifact = compressed("llama", assets=assets, scheme=kind, intermediate_size=128)
    exporter = GGUFExporter()
    result = exporter.write(artifact, tmp_path)
    own, read = artifact.quantized(LAYER), exporter.read_codes(tmp_path, LAYER)
    assert torch.equal(read.codes, own.codes)
    assert torch.allclose(read.scales(), own.scales(), rtol=1e-6, atol=0)
    assert exporting.same_codes(own, read)
    if own.outer is not None:
        other = replace(own, outer=own.outer * (1 + 1e-6))
        assert not exporting.same_codes(other, read)
    values = GGUFSource(result.files[0]).read(f"{LAYER}.weight")
    assert torch.allclose(values.float(), own.dequantize(), rtol=1e-2, atol=1e-4)
    sizes = exporter.tensor_bytes(artifact.plan, artifact.description)
    tensors = open_gguf(result.files[0]).tensors
    assert sum(sizes.values()) == sum(t.size_bytes for t in tensors.values())
    assert ("blk.1.attn_k.scale" in tensors) == (kind == "nvfp4")
    assert exporter.file_bytes(artifact.plan, artifact.description) == result.size_bytes


def test_other_types_have_no_factor(assets: Path, tmp_path: Path) -> None:
    artifact = compressed("llama", assets=assets)
    exporter = GGUFExporter()
    path = exporter.write(artifact, tmp_path).files[0]
    assert not any(name.endswith(".scale") for name in open_gguf(path).tensors)
    assert same_codes(exporter.read_codes(tmp_path, LAYER), artifact.quantized(LAYER))


DOWN = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("family", "where", "changes"),
    [
        ("llama", "lm_head", {}),
        ("llama", DOWN, {"intermediate_size": 96}),
        ("llama", DOWN, {"mlp_bias": True}),
        ("qwen2", DOWN, {}),
    ],
)
def test_nvfp4_is_refused_where_llamacpp_would_not_multiply(
    family: str, where: str, changes: dict[str, Any], assets: Path
) -> None:
    changes = {"intermediate_size": 128, **changes}
    also = {where: "nvfp4"}
    artifact = compressed(family, assets=assets, scheme=None, also=also, **changes)
    problems = GGUFExporter().check(artifact.plan, artifact.description)
    assert [problem.where for problem in problems] == [where]
    assert "applies its outer scale in attention" in problems[0].message


@pytest.mark.parametrize(
    ("family", "part", "changes"),
    [
        ("llama", "self_attn", {"attention_bias": True, "mlp_bias": True}),
        ("qwen2", "self_attn", {}),
        ("qwen3", "", {}),
    ],
)
def test_llamacpp_multiplies_elsewhere(
    family: str, part: str, changes: dict[str, Any], assets: Path, tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp")
    changes = {"intermediate_size": 128, **changes}
    dense = compressed(family, assets=assets, scheme=None, **changes)
    also = {n: "nvfp4" for n in dense.description.linears() if part in n}
    artifact = compressed(family, assets=assets, scheme=None, also=also, **changes)
    exporter = GGUFExporter(GGUFOptions(embedding="f16"))
    exporter.write(artifact, tmp_path)
    tokens = torch.arange(48)[None]
    logits = torch.stack(list(exporter.replay(tmp_path, tokens)))
    assert mean_kl(torch_logits(artifact, tokens), logits) < 1e-6


def test_blocks_of_several_widths_have_it_in_attention(
    assets: Path, tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp")
    sizes: dict[str, Any] = {"widths": (128, 64, 192), "vocab_size": ROWS}
    model, whole = uneven_artifact(
        assets=assets, scheme="nvfp4", bos_token_id=0, eos_token_id=0, **sizes
    )
    exporter = GGUFExporter(GGUFOptions(embedding="f32"))
    refused = {p.where for p in exporter.check(whole.plan, whole.description)}
    assert refused == {name for name in whole.plan.layers if ".mlp." in name}
    layers = {n: x for n, x in whole.plan.layers.items() if n not in refused}
    artifact = replace(whole, plan=Plan("tiny", layers))
    exporter.write(artifact, tmp_path)
    tokens = torch.arange(48)[None]
    with torch.no_grad():
        for name in refused:
            weight = whole.source.read(f"{name}.weight")
            model.get_submodule(name).weight.copy_(weight)
        expected = model(tokens).logits
    logits = torch.stack(list(exporter.replay(tmp_path, tokens)))
    assert mean_kl(expected, logits) < 1e-6


@pytest.mark.parametrize("mixture", KINDS)
def test_experts_have_a_factor_each_in_llamacpp(mixture: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    save_mixture(tmp_path / "model", mixture)
    handle = opened(tmp_path / "model")
    layers = {
        name: replace(layer, scheme=Scheme.parse("nvfp4"))
        for name, layer in plan_of(handle, "rtn").layers.items()
        if layer.shape[1] % 64 == 0  # all but the experts' down
    }
    plan = Plan("tiny", layers)

    def quantized(name: str) -> QuantizedTensor:
        weight = handle.source.read(f"{name}.weight")
        return RoundToNearest().quantize(weight, layers[name].scheme, None)

    artifact = CompressedModel(handle.description, plan, handle.source, quantized)
    exporter = GGUFExporter(GGUFOptions(embedding="f32"))
    file = open_gguf(exporter.write(artifact, tmp_path).files[0])
    factors = file.read_values("blk.0.ffn_gate_exps.scale").flatten()
    assert len(set(factors.tolist())) == 4  # one for all would not do
    tokens = windows(2, 16)
    found = torch.stack(list(exporter.replay(tmp_path, tokens))).log_softmax(-1)
    source = CompressedSource(handle.source, plan, quantized)
    model = StreamedModel(handle.description, source)
    expected = torch.stack(list(model.logits(tokens))).log_softmax(-1)
    kl = (expected.exp() * (expected - found)).sum(-1)
    assert float(kl.mean()) < 1e-5
    own, back = quantized(next(iter(layers))), GGUFSource(file.path)
    values = back.read(f"{next(iter(layers))}.weight").float()
    assert torch.allclose(values, own.dequantize(), rtol=1e-2, atol=1e-3)
