"""Our checkpoints in stock transformers, against a model with our decoded weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from export_fixtures import dense_logits, linears, make_artifact
from torch import Tensor

from compress.export.safetensors import SafetensorsExporter, SafetensorsOptions

pytest.importorskip("compressed_tensors")
pytestmark = pytest.mark.integration
WINDOWS = torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(1))


def mixed(layer: str) -> str | None:
    if ".layers." not in layer:
        return None
    return "int6-g32" if "self_attn" in layer else "int3"


def mean_kl(reference: Tensor, other: Tensor) -> float:
    p, q = reference.log_softmax(-1), other.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def replayed_kl(artifact, folder: Path, size: str = "5GB") -> float:
    exporter = SafetensorsExporter(SafetensorsOptions(max_shard_size=size))
    exporter.write(artifact, folder)
    logits = torch.stack(list(exporter.replay(folder, WINDOWS)))
    assert logits.dtype == torch.float32
    return mean_kl(dense_logits(artifact, WINDOWS), logits)


@pytest.mark.parametrize("group", ["", "-g32"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_symmetric_codes_load(bits: int, group: str, tmp_path: Path) -> None:
    artifact = make_artifact(linears(f"int{bits}{group}"))
    assert replayed_kl(artifact, tmp_path) < 1e-9


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
def test_scales_of_any_type_are_multiplied_in_float32(
    scale_dtype: str, tmp_path: Path
) -> None:
    artifact = make_artifact(
        linears("int4-g32"), dtype="bfloat16", scale_dtype=scale_dtype
    )
    assert replayed_kl(artifact, tmp_path) < 1e-9


@pytest.mark.parametrize("scheme", ["int2-g32-asym", "int5-g32-asym", "int8-asym"])
def test_integer_zero_points_load_with_dequantize(scheme: str, tmp_path: Path) -> None:
    assert replayed_kl(make_artifact(linears(scheme)), tmp_path) < 1e-9


@pytest.mark.parametrize(("dtype", "limit"), [("float16", 1e-5), ("bfloat16", 1e-3)])
def test_zero_points_are_off_by_the_scales_own_rounding(
    dtype: str, limit: float, tmp_path: Path
) -> None:
    # dequantize=True multiplies in the scales' type, which has 11 or 8 bits.
    artifact = make_artifact(linears("int4-g32-asym"), dtype=dtype)
    assert replayed_kl(artifact, tmp_path) < limit


def test_several_schemes_load(tmp_path: Path) -> None:
    assert replayed_kl(make_artifact(mixed), tmp_path) < 1e-9


@pytest.mark.parametrize("tied", [False, True])
def test_shards_and_tied_heads_load(tied: bool, tmp_path: Path) -> None:
    artifact = make_artifact(linears("int4-g32"), tied=tied, dtype="bfloat16")
    assert replayed_kl(artifact, tmp_path, "20KB") < 1e-9
    assert len(list(tmp_path.glob("*.safetensors"))) > 2


def test_a_coded_head_loads(tmp_path: Path) -> None:
    artifact = make_artifact(lambda n: None if "embed" in n else "int4-g32")
    assert replayed_kl(artifact, tmp_path) < 1e-9


def test_a_plan_without_layers_loads(tmp_path: Path) -> None:
    assert replayed_kl(make_artifact(lambda _: None, tied=True), tmp_path) < 1e-9


def test_progress_bars_are_left_as_they_were(tmp_path: Path) -> None:
    from tqdm import tqdm

    before = tqdm.__init__
    replayed_kl(make_artifact(linears("int4-g32")), tmp_path)
    assert tqdm.__init__ is before
