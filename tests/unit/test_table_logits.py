"""Logits by tables: the arithmetic, and heads of transformers models that use it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from export_fixtures import make_artifact, round_to_nearest

import compress
from compress.core import palette_format
from compress.core.artifact import CompressedModel
from compress.core.errors import CheckpointError
from compress.core.scheme import Scheme
from compress.core.table_products import products
from compress.export.palette import PaletteExporter, PaletteOptions
from compress.runtime.coded_modules import TableHead, TiedHead, TiedTableHead

WINDOWS = torch.arange(24).view(2, 12)
BY_TABLES = PaletteExporter(PaletteOptions(table_logits=True))


def ends(scheme: str | None, others: str | None = "palette4") -> Any:
    """Return what each layer gets: embedding and head one scheme, the rest another."""

    def scheme_of(layer: str) -> str | None:
        return others if ".layers." in layer else scheme

    return scheme_of


def write(folder: Path, exporter: PaletteExporter, **options: Any) -> CompressedModel:
    artifact = make_artifact(ends("pq-4x5"), **options)
    assert exporter.check(artifact.plan, artifact.description) == []
    exporter.write(artifact, folder)
    return artifact


def opened(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return torch.stack([model(w[None]).logits[0] for w in WINDOWS])


@pytest.mark.parametrize("name", ["pq-4x8", "pq-2x9", "pq-8x5x2", "pq-16x3x3-scaled"])
@pytest.mark.parametrize("leading", [(), (3,), (2, 5)])
def test_table_products_are_those_of_the_decoded_matrix(
    name: str, leading: tuple[int, ...]
) -> None:
    scheme = Scheme.parse(name)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(130, 64, generator=generator)
    coded = round_to_nearest(weight, scheme)
    inputs = torch.randn(*leading, 64, generator=generator)
    found = products(inputs, palette_format.encode(coded), scheme)
    expected = inputs @ coded.dequantize().T
    assert found.shape == expected.shape and found.dtype == torch.float32
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("tied", [False, True])
def test_logits_by_tables_are_the_dense_logits(tied: bool, tmp_path: Path) -> None:
    write(tmp_path, BY_TABLES, tied=tied, scale_dtype="float16")
    model = opened(tmp_path, dtype=torch.float32)
    assert isinstance(model.lm_head, TiedTableHead if tied else TableHead)
    dense = logits(compress.load(tmp_path, dtype=torch.float32))
    found = logits(model)
    assert float((found - dense).abs().max()) < 1e-5 * float(dense.abs().max())
    assert torch.equal(logits(model.dequantize()), dense)


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_keeps_its_tables(tied: bool, tmp_path: Path) -> None:
    write(tmp_path, BY_TABLES, tied=tied, scale_dtype="float16")
    model = opened(tmp_path, dtype=torch.float32)
    model.save_pretrained(tmp_path / "again")
    again = opened(tmp_path / "again", dtype=torch.float32)
    assert type(again.lm_head) is type(model.lm_head)
    assert torch.equal(logits(again), logits(model))


def test_a_head_is_decoded_unless_the_config_says_it(tmp_path: Path) -> None:
    write(tmp_path, PaletteExporter(), tied=True)
    model = opened(tmp_path, dtype=torch.float32)
    assert type(model.lm_head) is TiedHead
    assert torch.equal(logits(model), logits(compress.load(tmp_path)))
    set_table_logits(tmp_path)
    assert isinstance(opened(tmp_path).lm_head, TiedTableHead)


def set_table_logits(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["table_logits"] = True
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("tied", [False, True])
def test_the_exporter_refuses_a_head_without_such_tables(tied: bool) -> None:
    name = "model.embed_tokens" if tied else "lm_head"
    for scheme in ("palette4", None):
        artifact = make_artifact(ends(scheme), tied=tied)
        (problem,) = BY_TABLES.check(artifact.plan, artifact.description)
        assert problem.where == "table_logits" and name in problem.message


@pytest.mark.parametrize("tied", [False, True])
def test_a_config_that_asks_for_missing_tables_is_refused(
    tied: bool, tmp_path: Path
) -> None:
    PaletteExporter().write(make_artifact(ends("palette4"), tied=tied), tmp_path)
    set_table_logits(tmp_path)
    with pytest.raises(CheckpointError, match="table_logits"):
        opened(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_planned_bytes_are_those_of_the_file(tied: bool, tmp_path: Path) -> None:
    artifact = write(tmp_path, PaletteExporter(), tied=tied)
    predicted = PaletteExporter().file_bytes(artifact.plan, artifact.description)
    assert predicted == (tmp_path / "model.safetensors").stat().st_size
    layer = artifact.plan.layers["model.embed_tokens"]
    rows, columns = layer.shape
    bits = layer.scheme.bits_per_weight(columns, rows)
    each = PaletteExporter().tensor_bytes(artifact.plan, artifact.description)
    assert each[layer.name] == pytest.approx(bits * rows * columns / 8)


@pytest.mark.parametrize("tied", [False, True])
def test_codes_read_back_bit_for_bit(tied: bool, tmp_path: Path) -> None:
    artifact = write(tmp_path, PaletteExporter(), tied=tied)
    for layer in artifact.plan.layers:
        found = PaletteExporter().read_codes(tmp_path, layer)
        before = artifact.quantized(layer)
        assert found.scheme == before.scheme
        for key, tensor in before.state().items():
            assert torch.equal(tensor, found.state()[key]), (layer, key)


def test_a_config_of_an_unknown_grid_is_refused() -> None:
    scheme = Scheme.parse("pq-4x8")
    config = palette_format.config_of({"lm_head": (scheme, (512, 64))})
    assert config["groups"][0]["grid"] == "product"
    assert palette_format.layers_of(config) == {"lm_head": (scheme, (512, 64))}
    config["groups"][0]["grid"] = "sum"
    with pytest.raises(CheckpointError, match="int, codebook and product"):
        palette_format.layers_of(config)
