"""Verification that fails: the report is written all the same, the exit code is 1."""

from __future__ import annotations

from pathlib import Path

import pytest
from pipeline_fixtures import BOTH, GGUF, Ground, call, report_of, write_config

from compress.exporting import failures


def test_a_consumer_that_crashes_fails_the_check_and_not_the_run(
    ground: Ground, tmp_path: Path, llama_cpp: None
) -> None:
    path = write_config(
        tmp_path / "crash.yaml",
        ground.config("crash", export=BOTH, run={"verify": True}),
    )
    crash = "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n"
    (tmp_path / "llama_cpp.py").write_text(crash)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        result = call("run", path)
    assert result.exit_code == 1
    assert "FAILED" in result.stdout and "SIGSEGV" in result.stdout
    workdir = ground.folder / "crash"
    for kind in ("md", "html"):
        page = (workdir / f"report.{kind}").read_text()
        assert "FAILED" in page and "SIGSEGV" in page
    exports = report_of(workdir)["exports"]
    assert "crashed (SIGSEGV)" in exports["gguf"]["verify"]["failed"]
    assert exports["gguf"]["codes"]["identical"]
    assert exports["safetensors"]["verify"]["passed"]
    # A crash is not remembered: the next try may have another llama.cpp.
    assert call("run", path, "--resume").exit_code == 0
    assert report_of(workdir)["exports"]["gguf"]["verify"]["passed"]


def test_too_large_a_distance_is_exit_code_1(
    ground: Ground, tmp_path: Path, llama_cpp: None
) -> None:
    settings = {"verify": True, "max_kl": 1e-30}
    config = ground.config("far", export=[GGUF], run=settings)
    result = call("run", write_config(tmp_path / "far.yaml", config))
    assert result.exit_code == 1
    assert "exceeds 1e-30" in result.stdout
    verify = report_of(ground.folder / "far")["exports"]["gguf"]["verify"]
    assert (verify["passed"], "failed" in verify) == (False, False)


def test_other_codes_are_a_failure() -> None:
    exports = {
        "a": {"verify": {"passed": True}, "codes": {"layers": 2, "identical": True}},
        "b": {"verify": {"skipped": "x"}, "codes": {"layers": 2, "identical": False}},
    }
    assert failures(exports) == ["b: the file's codes are not those that were computed"]
