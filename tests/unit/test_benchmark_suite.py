"""The table of quality_suite.py: rows of other tools, and rows kept in files."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import quality_suite

    return quality_suite


def figures_of(kl: float, **more: Any) -> dict[str, Any]:
    texts = {text: {"kl": kl} for text in ("wikitext2", "tales", "code")}
    return {"texts": texts, "seconds": 1.0, **more}


def test_every_recipe_of_a_peer_has_exactly_one_row_of_ours(suite):
    labels = [(row.scheme, row.label) for row in suite.rows()]
    assert [
        wanted for _, *wanted in suite.PEERS if labels.count(tuple(wanted)) != 1
    ] == []


def test_rows_that_make_the_same_have_the_same_label_once(suite):
    labels = [(row.scheme, row.label) for row in suite.rows()]
    assert len(labels) == len(set(labels))


def test_a_ratio_is_ours_over_theirs(suite):
    mine = figures_of(0.2, scheme="mxfp4", method="rtn")
    theirs = figures_of(0.4, tool="a tool", differing=0, device="a CPU")
    (row,) = suite.against_peers([mine], {"rtn-mxfp4": theirs})
    assert row["ours / theirs tales"] == pytest.approx(0.5)


def test_a_kept_row_is_not_made_again(suite, tmp_path):
    bench = suite.Bench(tmp_path, tmp_path, "cpu")
    first = bench.kept("row", lambda: figures_of(0.1))
    assert bench.kept("row", pytest.fail) == first


def test_a_kept_row_of_other_windows_is_refused(suite, tmp_path):
    (tmp_path / "rows").mkdir()
    stored = {**figures_of(0.1), "windows": suite.WINDOWS + 1}
    (tmp_path / "rows" / "row.json").write_text(json.dumps(stored))
    with pytest.raises(SystemExit, match="remove it"):
        suite.Bench(tmp_path, tmp_path, "cpu").kept("row", pytest.fail)


def test_weights_that_differ_are_counted_beyond_float32_rounding(suite):
    layer, other = torch.nn.Linear(4, 2, bias=False), torch.nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        other.weight.copy_(layer.weight * (1 + 1e-7))
        other.weight[0, :3] *= 1.01
    assert suite.differing_weights(layer, other) == 3
