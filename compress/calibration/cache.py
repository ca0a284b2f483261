"""Calibration tokens on disk, so that a run or its resumption does not tokenize again.

An entry is a safetensors file of its own, named by a digest of all that decides its
tokens: the texts as they were read, the tokenizer, the number, length and seed of the
windows, and the libraries. Texts are read before an entry is looked up, so a changed
file is always seen; a dataset is downloaded again, for the same reason.

An entry that is damaged is computed again, and a folder that cannot be used costs a
warning, never the run. Files are readable by their owner only, since they hold the
user's text.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_log = logging.getLogger(__name__)

_LAYOUT = 1  # counted up when windows are drawn in another way, or stored in another


def cache_folder() -> Path:
    """Return ``$COMPRESS_CACHE``, or the place that the XDG rules give.

    Raises:
        RuntimeError: No variable is set and the user has no home.
    """
    own = os.environ.get("COMPRESS_CACHE")
    if own:
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "compress"


def key_of(
    texts: Sequence[str], tokenizer: Any, parameters: Sequence[Any]
) -> str | None:
    """Return the digest that names an entry, or ``None`` where there can be none.

    Args:
        texts: SHA-256 of each text.
        tokenizer: A transformers tokenizer. One without a ``tokenizers`` backend may
            run any Python code, which no digest can cover: its tokens are not kept.
        parameters: Whatever else decides the windows, as plain data.
    """
    import tokenizers
    import transformers

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        return None
    state = json.loads(backend.to_str())
    for left_by_last_call in ("truncation", "padding"):
        state.pop(left_by_last_call, None)
    kind = type(tokenizer)
    identity = {
        "layout": _LAYOUT,
        "texts": list(texts),
        "tokenizer": hashlib.sha256(json.dumps(state).encode()).hexdigest(),
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "special": [tokenizer.bos_token_id, tokenizer.split_special_tokens],
        "parameters": list(parameters),
        "versions": [m.__version__ for m in (tokenizers, transformers, torch)],
    }
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def read_entry(key: str, shape: tuple[int, int]) -> Tensor | None:
    """Return the int64 tokens of an entry, or ``None`` if it is absent or damaged.

    Args:
        key: From :func:`key_of`.
        shape: Windows and tokens a window.
    """
    from safetensors import SafetensorError, safe_open

    try:
        path = _path(key)
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tokens: Tensor = file.get_tensor("tokens")
    except (SafetensorError, OSError, RuntimeError) as error:
        _warn_of_damage(key, str(error))
        return None
    if (tokens.dtype, tuple(tokens.shape)) != (torch.int64, shape):
        _warn_of_damage(key, f"it holds {tokens.dtype} {list(tokens.shape)}")
        return None
    if (about.get("key"), about.get("sha256")) != (key, _sha256(tokens)):
        _warn_of_damage(key, "its tokens are not those that were stored")
        return None
    return tokens


def write_entry(key: str, tokens: Tensor) -> None:
    """Store an entry; a folder that cannot be written is a warning."""
    from safetensors.torch import save

    data = save({"tokens": tokens}, {"key": key, "sha256": _sha256(tokens)})
    try:
        place(_path(key), data)
    except (OSError, RuntimeError) as error:
        _log.warning(
            "calibration tokens are not kept for the next run: %s; set COMPRESS_CACHE "
            "to a folder that can be written",
            error,
        )


def place(path: Path, data: bytes) -> None:
    """Write a file of the cache so that it is whole or absent.

    Unlike a file of a work directory, two runs may write it at the same time.

    Raises:
        OSError: It cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(data)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _path(key: str) -> Path:
    return cache_folder() / "calibration" / f"{key}.safetensors"


def _sha256(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.numpy().astype("<i8").tobytes()).hexdigest()


def _warn_of_damage(key: str, why: str) -> None:
    _log.warning(
        "cached calibration tokens (%s) are damaged and computed again: %s", key, why
    )
