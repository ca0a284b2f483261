"""Every example runs, on a tiny model; every config in them is valid as it stands."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from pipeline_fixtures import save_checkpoint, write_text

import compress
from compress.config import load_config, load_sweep
from compress.core.scheme import Scheme
from compress.registry import get_quantizer

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SWEEP = EXAMPLES / "06_sweep.yaml"
CONFIGS = sorted({*EXAMPLES.glob("*.yaml")} - {SWEEP})
by_name = pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples") / "tiny"
    save_checkpoint(
        folder,
        tie_word_embeddings=True,
        dtype=torch.float16,
        intermediate_size=320,
    )
    return folder


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@by_name
def test_config_is_valid(config: Path) -> None:
    loaded = load_config(config)
    assert loaded.export, "an example ends with files"
    assert not loaded.run.workdir.is_absolute()


def test_examples_use_work_directories_of_their_own() -> None:
    folders = [load_config(config).run.workdir for config in CONFIGS]
    assert len(set(folders)) == len(CONFIGS)


@pytest.mark.integration
@by_name
def test_config_runs(config: Path, checkpoint: Path, tmp_path: Path) -> None:
    changes = [
        f"model.path={checkpoint}",
        f"run.workdir={tmp_path / 'work'}",
        "run.verify=false",
        "run.threads=1",
        f"evaluate.perplexity=[{write_text(tmp_path)}]",
        "evaluate.windows=1",
        "evaluate.sequence_length=32",
        "calibration.samples=4",
        "calibration.sequence_length=32",
    ]
    if load_config(config).recover is not None:
        short = {"steps": 1, "minutes": "null", "samples": 4, "held_out": 2, "batch": 2}
        changes += [f"recover.options.{key}={value}" for key, value in short.items()]
        changes.append("recover.options.sequence_length=16")
    wanted = {entry.format for entry in load_config(config).export}
    result = compress.run(load_config(config, changes))
    assert set(result.report["exports"]) == wanted
    for export in result.report["exports"].values():
        assert all((tmp_path / "work" / file).is_file() for file in export["files"])
    assert (tmp_path / "work" / "report.html").is_file()


@pytest.mark.integration
def test_sweep_runs(checkpoint: Path, tmp_path: Path) -> None:
    changes = [
        f"base.model.path={checkpoint}",
        f"base.calibration.data={write_text(tmp_path)}",
        "base.calibration.samples=4",
        "base.calibration.sequence_length=32",
        "base.allocate.windows=2",
        "budgets=[9bpw, 0.6x]",
        f"workdir={tmp_path / 'sweep'}",
    ]
    points = compress.sweep(load_sweep(SWEEP, changes)).data["points"]
    assert len(points) == 4
    assert all(point["bytes"] <= point["budget_bytes"] for point in points)


@pytest.mark.integration
def test_python_api_runs(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    example = script("python_api")
    monkeypatch.setattr(example, "TEXT", str(write_text(tmp_path)))
    example.main(str(checkpoint), tmp_path, samples=8, length=32)
    printed = capsys.readouterr().out
    first, second = (
        float(line.rpartition(":")[2])
        for line in printed.splitlines()
        if line.startswith("KL ")
    )
    assert first == pytest.approx(second, rel=1e-3)  # one file and memory agree
    assert "LlamaForCausalLM" in printed
    assert (tmp_path / "in_memory" / "model.safetensors").is_file()


def test_custom_quantizer_with_the_whole_range_is_rtn(checkpoint: Path) -> None:
    example = script("custom_quantizer")
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    scheme = Scheme.parse("int4-g32")
    options = example.ClippedOptions(clip=1)
    own = example.Clipped(options).quantize(weight, scheme, None)
    other = get_quantizer("rtn")().quantize(weight, scheme, None)
    assert torch.equal(own.codes, other.codes)
    assert torch.equal(own.scale, other.scale)


def test_custom_quantizer_runs_as_a_script(checkpoint: Path) -> None:
    errors = script("custom_quantizer").main(str(checkpoint))
    assert all(0 < error < 0.1 for error in errors.values())
