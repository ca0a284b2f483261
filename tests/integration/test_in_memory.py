"""``compress.quantize`` on a module in memory, against runs from disk."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pipeline_fixtures import (
    Ground,
    codes_of,
    same,
    weights_of,
)

import compress
from compress.api import describe


@pytest.mark.parametrize(
    ("method", "scheme"), [("rtn", "int3-g32-asym"), ("gptq", "int4-g32")]
)
def test_in_memory_and_from_disk_are_the_same_byte_for_byte(
    ground: Ground, method: str, scheme: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from compress.calibration.data import load_tokens

    workdir = ground.run(
        f"disk-{method}", quantize={"method": method, "scheme": scheme}
    )
    model = AutoModelForCausalLM.from_pretrained(ground.model)
    tokenizer = AutoTokenizer.from_pretrained(ground.model)
    tokens = load_tokens(
        str(ground.text), tokenizer, samples=8, sequence_length=32, seed=0
    ).tokens
    found = compress.quantize(
        model, scheme, method=method, calibration=tokens, tokenizer=tokenizer
    )
    folder = ground.folder / f"memory-{method}"
    written = found.save(folder)
    flat = {
        f"{name}.{key}": value
        for name in found.artifact.plan.layers
        for key, value in found.artifact.quantized(name).state().items()
    }
    assert same(flat, codes_of(workdir))
    ours, theirs = weights_of(folder), weights_of(workdir / "export" / "safetensors")
    assert ours == theirs
    assert written.size_bytes == sum(map(len, ours.values()))
    loaded = compress.load(folder, dtype=torch.float16)
    values = loaded.state_dict()
    assert all(torch.equal(v, values[k]) for k, v in found.model.state_dict().items())


def test_quantize_replaces_weights_in_place(ground: Ground) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(ground.model)
    before = model.lm_head.weight.detach().clone()
    found = compress.quantize(
        model,
        "int4-g32",
        method="rtn",
        overrides={"model.layers.0.mlp.up_proj": {"scheme": "dense"}},
    )
    assert found.model is model
    for name in found.artifact.plan.layers:
        values = found.artifact.quantized(name).dequantize(torch.float16)
        assert torch.equal(model.get_submodule(name).weight, values)
    assert torch.equal(model.lm_head.weight, before)
    assert len(found.artifact.plan.layers) == 13
    assert found.records["model.layers.0.mlp.down_proj"]["weight_error"] > 0


def test_save_refuses_a_folder_that_is_in_use(ground: Ground) -> None:
    from transformers import AutoModelForCausalLM

    from compress.core.errors import ConfigError

    model = AutoModelForCausalLM.from_pretrained(ground.model)
    found = compress.quantize(model, "int8", method="rtn")
    with pytest.raises(ConfigError, match="is not empty"):
        found.save(ground.model)


def test_gptq_in_memory_needs_tokens(ground: Ground) -> None:
    from transformers import AutoModelForCausalLM

    from compress.core.errors import CalibrationError

    model = AutoModelForCausalLM.from_pretrained(ground.model)
    model.config._name_or_path = ""  # its tokenizer would be taken from there
    with pytest.raises(CalibrationError, match="pass calibration="):
        compress.quantize(model, "int4-g32")


def test_a_process_leaves_no_tokenizer_behind(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(ground.model)
    tokenizer = AutoTokenizer.from_pretrained(ground.model)
    (ground.folder / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(ground.folder / "temporary"))
    at_exit: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        "atexit.register", lambda do, *given, **more: at_exit.append((do, given, more))
    )
    description = describe(model, tokenizer)
    assert description.assets is not None and any(description.assets.iterdir())
    for do, given, more in at_exit:
        do(*given, **more)
    assert not any((ground.folder / "temporary").iterdir())
