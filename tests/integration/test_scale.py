"""Runs in several processes: the codes, files and figures of one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from moe_fixtures import save_mixture
from pipeline_fixtures import (
    GGUF,
    codes_of,
    config_of,
    digests,
    report_of,
    same,
    save_checkpoint,
    write_text,
)
from torchrun_fixtures import outcomes, run_processes

import compress

RUNS = """
import json, os, sys
from pathlib import Path
from compress import pipeline
cache = Path(sys.argv[1]) / f"cache-{os.environ['WORLD_SIZE']}"
os.environ["COMPRESS_CACHE"] = str(cache)
for name, config in json.loads(sys.argv[2]).items():
    result = pipeline.run(config)
    path = Path(config["run"]["workdir"]).with_suffix(f".{os.environ['RANK']}")
    path.write_text(json.dumps(result.report))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scale")
    save_checkpoint(folder / "tiny")
    save_checkpoint(folder / "wide", hidden_size=256, intermediate_size=256)
    save_mixture(folder / "mixtral", "mixtral")
    write_text(folder)
    return folder


def configs(folder: Path, size: int) -> dict[str, dict[str, Any]]:
    """Return a config for each kind of run, by name; for four processes of some."""

    def config(name: str, model: str = "tiny", **changes: Any) -> dict[str, Any]:
        workdir = folder / f"{name}-of-{size}"
        return config_of(folder / model, folder / "text.txt", workdir, **changes)

    gptq, gguf = {"method": "gptq"}, [{"format": "gguf"}]
    mixed = {"re:.*v_proj": {"scheme": "q6_k"}}
    tables = {
        "method": "aqlm",
        "scheme": "aqlm-1x4g8",
        "options": {"allow_large_tables": True},
    }
    dense = [{"format": "safetensors", "dense": True}]
    ends = {"re:.*(embed_tokens|lm_head)": {"scheme": "int8-g32"}}
    every = {
        "gptq": config("gptq", evaluate={"windows": 3}, run={"verify": True}),
        "mixture": config("mixture", "mixtral", calibration={"samples": 16}),
        "ends": config("ends", quantize={**gptq, "overrides": ends}, export=[GGUF]),
        "block": config("block", quantize={**gptq, "order": "block"}),
        "awq": config("awq", quantize={"method": "awq"}),
        "k": config(
            "k",
            "wide",
            quantize={**gptq, "scheme": "q4_k", "overrides": mixed},
            export=[{"format": "gguf", "imatrix": True}],
        ),
        "data-free": config("data-free", quantize={"method": "rtn"}),
        "tables": config("tables", quantize=tables, export=dense),
        "budget": config("budget", quantize=None, evaluate=None, export=gguf)
        | {
            "quantize": gptq,
            "budget": {"bits_per_weight": 7.0},
            "allocate": {
                "method": "evolution",
                "schemes": ["q4_0", "q5_0", "q8_0"],
                "samples": 8,
                "windows": 3,
            },
        },
    }
    return {name: every[name] for name in (OF_FOUR if size == 4 else every)}


OF_FOUR = ("gptq", "mixture", "k", "budget")
FILES = ("gptq", "k", "budget")  # whose exports are compared


@pytest.fixture(scope="module")
def alone(folder: Path) -> Mapping[str, dict[str, Any]]:
    """The reports of all runs in one process."""
    before = os.environ.get("COMPRESS_CACHE")
    os.environ["COMPRESS_CACHE"] = str(folder / "cache-1")
    try:
        return {n: compress.run(c).report for n, c in configs(folder, 1).items()}
    finally:
        os.environ.pop("COMPRESS_CACHE")
        if before is not None:
            os.environ["COMPRESS_CACHE"] = before


@pytest.fixture(scope="module", params=[2, 4])
def size(request: pytest.FixtureRequest, folder: Path, alone: Any) -> int:
    """How many processes have done all runs."""
    number = int(request.param)
    run_processes(RUNS, folder, configs(folder, number), size=number)
    return number


def test_codes_are_those_of_one_process(size: int, folder: Path) -> None:
    others = [
        name
        for name in configs(folder, size)
        if not same(
            codes_of(folder / f"{name}-of-1"), codes_of(folder / f"{name}-of-{size}")
        )
    ]
    assert others == []


@pytest.mark.parametrize("name", FILES)
def test_files_are_those_of_one_process(name: str, size: int, folder: Path) -> None:
    one, many = (digests(folder / f"{name}-of-{n}" / "export") for n in (1, size))
    assert one == many


def test_figures_are_those_of_one_process(
    size: int, folder: Path, alone: Mapping[str, dict[str, Any]]
) -> None:
    for name in configs(folder, size):
        report = alone[name]
        found = report_of(folder / f"{name}-of-{size}")
        for kind, figures in report["metrics"].items():
            expected = None if figures is None else pytest.approx(figures["perplexity"])
            own = found["metrics"][kind]
            assert (own and own["perplexity"]) == expected
        assert [p["rank"] for p in found["processes"]] == list(range(size))


def test_the_allocator_chooses_the_same_plan(size: int, folder: Path) -> None:
    chosen = [
        report_of(folder / f"budget-of-{n}")["allocation"]["assignment"]
        for n in (1, size)
    ]
    assert chosen[0] == chosen[1]


def test_all_processes_get_the_report(size: int, folder: Path) -> None:
    for name in configs(folder, size):
        path = folder / f"{name}-of-{size}"
        for rank in range(size):
            own = json.loads(path.with_suffix(f".{rank}").read_text())
            assert own == report_of(path)


BROKEN = """
import json, os, signal, sys
from compress import pipeline
from compress.core.errors import CompressError
from compress.parts import Part
options = json.loads(sys.argv[2])
add_all, seen = Part.add_all, 0
def killed(part, jobs):
    global seen
    seen += 1
    if options["kill"] and os.environ["RANK"] == "1" and seen == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return add_all(part, jobs)
Part.add_all = killed
try:
    pipeline.run(options["config"], resume=not options["kill"])
except CompressError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def test_a_run_goes_on_after_one_process_was_killed(
    folder: Path, alone: Any, tmp_path: Path
) -> None:
    config = configs(tmp_path, 2)["gptq"]
    config |= {key: configs(folder, 2)["gptq"][key] for key in ("model", "calibration")}
    config["evaluate"] = None
    first, killed = outcomes(BROKEN, tmp_path, {"config": config, "kill": True})
    assert killed[0] == -9
    assert first[0] == 1 and "--resume" in first[1]
    work = tmp_path / "gptq-of-2"
    assert [p.name for p in (work / "blocks").iterdir()] == ["0000.safetensors"]
    run_processes(BROKEN, tmp_path, {"config": config, "kill": False})
    assert same(codes_of(work), codes_of(folder / "gptq-of-1"))
