"""W6A8 layers in models: the operations, the module, and both ways to get them."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from export_fixtures import linears, make_artifact
from safetensors.torch import load_file
from torch import library

import compress
from compress.core.errors import CheckpointError, KernelError
from compress.core.scheme import Scheme
from compress.core.tensors import QuantizedTensor
from compress.export.safetensors import SafetensorsExporter, SafetensorsOptions
from compress.runtime.w6a8 import engines, ops, reference
from compress.runtime.w6a8.linear import W6A8Linear
from compress.runtime.w6a8.tiles import TiledWeight

IDS = torch.arange(12)[None]


def tensor(scheme: str, rows: int, columns: int, seed: int = 0) -> QuantizedTensor:
    parsed = Scheme.parse(scheme)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-32, 32, (rows, columns), generator=generator)
    groups = columns // parsed.group_of(columns)
    scale = torch.rand(rows, groups, generator=generator).half() * 0.01
    return QuantizedTensor(codes.to(torch.int8), scale, None, parsed)


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def write(folder: Path, scheme: str) -> None:
    folder.mkdir(exist_ok=True)
    artifact = make_artifact(linears(scheme), dtype="bfloat16", hidden=128)
    SafetensorsExporter(SafetensorsOptions()).write(artifact, folder)


@pytest.mark.parametrize("scheme", ["w6a8-g32", "w6a8-g128", "w6a8-g64-group"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_layer_is_the_reference(
    scheme: str, dtype: torch.dtype, has_bias: bool
) -> None:
    given, x = tensor(scheme, 17, 128), inputs(2, 3, 128).to(dtype)
    bias = inputs(17).to(dtype) if has_bias else None
    layer = W6A8Linear(given, bias)
    assert given.scheme.inputs is not None
    expected = reference.linear(
        reference.quantize_activations(x, given.scheme.inputs.group_size),
        (given.codes, given.scale),
        bias,
        dtype=dtype,
    )
    found = layer(x)
    assert found.dtype == dtype
    assert torch.equal(found, expected.view(2, 3, 17))
    assert torch.equal(layer(x.transpose(0, 1)), found.transpose(0, 1))


def test_a_layer_is_close_to_the_exact_product() -> None:
    given, x = tensor("w6a8-g64", 32, 256), inputs(9, 256)
    exact = x @ given.dequantize().t()
    error = (W6A8Linear(given, None)(x) - exact).norm() / exact.norm()
    assert 0 < error < 0.01


def test_no_tokens_give_no_rows() -> None:
    layer = W6A8Linear(tensor("w6a8-g32", 8, 64), None)
    assert layer(torch.zeros(2, 0, 64)).shape == (2, 0, 8)


def test_the_operations_obey_torchs_contract() -> None:
    given = TiledWeight.from_quantized(tensor("w6a8-g32", 20, 160))
    x = inputs(2, 3, 160)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    library.opcheck(ops.quant_act, (x, 160), test_utils=tests[:2])
    arguments = (x, given.tiles, given.scales, inputs(20), 20, 160, 32, 160)
    library.opcheck(ops.w6a8_linear, arguments, test_utils=tests)


def test_quant_act_fills_up_with_zeros() -> None:
    x = inputs(3, 160)
    codes, scale = ops.quant_act(x, 32)
    expected = reference.quantize_activations(x, 32)
    assert torch.equal(codes[:, :160], expected[0]) and torch.equal(scale, expected[1])
    assert codes.shape == (3, 256) and not codes[:, 160:].any()


def test_inputs_of_another_width_or_place_are_refused() -> None:
    layer = W6A8Linear(tensor("w6a8-g32", 8, 64), None)
    with pytest.raises(KernelError, match="inputs have 128 columns, the weight has 64"):
        layer(inputs(2, 128))
    with pytest.raises(KernelError, match="are on meta, the layer is on cpu; move one"):
        layer(inputs(2, 64).to("meta"))


def test_a_gradient_is_refused() -> None:
    layer = W6A8Linear(tensor("w6a8-g32", 8, 64), None)
    x = inputs(1, 64).requires_grad_()
    with pytest.raises(RuntimeError, match="no autograd formula"):
        layer(x).sum().backward()


def test_the_state_is_that_of_the_file_and_goes_back() -> None:
    given = tensor("w6a8-g32", 17, 96)
    layer = W6A8Linear(given, inputs(17))
    state = layer.state_dict()
    assert list(state) == ["bias", "weight_packed", "weight_scale", "weight_shape"]
    assert torch.equal(state["weight_scale"], given.scale)
    other = W6A8Linear(tensor("w6a8-g32", 17, 96, seed=3), torch.zeros(17))
    assert other.load_state_dict(state).missing_keys == []
    x = inputs(2, 96)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(other.quantized().codes, given.codes)


def test_a_state_of_another_shape_is_refused() -> None:
    state = W6A8Linear(tensor("w6a8-g32", 17, 96), None).state_dict()
    with pytest.raises(CheckpointError, match="weight_packed is int32"):
        W6A8Linear(tensor("w6a8-g32", 16, 96), None).load_state_dict(state)


def test_a_cast_leaves_codes_and_scales_alone() -> None:
    given = tensor("w6a8-g32", 17, 96)
    layer = W6A8Linear(given, inputs(17)).to(torch.bfloat16)
    assert torch.equal(layer.quantized().scale, given.scale)
    assert layer.bias is not None and layer.bias.dtype == torch.bfloat16


def test_the_reason_for_the_slow_path_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engines.say_slow.cache_clear()
    layer = W6A8Linear(tensor("w6a8-g32", 8, 64), None)
    with caplog.at_level(logging.WARNING):
        layer(inputs(1, 64)), layer(inputs(2, 64))
    assert [r.message for r in caplog.records] == [
        "W6A8 layers are computed in plain torch, which is slow: the model is on cpu, "
        "the kernels need CUDA"
    ]


def test_inputs_of_other_types_have_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    found = engines.available(torch.device("cuda"), torch.float64)
    assert isinstance(found, KernelError) and "torch.float64" in str(found)


@pytest.mark.parametrize("scheme", ["w6a8-g64", "w6a8-g64-group"])
def test_a_folder_is_loaded_as_served(scheme: str, tmp_path: Path) -> None:
    write(tmp_path, scheme)
    model = compress.load(tmp_path, as_served=True, fused=False)
    layers = [m for m in model.modules() if isinstance(m, W6A8Linear)]
    assert len(layers) == 14
    # The same as rounding the inputs of the dense model.
    dense = compress.load(tmp_path)

    def rounded(module: torch.nn.Module, given: tuple[torch.Tensor]) -> torch.Tensor:
        codes, scale = reference.quantize_activations(given[0], group)
        runs = codes.view(len(codes), scale.shape[1], -1) * scale[..., None]
        return runs.view(given[0].shape)

    assert layers[0].scheme.inputs is not None
    group = layers[0].scheme.inputs.group_size
    for name, module in model.named_modules():
        if isinstance(module, W6A8Linear):
            dense.get_submodule(name).register_forward_pre_hook(rounded)
    with torch.inference_mode():
        found, expected = model(IDS).logits, dense(IDS).logits
    assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4)


def test_stock_transformers_accelerated_gives_the_same_logits(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    write(tmp_path, "w6a8-g64")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert compress.accelerate(stock, fused=False) is stock
    assert sum(isinstance(m, W6A8Linear) for m in stock.modules()) == 14
    ours = compress.load(tmp_path, as_served=True)
    with torch.inference_mode():
        assert torch.equal(stock(IDS).logits, ours(IDS).logits)


def test_biases_of_a_model_are_kept(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(num_hidden_layers=2, attention_bias=True, **sizes, **heads)
    model = LlamaForCausalLM(config).bfloat16()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.k_proj.bias)
    biases = {n: p.clone() for n, p in model.named_parameters() if n.endswith("bias")}
    compress.quantize(model, "w6a8-g64", method="rtn").save(tmp_path / "saved")
    assert len(biases) == 8
    for fused in (False, True):
        folder = tmp_path / "saved"
        served = compress.load(folder, dtype=None, as_served=True, fused=fused)
        found = served.state_dict()
        assert all(torch.equal(found[name], bias) for name, bias in biases.items())


def test_layers_that_stay_exact_are_decoded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoModelForCausalLM

    def scheme_of(layer: str) -> str | None:
        if ".layers." not in layer:
            return None
        return "int4-g64" if "layers.0.mlp.down_proj" in layer else "w6a8-g64"

    artifact = make_artifact(scheme_of, dtype="bfloat16", hidden=128)
    SafetensorsExporter(SafetensorsOptions()).write(artifact, tmp_path)
    with caplog.at_level(logging.WARNING):
        ours = compress.load(tmp_path, as_served=True)
    assert "1 layers are decoded: int4-g64 is not 6-bit" in caplog.text
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    compress.accelerate(stock)
    exact = ours.model.layers[0].mlp.down_proj
    assert type(exact) is torch.nn.Linear
    decoded = artifact.quantized("model.layers.0.mlp.down_proj").dequantize()
    assert torch.equal(exact.weight, decoded)
    with torch.inference_mode():
        assert torch.equal(stock(IDS).logits, ours(IDS).logits)


def test_what_is_saved_again_is_the_same_file(tmp_path: Path) -> None:
    write(tmp_path / "first", "w6a8-g64")
    model = compress.load(tmp_path / "first", dtype=None, as_served=True)
    model.save_pretrained(tmp_path / "second")
    first, second = (
        load_file(tmp_path / name / "model.safetensors") for name in ("first", "second")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    config = json.loads((tmp_path / "second" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    again = compress.load(tmp_path / "second", dtype=None, as_served=True)
    with torch.inference_mode():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_other_layers_are_decoded_with_a_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, "int4-g32")
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(CheckpointError, match="no layer has 6-bit weights around zero"),
    ):
        compress.load(tmp_path, as_served=True)
    assert "14 layers are decoded: int4-g32 is not 6-bit" in caplog.text


def test_accelerate_says_what_it_cannot_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="none is quantized"):
        compress.accelerate(torch.nn.Linear(3, 4))
    from transformers import AutoModelForCausalLM

    write(tmp_path, "w6a8-g64")
    decoded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.inference_mode():
        decoded(IDS)
    with pytest.raises(CheckpointError, match="before the first forward pass"):
        compress.accelerate(decoded)
