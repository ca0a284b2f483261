"""The aqlm exporter, checked with stock transformers and the aqlm library."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from export_fixtures import dense_logits, linears, make_artifact, round_to_nearest
from safetensors.torch import load_file, save_file

import compress
from compress.core import aqlm_format
from compress.core.artifact import CompressedModel
from compress.core.errors import CheckpointError, MissingDependencyError
from compress.core.scheme import Scheme
from compress.core.tensors import QuantizedTensor
from compress.export.aqlm import AqlmExporter
from compress.model.coded_source import open_coded

WINDOWS = torch.arange(24).view(2, 12)
UP_PROJ = "model.layers.0.mlp.up_proj"


def partly(scheme: str) -> Callable[[str], str | None]:
    """Code all linears but the attention of the first block."""
    return lambda layer: (
        scheme if ".layers." in layer and "0.self_attn" not in layer else None
    )


def write(folder: Path, scheme: str = "aqlm-2x8g8", **options: Any) -> CompressedModel:
    artifact = make_artifact(partly(scheme), scale_dtype="float16", **options)
    AqlmExporter().write(artifact, folder)
    return artifact


def stored_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "scheme", ["aqlm-1x8g8", "aqlm-2x8g8", "aqlm-3x8g4", "aqlm-1x16g8"]
)
def test_stock_transformers_computes_what_we_decode(
    scheme: str, tied: bool, tmp_path: Path
) -> None:
    pytest.importorskip("aqlm")
    pytest.importorskip("numba")
    pytest.importorskip("scipy")
    artifact = write(tmp_path, scheme, tied=tied)
    found = torch.stack(list(AqlmExporter().replay(tmp_path, WINDOWS)))
    expected = dense_logits(artifact, WINDOWS)
    assert (found - expected).norm() <= 1e-3 * expected.norm()


def test_a_coded_head_loads_in_stock_transformers(tmp_path: Path) -> None:
    pytest.importorskip("aqlm")
    pytest.importorskip("numba")
    pytest.importorskip("scipy")
    artifact = make_artifact(
        lambda n: None if "embed" in n else "aqlm-2x8g8", scale_dtype="float16"
    )
    assert AqlmExporter().check(artifact.plan, artifact.description) == []
    AqlmExporter().write(artifact, tmp_path)
    found = torch.stack(list(AqlmExporter().replay(tmp_path, WINDOWS)))
    expected = dense_logits(artifact, WINDOWS)
    assert (found - expected).norm() <= 1e-3 * expected.norm()


def test_shapes_and_types_are_those_of_the_library(tmp_path: Path) -> None:
    write(tmp_path)
    stored = stored_in(tmp_path)
    found = {
        suffix: (str(tensor.dtype), list(tensor.shape))
        for suffix in aqlm_format.SUFFIXES
        for tensor in [stored[f"{UP_PROJ}.{suffix}"]]
    }
    assert found == {
        "codes": ("torch.int8", [128, 8, 2]),
        "codebooks": ("torch.float16", [2, 256, 1, 8]),
        "scales": ("torch.float16", [128, 1, 1, 1]),
    }
    assert f"{UP_PROJ}.weight" not in stored


@pytest.mark.parametrize("scheme", ["aqlm-2x8g8", "aqlm-1x16g8"])
def test_codes_are_packed_as_the_library_packs_them(
    scheme: str, tmp_path: Path
) -> None:
    utils = pytest.importorskip("aqlm.utils")
    artifact = write(tmp_path, scheme)
    stored = stored_in(tmp_path)[f"{UP_PROJ}.codes"]
    tensor = artifact.quantized(UP_PROJ)
    bits = tensor.scheme.bits
    places = tensor.codes.long() & ((1 << bits) - 1)
    packed = utils.pack_int_data(places.view(stored.shape).clone(), bits)
    assert torch.equal(stored, packed)


def test_dense_linears_are_listed_under_both_names(tmp_path: Path) -> None:
    write(tmp_path, tied=True)
    config = json.loads((tmp_path / "config.json").read_text())
    entry = config["quantization_config"]
    skipped = entry.pop("linear_weights_not_to_quantize")
    dense = ["lm_head", *(f"model.layers.0.self_attn.{p}_proj" for p in "qkvo")]
    assert sorted(skipped) == sorted(n + s for n in dense for s in ("", ".weight"))
    assert entry == {
        "quant_method": "aqlm",
        "in_group_size": 8,
        "out_group_size": 1,
        "num_codebooks": 2,
        "nbits_per_codebook": 8,
    }


@pytest.mark.parametrize("scheme", ["aqlm-2x8g8", "aqlm-1x16g8"])
def test_folded_tables_read_back_as_they_were(scheme: str, tmp_path: Path) -> None:
    artifact = write(tmp_path, scheme)
    stored = stored_in(tmp_path)
    largest = stored[f"{UP_PROJ}.codebooks"].abs().max()
    assert 0.5 < largest <= 1
    for layer in artifact.plan.layers:
        own, read = (
            artifact.quantized(layer),
            AqlmExporter().read_codes(tmp_path, layer),
        )
        assert read.scheme == own.scheme
        assert own.state().keys() == read.state().keys()
        assert all(torch.equal(t, read.state()[n]) for n, t in own.state().items())


@pytest.mark.parametrize("factor", [2.0**-9, 1.0, 2.0**10])
def test_a_folding_that_would_round_is_left_out(factor: float) -> None:
    scheme = Scheme.parse("aqlm-1x8g8").with_scales("float16")
    tensor = round_to_nearest(torch.randn(16, 32), scheme)
    assert tensor.tables is not None
    tables = tensor.tables * factor
    scale = torch.full((16, 1), 60000.0, dtype=torch.float16)
    tensor = QuantizedTensor(tensor.codes, scale, None, scheme, tables=tables)
    stored, exponent = aqlm_format.encode(tensor)
    again = aqlm_format.decode(stored, scheme, exponent=exponent)
    assert stored["scales"].isfinite().all()
    assert torch.equal(again.dequantize(), tensor.dequantize())
    assert torch.equal(again.scale, scale)


@pytest.mark.parametrize(
    ("scheme_of", "where", "message"),
    [
        (linears("palette4"), "model.layers.0.self_attn.q_proj", "holds aqlm-MxBgG"),
        (linears("int4-g32"), "model.layers.0.self_attn.q_proj", "palette export"),
        (linears("aqlm-1x6g8"), "model.layers.0.self_attn.q_proj", "only 8 and 16"),
        (linears("aqlm-1x8g48"), "model.layers.0.self_attn.q_proj", "48 columns"),
        (lambda _: "aqlm-1x8g8", "model.embed_tokens", "no coded embeddings"),
        (
            lambda n: f"aqlm-{2 if 'mlp' in n else 1}x8g8" if ".layers." in n else None,
            "model.layers.1.mlp.down_proj",
            "one scheme for the whole model",
        ),
    ],
)
def test_what_cannot_be_held_is_a_problem(
    scheme_of: Callable[[str], str | None], where: str, message: str
) -> None:
    artifact = make_artifact(scheme_of, scale_dtype="float16")
    problems = AqlmExporter().check(artifact.plan, artifact.description)
    assert where in {problem.where for problem in problems}
    assert all(message in problem.message for problem in problems)


def test_tables_of_another_type_are_a_problem() -> None:
    artifact = make_artifact(linears("aqlm-1x8g8"), scale_dtype="bfloat16")
    problems = AqlmExporter().check(artifact.plan, artifact.description)
    assert "set quantize.scale_dtype: float16" in problems[0].message


def test_a_head_of_a_tied_model_is_a_problem() -> None:
    untied = make_artifact(lambda n: "aqlm-1x8g8" if n == "lm_head" else None)
    tied = make_artifact(lambda _: None, tied=True).description
    (problem,) = AqlmExporter().check(untied.plan, tied)
    assert "shares the embedding" in problem.message


def test_our_reader_decodes_the_folder(tmp_path: Path) -> None:
    artifact = write(tmp_path, tied=True)
    source = open_coded(tmp_path)
    assert set(source.schemes) == set(artifact.plan.layers)
    for layer in artifact.plan.layers:
        expected = artifact.quantized(layer).dequantize()
        assert torch.equal(source.read(f"{layer}.weight"), expected)
    with torch.inference_mode():
        model = compress.load(tmp_path)
        found = torch.stack([model(w[None]).logits[0] for w in WINDOWS])
    assert torch.allclose(found, dense_logits(artifact, WINDOWS), atol=1e-5)


def test_folders_that_the_library_saved_are_read(tmp_path: Path) -> None:
    """As stock transformers writes them: two shards of names, config rewritten."""
    pytest.importorskip("aqlm")
    from transformers import AutoModelForCausalLM

    write(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    model.save_pretrained(tmp_path / "again")
    one, two = open_coded(tmp_path), open_coded(tmp_path / "again")
    for layer in one.schemes:
        name = f"{layer}.weight"
        assert torch.equal(one.read(name), two.read(name))


@pytest.mark.parametrize(
    ("suffix", "tensor", "message"),
    [
        ("codes", torch.zeros(128, 8, dtype=torch.int8), "codes is"),
        ("codes", torch.zeros(128, 8, 1, dtype=torch.int8), "codes is int8"),
        ("scales", torch.zeros(64, 1, 1, 1), "scales is"),
        ("codebooks", torch.zeros(2, 16, 1, 8), "codebooks is"),
        ("codebooks", None, "codebooks is missing"),
        ("scales", None, "scales is missing"),
        ("codes", None, "codes is missing"),
    ],
)
def test_damage_is_named(
    suffix: str, tensor: torch.Tensor | None, message: str, tmp_path: Path
) -> None:
    write(tmp_path)
    stored = stored_in(tmp_path)
    if tensor is None:
        del stored[f"{UP_PROJ}.{suffix}"]
    else:
        stored[f"{UP_PROJ}.{suffix}"] = tensor
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{UP_PROJ}: {message}"):
        open_coded(tmp_path)


def test_codes_beyond_their_bits_are_refused(tmp_path: Path) -> None:
    """Six bits in a byte, as other writers of the layout store them."""
    write(tmp_path)
    stored = stored_in(tmp_path)
    for name in [n for n in stored if n.endswith(".codebooks")]:
        stored[name] = stored[name][:, :64].contiguous()
    save_file(stored, tmp_path / "model.safetensors")
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["nbits_per_codebook"] = 6
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="6 bits hold -32 to 31"):
        open_coded(tmp_path).read(f"{UP_PROJ}.weight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out_group_size": 8}, "span rows"),
        ({"num_codebooks": 0}, "num_codebooks"),
        ({"nbits_per_codebook": 20}, "20 bits"),
    ],
)
def test_configs_that_make_no_sense_are_refused(
    change: dict[str, int], message: str, tmp_path: Path
) -> None:
    write(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        open_coded(tmp_path)


def test_replay_without_the_library_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "aqlm", None)
    with pytest.raises(MissingDependencyError, match=r"compress-llm\[aqlm\]"):
        next(AqlmExporter().replay(tmp_path, WINDOWS))


def test_a_plan_without_layers_is_a_plain_checkpoint(tmp_path: Path) -> None:
    AqlmExporter().write(make_artifact(lambda _: None), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config


def test_blocks_of_different_widths_are_a_problem() -> None:
    artifact = make_artifact(linears("aqlm-1x8g8"), scale_dtype="float16")
    config = dict(artifact.description.config)
    config["intermediate_size_per_layer"] = [128, 64]
    description = replace(artifact.description, config=config)
    problems = AqlmExporter().check(artifact.plan, description)
    assert "were not tried" in problems[-1].message
