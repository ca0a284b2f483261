"""What exports leave for ``llama-quantize``, in llama.cpp's quantizer itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_quantize import llama_quantize
from pipeline_fixtures import Ground, call, digests, report_of, save_checkpoint

import compress
from compress.export.gguf_files import only_file
from compress.export.gguf_reader import open_gguf
from compress.export.imatrix_reader import read_imatrix
from compress.scoring import inspect

BESIDE = {"format": "gguf", "embedding": "q8_0", "imatrix": True, "tensor_types": True}
MIXED = {
    "method": "rtn",
    "scheme": "q4_k",
    "overrides": {
        "model.layers.1.mlp.down_proj": {"scheme": "q6_k"},
        "model.layers.0.self_attn.v_proj": {"scheme": "q5_0"},
        "model.layers.1.self_attn.o_proj": {"scheme": "dense"},
    },
}


@pytest.fixture(scope="module")
def wide(ground: Ground) -> Ground:
    """Rows as long as K types need them."""
    folder = ground.folder / "wide"
    save_checkpoint(folder, hidden_size=256, intermediate_size=512, head_dim=64)
    return Ground(ground.folder, folder, ground.text)


@pytest.fixture(scope="module")
def mixed(wide: Ground) -> Path:
    """A folder with a file of several types, and what lies beside it."""
    return wide.run("mixed", quantize=MIXED, export=[BESIDE]) / "export" / "gguf"


@pytest.fixture(scope="module")
def dense(wide: Ground) -> Path:
    """The same model as an F32 file."""
    export = [{"format": "gguf", "embedding": "f32"}]
    return only_file(wide.run("dense", quantize=None, export=export) / "export/gguf")


def types_of(path: Path) -> dict[str, str]:
    return {name: tensor.type for name, tensor in open_gguf(path).tensors.items()}


def importances_of(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    (path,) = folder.glob("*.imatrix.gguf")
    entries = read_imatrix(path).entries
    return {name: np.ascontiguousarray(e.means()) for name, e in entries.items()}


def test_llama_cpp_takes_the_importance_matrix(
    mixed: Path, dense: Path, tmp_path: Path
) -> None:
    importances = importances_of(mixed)
    blocks = {n for n in types_of(dense) if n.startswith("blk.") and "norm" not in n}
    assert importances.keys() == blocks
    with_it, without = tmp_path / "with.gguf", tmp_path / "without.gguf"
    llama_quantize(dense, with_it, "q4_k_m", importances=importances)
    llama_quantize(dense, without, "q4_k_m")
    weighted, plain = open_gguf(with_it), open_gguf(without)
    original = open_gguf(dense)
    for name in blocks:
        assert not np.array_equal(weighted.read(name), plain.read(name)), name
        # What it is for: less error where inputs are large.
        target = original.read_values(name)
        errors = [
            float(((file.read_values(name) - target) ** 2 * importances[name]).sum())
            for file in (weighted, plain)
        ]
        assert errors[0] < errors[1], name


def test_the_types_of_the_plan_come_out_of_llama_cpp(
    mixed: Path, dense: Path, tmp_path: Path
) -> None:
    (path,) = mixed.glob("*.tensor-types.txt")
    rules = [
        (pattern, kind)
        for pattern, _, kind in (
            line.rpartition("=") for line in path.read_text().splitlines()
        )
    ]
    assert (r"^blk\.1\.ffn_down\.weight$", "q6_k") in rules
    llama_quantize(dense, tmp_path / "x.gguf", "q8_0", types=rules)
    expected = types_of(only_file(mixed))
    assert types_of(tmp_path / "x.gguf") == expected
    assert {"q4_k", "q6_k", "q5_0", "q8_0", "f32"} == set(expected.values())


def test_the_report_names_the_files_and_the_text(wide: Ground, mixed: Path) -> None:
    entry = report_of(mixed.parent.parent)["exports"]["gguf"]
    names = [Path(file).name for file in entry["files"]]
    stem = names[0].removesuffix(".gguf")
    assert names[1:] == [f"{stem}.tensor-types.txt", f"{stem}.imatrix.gguf"]
    assert entry["size_bytes"] == only_file(mixed).stat().st_size
    assert any(f"8 x 32 tokens of {wide.text}" in note for note in entry["notes"])


def test_inspect_takes_the_model_and_not_what_lies_beside(mixed: Path) -> None:
    found = inspect(mixed.parent.parent)
    assert found.architecture == "llama"


def test_a_finished_run_gets_them_later(wide: Ground) -> None:
    quantize = {"method": "rtn", "scheme": "q4_0", "scale_dtype": "float16"}
    workdir = wide.run("later", quantize=quantize, export=[])
    before = digests(workdir / "blocks")
    result = call("export", workdir, "--to", "gguf", "--set", "imatrix=true")
    assert result.exit_code == 0, result.output
    assert digests(workdir / "blocks") == before
    assert importances_of(workdir / "export" / "gguf")


def test_a_text_that_is_not_there_is_told_before_any_work(wide: Ground) -> None:
    config = wide.config(
        "no-text",
        quantize={"method": "rtn", "scheme": "q4_0"},
        calibration={"data": "gone.txt"},
        export=[BESIDE],
    )
    with pytest.raises(compress.CompressError, match=r"gone\.txt"):
        compress.run(config)
    assert not (wide.folder / "no-text" / "blocks").exists()
