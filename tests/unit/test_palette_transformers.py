"""Palette folders in transformers, opened by what `import compress` registers."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from export_fixtures import dense_logits, make_artifact
from safetensors.torch import load_file, save_file

import compress
from compress.core.artifact import CompressedModel
from compress.core.errors import CheckpointError
from compress.export.palette import PaletteExporter, PaletteOptions
from compress.runtime.coded_modules import CodedEmbedding, CodedLinear, TiedHead

WINDOWS = torch.arange(24).view(2, 12)
Q_PROJ = "model.layers.0.self_attn.q_proj"


def mixed(layer: str) -> str | None:
    """Tables of every kind, a grid, and layers that stay dense."""
    kinds = {
        "q_proj": "pq-4x5",
        "k_proj": "palette4-r1",
        "v_proj": "palette2-tensor",
        "o_proj": "palette-2x6-r32",
        "gate_proj": "aqlm-2x9g8",
        "up_proj": "palette5-scaled",
        "down_proj": "int4-g32-asym",
        "embed_tokens": "palette6",
        "lm_head": "pq-8x4x2-scaled",
    }
    if layer == "model.layers.1.mlp.up_proj":
        return None
    return kinds.get(layer.rsplit(".", 1)[-1])


def without_ends(layer: str) -> str | None:
    return mixed(layer) if ".layers." in layer else None


def write(folder: Path, scheme_of: Any = mixed, **options: Any) -> CompressedModel:
    artifact = make_artifact(scheme_of, **options)
    assert PaletteExporter().check(artifact.plan, artifact.description) == []
    PaletteExporter(PaletteOptions(max_shard_size="30KB")).write(artifact, folder)
    return artifact


def opened(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return torch.stack([model(w[None]).logits[0] for w in WINDOWS])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scheme_of", [mixed, without_ends])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_bit_equal_to_the_dense_decode(
    scheme_of: Any, tied: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    write(tmp_path, scheme_of, tied=tied, scale_dtype="float16")
    model = opened(tmp_path, dtype=dtype)
    assert model.model.layers[0].self_attn.q_proj.tables.dtype == torch.float16
    dense = compress.load(tmp_path, dtype=dtype)
    assert torch.equal(logits(model), logits(dense))


def test_logits_are_those_of_the_artifact(tmp_path: Path) -> None:
    artifact = write(tmp_path)
    found = logits(opened(tmp_path, dtype=torch.float32))
    assert torch.allclose(found, dense_logits(artifact, WINDOWS), atol=1e-5)


def test_codes_stay_codes_in_memory(tmp_path: Path) -> None:
    write(tmp_path, tied=True)
    model = opened(tmp_path)
    assert isinstance(model.get_submodule(Q_PROJ), CodedLinear)
    assert isinstance(model.model.embed_tokens, CodedEmbedding)
    assert isinstance(model.lm_head, TiedHead)
    assert isinstance(model.model.layers[1].mlp.up_proj, torch.nn.Linear)
    names = dict(model.named_parameters())
    assert f"{Q_PROJ}.weight" not in names
    assert model.get_submodule(Q_PROJ).codes.dtype == torch.uint8


@pytest.mark.parametrize("tied", [False, True])
def test_saving_keeps_every_tensor(tied: bool, tmp_path: Path) -> None:
    write(tmp_path / made(tmp_path, "a"), tied=tied, scale_dtype="float16")
    model = opened(tmp_path / "a", dtype=torch.float32)
    before = logits(model)
    model.save_pretrained(tmp_path / "b")
    again = opened(tmp_path / "b", dtype=torch.float32)
    assert torch.equal(logits(again), before)
    assert torch.equal(logits(compress.load(tmp_path / "b")), before)
    first, second = state(tmp_path / "a"), state(tmp_path / "b")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def made(folder: Path, name: str) -> str:
    (folder / name).mkdir()
    return name


def state(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def test_casting_a_model_leaves_its_tables(tmp_path: Path) -> None:
    write(tmp_path, scale_dtype="float16")
    model = opened(tmp_path, dtype=torch.float32).to(torch.bfloat16)
    expected = compress.load(tmp_path).to(torch.bfloat16)
    assert model.model.embed_tokens.tables.dtype == torch.float16
    assert torch.equal(logits(model), logits(expected))


def test_a_copy_reads_its_own_embedding(tmp_path: Path) -> None:
    write(tmp_path, tied=True)
    model = opened(tmp_path)
    other = copy.deepcopy(model)
    before = logits(model)
    model.model.embed_tokens.tables.zero_()
    assert torch.equal(logits(other), before)
    assert not torch.equal(logits(model), before)


@pytest.mark.parametrize("tied", [False, True])
def test_decoding_once_changes_nothing(tied: bool, tmp_path: Path) -> None:
    write(tmp_path, tied=tied)
    model = opened(tmp_path, dtype=torch.bfloat16)
    before = logits(model)
    dense = model.dequantize()
    assert torch.equal(logits(dense), before)
    assert isinstance(dense.get_submodule(Q_PROJ), torch.nn.Linear)
    assert (dense.lm_head.weight is dense.model.embed_tokens.weight) == tied
    dense.save_pretrained(tmp_path / "dense")
    assert torch.equal(logits(opened(tmp_path / "dense")), before)


def test_generating_works(tmp_path: Path) -> None:
    write(tmp_path, tied=True)
    ids = opened(tmp_path).generate(WINDOWS[:1], max_new_tokens=3, do_sample=False)
    assert ids.shape[1] == 15


@pytest.mark.parametrize("suffix", ["codes", "tables"])
def test_a_missing_tensor_is_refused_by_name(suffix: str, tmp_path: Path) -> None:
    artifact = make_artifact(mixed)
    PaletteExporter().write(artifact, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    del stored[f"{Q_PROJ}.{suffix}"]
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{Q_PROJ}: {suffix} is missing"):
        opened(tmp_path)


def test_tables_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    PaletteExporter().write(make_artifact(mixed), tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored[f"{Q_PROJ}.tables"][0, 0, 0] = float("nan")
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{Q_PROJ}\.tables has NaN"):
        opened(tmp_path)


@pytest.mark.parametrize(
    "lines",
    [
        "import compress, transformers",
        "import transformers, compress",
        "import transformers.quantizers.auto, compress",
        "import compress, compress; from transformers import AutoModelForCausalLM",
    ],
)
def test_the_order_of_imports_does_not_matter(lines: str) -> None:
    code = (
        f"{lines}\nfrom transformers.quantizers import auto\n"
        "assert 'palette' in auto.AUTO_QUANTIZER_MAPPING"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_stays_light() -> None:
    code = (
        "import sys, compress\n"
        "assert not {'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
