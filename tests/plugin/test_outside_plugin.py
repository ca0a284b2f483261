"""A distribution from outside adds two plug-ins: installed as a user would do it.

Its files are those that ``docs/howto/own_quantizer.md`` shows.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "compress-plugin-demo"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the plug-in into a folder of its own, without network."""
    folder = tmp_path_factory.mktemp("plugin")
    copy, site = folder / "source", folder / "site"
    shutil.copytree(SOURCE, copy)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    pip += ["--no-build-isolation", "--no-index", "--target", str(site), str(copy)]
    subprocess.run(pip, check=True, capture_output=True, text=True)
    return site


def test_a_quantizer_takes_forty_lines_at_most() -> None:
    lines = (SOURCE / "demo_power_of_two.py").read_text("utf-8").splitlines()
    assert len(lines) <= 40


def run(installed: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("kind", "name"),
    [("quantizers", "demo-power-of-two"), ("pruners", "demo-longest")],
)
def test_it_is_listed_with_its_origin(kind: str, name: str, installed: Path) -> None:
    done = run(installed, "-m", "compress", "list", kind, "--json")
    assert done.returncode == 0, done.stderr
    (row,) = (r for r in json.loads(done.stdout) if r["name"] == name)
    assert row["origin"] == "compress-plugin-demo 0.1.0"
    assert row["works"]


def test_its_options_and_schemes_give_the_errors_of_built_ins(
    installed: Path, tmp_path: Path
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        "model: {path: x}\n"
        "quantize:\n"
        "  method: demo-power-of-two\n"
        "  scheme: int4-g32-asym\n"
        "  options: {shft: 1}\n"
    )
    done = run(installed, "-m", "compress", "plan", str(config))
    assert done.returncode == 2
    assert done.stderr.replace(f"{tmp_path}/", "").splitlines() == [
        "run.yaml:5:13: quantize.options.shft: unknown key; did you mean 'shift'?"
    ]
    config.write_text(config.read_text().replace("shft", "shift"))
    done = run(installed, "-m", "compress", "plan", str(config))
    assert done.stderr.replace(f"{tmp_path}/", "").splitlines() == [
        "run.yaml:4:3: quantize.scheme: demo-power-of-two cannot quantize to "
        "int4-g32-asym; it can to: int8-g32, int4-g32"
    ]


def test_it_quantizes(installed: Path) -> None:
    code = (
        "import torch\n"
        "from compress.core.scheme import Scheme\n"
        "from compress.registry import get_quantizer\n"
        "weight = torch.eye(32)\n"
        "plugin = get_quantizer('demo-power-of-two')()\n"
        "coded = plugin.quantize(weight, Scheme.parse('int4-g32'), None)\n"
        "print(torch.equal(coded.dequantize(), weight))"
    )
    done = run(installed, "-c", code)
    assert done.stdout.strip() == "True", done.stderr
