"""Matrices that are fitted to the original's stream, block after block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from export_fixtures import StateDictSource
from moe_fixtures import opened, save_mixture
from pruning_fixtures import loaded, pruned, pruning_of
from streaming_fixtures import model_of
from torch import Tensor

from compress.core.compensation import fitted
from compress.core.errors import CalibrationError, ConfigError
from compress.pruning.statistics import NeuronMoments
from compress.pruning.walk import input_of

SECTION = {"method": "wanda_sp", "sparsity": 0.4}
TEXT = torch.randint(3, 128, (64, 24), generator=torch.Generator().manual_seed(7))


def streams_of(model: Any, windows: Tensor) -> list[Tensor]:
    """Return the residual stream behind the embedding and each block."""
    found: list[Tensor] = []
    layers = model.model.layers
    hooks = [layers[0].register_forward_pre_hook(lambda _m, x: found.append(x[0]))]
    hooks += [
        layer.register_forward_hook(
            lambda _m, _x, y: found.append(y[0] if isinstance(y, tuple) else y)
        )
        for layer in layers
    ]
    with torch.no_grad():
        model(windows)
    for hook in hooks:
        hook.remove()
    return found


def test_a_fit_has_no_slope_left() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 12, generator=generator, dtype=torch.float64)
    t = torch.randn(500, 5, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, 12, generator=generator)
    kept = torch.tensor([0, 2, 3, 7, 11])
    gram, products = x.T @ x / 500, t.T @ x / 500
    found = fitted(weight, gram, products, kept, ridge=1e-12).double()
    expected = torch.linalg.lstsq(x[:, kept], t).solution.T
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    held = fitted(weight, gram, products, kept, ridge=1e12).double()
    torch.testing.assert_close(held, weight[:, kept].double())  # the ridge draws there


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [100, 4096])
def test_each_matrix_is_the_best_one_for_the_stream(
    chunk: int, bias: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By plain transformers: residuals have nothing to do with the inputs."""
    monkeypatch.setattr("compress.pruning.statistics._AT_ONCE", chunk)
    options = {"attention_bias": bias, "mlp_bias": bias}
    model, description, _ = model_of("llama", **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    source = StateDictSource({n: p.detach() for n, p in model.named_parameters()})
    section = SECTION | {"propagate": "corrected"}
    pruned(description, source, tmp_path, windows=TEXT, **section)
    small = loaded(tmp_path).float()
    wanted = streams_of(model, TEXT)
    for index, layer in enumerate(small.model.layers):
        other = model.model.layers[index]
        with (
            input_of(layer.self_attn.o_proj) as o,
            input_of(layer.mlp.down_proj) as down,
            input_of(layer.post_attention_layernorm) as between,
            input_of(other.post_attention_layernorm) as wanted_between,
        ):
            streams = streams_of(small, TEXT)
            streams_of(model, TEXT)
        gaps = {
            "o": (o[0], wanted_between[0] - between[0]),
            "down": (down[0], wanted[index + 1] - streams[index + 1]),
        }
        for name, (inputs, gap) in gaps.items():
            x = inputs.flatten(0, 1).double()
            left = gap.flatten(0, 1).double().T @ x / len(x)
            whole = wanted[index + 1].flatten(0, 1).double().T @ x / len(x)
            # A ridge of 1e-4 leaves that much of the correlation.
            assert left.norm() < 0.01 * whole.norm(), (index, name)


def test_a_corrected_model_is_nearer_to_the_original(tmp_path: Path) -> None:
    model, description, source = model_of("llama")
    wanted = streams_of(model, TEXT)[-1]
    left = {}
    for kind in ("dense", "pruned", "corrected"):
        section = SECTION | {"propagate": kind}
        record, _ = pruned(
            description, source, tmp_path / kind, windows=TEXT, **section
        )
        assert record["propagate"] == kind
        found = streams_of(loaded(tmp_path / kind), TEXT)[-1]
        left[kind] = float((found - wanted).square().mean())
    assert left["corrected"] < 0.9 * left["pruned"]
    assert left["corrected"] < 0.9 * left["dense"]
    assert record["blocks"][0]["attention_error"] < 1e-6  # nothing was wrong before it
    assert all(0 < block["error"] < 1 for block in record["blocks"])
    assert record["blocks"][1]["attention_error"] > 1e-6


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "phi3", "smollm3", "mistral"])
def test_other_families_are_corrected_too(kind: str, tmp_path: Path) -> None:
    model, description, source = model_of(kind)
    wanted, left = streams_of(model, TEXT)[-1], []
    for how in ("pruned", "corrected"):
        section = SECTION | {"propagate": how}
        pruned(description, source, tmp_path / how, windows=TEXT, **section)
        found = streams_of(loaded(tmp_path / how), TEXT)[-1]
        left.append(float((found - wanted).square().mean()))
    assert left[1] < left[0]


@pytest.mark.parametrize(
    ("kind", "section", "message"),
    [
        ("llama", SECTION | {"repair": "mask"}, "only repair least_squares"),
        ("llama", {"method": "maw", "sparsity": 0.4}, "only repair least_squares"),
        ("llama", SECTION | {"repair": "none"}, "only repair least_squares"),
        ("gemma2", SECTION, "norms between o or down and the stream"),
    ],
)
def test_what_cannot_be_corrected_is_refused(
    kind: str, section: dict[str, Any], message: str, tmp_path: Path
) -> None:
    _, description, source = model_of(kind)
    with pytest.raises(ConfigError, match=f"prune.propagate corrected: .*{message}"):
        pruning_of(
            description, source, tmp_path, **section | {"propagate": "corrected"}
        )


def test_a_mixture_is_refused(tmp_path: Path) -> None:
    save_mixture(tmp_path, "qwen3_moe")
    handle = opened(tmp_path)
    section = SECTION | {"propagate": "corrected"}
    with pytest.raises(ConfigError, match=r"corrected: qwen3_moe is a mixture"):
        pruning_of(handle.description, handle.source, tmp_path, **section)


def test_what_is_wanted_has_to_be_finite() -> None:
    moments = NeuronMoments()
    moments.add(torch.ones(3, 4), torch.full((3, 2), torch.inf))
    with pytest.raises(CalibrationError, match=r"x: what it is to give is NaN"):
        moments.result("x", None)


def test_a_correction_changes_no_choice_that_exchanges_made(tmp_path: Path) -> None:
    model, description, source = model_of("llama")
    wanted = streams_of(model, TEXT)[-1]
    section = {"method": "taylor", "sparsity": 0.4, "exchanges": 1}
    kept, left = [], []
    for how in ("dense", "corrected"):
        _, own = pruned(
            description, source, tmp_path / how, windows=TEXT, propagate=how, **section
        )
        found = streams_of(loaded(tmp_path / how), TEXT)[-1]
        kept.append({path: n for path, n in own.items() if path.endswith("mlp")})
        left.append(float((found - wanted).square().mean()))
    assert kept[0] == kept[1] and left[1] < 0.9 * left[0]


def test_blocks_without_attention_are_corrected(tmp_path: Path) -> None:
    """In such a block nothing but ``down`` adds to the stream."""
    _, description, source = model_of("llama", num_hidden_layers=5)
    section = SECTION | {"depth_unit": "attention", "depth_share": 0.3}
    record, kept = pruned(
        description,
        source,
        tmp_path,
        windows=TEXT,
        shape="per-layer",
        propagate="corrected",
        **section,
    )
    gone = record["attention_removed"]
    assert gone and all(f"model.layers.{n}.self_attn" not in kept for n in gone)
    errors = [block["attention_error"] for block in record["blocks"]]
    assert [n for n, error in enumerate(errors) if error is None] == gone
