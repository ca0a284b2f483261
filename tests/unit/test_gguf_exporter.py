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
    same_codes,
    save_tokenizer,
    with_scales,
)

from compress.core.artifact import CompressedModel
from compress.core.errors import ExportError
from compress.export.gguf import GGUFExporter, GGUFOptions
from compress.export.gguf_names import to_gguf_rows
from compress.export.gguf_reader import open_gguf

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    save_tokenizer(folder)
    return folder


def exporter(**options: Any) -> GGUFExporter:
    return GGUFExporter(GGUFOptions(**options))


def written(artifact: CompressedModel, folder: Path, **options: Any) -> GGUFExporter:
    plugin = exporter(**options)
    plugin.write(artifact, folder)
    return plugin


@pytest.mark.parametrize("family", FAMILIES)
def test_codes_of_every_layer_come_back(
    family: str, assets: Path, tmp_path: Path
) -> None:
    artifact = compressed(family, assets=assets)
    plugin = written(artifact, tmp_path)
    wrong = [
        layer
        for layer in artifact.plan.layers
        if not same_codes(plugin.read_codes(tmp_path, layer), artifact.quantized(layer))
    ]
    assert wrong == []


@pytest.mark.parametrize("kind", ["q4_1", "q5_0", "q5_1", "q8_0"])
def test_codes_of_every_type_come_back(kind: str, assets: Path, tmp_path: Path) -> None:
    artifact = compressed("llama", assets=assets, scheme=kind)
    plugin = written(artifact, tmp_path)
    layer = "model.layers.1.self_attn.k_proj"
    assert same_codes(plugin.read_codes(tmp_path, layer), artifact.quantized(layer))


def test_gguf_package_decodes_the_permuted_weight(assets: Path, tmp_path: Path) -> None:
    artifact = compressed("llama", assets=assets)
    result = exporter().write(artifact, tmp_path)
    tensors = {t.name: t for t in gguf.GGUFReader(result.files[0]).tensors}
    stored = tensors["blk.0.attn_q.weight"]
    values = gguf.quants.dequantize(stored.data, stored.tensor_type)
    weight = artifact.quantized("model.layers.0.self_attn.q_proj").dequantize()
    assert np.array_equal(values, to_gguf_rows(weight, 4).numpy())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_tensor_bytes_are_those_of_the_file(
    family: str, tied: bool, assets: Path, tmp_path: Path
) -> None:
    artifact = compressed(family, assets=assets, tie_word_embeddings=tied)
    promised = exporter().tensor_bytes(artifact.plan, artifact.description)
    result = exporter().write(artifact, tmp_path)
    stored = {t.name: t.n_bytes for t in gguf.GGUFReader(result.files[0]).tensors}
    assert sum(promised.values()) == sum(stored.values())
    assert promised["model.embed_tokens"] == stored["token_embd.weight"]
    assert ("output.weight" in stored) == (not tied)
    assert result.size_bytes == result.files[0].stat().st_size


def test_file_is_named_after_model_and_scheme(assets: Path, tmp_path: Path) -> None:
    artifact = compressed("llama", assets=assets)
    label = "x/SmolLM2-135M-Instruct.Q4_1.gguf"
    artifact = replace(artifact, description=replace(artifact.description, label=label))
    result = exporter().write(artifact, tmp_path)
    assert result.files[0].name == "SmolLM2-135M-Instruct-int4-g32.gguf"


def test_a_mixed_file_is_named_after_its_bits(assets: Path, tmp_path: Path) -> None:
    down = {f"model.layers.{i}.mlp.down_proj": "q8_0" for i in range(2)}
    artifact = compressed("llama", assets=assets, also=down)
    (path,) = exporter().write(artifact, tmp_path).files
    file = gguf.GGUFReader(path)
    weights = sum(int(t.n_elements) for t in file.tensors)
    bits = 8 * sum(int(t.n_bytes) for t in file.tensors) / weights
    assert path.name == f"Tiny-llama-mixed-{round(bits, 2)}bpw.gguf"
    assert str(file.fields["general.name"].contents()) == path.stem


def test_a_coded_embedding_makes_no_mixed_file(assets: Path, tmp_path: Path) -> None:
    also = {"model.embed_tokens": "q8_0", "lm_head": "q5_0"}
    result = exporter().write(compressed("llama", assets=assets, also=also), tmp_path)
    assert result.files[0].name == "Tiny-llama-int4-g32.gguf"


def test_stand_ins_make_no_mixed_file(assets: Path, tmp_path: Path) -> None:
    artifact = compressed("llama", assets=assets)
    layers = {n: replace(x, asked="q4_k") for n, x in artifact.plan.layers.items()}
    name = "model.layers.0.mlp.up_proj"
    other = compressed("llama", assets=assets, also={name: "q8_0"})
    layers[name] = replace(other.plan.layers[name], asked="q4_k")
    mixed = replace(other, plan=replace(other.plan, layers=layers))
    result = exporter().write(mixed, tmp_path)
    assert result.files[0].name == "Tiny-llama-int4-g32.gguf"


def test_option_names_the_file(assets: Path, tmp_path: Path) -> None:
    result = exporter(name="mine").write(compressed("llama", assets=assets), tmp_path)
    assert result.files[0].name == "mine.gguf"


def test_metadata_describes_the_model(assets: Path, tmp_path: Path) -> None:
    artifact = compressed("qwen3", assets=assets, head_dim=32)
    file = open_gguf(exporter().write(artifact, tmp_path).files[0])
    found = {
        key: file.architecture_value(key)
        for key in ("attention.key_length", "attention.head_count_kv", "block_count")
    }
    assert file.architecture == "qwen3"
    assert found == {
        "attention.key_length": 32,
        "attention.head_count_kv": 2,
        "block_count": 2,
    }
    assert file.get("general.file_type") == 2
    assert str(file.get("general.quantized_by")).startswith("compress-llm ")
    assert len(file.get("tokenizer.ggml.tokens")) == ROWS


def test_embedding_option_sets_type_of_embedding_and_head(
    assets: Path, tmp_path: Path
) -> None:
    artifact = compressed("llama", assets=assets)
    result = exporter(embedding="f16").write(artifact, tmp_path)
    tensors = open_gguf(result.files[0]).tensors
    assert tensors["token_embd.weight"].type == "f16"
    assert tensors["output.weight"].type == "f16"


def test_embedding_of_odd_width_is_f16_and_noted(assets: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 40, "head_dim": 8, "num_key_value_heads": 4}
    artifact = compressed("llama", assets=assets, scheme=None, **sizes)
    result = exporter().write(artifact, tmp_path)
    assert open_gguf(result.files[0]).tensors["token_embd.weight"].type == "f16"
    assert any("no multiple of 32, so f16" in note for note in result.notes)


def test_embedding_codes_of_the_plan_are_kept(assets: Path, tmp_path: Path) -> None:
    also = {"model.embed_tokens": "q5_0"}
    artifact = compressed("llama", assets=assets, also=also, tie_word_embeddings=True)
    plugin = written(artifact, tmp_path)
    back = plugin.read_codes(tmp_path, "model.embed_tokens")
    assert same_codes(back, artifact.quantized("model.embed_tokens"))


def test_dense_layers_keep_the_models_type(assets: Path, tmp_path: Path) -> None:
    artifact = compressed("llama", assets=assets, scheme=None)
    file = open_gguf(exporter().write(artifact, tmp_path).files[0])
    name = "blk.1.ffn_down.weight"
    expected = artifact.source.read("model.layers.1.mlp.down_proj.weight").float()
    assert file.tensors[name].type == "f16"
    assert np.array_equal(file.read_values(name), expected.numpy())


@pytest.mark.parametrize("scheme", ["int4-g16", "int4", "int3-g32", "int4-g32-asym"])
def test_check_names_layer_and_remedy(scheme: str, assets: Path) -> None:
    artifact = compressed("llama", assets=assets, scheme=scheme)
    problems = exporter().check(artifact.plan, artifact.description)
    assert [p.where for p in problems] == list(artifact.plan.layers)
    assert f"no type for {scheme} " in problems[0].message
    assert "use q4_0" in problems[0].message
    assert "reencode: q8_0" in problems[0].message


def test_check_refuses_bfloat16_scales(assets: Path) -> None:
    artifact = with_scales(compressed("llama", assets=assets), "bfloat16")
    problems = exporter().check(artifact.plan, artifact.description)
    assert "bfloat16 scales" in problems[0].message


def test_reencode_rounds_dequantized_weights_again(
    assets: Path, tmp_path: Path
) -> None:
    artifact = compressed("llama", assets=assets, scheme="int4-g16")
    result = exporter(reencode="q8_0").write(artifact, tmp_path)
    file = open_gguf(result.files[0])
    weight = artifact.quantized("model.layers.0.mlp.up_proj").dequantize()
    kind = gguf.GGMLQuantizationType.Q8_0
    expected = gguf.quants.quantize(weight.numpy(), kind)
    assert np.array_equal(file.read("blk.0.ffn_up.weight"), expected)
    assert any("int4-g16 re-encoded as q8_0" in note for note in result.notes)


def test_reencoded_to_f16_has_no_codes(assets: Path, tmp_path: Path) -> None:
    artifact = compressed("llama", assets=assets, scheme="int4-g16")
    plugin = written(artifact, tmp_path, reencode="f16")
    with pytest.raises(ExportError, match="has no codes"):
        plugin.read_codes(tmp_path, "model.layers.0.mlp.up_proj")


def test_family_without_gguf_architecture_asks_for_template(assets: Path) -> None:
    artifact = compressed("gemma2", assets=assets, tie_word_embeddings=True)
    problems = exporter().check(artifact.plan, artifact.description)
    assert len(problems) == 1
    assert "does not know gemma2; give `template: FILE.gguf`" in problems[0].message


def test_unknown_rope_is_a_problem(assets: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    artifact = compressed("llama", assets=assets, rope_parameters=rope)
    problems = exporter().check(artifact.plan, artifact.description)
    assert "'dynamic' is not one of" in problems[0].message


def test_missing_tokenizer_is_a_problem() -> None:
    artifact = compressed("llama", assets=None)
    problems = exporter().check(artifact.plan, artifact.description)
    assert [p.where for p in problems] == ["tokenizer"]
    with pytest.raises(ExportError, match="tokenizer"):
        exporter().write(artifact, Path("unused"))


def test_nan_weights_are_refused_by_name(assets: Path, tmp_path: Path) -> None:
    artifact = compressed("llama", assets=assets)
    artifact.source.state["lm_head.weight"][0, 0] = torch.nan  # type: ignore[attr-defined]
    with pytest.raises(ExportError, match=r"lm_head\.weight has NaN"):
        exporter().write(artifact, tmp_path)


def test_a_full_disk_is_an_export_error(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(ExportError, match="No space left on device; free some space"):
        exporter().write(compressed("llama", assets=assets), tmp_path)


def test_a_sliding_window_is_noted(assets: Path, tmp_path: Path) -> None:
    artifact = compressed("mistral", assets=assets, sliding_window=32)
    result = exporter().write(artifact, tmp_path)
    assert any("window of 32 tokens" in note for note in result.notes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "'gelu' is not silu"),
        (
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 1e4,
                    "factor": 2.0,
                    "attention_factor": 1.5,
                }
            },
            "attention_factor 1.5 is set",
        ),
    ],
)
def test_settings_gguf_cannot_express_are_problems(
    changes: dict[str, Any], message: str, assets: Path
) -> None:
    artifact = compressed("llama", assets=assets, **changes)
    problems = exporter().check(artifact.plan, artifact.description)
    assert [message in problem.message for problem in problems] == [True]


def test_a_layer_that_the_model_lacks_is_a_problem(assets: Path) -> None:
    artifact = compressed("llama", assets=assets)
    layer = next(iter(artifact.plan.layers.values()))
    plan = replace(artifact.plan, layers={"model.other": layer})
    problems = exporter().check(plan, artifact.description)
    assert [p.where for p in problems] == ["model.other"]
