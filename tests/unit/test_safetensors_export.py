"""The safetensors exporter, checked with compressed-tensors' own packer and schema."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from export_fixtures import linears, make_artifact, round_to_nearest
from pydantic import ValidationError
from safetensors.torch import load_file

from compress.core.artifact import CompressedModel
from compress.core.compressed_tensors import layout_of
from compress.core.errors import CheckpointError, ExportError, MissingDependencyError
from compress.core.scheme import Scheme
from compress.export.safetensors import SafetensorsExporter, SafetensorsOptions

Q_PROJ = "model.layers.0.self_attn.q_proj"
EMBEDDING = "model.embed_tokens"


def mixed(layer: str) -> str | None:
    if ".layers." not in layer:
        return None
    return "int6-g32" if "self_attn" in layer else "int3"


def written(artifact: CompressedModel, folder: Path, size: str = "5GB") -> Path:
    SafetensorsExporter(SafetensorsOptions(max_shard_size=size)).write(artifact, folder)
    return folder


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("zero", ["", "-asym"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_packing_equals_the_librarys_own(bits: int, zero: str) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized")
    scheme = Scheme.parse(f"int{bits}-g20{zero}")
    weight = torch.randn(37, 60, generator=torch.Generator().manual_seed(bits))
    tensor = round_to_nearest(weight, scheme)
    layout = layout_of(scheme)
    stored = layout.encode(tensor)
    packed = helpers.pack_to_int32(tensor.codes, bits)
    assert torch.equal(stored["weight_packed"], packed)
    if tensor.zero is not None:
        zeros = helpers.pack_to_int32(tensor.zero, bits, packed_dim=0)
        assert torch.equal(stored["weight_zero_point"], zeros)
    again = layout.decode(stored, scheme, tensor.shape)
    assert torch.equal(again.codes, tensor.codes)
    assert again.zero is None or torch.equal(again.zero, tensor.zero)


def test_long_rows_are_packed_in_runs_without_a_seam(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scheme = Scheme.parse("int3-g16-asym")
    tensor = round_to_nearest(torch.randn(50, 48), scheme)
    layout = layout_of(scheme)
    whole = layout.encode(tensor)
    monkeypatch.setattr("compress.core.compressed_tensors.packed_integers._RUN", 7 * 48)
    in_runs = layout.encode(tensor)
    assert all(torch.equal(whole[name], in_runs[name]) for name in whole)
    again = layout.decode(whole, scheme, tensor.shape)
    assert torch.equal(again.codes, tensor.codes)


@pytest.mark.parametrize("scheme_of", [linears("int4-g32"), linears("int5"), mixed])
def test_the_config_passes_the_librarys_schema(scheme_of, tmp_path: Path) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    artifact = make_artifact(scheme_of)
    data = config_of(written(artifact, tmp_path))["quantization_config"]
    parsed = quantization.QuantizationConfig.model_validate(data)
    assert parsed.quantization_status == "compressed"
    covered = [t for group in parsed.config_groups.values() for t in group.targets]
    assert sorted(covered) == sorted(artifact.plan.layers)
    assert parsed.ignore == ["lm_head"]


def test_layers_without_codes_are_ignored_by_name(tmp_path: Path) -> None:
    def only_mlp(layer: str) -> str | None:
        return "int4-g32" if ".mlp." in layer else None

    folder = written(make_artifact(only_mlp), tmp_path)
    ignored = config_of(folder)["quantization_config"]["ignore"]
    assert Q_PROJ in ignored
    assert "lm_head" in ignored
    assert "model.layers.0.mlp.up_proj" not in ignored


@pytest.mark.parametrize("scheme_of", [linears("int4-g32-asym"), mixed, lambda _: None])
@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_predicted_bytes_are_the_bytes_of_the_files(
    scheme_of, size: str, tmp_path: Path
) -> None:
    artifact = make_artifact(scheme_of, dtype="bfloat16", tied=True)
    exporter = SafetensorsExporter(SafetensorsOptions(max_shard_size=size))
    sizes = exporter.tensor_bytes(artifact.plan, artifact.description)
    result = exporter.write(artifact, tmp_path)
    files = list(tmp_path.glob("*.safetensors"))
    headers = sum(8 + int.from_bytes(f.read_bytes()[:8], "little") for f in files)
    assert result.size_bytes == sum(f.stat().st_size for f in files)
    assert sum(sizes.values()) == result.size_bytes - headers
    assert (size == "5GB") == (len(files) == 1)


@pytest.mark.parametrize("size", ["5GB", "10KB"])
@pytest.mark.parametrize("scheme_of", [linears("int4-g32-asym"), mixed])
def test_codes_read_back_exactly(scheme_of, size: str, tmp_path: Path) -> None:
    artifact = make_artifact(scheme_of, scale_dtype="float16")
    folder = written(artifact, tmp_path, size)
    for layer in artifact.plan.layers:
        expected = artifact.quantized(layer)
        found = SafetensorsExporter().read_codes(folder, layer)
        assert found.scheme == expected.scheme
        assert found.state().keys() == expected.state().keys()
        for name, tensor in expected.state().items():
            assert torch.equal(found.state()[name], tensor)


def test_codes_of_a_dense_layer_are_an_error(tmp_path: Path) -> None:
    folder = written(make_artifact(linears("int4-g32")), tmp_path)
    with pytest.raises(CheckpointError, match="names no codes of lm_head"):
        SafetensorsExporter().read_codes(folder, "lm_head")


def test_dense_tensors_take_the_models_type(tmp_path: Path) -> None:
    artifact = make_artifact(linears("int4-g32"), dtype="bfloat16", tied=True)
    artifact.source.state["model.norm.weight"] = torch.full((64,), 1.2345)
    stored = load_file(written(artifact, tmp_path) / "model.safetensors")
    assert stored["model.norm.weight"].dtype == torch.bfloat16
    assert torch.equal(
        stored["model.embed_tokens.weight"], artifact.source.read(f"{EMBEDDING}.weight")
    )
    assert "lm_head.weight" not in stored
    assert f"{Q_PROJ}.weight" not in stored
    config = config_of(tmp_path)
    assert (config["dtype"], config["tie_word_embeddings"]) == ("bfloat16", True)


def test_values_beyond_the_models_type_are_an_error(tmp_path: Path) -> None:
    artifact = make_artifact(linears("int4-g32"), dtype="float16")
    artifact.source.state["model.norm.weight"] = torch.full((64,), 1e6)
    with pytest.raises(ExportError, match=r"model\.norm\.weight.*do not fit float16"):
        written(artifact, tmp_path)


def test_a_plan_without_layers_is_a_plain_checkpoint(tmp_path: Path) -> None:
    artifact = make_artifact(lambda _: None)
    stored = load_file(written(artifact, tmp_path) / "model.safetensors")
    assert stored.keys() == artifact.description.tensors.keys()
    assert "quantization_config" not in config_of(tmp_path)
    assert "pack-quantized" not in (tmp_path / "README.md").read_text()


def test_each_weight_is_read_once_and_coded_ones_never(tmp_path: Path) -> None:
    artifact = make_artifact(linears("int4-g32"))
    written(artifact, tmp_path)
    coded = {f"{layer}.weight" for layer in artifact.plan.layers}
    expected = [n for n in artifact.description.tensors if n not in coded]
    assert artifact.source.reads == expected


def test_two_writes_are_the_same_bytes(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        written(make_artifact(mixed), folder)
    names = sorted(path.name for path in folders[0].iterdir())
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_tokenizer_files_are_copied_and_nothing_else(tmp_path: Path) -> None:
    assets, out = tmp_path / "in", tmp_path / "out"
    assets.mkdir()
    out.mkdir()
    wanted = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    for name in [*wanted, "pytorch_model.bin", "modeling.py", "generation_config.json"]:
        (assets / name).write_text('{"from": "base"}')
    (assets / "README.md").write_text("---\nlicense: mit\n---\nbase card")
    result = SafetensorsExporter().write(
        make_artifact(linears("int4-g32"), assets=assets), out
    )
    ours = ["README.md", "config.json", "generation_config.json", "model.safetensors"]
    assert sorted(p.name for p in out.iterdir()) == sorted(wanted + ours)
    assert {path.name for path in result.files} == {p.name for p in out.iterdir()}
    assert (out / "generation_config.json").read_text() == '{"from": "base"}'
    assert "license: mit" in (out / "README.md").read_text()


def test_generation_config_falls_back_to_the_special_tokens(tmp_path: Path) -> None:
    folder = written(make_artifact(linears("int4-g32")), tmp_path)
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2


def test_config_drops_what_speaks_of_the_original_file(tmp_path: Path) -> None:
    artifact = make_artifact(linears("int4-g32"))
    config = dict(artifact.description.config)
    config.update(torch_dtype="float16", quantization_config={"bits": 4}, auto_map={})
    config.pop("architectures")
    description = replace(artifact.description, config=config)
    found = config_of(written(replace(artifact, description=description), tmp_path))
    assert found["quantization_config"]["quant_method"] == "compressed-tensors"
    assert found["architectures"] == ["LlamaForCausalLM"]
    assert not {"torch_dtype", "auto_map"} & found.keys()


def test_the_card_says_what_and_how(tmp_path: Path) -> None:
    artifact = make_artifact(linears("int3-g32-asym"))
    artifact = replace(artifact, provenance={"compress": "1.2.3"})
    text = (written(artifact, tmp_path) / "README.md").read_text()
    assert "| `int3-g32-asym` | pack-quantized | float32 | 14 |" in text
    assert "compressed-tensors>=0.20" in text
    assert "CompressedTensorsConfig(dequantize=True)" in text
    assert "vllm serve" in text
    assert "licence | unknown" in text
    assert "| compress | `1.2.3` |" in text


@pytest.mark.parametrize(
    ("scheme_of", "tied", "where", "message"),
    [
        (linears("q4_1"), False, Q_PROJ, "use int4-g32 or int4-g32-asym"),
        (lambda _: "int8-g32", True, EMBEDDING, "cannot load a coded embedding"),
        (linears("int4-g48"), False, Q_PROJ, "use 16 or 32 or 64"),
        (
            lambda n: (
                ("int4-asym" if "mlp" in n else "int4") if "layers" in n else None
            ),
            False,
            "model.layers.0.mlp.gate_proj",
            "int4-asym beside other schemes",
        ),
    ],
)
def test_what_cannot_be_held_is_a_problem(scheme_of, tied, where, message) -> None:
    artifact = make_artifact(scheme_of, tied=tied)
    problems = SafetensorsExporter().check(artifact.plan, artifact.description)
    assert problems[0].where == where
    assert message in problems[0].message


def test_a_tied_head_in_the_plan_is_a_problem() -> None:
    artifact = make_artifact(lambda n: None if n == EMBEDDING else "int4-g32")
    tied = make_artifact(linears("int4-g32"), tied=True).description
    (problem,) = SafetensorsExporter().check(artifact.plan, tied)
    assert problem.where == "lm_head"
    assert "shares the embedding" in problem.message


def test_a_plan_of_other_shapes_is_a_problem() -> None:
    artifact = make_artifact(linears("int4-g32"))
    layers = dict(artifact.plan.layers)
    layers[Q_PROJ] = replace(layers[Q_PROJ], shape=(64, 32))
    plan = replace(artifact.plan, layers=layers)
    (problem,) = SafetensorsExporter().check(plan, artifact.description)
    assert "plan it again" in problem.message


@pytest.mark.parametrize("scheme", ["int2", "int4-g32", "int8-g64", "int4-asym"])
def test_uniform_integer_plans_have_no_problem(scheme: str) -> None:
    artifact = make_artifact(linears(scheme))
    assert SafetensorsExporter().check(artifact.plan, artifact.description) == []


def test_notes_name_what_a_reader_must_know() -> None:
    def uneven(layer: str) -> str | None:
        if layer == "lm_head":
            return "int8-g32"
        return "int5-g32" if "q_proj" in layer else linears("int4-g32")(layer)

    artifact = make_artifact(uneven, dtype="bfloat16", scale_dtype="float16")
    notes = SafetensorsExporter().notes(artifact.plan, artifact.description)
    text = " ".join(notes)
    assert "Scales are float16 in a bfloat16 model" in text
    assert "Codes of 5 bits" in text
    assert "self_attn.q_proj, self_attn.k_proj, self_attn.v_proj" in text
    assert "lm_head is coded" in text


def test_a_plain_plan_needs_no_notes() -> None:
    artifact = make_artifact(linears("int4-g32"))
    assert SafetensorsExporter().notes(artifact.plan, artifact.description) == ()


@pytest.mark.parametrize("size", [1000, "1000", "1 KB"])
def test_shard_size_is_a_number_or_a_size(size) -> None:
    options = SafetensorsOptions.model_validate({"max_shard_size": size})
    assert SafetensorsOptions.model_validate(options.model_dump()) == options


@pytest.mark.parametrize("size", ["big", 0, True, -1])
def test_a_shard_size_that_is_none_is_refused(size) -> None:
    with pytest.raises(ValidationError):
        SafetensorsOptions.model_validate({"max_shard_size": size})


def test_replay_without_the_library_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = written(make_artifact(linears("int4-g32")), tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "compressed_tensors", None)
    windows = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(MissingDependencyError, match=r"compress-llm\[verify\]"):
        next(SafetensorsExporter().replay(folder, windows))
