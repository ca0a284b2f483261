"""What storing keys and values in fewer bits costs a model: ``compress kv``.

Every pair of types is measured against the same weights with an exact cache, on the
same windows, prefill included. FP8 gets calibrated scales first. Nothing is written
into the model: the outcome is a table, and flags for llama.cpp and vLLM.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress import pipeline, provenance
from compress.calibration.data import load_tokens
from compress.calibration.observe import observe
from compress.calibration.sources import check_sources
from compress.core.errors import ConfigError
from compress.evaluation.measure import prepare_texts
from compress.evaluation.texts import check_evaluation_text
from compress.kvcache.cache import CacheRounding
from compress.kvcache.measure import (
    measure_types,
    recommended,
    recommended_for_vllm,
)
from compress.kvcache.names import FP8, STUDIED_PAIRS, CachePair
from compress.kvcache.scales import ScaleRule
from compress.model.coded_source import CodedSource
from compress.model.devices import choose_device
from compress.model.loading import open_model
from compress.report.cache import study_markdown, study_text
from compress.report.wording import plain_data
from compress.scoring import checkpoint_of, inspect, streamed
from compress.workdir import write_atomically

CONTEXTS = (4096, 32768)


@dataclass(frozen=True)
class CacheStudy:
    """What cache types cost a model.

    Attributes:
        data: What ``kv.json`` holds.
    """

    data: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return dict(self.data)

    def text(self) -> str:
        """Return table and advice for a terminal."""
        return study_text(self.data)


def kv_study(
    model: str | Path,
    *,
    types: Sequence[str] = STUDIED_PAIRS,
    fp8: bool = True,
    rule: ScaleRule | None = None,
    calibration: str = "mix",
    samples: int = 32,
    text: str = "wikitext2",
    windows: int = 4,
    sequence_length: int = 512,
    contexts: Sequence[int] = CONTEXTS,
    limit: float = 0.001,
    tight_limit: float = 0.01,
    device: str = "auto",
    folder: str | Path | None = None,
    command: str | None = None,
) -> CacheStudy:
    """Measure cache types on a model, as it is, and say which to take.

    Args:
        model: HF folder or id, GGUF file, work directory of a run, ``builtin:NAME``. It
            runs in torch with its decoded weights.
        types: Types of :data:`~compress.kvcache.names.CACHE_TYPES`, or ``KEYS/VALUES``.
        fp8: Measure FP8 as well, with scales from calibration text.
        rule: How these scales are chosen; one a tensor, of its amax, if absent.
        calibration: Bundled text or file for the scales.
        samples: Windows of it.
        text: Bundled text or file that types are measured on.
        windows: Windows of it.
        sequence_length: Tokens of a window, of both texts.
        contexts: Lengths whose cache is given in bytes.
        limit: KL in nats that a recommended type may cost.
        tight_limit: The same where memory is short.
        device: ``auto``, ``cpu`` or ``cuda``.
        folder: For ``kv.json`` and ``kv.md``; nothing is written without.
        command: How it was called, for the record.

    Raises:
        CompressError: The model cannot be opened, or a type does not fit it.
    """
    check_evaluation_text(text)
    pairs = [CachePair.parse(name) for name in types]
    if any(pair.uses_fp8 for pair in pairs):
        raise ConfigError("types: fp8 is measured anyway; leave it out of the types")
    rule = rule or ScaleRule()
    if fp8:
        check_sources(calibration)
    if not pairs and not fp8:
        raise ConfigError("nothing to measure: give types, or measure fp8")
    path, device = checkpoint_of(str(model)), choose_device(device)
    with tempfile.TemporaryDirectory() as cache:
        handle = open_model(path, cache=Path(cache))
        for pair in pairs:
            CacheRounding(handle.description, pair)  # fits the model, or says why not
        plain = streamed(handle, device=device)

        def build(**options: Any) -> Any:
            return plain.with_source(plain.source, **options)

        tokenizer = handle.tokenizer()
        (prepared,) = prepare_texts(
            [text],
            tokenizer,
            protocol="windows",
            count=windows,
            length=sequence_length,
        )
        scales = {}
        if fp8:
            tokens = load_tokens(
                calibration,
                tokenizer,
                samples=samples,
                sequence_length=sequence_length,
                seed=0,
            )
            scales = observe(build, tokens.tokens, rule=rule).kv_scales
            pairs.append(CachePair.parse(FP8))
        entries = measure_types(prepared, build, pairs, scales)
    for entry in entries:
        entry["cache_bytes"] = {
            str(length): entry["bytes_per_token"] * length for length in contexts
        }
    data = plain_data(
        {
            "version": 1,
            "model": path,
            "text": prepared.name,
            "protocol": prepared.windows.protocol,
            "tokens": prepared.windows.predictions,
            "weights_bytes": inspect(path).size_bytes,
            "scheme": FP8 if fp8 else "none",
            "strategy": rule.strategy,
            "scale": rule.choice,
            "samples": samples if fp8 else None,
            "types": entries,
            "contexts": list(contexts),
            "recommended": recommended(entries, limit),
            "recommended_tight": recommended(entries, tight_limit),
            "recommended_vllm": recommended_for_vllm(entries, tight_limit),
            "command": command or "compress.kv_study(model)",
            "versions": provenance.versions(),
            "hardware": provenance.hardware(device),
        }
    )
    if folder is not None:
        root = Path(folder)
        content = json.dumps(data, indent=1, ensure_ascii=False)
        write_atomically(root / "kv.json", content.encode())
        write_atomically(root / "kv.md", study_markdown(data).encode())
    return CacheStudy(data)


def store_scales(
    model: str | Path,
    folder: str | Path,
    *,
    rule: ScaleRule | None = None,
    calibration: str = "mix",
    samples: int = 32,
    sequence_length: int = 512,
    command: str | None = None,
) -> Path:
    """Write a dense checkpoint again with calibrated FP8 scales of its cache.

    vLLM and transformers read them. Weights are copied as they are.

    Args:
        model: HF folder or id, or ``builtin:NAME``, not quantized.
        folder: Work directory; the checkpoint is ``export/safetensors`` in it.
        rule: How scales are chosen; one a tensor, of its amax, if absent.
        calibration: Bundled text or file.
        samples: Windows of it.
        sequence_length: Tokens of a window.
        command: How it was called, for the record.

    Returns:
        The folder of the checkpoint.

    Raises:
        ConfigError: The model is quantized: its own run can store scales.
    """
    rule = rule or ScaleRule()
    path = str(model)
    with tempfile.TemporaryDirectory() as cache:
        handle = open_model(path, cache=Path(cache))
        if handle.description.source_gguf or isinstance(handle.source, CodedSource):
            raise ConfigError(
                f"{path} is quantized, and writing it again would decode it; put "
                "kv_cache: {scheme: fp8} into the config of the run that makes it"
            )
    result = pipeline.run(
        {
            "model": {"path": path},
            "calibration": {
                "data": calibration,
                "samples": samples,
                "sequence_length": sequence_length,
            },
            "kv_cache": {
                "scheme": FP8,
                "strategy": rule.strategy,
                "scale": rule.choice,
                "percentile": rule.percentile,
                "samples": samples,
            },
            "evaluate": None,
            "export": [{"format": "safetensors"}],
            "run": {"workdir": str(folder)},
        },
        resume=True,
        command=command,
    )
    return result.workdir / "export" / "safetensors"
