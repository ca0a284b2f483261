"""Figures of any checkpoint: ``compress eval`` and ``compress inspect``."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.core.errors import CheckpointError, ConfigError
from compress.core.scheme import Scheme
from compress.evaluation.measure import (
    Predictor,
    PreparedText,
    evaluate_candidates,
    prepare_texts,
)
from compress.model.coded_source import CodedSource
from compress.model.loading import ModelHandle, check_tensors, locate, open_model
from compress.model.streaming import StreamedModel
from compress.recovery.soft_prompt import check_prompt, read_prompt
from compress.served_folder import Served, served_as

DEFAULT_TEXTS = ("wikitext2", "speeches", "code")


def evaluate(
    path: str | Path,
    *,
    base: str | Path | None = None,
    texts: Sequence[str] | None = None,
    windows: int = 10,
    sequence_length: int = 1024,
    protocol: str = "windows",
    prompt: str | Path | None = None,
) -> dict[str, Any]:
    """Return perplexity of a checkpoint, and its distance to a base if one is given.

    GGUF files run in llama.cpp itself, everything else block by block in torch, and so
    does a base, whatever it is: llama.cpp rounds activations, and a base must not.
    Inputs and caches that the config of a folder rounds are rounded here too; then
    figures of the weights alone stand beside them.

    Args:
        path: HF folder or id, GGUF file, our own output, or ``builtin:NAME``.
        base: The same, of the model to compare with.
        texts: Bundled texts or files.
        windows: Windows a text.
        sequence_length: Tokens in a window.
        protocol: ``windows``, ``hf2048`` or ``llamacpp512``.
        prompt: Folder of a soft prompt that is put before every window, learned for
            this model or for another size of it. ``texts`` are with it then, and
            ``without_prompt_texts`` stand beside them; the same tokens count.

    Raises:
        CompressError: A model, text or prompt cannot be read, or they do not fit.
    """
    with tempfile.TemporaryDirectory() as cache:
        handle = open_model(str(path), cache=Path(cache) / "model")
        other = None
        if base is not None:
            other = open_model(str(base), cache=Path(cache) / "base")
        prepared = prepare_texts(
            texts or DEFAULT_TEXTS,
            (other or handle).tokenizer(),
            protocol=protocol,
            count=windows,
            length=sequence_length,
        )
        values = _prompt_for(handle, prompt) if prompt is not None else None
        own, others = _figures(handle, other, prepared, values)
    result = {"model": str(path), "protocol": protocol}
    if prompt is not None:
        result["prompt"] = str(prompt)
    if other is None and prompt is not None:
        return {**result, **others, "without_prompt_texts": own}
    if other is None:
        return {**result, "texts": own, **others}
    return {**result, "base": str(base), **others, "base_texts": own}


def _prompt_for(handle: ModelHandle, folder: str | Path) -> Tensor:
    """Return a stored prompt, checked against the model that it is put before."""
    if handle.description.source_gguf is not None:
        raise ConfigError(
            f"{handle.description.label}: llama.cpp runs GGUF files without soft "
            "prompts; evaluate the safetensors export with this one"
        )
    prompt = read_prompt(Path(folder))
    check_prompt(prompt, handle.description)
    return prompt


def _figures(
    handle: ModelHandle,
    base: ModelHandle | None,
    texts: list[PreparedText],
    prompt: Tensor | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return figures of the reference, and those of the model by key of the result.

    Without a base the reference is the model itself, as it is served, and with no
    prompt before the text.
    """
    served = served_as(handle)
    candidates: dict[str, Predictor] = {}
    if prompt is not None:
        prompted = replace(served, prompt=prompt)
        candidates["texts"] = predictor_of(handle, "prompted", prompted)
    if base is not None:
        key = "texts" if prompt is None else "without_prompt_texts"
        candidates[key] = predictor_of(handle, "model", served)
        if served.is_more_than_weights:
            candidates["weights_only_texts"] = partial(
                streamed(handle).logits, name="weights"
            )
    own, others = evaluate_candidates(
        texts,
        predictor_of(handle, "model", served)
        if base is None
        else partial(streamed(base).logits, name="base"),
        candidates,
        hidden_size=int(handle.description.config["hidden_size"]),
        kl=base is not None,
    )
    return own, others


def predictor_of(
    handle: ModelHandle, name: str, served: Served, *, device: str = "cpu"
) -> Predictor:
    """Return what runs a model as it is served: a GGUF file in llama.cpp."""
    if handle.description.source_gguf is not None:
        from compress.export.gguf_runtime import llamacpp_logits

        return partial(llamacpp_logits, handle.description.source_gguf)
    return partial(streamed(handle, served, device=device).logits, name=name)


def streamed(
    handle: ModelHandle, served: Served | None = None, *, device: str = "cpu"
) -> StreamedModel:
    """Return a model that runs block by block in torch, in float32.

    Raises:
        CheckpointError: A weight is missing or misshapen.
    """
    check_tensors(handle)
    options = {} if served is None else vars(served)
    source = handle.source
    return StreamedModel(handle.description, source, device=device, **options)


def generation_speeds(path: Path, *, tokens: int, repeats: int) -> list[float]:
    """Return tokens a second of a GGUF file in llama.cpp on the CPU, once a round.

    Args:
        path: The file.
        tokens: Written one after another in a round, beginning with an empty cache.
        repeats: Rounds that count, after one that does not.

    Raises:
        MissingDependencyError: llama-cpp-python is not installed.
        ExportError: llama.cpp refuses the file, or crashes.
    """
    from compress.export.gguf_runtime import llamacpp_seconds

    seconds = llamacpp_seconds(path, tokens=tokens, repeats=repeats)
    return [tokens / second for second in seconds]


@dataclass(frozen=True)
class Inspection:
    """Layers of a checkpoint, without their weights.

    Attributes:
        label: Of the model.
        architecture: ``model_type``.
        parameters: Number of stored weights.
        size_bytes: Of the weight files.
        layers: Name, shape, scheme and bits per weight of each matrix.
    """

    label: str
    architecture: str
    parameters: int
    size_bytes: int
    layers: tuple[dict[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {**vars(self), "bits_per_weight": self.bits_per_weight}

    @property
    def bits_per_weight(self) -> float:
        """Bits of the files for each weight, everything included."""
        return self.size_bytes * 8 / max(1, self.parameters)

    def text(self) -> str:
        """Return a table."""
        lines = [
            f"{self.label}: {self.architecture}, {self.parameters:,} parameters, "
            f"{self.size_bytes:,} bytes, {self.bits_per_weight:.3f} bits per weight",
            "",
            f"{'layer':<48} {'shape':<16} {'scheme':<16} bits",
        ]
        for layer in self.layers:
            shape = " x ".join(map(str, layer["shape"]))
            lines.append(
                f"{layer['name']:<48} {shape:<16} {layer['scheme']:<16} "
                f"{layer['bits_per_weight']:.3f}"
            )
        return "\n".join(lines)


def inspect(path: str | Path) -> Inspection:
    """Describe a checkpoint, or the safetensors export of a work directory.

    Raises:
        CheckpointError: There is no checkpoint.
    """
    file = locate(checkpoint_of(path))
    if file.suffix == ".gguf":
        return _inspect_gguf(file)
    with tempfile.TemporaryDirectory() as cache:
        handle = open_model(str(file), cache=Path(cache))
    schemes: dict[str, Scheme] = {}
    if isinstance(handle.source, CodedSource):
        schemes = dict(handle.source.schemes)
    layers = []
    for name, info in handle.description.tensors.items():
        scheme = schemes.get(name.removesuffix(".weight"))
        bits = {"float32": 32.0}.get(info.dtype, 16.0)
        if scheme is not None:
            bits = scheme.bits_per_weight(info.shape[1], info.shape[0])
        layers.append(
            {
                "name": name,
                "shape": list(info.shape),
                "scheme": scheme.name if scheme else info.dtype,
                "bits_per_weight": bits,
            }
        )
    return Inspection(
        str(path),
        str(handle.description.config["model_type"]),
        sum(info.elements for info in handle.description.tensors.values()),
        sum(shard.stat().st_size for shard in file.glob("*.safetensors")),
        tuple(layers),
    )


def checkpoint_of(path: str | Path) -> str:
    """Return the path of a model; of a work directory that of its export.

    Raises:
        CheckpointError: A work directory has no export yet.
    """
    where = Path(path)
    if not (where / "state.json").is_file():
        return str(path)
    exports = sorted((where / "export").glob("*"))
    if not exports:
        raise CheckpointError(f"{where}: a work directory without exports yet")
    where = exports[-1] if exports[-1].name == "safetensors" else exports[0]
    if any(where.glob("*.gguf")):
        from compress.export.gguf_files import only_file

        where = only_file(where)
    return str(where)


def _inspect_gguf(file: Path) -> Inspection:
    from compress.export.gguf_reader import open_gguf

    opened = open_gguf(file)
    layers = []
    total = 0
    for name, tensor in opened.tensors.items():
        count = 1
        for size in tensor.shape:
            count *= size
        total += count
        layers.append(
            {
                "name": name,
                "shape": list(tensor.shape),
                "scheme": tensor.type,
                "bits_per_weight": tensor.size_bytes * 8 / count,
            }
        )
    return Inspection(
        str(file), opened.architecture, total, file.stat().st_size, tuple(layers)
    )
