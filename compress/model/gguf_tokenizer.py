"""Hugging Face tokenizer files from the metadata of a GGUF file.

transformers' reader (5.23) gives a byte-level BPE of an old architecture GPT-2's
pre-tokenizer whatever the file says: SmolLM2 then no longer splits digits ("2024" is
two tokens instead of four). So byte-level BPEs with a known pre-tokenizer are built
here from the file's own tokens, merges and token types; the rest goes through
transformers, with a warning where the pre-tokenizer is not known.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from compress.core.errors import CheckpointError
from compress.export.gguf_reader import GGUFFile, open_gguf
from compress.export.gguf_tokenizer import PRE_TOKENIZERS, PreTokenizer, TokenType

_log = logging.getLogger(__name__)
_NAMES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def save_gguf_tokenizer(path: Path, folder: Path) -> None:
    """Write tokenizer files and chat template of a GGUF file into ``folder``.

    Args:
        path: The GGUF file.
        folder: Exists; gets ``tokenizer.json``, ``tokenizer_config.json`` and, if the
            file has one, ``chat_template.jinja``.

    Raises:
        CheckpointError: The file has no tokenizer, or one that cannot be rebuilt.
    """
    file = open_gguf(path)
    kind = file.get("tokenizer.ggml.model")
    if kind is None:
        raise CheckpointError(f"{path}: the GGUF file has no tokenizer")
    known = {entry.name: entry for entry in PRE_TOKENIZERS}
    name = file.get("tokenizer.ggml.pre", "")
    if kind == "gpt2" and name in known:
        _byte_level_tokenizer(file, known[name]).save_pretrained(folder)
        return
    if kind == "gpt2":
        _log.warning(
            "%s: pre-tokenizer %r is rebuilt by transformers, which may split text "
            "unlike llama.cpp",
            path,
            name,
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise CheckpointError(
            f"{path}: transformers cannot rebuild its tokenizer: {error}"
        ) from error
    tokenizer.save_pretrained(folder)


def _byte_level_tokenizer(file: GGUFFile, known: PreTokenizer) -> Any:
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = file.require("tokenizer.ggml.tokens")
    types: list[int] = file.get("tokenizer.ggml.token_type", [1] * len(tokens))
    special = {
        f"{ours}_token": tokens[file.require(f"tokenizer.ggml.{theirs}_token_id")]
        for ours, theirs in _NAMES.items()
        if f"tokenizer.ggml.{theirs}_token_id" in file.metadata
    }
    try:
        tokenizer = Tokenizer.from_str(_tokenizer_json(file, known, tokens, types))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(
            f"{file.path}: damaged tokenizer: {error}; fetch the file again"
        ) from error
    added = [
        AddedToken(token, normalized=False, special=kind == TokenType.CONTROL)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    default = known.name == "llama-bpe"  # llama.cpp's own default for this name
    if file.get("tokenizer.ggml.add_bos_token", default) and "bos_token" in special:
        _add_bos(tokenizer, special["bos_token"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=file.architecture_value("context_length"),
        clean_up_tokenization_spaces=False,
        **special,
    )
    fast.chat_template = file.get("tokenizer.chat_template")
    return fast


def _tokenizer_json(
    file: GGUFFile, known: PreTokenizer, tokens: list[str], types: list[int]
) -> str:
    merges = [pair.split(" ", 1) for pair in file.require("tokenizer.ggml.merges")]
    vocabulary = {
        token: index
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind != TokenType.UNUSED
    }
    normalizer = known.normalizers[-1]
    model = {
        "type": "BPE",
        "vocab": vocabulary,
        "merges": merges,
        "ignore_merges": known.ignore_merges,
    }
    data: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None if normalizer is None else {"type": normalizer},
        "pre_tokenizer": known.to_json(),
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": model,
    }
    return json.dumps(data, ensure_ascii=False)


def _add_bos(tokenizer: Any, token: str) -> None:
    from tokenizers.processors import TemplateProcessing

    index = tokenizer.token_to_id(token)
    tokenizer.post_processor = TemplateProcessing(
        single=f"{token} $A",
        pair=f"{token} $A {token} $B",
        special_tokens=[(token, index)],
    )
