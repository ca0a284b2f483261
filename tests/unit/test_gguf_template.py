from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_fixtures import (
    ROWS,
    compressed,
    random_state,
    same_codes,
    tiny_config,
)

from compress.core.errors import ExportError
from compress.export.gguf import GGUFExporter, GGUFOptions
from compress.export.gguf_names import to_gguf_rows
from compress.export.gguf_reader import open_gguf


def exporter(**options: Any) -> GGUFExporter:
    return GGUFExporter(GGUFOptions(**options))


GEMMA: dict[str, Any] = {"query_pre_attn_scalar": 16, "tie_word_embeddings": True}


def dense_template(
    model_type: str, folder: Path, *, permute: bool, **changes: Any
) -> Path:
    """Write what a converter would: an F16 GGUF of the same random weights."""
    config = tiny_config(model_type, **changes)
    state = random_state(config)
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[model_type], config.num_hidden_layers)
    path = folder / "template.gguf"
    writer = gguf.GGUFWriter(path, model_type)
    writer.add_array("tokenizer.ggml.tokens", [f"t{i}" for i in range(ROWS)])
    writer.add_array("tokenizer.ggml.scores", [0.5] * ROWS)
    writer.add_array("some.bytes", [1, 2, 3])
    writer.add_uint16("split.count", 1)
    writer.add_file_type(1)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in state.items():
        count = heads.get(name.split(".")[-2], 0) if permute else 0
        data = to_gguf_rows(tensor, count)
        kind = np.float32 if tensor.dim() == 1 else np.float16
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert target is not None
        writer.add_tensor(target, data.numpy().astype(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(("family", "permute"), [("llama", True), ("gemma2", False)])
def test_template_takes_codes_for_any_architecture(
    family: str, permute: bool, tmp_path: Path
) -> None:
    changes = GEMMA if family == "gemma2" else {}
    template = dense_template(family, tmp_path, permute=permute, **changes)
    out = tmp_path / "out"
    out.mkdir()
    artifact = compressed(family, assets=None, **changes)
    plugin = exporter(template=str(template))
    plugin.write(artifact, out)
    wrong = [
        layer
        for layer in artifact.plan.layers
        if not same_codes(plugin.read_codes(out, layer), artifact.quantized(layer))
    ]
    assert wrong == []


def test_template_tensors_out_of_the_plan_are_copied(tmp_path: Path) -> None:
    template = dense_template("gemma2", tmp_path, permute=False, **GEMMA)
    out = tmp_path / "out"
    out.mkdir()
    artifact = compressed("gemma2", assets=None, **GEMMA)
    result = exporter(template=str(template)).write(artifact, out)
    before, after = open_gguf(template), open_gguf(result.files[0])
    assert list(before.tensors) == list(after.tensors)
    for name in ("token_embd.weight", "blk.1.post_ffw_norm.weight"):
        assert np.array_equal(before.read(name), after.read(name))


def test_template_metadata_keeps_types_and_drops_splits(tmp_path: Path) -> None:
    template = dense_template("llama", tmp_path, permute=True)
    out = tmp_path / "out"
    out.mkdir()
    artifact = compressed("llama", assets=None)
    result = exporter(template=str(template)).write(artifact, out)
    before, after = open_gguf(template).metadata, open_gguf(result.files[0]).metadata
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.scores", "some.bytes"):
        assert after[key] == before[key]
    assert "split.count" not in after
    assert after["general.file_type"].value == 2


def test_template_bytes_are_promised_exactly(tmp_path: Path) -> None:
    template = dense_template("gemma2", tmp_path, permute=False, **GEMMA)
    out = tmp_path / "out"
    out.mkdir()
    artifact = compressed("gemma2", assets=None, **GEMMA)
    plugin = exporter(template=str(template), embedding="q8_0")
    promised = plugin.tensor_bytes(artifact.plan, artifact.description)
    result = plugin.write(artifact, out)
    stored = open_gguf(result.files[0]).tensors.values()
    assert sum(promised.values()) == sum(tensor.size_bytes for tensor in stored)
    assert promised["model.embed_tokens"] == ROWS * 64 // 32 * 34


def test_template_of_other_weights_is_refused(tmp_path: Path) -> None:
    template = dense_template("llama", tmp_path, permute=True, initializer_range=0.3)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ExportError, match=r"blk\.0\.attn_q\.weight is not model"):
        exporter(template=str(template)).write(compressed("llama", assets=None), out)


def test_template_of_another_size_is_a_problem(tmp_path: Path) -> None:
    template = dense_template("llama", tmp_path, permute=True, intermediate_size=128)
    artifact = compressed("llama", assets=None)
    plugin = exporter(template=str(template))
    problems = plugin.check(artifact.plan, artifact.description)
    assert "blk.0.ffn_gate.weight is [128, 64], the layer [96, 64]" in "".join(
        problem.message for problem in problems
    )


def test_missing_template_is_a_problem(tmp_path: Path) -> None:
    artifact = compressed("llama", assets=None)
    plugin = exporter(template=str(tmp_path / "gone.gguf"))
    problems = plugin.check(artifact.plan, artifact.description)
    assert [p.where for p in problems] == ["template"]
    assert "gone.gguf: cannot read" in problems[0].message
