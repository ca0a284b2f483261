"""Pruning by ``compress run``: every family, in stock transformers; and its life."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_fixtures import KINDS
from pipeline_fixtures import (
    GGUF,
    Ground,
    call,
    config_of,
    digests,
    save_checkpoint,
    write_config,
    write_text,
)
from pruning_fixtures import kept_neurons, loaded
from streaming_fixtures import FAMILIES, WINDOWS
from torch import Tensor

import compress
from compress.core.errors import ConfigError
from compress.core.families import FAMILIES as TABLE
from compress.core.families import family_of
from compress.model.experts import weight_of
from compress.model.loading import check_tensors, open_model
from compress.model.streaming import StreamedModel
from compress.pruning.shards import ShardFolder

EVERY = {**FAMILIES, **KINDS}
NOTHING_ELSE = {"quantize": None, "export": None, "evaluate": None}
SIXTEENS = {"sparsity": 0.3, "round_to": 16}


def logits_of(model: Any, windows: Tensor = WINDOWS) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(windows).logits
    return logits


def test_every_family_of_the_table_is_tried() -> None:
    assert {k for family in TABLE for k in family.model_types} == set(EVERY)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("pruning"))


@pytest.fixture(scope="module", params=EVERY)
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Any]:
    """Kind, folder and transformers model of three random blocks."""
    kind: str = request.param
    folder = tmp_path_factory.mktemp("pruning") / kind
    model = save_checkpoint(folder, kind, num_hidden_layers=3, **EVERY[kind])
    model.set_attn_implementation("eager")  # others have no soft cap (Gemma 2)
    return kind, folder, model


def without_columns(model: Any, kind: str, kept: dict[str, list[int]]) -> None:
    """Silence the neurons that are gone, in the dense model."""
    family = family_of(kind)
    for path, neurons in kept.items():
        leaf = "down_proj" if kind != "mixtral" else "w2"
        weight = weight_of(model, family, f"{path}.{leaf}")
        gone = [j for j in range(weight.shape[1]) if j not in neurons]
        assert gone, path
        weight[:, gone] = 0


def test_pruned_folders_load_in_stock_transformers(
    checkpoint: tuple[str, Path, Any], text: Path, tmp_path: Path
) -> None:
    """They compute what the dense model does without the neurons, and what we do."""
    kind, folder, model = checkpoint
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    prune = {"method": "wanda_sp", "repair": "none", **SIXTEENS}
    compress.run(config_of(folder, text, tmp_path, prune=prune, **NOTHING_ELSE))
    found, kept = logits_of(loaded(tmp_path)), kept_neurons(tmp_path)
    assert {len(neurons) for neurons in kept.values()} == {64}
    with torch.no_grad():
        without_columns(model, kind, kept)
        expected = logits_of(model)
        for name, parameter in model.named_parameters():
            parameter.copy_(dense[name])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    handle = open_model(str(tmp_path / "pruned"), cache=tmp_path / "cache")
    check_tensors(handle)
    streamed = StreamedModel(handle.description, handle.source).logits(WINDOWS)
    torch.testing.assert_close(torch.stack(list(streamed)), found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("checkpoint", ["phi3", "gemma2", "mixtral"], indirect=True)
def test_repaired_folders_load_in_stock_transformers(
    checkpoint: tuple[str, Path, Any], text: Path, tmp_path: Path
) -> None:
    """Of widths that differ where the family can, and nearer to the original."""
    kind, folder, _ = checkpoint
    errors = {}
    for repair in ("none", "least_squares"):
        workdir = tmp_path / repair
        prune = {"method": "cfsp", "repair": repair, **SIXTEENS}
        if kind not in KINDS:
            prune["shape"] = "per-layer"
        settings = config_of(folder, text, workdir, prune=prune, **NOTHING_ELSE)
        report = compress.run(settings).report
        widths = [block["after"] for block in report["pruning"]["blocks"]]
        assert (len(set(widths)) == 1) == (kind in KINDS)
        handle = open_model(str(workdir / "pruned"), cache=workdir / "cache")
        streamed = StreamedModel(handle.description, handle.source).logits(WINDOWS)
        found = logits_of(loaded(workdir))
        torch.testing.assert_close(
            torch.stack(list(streamed)), found, rtol=1e-4, atol=1e-4
        )
        blocks = report["pruning"]["blocks"]
        errors[repair] = [block["error"] for block in blocks]
        assert all(block["unseen"] == 0 for block in blocks) or kind in KINDS
    pairs = list(zip(errors["least_squares"], errors["none"], strict=True))
    measured = [(a, b) for a, b in pairs if a is not None]
    assert measured
    assert all(a < b or a == b == 0 for a, b in measured)  # 0: all neurons stay


# The life of a run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Ground:
    """A Llama of four blocks whose widths are whole groups after pruning."""
    folder = tmp_path_factory.mktemp("pruning-runs")
    save_checkpoint(
        folder / "tiny",
        num_hidden_layers=4,
        intermediate_size=128,
        dtype=torch.float16,
    )
    return Ground(folder, folder / "tiny", text)


def settings(tiny: Ground, name: str, /, **prune: Any) -> dict[str, Any]:
    """Return a config that prunes, quantizes and writes a GGUF file."""
    section = {"method": "cfsp", "sparsity": 0.25, "round_to": 32, **prune}
    return tiny.config(name, prune=section, evaluate=None, export=[GGUF])


class KilledError(Exception):
    """Stands for the end of the process."""


def kill_after(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    save = ShardFolder.save_block

    def save_and_die(self: ShardFolder, index: int, tensors: Any) -> None:
        save(self, index, tensors)
        if index + 1 == blocks:
            raise KilledError

    monkeypatch.setattr(ShardFolder, "save_block", save_and_die)


def test_a_run_that_was_killed_while_pruning_goes_on(
    tiny: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compress.run(settings(tiny, "prune-whole")).workdir
    killed = settings(tiny, "prune-killed")
    with monkeypatch.context() as patch:
        kill_after(2, patch)
        with pytest.raises(KilledError):
            compress.run(killed)
    workdir = tiny.folder / "prune-killed"
    assert not (workdir / "report.json").exists()
    with pytest.raises(ConfigError, match="holds an earlier run; continue it with"):
        compress.run(killed)
    changed = settings(tiny, "prune-killed", sparsity=0.5)
    with pytest.raises(ConfigError, match="prune changed since that run began"):
        compress.run(changed, resume=True)
    compress.run(killed, resume=True)
    for part in ("pruned", "export"):
        assert digests(workdir / part) == digests(whole / part)
    for config in (changed, tiny.config("prune-killed")):
        with pytest.raises(ConfigError, match=r"prune.* changed"):
            compress.run(config, resume=True)
    assert digests(workdir / "pruned") == digests(whole / "pruned")
    compress.run(changed, overwrite=True)
    assert digests(workdir / "pruned") != digests(whole / "pruned")
    compress.run(killed, overwrite=True)
    assert digests(workdir / "export") == digests(whole / "export")


def test_a_run_without_pruning_does_not_begin_to_prune(tiny: Ground) -> None:
    compress.run(tiny.config("prune-added"))
    with pytest.raises(ConfigError, match="prune changed since that run began"):
        compress.run(settings(tiny, "prune-added"), resume=True)
    assert not (tiny.folder / "prune-added/pruned").exists()


def test_the_plan_has_the_sizes_to_come_and_computes_nothing(tiny: Ground) -> None:
    config = settings(tiny, "prune-plan")
    path = write_config(tiny.folder / "prune-plan.yaml", config)
    result = call("run", path, "--dry-run")
    assert result.exit_code == 0, result.output
    assert not (tiny.folder / "prune-plan").exists()
    shown = compress.plan(config)
    report = compress.run(config).report
    assert dict(shown.sizes)["pruned"] == report["size_bytes"]["pruned"]
    sizes, weights = report["size_bytes"], report["pruning"]["parameters"]
    assert sizes["base"] == 2 * weights["before"]
    assert sizes["pruned"] == 2 * weights["after"]
    for figure in ("pruned", "gguf"):
        assert f"{shown.sizes[figure]:,}" in result.output
    shapes = {layer["name"]: tuple(layer["shape"]) for layer in report["layers"]}
    assert shapes == {n: layer.shape for n, layer in shown.plan.layers.items()}
    assert shapes["model.layers.3.mlp.down_proj"] == (64, 96)


@pytest.mark.usefixtures("llama_cpp")
@pytest.mark.parametrize("shape", ["uniform", "per-layer"])
def test_pruned_and_quantized_files_open_in_llama_cpp(shape: str, tiny: Ground) -> None:
    config = settings(tiny, f"prune-{shape}", shape=shape)
    config["run"]["verify"] = True
    report = compress.run(config).report
    verified = report["exports"]["gguf"]["verify"]
    assert verified["passed"], verified
    widths = {block["after"] for block in report["pruning"]["blocks"]}
    assert (len(widths) == 1) == (shape == "uniform")


def test_padded_and_per_layer_runs_measure_the_same(tiny: Ground) -> None:
    plain = {"quantize": None, "export": None}
    kls = []
    for shape in ("per-layer", "padded"):
        prune = {"method": "cfsp", "sparsity": 0.25, "round_to": 32, "shape": shape}
        workdir = f"prune-same-{shape}"
        report = compress.run(tiny.config(workdir, prune=prune, **plain)).report
        kls.append(report["metrics"]["compressed"]["kl"])
    assert kls[0] == pytest.approx(kls[1], rel=1e-3)


@pytest.mark.parametrize("method", ["maw", "random", "wanda_sp"])
def test_methods_without_data_come_with_a_warning(
    method: str, tiny: Ground, caplog: pytest.LogCaptureFixture
) -> None:
    prune = {"method": method, "sparsity": 0.25, "round_to": 32}
    config = tiny.config(f"prune-data-{method}", prune=prune, **NOTHING_ELSE)
    with caplog.at_level(logging.WARNING, logger="compress"):
        report = compress.run(config).report
    warns = method != "wanda_sp"
    for text in (" ".join(report["warnings"]), caplog.text):
        assert ("Data-driven scores are better" in text) == warns
    markdown = (tiny.folder / f"prune-data-{method}/report.md").read_text()
    assert ("Data-driven scores are better" in markdown) == warns
    assert "| MLP neurons | 512 | 384 | 75.0 % |" in markdown.replace("  ", " ")


def test_errors_of_the_section_have_a_place(tiny: Ground) -> None:
    config = settings(tiny, "prune-wrong", method="tailor", sparsity=1.5)
    path = write_config(tiny.folder / "prune-wrong.yaml", config)
    result = call("plan", path)
    assert result.exit_code == 2
    assert "prune.method" in result.output
    assert "did you mean 'taylor'" in result.output
    assert "prune.sparsity" in result.output
