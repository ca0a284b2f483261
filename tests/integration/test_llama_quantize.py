"""What exports leave for ``llama-quantize``, in llama.cpp's quantizer itself."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_quantize import llama_quantize
from pipeline_fixtures import (
    Ground,
    call,
    codes_of,
    digests,
    report_of,
    same,
    save_checkpoint,
)

import compress
from compress.core.errors import CheckpointError, ConfigError
from compress.export.gguf_files import only_file
from compress.export.gguf_reader import open_gguf
from compress.export.imatrix import write_imatrix
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
SEARCH = {"method": "rtn", "scheme": "int4-g32", "options": {"search": True}}


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
    entries = read_imatrix(imatrix_of(folder)).entries
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
    workdir = wide.run("imatrix-later", quantize=quantize, export=[])
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


def imatrix_of(folder: Path) -> Path:
    (path,) = folder.glob("*.imatrix.gguf")
    return path


def as_binary(path: Path, target: Path) -> Path:
    """Write an importance matrix again in the older flavour."""
    entries = read_imatrix(path).entries
    data = struct.pack("<i", len(entries))
    for name, entry in entries.items():
        calls, values = int(entry.counts[0]), entry.sums.reshape(-1)
        data += struct.pack(f"<i{len(name)}s", len(name), name.encode())
        data += struct.pack("<ii", calls, values.size) + values.tobytes()
    target.write_bytes(data)
    return target


def test_rounding_by_importance_is_that_of_llama_cpp(
    wide: Ground, mixed: Path, dense: Path, tmp_path: Path
) -> None:
    known = {"imatrix": str(imatrix_of(mixed))}
    quantize = {"method": "rtn", "scheme": "q4_k"}
    export = [{"format": "gguf", "embedding": "q8_0"}]
    config = {"quantize": quantize, "export": export}
    path = wide.run("informed", calibration=known, **config) / "export" / "gguf"
    blind = wide.run("blind", **config) / "export" / "gguf"
    types = [(r"^blk\..*weight$", "q4_k")]
    importances = importances_of(mixed)
    theirs = tmp_path / "theirs.gguf"
    llama_quantize(dense, theirs, "q8_0", importances=importances, types=types)
    for name in importances:
        ours, other, plain = (
            open_gguf(p).read(name).reshape(-1, 144)
            for p in (only_file(path), theirs, only_file(blind))
        )
        assert (ours == other).all(-1).mean() > 0.9, name
        assert (ours == plain).all(-1).mean() < 0.5, name


def test_both_flavours_give_the_same_codes(
    wide: Ground, mixed: Path, tmp_path: Path
) -> None:
    files = [imatrix_of(mixed), as_binary(imatrix_of(mixed), tmp_path / "x.dat")]
    first, second = (
        codes_of(
            wide.run(
                f"flavour-{index}",
                quantize=SEARCH,
                calibration={"imatrix": str(file)},
                export=[],
            )
        )
        for index, file in enumerate(files)
    )
    plain = codes_of(wide.run("no-flavour", quantize=SEARCH, export=[]))
    assert same(first, second)
    assert not same(first, plain)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantize": {"method": "gptq"}}, "gptq on int4-g32 .*alone; use method rtn"),
        ({"quantize": {"method": "rtn"}}, "rtn on int4-g32 .*search: true"),
        ({"quantize": {"method": "awq"}}, "awq on int4-g32 .*alone"),
        ({"quantize": None}, "no layer is quantized"),
        (
            {"quantize": SEARCH, "transforms": ["awq"]},
            ".*awq changes them",
        ),
        (
            {
                "quantize": {"method": "rtn", "scheme": None},
                "budget": {"bits_per_weight": 12.0},
            },
            "a budget needs losses",
        ),
    ],
)
def test_methods_that_need_more_are_refused_before_any_work(
    wide: Ground, mixed: Path, changes: dict[str, Any], message: str
) -> None:
    known = {"imatrix": str(imatrix_of(mixed))}
    config = wide.config("refused", calibration=known, **changes)
    with pytest.raises(ConfigError, match=rf"calibration\.imatrix: {message}"):
        compress.run(config)
    assert not (wide.folder / "refused" / "blocks").exists()


def test_a_matrix_of_another_model_is_refused(
    wide: Ground, ground: Ground, mixed: Path, tmp_path: Path
) -> None:
    known = {"imatrix": str(imatrix_of(mixed))}
    config = ground.config("other", calibration=known, quantize=SEARCH)
    with pytest.raises(CheckpointError, match=r"has 256 importances, .*q_proj wants"):
        compress.run(config)
    matrix = read_imatrix(imatrix_of(mixed))
    kept = {n: e for n, e in matrix.entries.items() if not n.startswith("blk.1.")}
    write_imatrix(tmp_path / "part.gguf", replace(matrix, entries=kept))
    known = {"imatrix": str(tmp_path / "part.gguf")}
    config = wide.config("part", calibration=known, quantize=SEARCH)
    with pytest.raises(CheckpointError, match=r"no importances of model\.layers\.1\."):
        compress.run(config)


def test_columns_that_were_never_used_do_no_harm(
    wide: Ground, mixed: Path, tmp_path: Path
) -> None:
    matrix = read_imatrix(imatrix_of(mixed))
    for entry in matrix.entries.values():
        entry.sums[:, :64] = 0
    write_imatrix(tmp_path / "zeros.gguf", matrix)
    known = {"imatrix": str(tmp_path / "zeros.gguf")}
    for scheme in ("q2_k", "q3_k", "q4_k", "q6_k", "iq4_xs", "int4-g32"):
        quantize = {"method": "rtn", "scheme": scheme, "options": {"search": True}}
        work = wide.run(
            f"zeros-{scheme}", calibration=known, quantize=quantize, export=[]
        )
        layers = report_of(work)["layers"]
        assert all(0 < layer["weight_error"] < 0.5 for layer in layers), scheme
