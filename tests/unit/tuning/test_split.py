"""Two processes: the codes of one; with blocks split over them, in less memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torchrun_fixtures import run_processes
from tuning_fixtures import (
    coded_student,
    options_of,
    save_teacher,
    tuned_codes,
)

from compress.config.tune_section import EdkmOptions
from compress.core.errors import ConfigError
from compress.core.scheme import Scheme
from compress.core.tensors import join_rows
from compress.tuning.stacks import split_problem
from compress.tuning.tune import Tuned

SCRIPT = """
import json, os, sys
from pathlib import Path
import torch, torch.distributed as dist
from safetensors.torch import save_file
from tuning_fixtures import coded_student, options_of, text_of
from compress.config.tune_section import EdkmOptions
from compress.model.loading import open_model
from compress.recovery.checkpoints import CheckpointFiles
from compress.tuning.tune import tune

torch.set_num_threads(1)
dist.init_process_group("gloo")
folder = Path(sys.argv[1])
teacher = open_model(str(folder / "teacher"), cache=folder / "cache")
for name, case in json.loads(sys.argv[2]).items():
    student, codes = coded_student(teacher, case.pop("scheme"))
    stop, method = case.pop("stop", None), case.pop("method", "pv")
    if method == "edkm":  # whole matrices have a palette: windows are split alone
        options = EdkmOptions(batch=4, dtype="float32", **case)
    else:
        options = options_of(batch=4, shard=True, **case)
    if stop:
        save = CheckpointFiles.save
        def once(files, checkpoint):
            save(files, checkpoint)
            raise SystemExit("stopped here")
        CheckpointFiles.save = once
    found = tune(
        student, teacher, codes, originals=teacher.source, text=text_of(),
        options=options, device="cpu",
        state=folder / name,
    )
    if dist.get_rank() == 0:
        tensors = {f"{n}/{k}": v for n, c in found.codes.items()
                   for k, v in c.state().items()}
        tensors |= {n: v for n, v in found.dense.items()}
        save_file({k: v.contiguous().clone() for k, v in tensors.items()},
                  folder / f"{name}.safetensors")
        (folder / f"{name}.json").write_text(json.dumps(found.record))
dist.destroy_process_group()
"""
CASES: dict[str, dict[str, Any]] = {
    "grid": {"scheme": "int3-g32-offset", "regime": "ste"},
    "additive": {"scheme": "aqlm-2x4g4", "regime": "ste"},
    "palette": {"scheme": "palette2-r8-scaled", "regime": "p"},
    "subspace": {"scheme": "int2-g32", "regime": "pv"},
}
COMMON = {"steps": 6, "evaluations": 2, "code_learning_rate": 0.02}
EDKM = {"steps": 6, "evaluations": 2, "weight_learning_rate": 1e-2}


def alone(folder: Path, scheme: str, **options: Any) -> Tuned:
    return tuned_codes(folder, scheme, options_of(**options), state="alone")


def alone_by_edkm(folder: Path, scheme: str) -> Tuned:
    options = EdkmOptions(batch=8, dtype="float32", **EDKM)
    return tuned_codes(folder, scheme, options, state="edkm-alone")


@pytest.mark.slow
def test_two_processes_find_the_codes_of_one(tmp_path: Path) -> None:
    """Where all codes may change; the largest wishes are chosen in each process."""
    save_teacher(tmp_path)
    edkm = {"edkm": EDKM | {"method": "edkm", "scheme": "palette2"}}
    cases = {name: COMMON | case for name, case in CASES.items()}
    run_processes(SCRIPT, tmp_path, cases | edkm)
    for name in (*CASES, "edkm"):
        if name == "edkm":
            expected = alone_by_edkm(tmp_path, "palette2")
        else:
            expected = alone(tmp_path, **COMMON, **CASES[name])
        record = json.loads((tmp_path / f"{name}.json").read_text())
        assert record["processes"] == 2
        assert record["trained_values"] == expected.record["trained_values"]
        close = 1e-3 if name != "subspace" else 0.05
        kl = expected.record["kl_after"]
        assert record["kl_after"] == pytest.approx(kl, rel=close)
        assert record["kl_after"] < record["kl_before"]
        found = load_file(tmp_path / f"{name}.safetensors")
        for layer, tensor in expected.codes.items():
            for key, value in tensor.state().items():
                own = found[f"{layer}/{key}"]
                assert own.shape == value.shape
                if key == "codes" and name != "subspace":
                    assert (own == value).double().mean() > 0.999
                elif name != "subspace":
                    torch.testing.assert_close(own, value, rtol=2e-2, atol=2e-3)
        assert not list((tmp_path / name).glob("training*"))


@pytest.mark.slow
def test_a_split_run_goes_on_from_the_rows_of_each_process(tmp_path: Path) -> None:
    save_teacher(tmp_path)
    case = COMMON | {"scheme": "int2-g32", "checkpoint_minutes": 0}
    run_processes(SCRIPT, tmp_path, {"whole": case})
    with pytest.raises(AssertionError, match="stopped here"):
        run_processes(SCRIPT, tmp_path, {"broken": case | {"stop": 1}})
    parts = sorted((tmp_path / "broken").glob("training-3-*.safetensors"))
    assert len(parts) == 2
    rows = {name: tensor.shape for name, tensor in load_file(parts[0]).items()}
    whole = load_file(tmp_path / "whole.safetensors")
    codes = [n for n in rows if n.startswith("now/") and n.endswith("/codes")]
    kept = sum(rows[name].numel() for name in codes)
    assert 2 * kept == sum(t.numel() for n, t in whole.items() if n.endswith("/codes"))
    run_processes(SCRIPT, tmp_path, {"broken": case})
    found = load_file(tmp_path / "broken.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize(
    "scheme",
    ["int3-g32-offset", "int4-g32-asym", "palette2-r8", "aqlm-2x4g4", "pq-4x3-scaled"],
)
def test_rows_are_joined_as_they_were_split(scheme: str, tmp_path: Path) -> None:
    _, codes = coded_student(save_teacher(tmp_path), scheme)
    for tensor in codes.values():
        half = tensor.shape[0] // 2
        again = join_rows(tensor.split_rows([half, half]))
        assert again.scheme == tensor.scheme
        for key, value in tensor.state().items():
            assert torch.equal(again.state()[key], value)


def test_rows_that_share_tables_stay_together(tmp_path: Path) -> None:
    _, codes = coded_student(save_teacher(tmp_path), "palette2-r8")
    tensor = codes["model.layers.0.mlp.up_proj"]
    assert split_problem(tensor, 2) is None
    problem = split_problem(tensor, 1 + tensor.shape[0] // 8)
    assert problem is not None and "leave shard out" in problem
    assert Scheme.parse("palette2-r8").row_block == 8


def test_one_process_splits_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tune\.options\.shard: .* torchrun"):
        alone(tmp_path, "int2-g32", shard=True)
    with pytest.raises(ValueError, match="recompute"):
        options_of(shard=True, teacher="cache")
