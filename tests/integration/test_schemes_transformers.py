"""Every scheme with a layout: written, read by us, and run in stock transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from export_fixtures import dense_logits, linears, make_artifact
from torch import Tensor

from compress.core.artifact import CompressedModel
from compress.core.compressed_tensors import as_read
from compress.export.safetensors import SafetensorsExporter, SafetensorsOptions
from compress.model.quantized_source import PackedSource
from compress.runtime.load import load
from compress.scoring import inspect

pytest.importorskip("compressed_tensors")
pytestmark = pytest.mark.integration
WINDOWS = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(1))
CACHE = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}

# Decoded exactly by the library.
EXACT = [
    *("w6a8-g128", "w6a8-g64-group", "w4a8-g64", "w8a8-g64", "w8a8", "w8a8-asym"),
    *("fp8", "fp8-w8a8", "fp8-block", "fp8-tensor", "fp8-g64", "w4afp8-g128"),
    *("mxfp4", "mxfp6", "mxfp8", "fp4-g64-pow2", "w4a8-fp-g64-pow2"),
]
# Rounded to bfloat16 by the library: relative error 2**-9 of each weight.
ROUNDED = ["nvfp4", "nvfp4-w4a4", "fp4-g32", "w4a8-fp-g64", "w4a8-fp-g64-ratio"]


def write(artifact: CompressedModel, folder: Path, **options) -> SafetensorsExporter:
    exporter = SafetensorsExporter(SafetensorsOptions(**options))
    assert exporter.check(artifact.plan, artifact.description) == []
    sizes = exporter.tensor_bytes(artifact.plan, artifact.description)
    result = exporter.write(artifact, folder)
    header = (folder / "model.safetensors").read_bytes()[:8]
    extra = 4 * sum(scale.numel() for scale in artifact.kv_scales.values())
    data = result.size_bytes - 8 - int.from_bytes(header, "little")
    assert sum(sizes.values()) + extra == data
    return exporter


def mean_kl(reference: Tensor, other: Tensor) -> float:
    p, q = reference.log_softmax(-1), other.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def kl_of(artifact: CompressedModel, exporter: SafetensorsExporter, folder: Path):
    reference = dense_logits(artifact, WINDOWS)
    replayed = torch.stack(list(exporter.replay(folder, WINDOWS)))
    served = exporter.serve(folder, WINDOWS)
    return mean_kl(reference, replayed), (
        None if served is None else mean_kl(reference, torch.stack(list(served)))
    )


@pytest.mark.parametrize("name", EXACT + ROUNDED)
def test_a_scheme_goes_through_every_reader(name: str, tmp_path: Path) -> None:
    artifact = make_artifact(linears(name), dtype="bfloat16", hidden=128)
    exporter = write(artifact, tmp_path)
    source = PackedSource(tmp_path)
    for layer, planned in artifact.plan.layers.items():
        expected = artifact.quantized(layer)
        for found in (source.codes(layer), exporter.read_codes(tmp_path, layer)):
            assert torch.equal(found.codes, expected.codes)
            assert torch.equal(found.scales(), expected.scales())
            assert torch.equal(found.dequantize(), expected.dequantize())
            assert found.scheme.name == as_read(planned.scheme).name
    listed = {row["scheme"] for row in inspect(tmp_path).layers}
    assert as_read(artifact.plan.layers[layer].scheme).name in listed
    reference = dense_logits(artifact, WINDOWS)
    model = load(tmp_path)
    with torch.inference_mode():
        ours = torch.stack([model(w[None]).logits[0] for w in WINDOWS])
    assert torch.equal(ours, reference)
    replayed, served = kl_of(artifact, exporter, tmp_path)
    assert replayed < (1e-9 if name in EXACT else 1e-3)
    # Rounding inputs must show, or the switch that turns it off proves nothing.
    rounds = artifact.plan.layers[layer].scheme.inputs is not None
    assert (served is not None) == rounds
    assert served is None or served > 1e-4


def test_formats_may_be_mixed(tmp_path: Path) -> None:
    kinds = {
        "q_proj": "nvfp4",
        "k_proj": "fp8-w8a8",
        "v_proj": "int3-g32",
        "o_proj": "mxfp4",
        "gate_proj": "w6a8-g64",
        "up_proj": "w8a8",
    }
    artifact = make_artifact(
        lambda n: kinds.get(n.rpartition(".")[2]) if "layers" in n else None,
        dtype="bfloat16",
        hidden=128,
    )
    exporter = write(artifact, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert len({group["format"] for group in config["config_groups"].values()}) == 5
    replayed, served = kl_of(artifact, exporter, tmp_path)
    assert replayed < 1e-3
    assert served is not None


@pytest.mark.parametrize("name", ["nvfp4", "mxfp8", "fp8-w8a8", "w6a8-g64"])
def test_the_default_load_of_a_user_runs(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    artifact = make_artifact(linears(name), dtype="bfloat16", hidden=128)
    write(artifact, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.inference_mode():
        logits = model(WINDOWS).logits
    assert logits.dtype == torch.bfloat16
    # bfloat16 activations, and rounded inputs: near, not equal.
    assert mean_kl(dense_logits(artifact, WINDOWS), logits.float()) < 0.3


def test_decoding_to_bfloat16_is_the_librarys_and_noted(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    artifact = make_artifact(linears("mxfp4"), hidden=128)
    exporter = write(artifact, tmp_path)
    notes = " ".join(exporter.notes(artifact.plan, artifact.description))
    assert "load the model in bfloat16, a float32 one stops" in notes
    with pytest.raises(RuntimeError, match="same dtype"):
        AutoModelForCausalLM.from_pretrained(tmp_path)(WINDOWS)


@pytest.mark.parametrize("scheme", [None, "int4-g32"])
@pytest.mark.parametrize("heads", [False, True])
def test_cache_scales_are_read_and_used(scheme, heads: bool, tmp_path: Path) -> None:
    scale = torch.tensor([0.01, 0.02]).view(2, 1, 1) if heads else torch.tensor([0.02])
    scales = {
        f"model.layers.{index}.self_attn.{kind}_scale": scale
        for index in range(2)
        for kind in "kv"
    }
    artifact = replace(
        make_artifact(lambda n: linears(scheme)(n) if scheme else None),
        kv_scales=scales,
        kv_cache_scheme={**CACHE, "strategy": "attn_head" if heads else "tensor"},
    )
    exporter = write(artifact, tmp_path)
    replayed, served = kl_of(artifact, exporter, tmp_path)
    assert replayed < 1e-9
    assert served is not None
    assert served > 1e-5
    source = PackedSource(tmp_path)
    assert set(source.cache_scales) == set(scales)
    assert torch.equal(source.read(next(iter(scales))), scale)
    assert source.tensors().keys() == artifact.description.tensors.keys()
    assert (
        "key-value cache is to be held in 8 bits"
        in (tmp_path / "README.md").read_text()
    )


@pytest.mark.parametrize("name", ["e3m0-g32", "int4-g32-lorc8", "int4-g32-offset"])
def test_what_has_no_layout_goes_out_dense(name: str, tmp_path: Path) -> None:
    artifact = make_artifact(linears(name), dtype="bfloat16")
    refused = SafetensorsExporter().check(artifact.plan, artifact.description)
    assert "dense: true" in refused[0].message
    exporter = write(artifact, tmp_path, dense=True)
    assert not exporter.keeps_codes
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["compress"] == {"weights": "decoded", "schemes": {name: 14}}
    card = (tmp_path / "README.md").read_text()
    assert "they save no memory" in card
    assert f"Decoded values of {name}, in bfloat16" in card
    replayed, served = kl_of(artifact, exporter, tmp_path)
    assert replayed < 1e-3
    assert served is None
