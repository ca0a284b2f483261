"""Run with ``pytest -m gpu`` on a machine with a CUDA device."""

import pytest
import torch
from pipeline_fixtures import config_of, save_checkpoint, write_text
from safetensors.torch import load_file

import compress
from compress.evaluation.divergence import compare
from compress.evaluation.perplexity import TokenWindows
from compress.model import states
from compress.model.loading import open_model
from compress.model.streaming import StreamedModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def run_on(device, folder, name, method):
    workdir = folder / name
    config = config_of(folder / "model", folder / "text.txt", workdir)
    config["quantize"] = {"method": method, "scheme": "int4-g32"}
    config["export"] = [{"format": "safetensors"}]
    config["run"] = {"workdir": str(workdir), "device": device, "verify": False}
    report = compress.run(config).report
    return load_file(workdir / "export/safetensors/model.safetensors"), report


@pytest.fixture
def folder(tmp_path):
    save_checkpoint(tmp_path / "model")
    write_text(tmp_path)
    return tmp_path


def test_rounding_gives_the_same_codes_as_the_cpu(folder):
    cpu, _ = run_on("cpu", folder, "cpu", "rtn")
    cuda, _ = run_on("cuda", folder, "cuda", "rtn")
    assert all(torch.equal(cpu[name], cuda[name]) for name in cpu)


def test_gptq_gives_the_same_codes_twice(folder):
    first, _ = run_on("cuda", folder, "first", "gptq")
    second, _ = run_on("cuda", folder, "second", "gptq")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_gptq_is_as_close_as_on_the_cpu(folder):
    _, cpu = run_on("cpu", folder, "cpu", "gptq")
    _, cuda = run_on("cuda", folder, "cuda", "gptq")
    errors = [sum(row["error"] for row in r["layers"]) for r in (cpu, cuda)]
    assert errors[1] == pytest.approx(errors[0], rel=0.05)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_bfloat16_runs_and_read_ahead_give_the_same_twice(folder, method):
    save_checkpoint(folder / "half", dtype=torch.bfloat16)
    (folder / "model").rename(folder / "single")
    (folder / "half").rename(folder / "model")
    first, report = run_on("cuda", folder, "first", method)
    second, _ = run_on("cuda", folder, "second", method)
    if method == "gptq":
        assert report["calibration"]["dtype"] == "bfloat16"
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_states_in_host_memory_and_small_batches_change_nothing(folder, monkeypatch):
    _, held = run_on("cuda", folder, "held", "gptq")
    monkeypatch.setattr(states, "HELD_BYTES", 0)
    monkeypatch.setitem(states._BATCH_BYTES, "cuda", 1)  # a window a batch
    first, streamed = run_on("cuda", folder, "streamed", "gptq")
    again, _ = run_on("cuda", folder, "again", "gptq")
    assert all(torch.equal(first[name], again[name]) for name in first)
    errors = [sum(row["error"] for row in r["layers"]) for r in (held, streamed)]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


def test_scores_are_made_on_the_device_and_are_those_of_the_cpu(folder):
    handle = open_model(str(folder / "model"), cache=folder / "cache")
    text = TokenWindows("test", torch.arange(96).reshape(3, 32) % 50, 4)
    found = []
    for device in ("cpu", "cuda"):
        base = StreamedModel(handle.description, handle.source, device=device)
        other = base.with_source(handle.source, rounding=coarse(handle))
        assert next(iter(base.logits(text.ids))).device.type == device
        streams = base.logits(text.ids), other.logits(text.ids)
        found.append(compare(text, *streams))
    for name in ("nll", "kl", "same_top", "flipped", "dp"):
        cpu, cuda = (getattr(scores[1], name) for scores in found)
        assert cuda.device.type == "cpu"
        assert torch.allclose(cpu, cuda, atol=1e-4), name
    assert float(found[0][1].kl.mean()) > 1e-4
    mixed, _ = compare(
        text, base.logits(text.ids), map(torch.Tensor.cpu, base.logits(text.ids))
    )
    assert torch.equal(mixed.nll, found[1][0].nll)


def coarse(handle):
    """Rounding of the inputs of all linears, that changes what a model says."""
    names = [n.removesuffix(".weight") for n in handle.source.tensors() if "_proj" in n]
    return {name: lambda x: (x * 4).round() / 4 for name in names}
