"""One contract for every registered plug-in, and for one from outside."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from export_fixtures import linears, make_artifact
from plugin_fixtures import COLUMNS, ROWS, make_statistics, make_weight
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from compress import registry
from compress.core.artifact import CompressedModel
from compress.core.contracts import Exporter, Plugin, Quantizer
from compress.core.scheme import Scales, Scheme, Zero
from compress.core.statistics import LayerStatistics
from compress.core.tensors import TORCH_DTYPES, QuantizedTensor

TESTS = Path(__file__).resolve().parents[1]
OUTSIDE = TESTS / "plugin/compress-plugin-demo/demo_power_of_two.py"
SCHEMES = (
    "int2-g32",
    "int3-g64",
    "int4-g32",
    "int4-g32-asym",
    "int4-g32-offset",
    "int5-g32-offset",
    "int6-asym",
    "int8",
    "fp4-g32",
    "fp4-g32-pow2",
    "fp4-g32-ratio",
    "e3m0-g64-ratio",
    "fp6-g32",
    "fp8",
    "fp8-tensor",
    "fp8-b32",
    "nvfp4",
    "mxfp4",
    "int3-g64-lorc4",
    "int3-g32-offset-lorc4",
    "fp4-g32-ratio-lorc4",
    "iq4_nl",
    "aqlm-1x4g4",
    "aqlm-2x3g8",
)
STAND_INS = {
    "int2-g32": "aqlm-1x2g2",
    "int4-g32": "aqlm-2x4g2",
    "int7-g32": "aqlm-3x5g2",
}
"""What methods that know only tables are asked for instead, of as many bits or so."""
PRODUCTS = {"int2-g32": "pq-2x2", "int4-g32": "pq-2x5", "int7-g32": "pq-2x5x2"}
"""And those that know only tables of runs of columns."""
TABLES = (
    *("palette2", "palette3-r1", "palette4-tensor", "palette3-r32", "palette3-scaled"),
    *("palette-2x6", "palette-4x8-r24", "palette-2x9"),
    *("pq-4x3", "pq-2x9", "pq-8x4x2", "pq-4x4-scaled"),
)
DTYPES = ("float32", "float16", "bfloat16")


def load_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def quantizer_class(name: str) -> type[Quantizer]:
    if name == "outside":
        plugin: type[Quantizer] = load_file(OUTSIDE).PowerOfTwo
        return plugin
    return registry.get_quantizer(name)


QUANTIZERS = sorted({*registry.names("quantizers"), "outside"})


@pytest.fixture(params=QUANTIZERS)
def quantizer(request: pytest.FixtureRequest) -> Quantizer:
    return quantizer_class(request.param)()


@pytest.fixture(params=[*QUANTIZERS, *registry.names("exporters")])
def plugin(request: pytest.FixtureRequest) -> type[Plugin]:
    if request.param in registry.names("exporters"):
        return registry.get_exporter(request.param)
    return quantizer_class(request.param)


def statistics_for(quantizer: Quantizer) -> LayerStatistics | None:
    return make_statistics() if quantizer.needs_statistics else None


def supported(quantizer: Quantizer, name: str, dtype: str = "float16") -> Scheme:
    scheme = Scheme.parse(name).with_scales(dtype)
    if not quantizer.supports(scheme):
        pytest.skip(f"{quantizer.name} does not do {name}")
    return scheme


def any_zero(quantizer: Quantizer, name: str, dtype: str = "float16") -> Scheme:
    """Return ``name``, or what stands in for it where a method cannot make it."""
    table = f"palette{Scheme.parse(name).bits}-scaled"
    others = name, f"{name}-offset", STAND_INS[name], table, PRODUCTS[name]
    names = [x for x in others if quantizer.supports(Scheme.parse(x))]
    return supported(quantizer, names[0] if names else name, dtype)


def assert_same(left: QuantizedTensor, right: QuantizedTensor) -> None:
    assert left.state().keys() == right.state().keys()
    for key, tensor in left.state().items():
        assert torch.equal(tensor, right.state()[key]), key


def test_plugin_says_what_it_is(plugin: type[Plugin]) -> None:
    for text in (plugin.name, plugin.summary, plugin.source, plugin.__doc__):
        assert isinstance(text, str) and text.strip()
    assert "\n" not in plugin.summary
    if issubclass(plugin, Exporter):
        assert plugin.consumer


def test_options_survive_a_round_trip(plugin: type[Plugin]) -> None:
    options = plugin().options
    data = json.loads(json.dumps(options.model_dump(mode="json")))
    assert type(options).model_validate(data) == options
    assert plugin(options).options == options


def test_options_refuse_unknown_keys_and_are_frozen(plugin: type[Plugin]) -> None:
    config = plugin.Options.model_config
    assert (config.get("extra"), config.get("frozen")) == ("forbid", True)


def test_offered_schemes_exist_and_are_supported(quantizer: Quantizer) -> None:
    schemes = [Scheme.parse(name) for name in quantizer.schemes()]
    assert schemes
    assert all(quantizer.supports(scheme) for scheme in schemes)
    bits = [scheme.bits_per_weight(COLUMNS) for scheme in schemes]
    assert bits == sorted(bits, reverse=True)


def stored_scale(scheme: Scheme) -> tuple[torch.dtype, tuple[int, int]]:
    """Return the type and shape that a scheme's scales are stored in."""
    dtypes = {
        Scales.FREE: TORCH_DTYPES[scheme.scale_dtype],
        Scales.POWER: torch.uint8,
        Scales.RATIO: torch.uint8,
        Scales.TWO_LEVEL: torch.float8_e4m3fn,
    }
    blocks = -(-ROWS // scheme.rows_of_scale(ROWS))
    return dtypes[scheme.scales], (blocks, COLUMNS // scheme.group_of(COLUMNS))


@pytest.mark.parametrize("name", [n for n in SCHEMES if not n.startswith("aqlm")])
def test_codes_and_scales_have_the_types_of_the_scheme(
    quantizer: Quantizer, name: str
) -> None:
    scheme = supported(quantizer, name)
    coded = quantizer.quantize(make_weight(), scheme, statistics_for(quantizer))
    groups = (ROWS, COLUMNS // scheme.group_of(COLUMNS))
    assert coded.scheme == scheme
    assert coded.codes.shape == (ROWS, COLUMNS)
    assert coded.codes.dtype == scheme.levels.code_dtype
    assert (coded.scale.dtype, coded.scale.shape) == stored_scale(scheme)
    levels = scheme.levels.to_levels(coded.codes)
    assert float(levels.min()) >= scheme.levels.lowest
    assert float(levels.max()) <= scheme.levels.highest
    assert coded.scales().isfinite().all() and coded.dequantize().isfinite().all()
    assert (coded.outer is None) == (scheme.scales in (Scales.FREE, Scales.POWER))
    if scheme.zero is Zero.NONE:
        assert coded.zero is None
        return
    assert coded.zero is not None
    is_integer = scheme.zero is Zero.INTEGER
    assert coded.zero.dtype == (torch.int8 if is_integer else torch.float16)
    assert coded.zero.shape == groups
    if is_integer:
        assert int(coded.zero.min()) >= scheme.lowest
        assert int(coded.zero.max()) <= scheme.highest


@pytest.mark.parametrize("name", SCHEMES)
def test_corrections_have_the_rank_of_the_scheme(
    quantizer: Quantizer, name: str
) -> None:
    scheme = supported(quantizer, name)
    coded = quantizer.quantize(make_weight(), scheme, statistics_for(quantizer))
    keys = {key for key in coded.state() if key.startswith("low_rank.")}
    if coded.low_rank is None:
        assert not keys
        assert not scheme.rank or any("left out" in note for note in coded.notes)
        return
    assert len(keys) == 4
    low, rank = coded.low_rank, scheme.rank
    assert (low.left.dtype, low.left.shape) == (torch.int8, (ROWS, rank))
    assert (low.right.dtype, low.right.shape) == (torch.int8, (rank, COLUMNS))
    assert low.left_scale.dtype == low.right_scale.dtype == torch.float16
    assert (low.left_scale.shape, low.right_scale.shape) == ((1, rank), (rank, 1))


def stored_bits(coded: QuantizedTensor) -> int:
    """Return the bits of all stored tensors, each packed without gaps."""
    packed = {"codes": coded.scheme.bits}
    if coded.tables is not None and coded.scale.shape == (1, 1):
        packed["scale"] = 0  # the one of rows without scales is not stored
    if coded.scheme.zero is Zero.INTEGER:
        packed["zero"] = coded.scheme.bits
    if coded.scheme.scales is Scales.RATIO:
        packed["scale"] = 4  # shifts of 0 to 15
        assert int(coded.scale.max()) <= 15
    return sum(
        tensor.numel() * packed.get(key, 8 * tensor.element_size())
        for key, tensor in coded.state().items()
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*SCHEMES, *TABLES])
def test_bits_per_weight_are_those_of_the_stored_tensors(
    quantizer: Quantizer, name: str, dtype: str
) -> None:
    scheme = supported(quantizer, name, dtype)
    coded = quantizer.quantize(make_weight(), scheme, statistics_for(quantizer))
    if coded.low_rank is None:
        scheme = replace(scheme, rank=0)
    expected = scheme.bits_per_weight(COLUMNS, ROWS) * ROWS * COLUMNS
    assert stored_bits(coded) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_are_stored_as_asked(quantizer: Quantizer, dtype: str) -> None:
    scheme = any_zero(quantizer, "int4-g32", dtype)
    coded = quantizer.quantize(make_weight(dtype), scheme, statistics_for(quantizer))
    assert coded.scale.dtype == TORCH_DTYPES[dtype]
    assert coded.dequantize().dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_are_not_changed(quantizer: Quantizer, dtype: str) -> None:
    weight, before = make_weight(dtype), make_weight(dtype)
    statistics, same = make_statistics(), make_statistics()
    scheme = any_zero(quantizer, "int4-g32")
    quantizer.quantize(
        weight, scheme, statistics if quantizer.needs_statistics else None
    )
    assert weight.dtype == before.dtype
    assert torch.equal(weight, before)
    assert torch.equal(statistics.hessian, same.hessian)
    assert statistics.drift is not None and same.drift is not None
    assert torch.equal(statistics.drift, same.drift)


def test_quantizing_is_deterministic(quantizer: Quantizer) -> None:
    scheme = any_zero(quantizer, "int4-g32")
    first = quantizer.quantize(make_weight(), scheme, statistics_for(quantizer))
    torch.manual_seed(99)  # no use of the global generator
    again = type(quantizer)(quantizer.options)
    assert_same(first, again.quantize(make_weight(), scheme, statistics_for(again)))


def test_more_bits_never_increase_the_error(quantizer: Quantizer) -> None:
    """Measured as the method measures: on its inputs if it looks at them."""
    weight = make_weight()
    without_drift = make_statistics(with_drift=False)
    statistics = without_drift if quantizer.needs_statistics else None
    errors = []
    for name in ("int2-g32", "int4-g32", "int7-g32"):
        scheme = any_zero(quantizer, name)
        gap = weight - quantizer.quantize(weight, scheme, statistics).dequantize()
        loss = gap**2 if statistics is None else (gap @ statistics.hessian) * gap
        errors.append(float(loss.sum()))
    assert errors == sorted(errors, reverse=True)


# Exporters


@pytest.fixture(params=registry.names("exporters"))
def exporter(request: pytest.FixtureRequest) -> Exporter:
    return registry.get_exporter(request.param)()


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a byte-level tokenizer of at most 96 tokens."""
    folder = tmp_path_factory.mktemp("assets")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=96, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(["a small text, told twice: a small text"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def held_schemes(exporter: Exporter) -> tuple[str, str]:
    """Return a scheme that a format can hold, and one of more bits."""
    if exporter.name == "aqlm":
        return "aqlm-2x8g8", "aqlm-3x8g8"
    return "int4-g32", "int8-g32"


@pytest.fixture
def artifact(exporter: Exporter, assets: Path) -> CompressedModel:
    """A tiny Llama whose linears are coded as a built-in format can hold them."""
    scheme, _ = held_schemes(exporter)
    made = make_artifact(linears(scheme), dtype="float16", assets=assets)
    problems = exporter.check(made.plan, made.description)
    if registry.exporters()[exporter.name].origin.startswith("compress-llm "):
        assert problems == []
    elif problems:
        pytest.skip(f"{exporter.name} cannot hold int4-g32: {problems}")
    return made


def fingerprints(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_written_files_are_all_reported(
    exporter: Exporter, artifact: CompressedModel, tmp_path: Path
) -> None:
    result = exporter.write(artifact, tmp_path)
    on_disk = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert set(result.files) == on_disk
    sizes = {path: path.stat().st_size for path in result.files}
    assert sizes[result.files[0]] <= result.size_bytes <= sum(sizes.values())


def test_predicted_bytes_are_the_bytes_written(
    exporter: Exporter, artifact: CompressedModel, assets: Path, tmp_path: Path
) -> None:
    """Files are the predicted data and a header, which more bits do not change.

    The header holds names, offsets and the tokenizer: under 8 KiB here. Offsets with
    more digits and alignment may move it by less than 64 bytes.
    """
    _, scheme = held_schemes(exporter)
    wider = make_artifact(linears(scheme), dtype="float16", assets=assets)
    headers = []
    for made in (artifact, wider):
        folder = tmp_path / str(len(headers))
        folder.mkdir()
        predicted = exporter.tensor_bytes(made.plan, made.description)
        assert set(made.plan.layers) <= set(predicted)
        written = exporter.write(made, folder).size_bytes
        headers.append(written - sum(predicted.values()))
    assert 0 < headers[0] < 8192
    assert abs(headers[1] - headers[0]) < 64


def test_codes_read_back_are_the_codes_written(
    exporter: Exporter, artifact: CompressedModel, tmp_path: Path
) -> None:
    exporter.write(artifact, tmp_path)
    for layer in artifact.plan.layers:
        assert_same(exporter.read_codes(tmp_path, layer), artifact.quantized(layer))


def test_writing_is_deterministic(
    exporter: Exporter, artifact: CompressedModel, tmp_path: Path
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    exporter.write(artifact, tmp_path / "a")
    torch.manual_seed(99)
    type(exporter)(exporter.options).write(artifact, tmp_path / "b")
    assert fingerprints(tmp_path / "a") == fingerprints(tmp_path / "b")


def test_check_and_size_read_no_weights(
    exporter: Exporter, artifact: CompressedModel
) -> None:
    exporter.check(artifact.plan, artifact.description)
    exporter.tensor_bytes(artifact.plan, artifact.description)
    assert artifact.source.reads == []  # type: ignore[attr-defined]
