"""Folders of models whose blocks differ in width, in stock transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf_fixtures import save_tokenizer
from shapes_fixtures import uneven_artifact
from streaming_fixtures import FAMILIES, WINDOWS

import compress
from compress.core.plan import Plan
from compress.core.shapes import MODELING_FILE
from compress.export.safetensors import SafetensorsExporter, SafetensorsOptions
from compress.model.loading import check_tensors, open_model

pytest.importorskip("compressed_tensors")
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def logits_of(model: object, windows: torch.Tensor = WINDOWS) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(windows).logits  # type: ignore[operator]
    return logits


@pytest.mark.parametrize("silent", [(), (1,)])
@pytest.mark.parametrize("kind", FAMILIES)
def test_coded_folders_load(kind: str, silent: tuple[int, ...], tmp_path: Path) -> None:
    model, artifact = uneven_artifact(kind, scheme="int4-g32", silent=silent)
    attention = [name for name in artifact.plan.layers if "layers.1.self_attn" in name]
    assert (attention == []) == bool(silent)
    exporter = SafetensorsExporter(SafetensorsOptions())
    assert exporter.check(artifact.plan, artifact.description) == []
    exporter.write(artifact, tmp_path)
    expected = logits_of(model)
    replayed = torch.stack(list(exporter.replay(tmp_path, WINDOWS)))
    torch.testing.assert_close(replayed, expected, **CLOSE)
    torch.testing.assert_close(logits_of(compress.load(tmp_path)), expected, **CLOSE)
    check_tensors(open_model(str(tmp_path), cache=tmp_path / "cache"))


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("scheme", [None, "int8-asym", "fp8-w8a8", "mxfp4"])
def test_schemes_load(scheme: str | None, dense: bool, tmp_path: Path) -> None:
    # transformers decodes zero points in the type of the scales.
    model, artifact = uneven_artifact(scheme=scheme, tied=True, scale_dtype="float32")
    exporter = SafetensorsExporter(SafetensorsOptions(dense=dense))
    assert exporter.check(artifact.plan, artifact.description) == []
    result = exporter.write(artifact, tmp_path)
    replayed = torch.stack(list(exporter.replay(tmp_path, WINDOWS)))
    torch.testing.assert_close(replayed, logits_of(model), **CLOSE)
    plan, described = artifact.plan, artifact.description
    assert exporter.file_bytes(plan, described) == result.size_bytes


def test_the_card_names_the_code_and_how_to_trust_it(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save_tokenizer(tmp_path / "assets")
    _, artifact = uneven_artifact(assets=tmp_path / "assets", silent=(1,))
    folder = tmp_path / "out"
    folder.mkdir()
    SafetensorsExporter(SafetensorsOptions()).write(artifact, folder)
    card = (folder / "README.md").read_text()
    assert 'from_pretrained("FOLDER", trust_remote_code=True)' in card
    assert MODELING_FILE in card
    assert "MLPs are 32 to 96 neurons wide, 1 of them without attention" in card
    stock = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    handle = open_model(str(folder), cache=tmp_path)
    text = "the cat's friends"
    assert handle.tokenizer()(text)["input_ids"] == stock(text)["input_ids"]


def test_changed_code_is_not_run_to_verify(tmp_path: Path) -> None:
    _, artifact = uneven_artifact()
    exporter = SafetensorsExporter(SafetensorsOptions())
    exporter.write(artifact, tmp_path)
    with (tmp_path / MODELING_FILE).open("a") as file:
        file.write("raise SystemExit('this code was run')\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        next(exporter.replay(tmp_path, WINDOWS))


def test_what_cannot_be_loaded_is_refused() -> None:
    _, artifact = uneven_artifact(scheme="int4-g32")
    plan, described = artifact.plan, artifact.description
    vllm = SafetensorsExporter(SafetensorsOptions(runtime="vllm"))
    assert any("differ in the width" in x.message for x in vllm.check(plan, described))
    mixture = replace(described, config={**described.config, "model_type": "mixtral"})
    for dense in (False, True):
        exporter = SafetensorsExporter(SafetensorsOptions(dense=dense))
        found = exporter.check(Plan("tiny", {}), mixture)
        assert any("'mixtral' cannot differ" in x.message for x in found)
