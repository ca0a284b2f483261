"""The section ``tune`` in a run: refused before any work, stored, exported, resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_fixtures import config_of, report_of, save_checkpoint, windows, write_text
from safetensors.torch import load_file

import compress
from compress.core.errors import CompressError
from compress.workdir import WorkDir

OPTIONS = {
    "steps": 60,
    "samples": 200,
    "held_out": 8,
    "sequence_length": 16,
    "batch": 8,
    "evaluations": 3,
    "weight_learning_rate": 1e-2,
}


def config(folder: Path, **changes: Any) -> dict[str, Any]:
    if not (folder / "model").exists():
        save_checkpoint(folder / "model", initializer_range=0.15)
    sections: dict[str, Any] = {
        "quantize": {"method": "kmeans", "scheme": "palette2"},
        "tune": {"method": "edkm", "options": OPTIONS},
        "export": [{"format": "palette"}],
    }
    text = write_text(folder)
    return config_of(folder / "model", text, folder / "work", **(sections | changes))


def test_a_palette_tuned_by_edkm_is_exported_and_opened(tmp_path: Path) -> None:
    """It computes what the dense weights of the tuned model do, to the last bit."""
    from transformers import AutoModelForCausalLM

    exports = [{"format": "palette"}, {"format": "safetensors", "dense": True}]
    compress.run(config(tmp_path, export=exports))
    record = report_of(tmp_path / "work")["tuning"]
    assert record["method"] == "edkm"
    assert record["kl_after"] < record["kl_before"]
    assert 0 < record["changed_codes"] < 1
    folders = [tmp_path / "work/export" / entry["format"] for entry in exports]
    ids = windows(2)
    palette, dense = (
        AutoModelForCausalLM.from_pretrained(folder)(ids).logits.detach()
        for folder in folders
    )
    assert torch.equal(palette, dense)
    name = "model.layers.1.mlp.up_proj"
    tuned = WorkDir(tmp_path / "work/tuned").read_layer("0001", name)
    weights = load_file(folders[1] / "model.safetensors")
    assert torch.equal(weights[f"{name}.weight"], tuned.dequantize())
    before = WorkDir(tmp_path / "work").read_layer("0001", name)
    assert not torch.equal(before.codes, tuned.codes)


@pytest.mark.parametrize(
    "method, scheme", [("gptq", "int4-g32"), ("aqlm", "aqlm-2x4g4")]
)
def test_other_schemes_stop_a_run_before_it_starts(
    tmp_path: Path, method: str, scheme: str
) -> None:
    quantize: dict[str, Any] = {"method": method, "scheme": scheme}
    if method == "aqlm":
        quantize["options"] = {"allow_large_tables": True}
    wrong = config(
        tmp_path,
        quantize=quantize,
        export=[{"format": "safetensors", "dense": True}],
    )
    with pytest.raises(CompressError, match=f"{scheme} is none; use a scheme such"):
        compress.run(wrong)
    assert not (tmp_path / "work" / "blocks").exists()


@pytest.mark.parametrize("name, method", [("pv_tuning", "pv"), ("dkm", "edkm")])
def test_a_tuning_method_in_the_place_of_a_quantizer_is_explained(
    tmp_path: Path, name: str, method: str
) -> None:
    wrong = config(tmp_path, quantize={"method": name, "scheme": "palette2"})
    with pytest.raises(CompressError, match=f"write tune: {{method: {method}}}"):
        compress.run(wrong)
