"""Fused norms, projections and MLPs: the numbers and the files of single layers."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from export_fixtures import make_artifact
from gguf_fixtures import tiny_config
from moe_fixtures import KINDS
from safetensors.torch import load_file
from torch import library

import compress
from compress.core.errors import CheckpointError
from compress.core.families import FAMILIES
from compress.core.scheme import Scheme
from compress.core.tensors import QuantizedTensor
from compress.export.safetensors import SafetensorsExporter, SafetensorsOptions
from compress.model.experts import ActiveExperts
from compress.runtime.w6a8 import fused, fusion, ops
from compress.runtime.w6a8.linear import W6A8Linear

IDS = torch.arange(22).view(2, 11)
FAMILY_TYPES = [kind for family in FAMILIES for kind in family.model_types]


def save(folder: Path, kind: str, schemes: str = "w6a8-g32", **changes: Any) -> Path:
    """Save a quantized random model of a family, in bfloat16."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(kind, **(KINDS.get(kind, {}) | changes))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases
                parameter.add_(0.2 * torch.randn_like(parameter))
    compress.quantize(model, schemes, method="rtn").save(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def kinds_of(model: Any) -> dict[str, int]:
    names = [type(module).__name__ for module in model.modules()]
    return {name: names.count(name) for name in ("NormedLinear", "GatedDown", "Rows")}


@pytest.mark.parametrize("kind", FAMILY_TYPES)
def test_a_fused_model_computes_the_same_bits(kind: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "saved", kind)
    single = compress.load(folder, dtype=None, as_served=True, fused=False)
    together = compress.load(folder, dtype=None, as_served=True)
    assert not any(kinds_of(single).values())
    dense = kind not in KINDS
    projections = {"phi3": 2}.get(kind, 5 if dense else 3 + 2 * 4)
    assert kinds_of(together) == {
        "NormedLinear": 4 if dense else 2,
        "GatedDown": 2 if dense else 0,
        "Rows": 2 * projections,
    }
    assert torch.equal(logits(together), logits(single))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scheme", ["w6a8-g64", "w6a8-g32-group"])
def test_bits_are_the_same_in_other_types_and_modes(
    dtype: torch.dtype, scheme: str, tmp_path: Path
) -> None:
    folder = save(tmp_path / "saved", "qwen2", scheme, intermediate_size=128)
    single = compress.load(folder, dtype=dtype, as_served=True, fused=False)
    together = compress.load(folder, dtype=dtype, as_served=True)
    assert kinds_of(together)["GatedDown"] == 2
    assert torch.equal(logits(together), logits(single))


@pytest.mark.parametrize("kind", ["qwen2", "phi3", "gemma3_text", "mixtral"])
def test_a_fused_model_is_saved_as_the_file_it_came_from(
    kind: str, tmp_path: Path
) -> None:
    first = save(tmp_path / "first", kind)
    model = compress.load(first, dtype=None, as_served=True)
    model.save_pretrained(tmp_path / "second")
    before, after = (
        load_file(folder / "model.safetensors")
        for folder in (first, tmp_path / "second")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = compress.load(tmp_path / "second", dtype=None, as_served=True)
    assert torch.equal(logits(again), logits(model))


def test_stock_transformers_opens_what_a_fused_model_saved(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    first = save(tmp_path / "first", "qwen2")
    model = compress.load(first, dtype=None, as_served=True)
    model.save_pretrained(tmp_path / "second")
    stock = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (first, tmp_path / "second")
    ]
    assert torch.equal(logits(stock[1]), logits(stock[0]))


def test_accelerate_fuses_what_stock_transformers_loaded(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = save(tmp_path / "saved", "qwen3")
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    compress.accelerate(stock)
    assert kinds_of(stock)["NormedLinear"] == 4
    ours = compress.load(folder, dtype=None, as_served=True, fused=False)
    assert torch.equal(logits(stock), logits(ours))


def test_a_state_of_another_model_is_taken_over(tmp_path: Path) -> None:
    folder = save(tmp_path / "saved", "qwen2")
    model = compress.load(folder, dtype=None, as_served=True)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    target = copy.deepcopy(model)
    with torch.no_grad():
        for module in target.modules():
            if isinstance(module, W6A8Linear):
                module.tiles.zero_()
        for name, parameter in target.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    assert not torch.equal(logits(target), logits(model))
    found = target.load_state_dict(state)
    assert not found.missing_keys and not found.unexpected_keys
    assert torch.equal(logits(target), logits(model))


def test_a_copy_is_a_model_of_its_own(tmp_path: Path) -> None:
    model = compress.load(save(tmp_path / "saved", "llama"), as_served=True)
    other = copy.deepcopy(model)
    part = other.model.layers[0].self_attn.q_proj
    assert part.whole is other.model.layers[0].input_layernorm.stacked
    expected = logits(model)
    part.whole.tiles.zero_()
    assert torch.equal(logits(model), expected)


def test_a_state_with_damaged_rows_names_the_layer(tmp_path: Path) -> None:
    model = compress.load(save(tmp_path / "saved", "llama"), as_served=True)
    state = dict(model.state_dict())
    name = "model.layers.1.self_attn.v_proj"
    state[f"{name}.weight_packed"] = state[f"{name}.weight_packed"][:-1]
    with pytest.raises(CheckpointError, match=f"{name}: .*weight_packed"):
        model.load_state_dict(state)


def test_layers_that_disagree_stay_single(tmp_path: Path) -> None:
    folder = save_with(tmp_path, {"re:.*up_proj": "w6a8-g64"})
    model = compress.load(folder, dtype=None, as_served=True)
    assert kinds_of(model) == {"NormedLinear": 2, "GatedDown": 0, "Rows": 6}
    single = compress.load(folder, dtype=None, as_served=True, fused=False)
    assert torch.equal(logits(model), logits(single))


def test_exact_inputs_decode_the_weight_in_each_pass(tmp_path: Path) -> None:
    folder = save(tmp_path / "saved", "llama", "int6-g32")
    served = compress.load(folder, dtype=None, as_served=True)
    assert not any(kinds_of(served).values())
    layers = [m for m in served.modules() if isinstance(m, W6A8Linear)]
    assert len(layers) == 14 and layers[0].input_group is None
    assert torch.equal(logits(served), logits(compress.load(folder, dtype=None)))


def test_a_down_with_exact_inputs_follows_fused_gate_and_up(tmp_path: Path) -> None:
    folder = save_with(tmp_path, {"re:.*layers.0.mlp.down_proj": "int6-g32"})
    model = compress.load(folder, dtype=None, as_served=True)
    assert kinds_of(model)["GatedDown"] == 2
    single = compress.load(folder, dtype=None, as_served=True, fused=False)
    assert torch.equal(logits(model), logits(single))


def test_only_experts_with_tokens_are_called(tmp_path: Path) -> None:
    model = compress.load(save(tmp_path / "saved", "mixtral"), as_served=True)
    found = [m for m in model.modules() if isinstance(m, ActiveExperts)]
    assert len(found) == 2
    called: list[int] = []
    for number, expert in enumerate(found[0]):
        expert.register_forward_hook(lambda *_, n=number: called.append(n))
    with torch.inference_mode():
        model(torch.tensor([[5]]))
    assert len(called) == 2 and called == sorted(called)  # two of four, one token


def test_a_fused_model_is_one_graph(tmp_path: Path) -> None:
    model = compress.load(save(tmp_path / "saved", "llama"), as_served=True)
    expected = logits(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        found = compiled(IDS, use_cache=False).logits
    # Some releases of torch take apart what they trace, and round in another place.
    torch.testing.assert_close(found, expected)


def test_nothing_is_computed_for_no_tokens(tmp_path: Path) -> None:
    model = compress.load(save(tmp_path / "saved", "llama"), as_served=True)
    block = model.model.layers[0]
    products = block.input_layernorm(torch.zeros(3, 0, 64))
    assert products.shape == (3, 0, 128)
    assert block.self_attn.v_proj(products).shape == (3, 0, 32)
    assert block.mlp(torch.zeros(0, 192)).shape == (0, 64)


@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_norm_and_its_codes_are_the_modules_pair(
    plus_one: bool, dtype: torch.dtype
) -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm: Any = (Gemma3RMSNorm if plus_one else LlamaRMSNorm)(160, 1e-5)
    torch.manual_seed(0)
    norm.weight.data.normal_()
    norm, x = norm.to(dtype), 3 * torch.randn(2, 5, 160).to(dtype)
    found = fused.rms_norm_quant(x, norm.weight.detach(), 1e-5, plus_one, 32)
    expected = ops.quant_act(norm(x).detach(), 32)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_an_activation_and_its_codes_are_the_pair() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 2 * 96).bfloat16()
    gate, up = x.chunk(2, -1)
    found = fused.silu_mul_quant(x, 96)
    expected = ops.quant_act(torch.nn.functional.silu(gate) * up, 96)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_codes_and_layer_are_the_layer() -> None:
    torch.manual_seed(0)
    codes = torch.randint(-32, 32, (17, 160), dtype=torch.int8)
    scale = 0.01 * torch.rand(17, 5).half()
    scheme = Scheme.parse("w6a8-g32-group")
    layer = W6A8Linear(QuantizedTensor(codes, scale, None, scheme), torch.randn(17))
    x = torch.randn(6, 160).half()
    codes, scale = ops.quant_act(x, 32)
    tiles, scales, bias, rows, columns, group, _ = layer.operands()
    found = ops.w6a8_matmul(
        codes, scale, tiles, scales, bias, rows, columns, group, torch.float16
    )
    assert torch.equal(found, layer(x))


def test_the_operations_obey_torchs_contract() -> None:
    x, tests = torch.randn(2, 3, 160), ("test_schema", "test_faketensor")
    check = library.opcheck
    check(
        fused.rms_norm_quant, (x, torch.randn(160), 1e-5, False, 32), test_utils=tests
    )
    check(fused.silu_mul_quant, (x, 80), test_utils=tests)
    layer = W6A8Linear(
        QuantizedTensor(
            torch.ones(17, 160, dtype=torch.int8),
            torch.ones(17, 5).half(),
            None,
            Scheme.parse("w6a8-g32"),
        ),
        torch.zeros(17),
    )
    given = (x, torch.randn(160), 1e-5, False, *layer.operands())
    check(fused.rms_norm_linear, given, test_utils=tests)
    given = (torch.randn(2, 3, 320), *layer.operands())
    check(fused.silu_mul_linear, given, test_utils=tests)


def test_a_norm_that_is_not_an_rms_norm_is_left_alone() -> None:
    assert fusion.epsilon(torch.nn.LayerNorm(8)) is None
    assert fusion.epsilon(torch.nn.RMSNorm(8, elementwise_affine=False)) is None


def save_with(folder: Path, overrides: dict[str, str]) -> Path:
    """Save a Llama with ``w6a8-g32`` and other schemes for some layers."""

    def scheme_of(layer: str) -> str | None:
        if ".layers." not in layer:
            return None
        for pattern, scheme in overrides.items():
            if re.fullmatch(pattern.removeprefix("re:"), layer):
                return scheme
        return "w6a8-g32"

    artifact = make_artifact(scheme_of, dtype="bfloat16")
    (folder / "saved").mkdir()
    SafetensorsExporter(SafetensorsOptions()).write(artifact, folder / "saved")
    return folder / "saved"
