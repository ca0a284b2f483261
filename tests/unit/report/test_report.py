"""The three files of a report, the summary on the terminal, and wording."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress.core.errors import ExportError
from compress.report import summary_table, write_report
from compress.report.wording import duration, grade_of, nats, size

Report = dict[str, Any]
Make = Callable[..., Report]


def written(report: dict[str, Any], folder: Path) -> dict[str, str]:
    return {
        path.suffix: path.read_text("utf-8") for path in write_report(report, folder)
    }


def test_json_is_the_report_itself(tmp_path: Path, make_report: Make) -> None:
    report = make_report()
    assert json.loads(written(report, tmp_path)[".json"]) == report


def test_nan_and_infinity_become_null(tmp_path: Path, make_report: Make) -> None:
    report = make_report(2)
    report["layers"][0]["error"] = math.nan
    report["metrics"]["compressed"]["texts"]["dialogue"]["kl_max"] = math.inf
    data = json.loads(
        written(report, tmp_path)[".json"],
        parse_constant=lambda name: pytest.fail(name),
    )
    assert data["layers"][0]["error"] is None
    assert data["metrics"]["compressed"]["texts"]["dialogue"]["kl_max"] is None


def test_markdown_tables_keep_their_columns_when_names_hold_pipes(
    tmp_path: Path, make_report: Make
) -> None:
    report = make_report(1)
    report["layers"][0]["name"] = "a|b\nc"
    lines = written(report, tmp_path)[".md"].splitlines()
    row = next(line for line in lines if "a\\|b c" in line)
    header = next(line for line in lines if line.startswith("| layer |"))
    unescaped = re.compile(r"(?<!\\)\|")
    assert len(unescaped.findall(row)) == len(unescaped.findall(header))


def test_config_with_a_fence_stays_inside_its_block(
    tmp_path: Path, make_report: Make
) -> None:
    report = make_report(1) | {"config_text": "a: |\n  ```\n  b\n"}
    assert "````yaml\na: |\n  ```\n  b\n````" in written(report, tmp_path)[".md"]


def test_a_report_without_optional_parts_is_written(
    tmp_path: Path, bare_report: Report
) -> None:
    files = written(bare_report, tmp_path)
    assert "No calibration text was used." in files[".html"]
    assert "KL" not in files[".md"]
    assert summary_table(bare_report).endswith(
        "report.html\n  report.md\n  report.json"
    )


def test_perplexity_without_kl_leaves_out_the_columns_of_kl(
    tmp_path: Path, make_report: Make
) -> None:
    report = make_report(1)
    texts = report["metrics"]["compressed"]["texts"]
    for name, text in texts.items():
        texts[name] = {
            k: v for k, v in text.items() if not k.startswith(("kl", "top1"))
        }
    summary = summary_table(report)
    assert "perplexity base" in summary and "KL (nats)" not in summary
    assert "light" not in summary
    assert "traffic light" not in written(report, tmp_path)[".html"]


def test_summary_says_what_a_run_must_end_with(make_report: Make) -> None:
    summary = summary_table(make_report())
    for said in (
        "gptq int4-g32 (210 layers)",
        "protocol: llamacpp512; tokens: 10,200",
        "Calibrated on mix: 128 samples of 512, 65,536 tokens, in bfloat16.",
        "5.34",
        "0.0874 +- 0.0017",
        "llama.cpp",
        "identical in 210 layers",
        "made-up-135m-int4-g32.gguf",
        "WARNING: the bundled model was stored in 4 bits",
        "report.html",
    ):
        assert said in summary
    assert summary.isascii()


def test_a_failed_verification_cannot_be_overlooked(
    tmp_path: Path, make_report: Make
) -> None:
    report = make_report(1)
    report["exports"]["gguf"]["verify"] |= {"passed": False, "kl": 0.4}
    report["exports"]["safetensors"]["verify"] = {"skipped": "not installed"}
    files = written(report, tmp_path)
    assert "FAILED" in summary_table(report) and "FAILED" in files[".md"]
    assert "skipped: not installed" in files[".md"]
    assert 'class="failed"' in files[".html"] and "0 of 2" in files[".html"]


def test_a_consumer_that_crashed_is_a_failed_verification(
    tmp_path: Path, make_report: Make
) -> None:
    report = make_report(1)
    report["exports"]["gguf"]["verify"] = {
        "consumer": "llama.cpp",
        "failed": "llama.cpp crashed (SIGSEGV)",
        "passed": False,
    }
    files = written(report, tmp_path)
    assert "FAILED" in summary_table(report) and "FAILED" in files[".md"]
    assert 'class="failed"' in files[".html"] and "1 of 2" in files[".html"]


@pytest.mark.parametrize(
    ("kl", "name"),
    [(0.0, "green"), (0.0099, "green"), (0.01, "amber"), (0.05, "red"), (3.0, "red")],
)
def test_traffic_light_changes_at_its_limits(kl: float, name: str) -> None:
    grade = grade_of(kl)
    assert grade is not None and grade.name == name


def test_a_failed_write_leaves_the_older_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_report: Make
) -> None:
    before = written(make_report(1), tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ExportError, match="No space left on device"):
        write_report(make_report(2), tmp_path)
    after = {p.suffix: p.read_text("utf-8") for p in tmp_path.iterdir()}
    assert after == before


def test_writing_does_not_change_the_report(tmp_path: Path, make_report: Make) -> None:
    report = make_report(1)
    before = copy.deepcopy(report)
    write_report(report, tmp_path)
    assert report == before


@pytest.mark.parametrize(
    ("value", "said"),
    [(999, "999 B"), (1536, "1.5 KiB"), (91 * 2**20, "91.0 MiB"), (2**31, "2.00 GiB")],
)
def test_sizes_are_said_in_binary_units(value: int, said: str) -> None:
    assert size(value) == said


def test_numbers_are_said_with_the_digits_they_need() -> None:
    assert (nats(0.0874), nats(2.4e-6), nats(0.0)) == ("0.0874", "2.4e-06", "0.0000")
    assert (duration(59.94), duration(61), duration(3661)) == (
        "59.9 s",
        "1 min 01 s",
        "1 h 01 min",
    )
