"""Digests, versions and hardware of a report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pipeline_fixtures import copy_without, save_checkpoint

from compress import __version__, provenance
from compress.core.artifact import ModelDescription
from compress.model.loading import open_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_checkpoint(folder, tokenizer=False)
    return folder


def description(folder: Path) -> ModelDescription:
    return open_model(str(folder), cache=folder).description


def test_digests_do_not_depend_on_the_order_of_keys() -> None:
    assert provenance.digest_of({"a": 1, "b": 2}) == provenance.digest_of(
        {"b": 2, "a": 1}
    )
    assert provenance.digest_of({"a": 1}) != provenance.digest_of({"a": 2})


def test_a_model_is_known_by_its_content(checkpoint: Path, tmp_path: Path) -> None:
    copy = copy_without(checkpoint, tmp_path / "other")
    model = description(checkpoint)
    first = provenance.model_digest(model, checkpoint)
    assert provenance.model_digest(description(copy), copy) == first
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert provenance.model_digest(model, copy) != first


def test_the_config_is_part_of_the_digest(checkpoint: Path, tmp_path: Path) -> None:
    copy = copy_without(checkpoint, tmp_path / "other")
    path = copy / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 1.0}))
    first = provenance.model_digest(description(checkpoint), checkpoint)
    assert provenance.model_digest(description(copy), copy) != first


def test_versions_and_hardware_are_filled_in() -> None:
    versions = provenance.versions()
    assert versions["compress"] == __version__
    assert {"python", "torch", "transformers", "safetensors"} <= set(versions)
    hardware = provenance.hardware("cpu")
    assert hardware["cpu"] and hardware["cores"] >= 1
    assert hardware["memory_bytes"] > 1 << 28
    assert provenance.peak_memory_bytes() > 1 << 24
