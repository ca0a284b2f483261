"""Tokenizer metadata for GGUF from a Hugging Face folder, only where it is certain.

llama.cpp rebuilds a tokenizer from tokens, merges or scores, and the *name* of a
pre-tokenizer. A wrong name silently splits text differently, so a byte-level BPE is
accepted only when its pre-tokenizer is, rule for rule, one in the table below. A
SentencePiece BPE is accepted from ``tokenizer.model``, or from a ``tokenizer.json``
whose merges are exactly what scores in the order of ids would give. Anything else is an
error that asks for a template.

Source: llama.cpp ``src/llama-vocab.cpp`` (regular expressions of each name) and
``convert_hf_to_gguf.py`` (token types, padding).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from compress.core.errors import ExportError
from compress.core.foreign import parse_json
from compress.export.gguf_reader import MetadataValue
from compress.export.gguf_sentencepiece import Piece, read_sentencepiece
from compress.export.gguf_writer import boolean, reals, text, texts, whole, wholes

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


class TokenType(IntEnum):
    """GGUF's kinds of tokens."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class PreTokenizer:
    """A pre-tokenizer that llama.cpp knows, and the same in ``tokenizer.json``.

    Attributes:
        name: ``tokenizer.ggml.pre``.
        rules: Splits, in order; the last is how bytes are mapped.
        ignore_merges: Whether a whole word in the vocabulary is taken before merging.
        normalizers: Normalizers under which the name is used.
    """

    name: str
    rules: tuple[str, ...]
    ignore_merges: bool = False
    normalizers: tuple[str | None, ...] = (None,)

    def to_json(self) -> dict[str, Any]:
        """Return the ``pre_tokenizer`` entry of a ``tokenizer.json``."""
        steps: list[dict[str, Any]] = []
        for rule in self.rules[:-1]:
            if rule == "digits":
                steps.append({"type": "Digits", "individual_digits": True})
            else:
                pattern = {"Regex": rule}
                steps.append(
                    {
                        "type": "Split",
                        "pattern": pattern,
                        "behavior": "Isolated",
                        "invert": False,
                    }
                )
        last = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": self.rules[-1] == "gpt2 split",
        }
        return {"type": "Sequence", "pretokenizers": [*steps, last]}


PRE_TOKENIZERS = (
    PreTokenizer("gpt-2", ("gpt2 split",)),
    PreTokenizer("smollm", ("digits", "gpt2 split")),
    PreTokenizer("llama-bpe", (_LLAMA3_SPLIT, "bytes"), ignore_merges=True),
    # llama.cpp does not normalize; its converter accepts that for Qwen's NFC.
    PreTokenizer("qwen2", (_QWEN2_SPLIT, "bytes"), normalizers=(None, "NFC")),
)


def tokenizer_metadata(folder: Path | None, rows: int) -> dict[str, MetadataValue]:
    """Return the ``tokenizer.*`` metadata of a model folder.

    Args:
        folder: Holds ``tokenizer.json`` or ``tokenizer.model`` and their companions.
        rows: Rows of the embedding; the token list is padded to it.

    Raises:
        ExportError: The tokenizer is missing or cannot be expressed with certainty.
    """
    remedy = (
        "give `template: FILE.gguf`, a GGUF of the same model made by llama.cpp's "
        "converter"
    )
    if folder is None:
        raise ExportError(f"the model has no tokenizer files; {remedy}")
    path = folder / "tokenizer.json"
    model_path = folder / "tokenizer.model"
    try:
        data = parse_json(path.read_text("utf-8")) if path.is_file() else None
    except (OSError, ValueError) as error:
        raise ExportError(f"{path}: not a tokenizer: {error}; {remedy}") from error
    if data is not None and _is_byte_level(data):
        values = _byte_level_metadata(path, data, rows=rows, remedy=remedy)
    elif model_path.is_file():
        pieces, prefix = read_sentencepiece(model_path)
        values = _sentencepiece_metadata(pieces, data or {}, rows=rows, prefix=prefix)
    elif data is not None and data["model"].get("byte_fallback"):
        pieces, prefix = _pieces_of_merges(path, data, remedy)
        values = _sentencepiece_metadata(pieces, data, rows=rows, prefix=prefix)
    else:
        raise ExportError(
            f"{folder}: no tokenizer.json with a byte-level or byte-fallback BPE and "
            f"no tokenizer.model; {remedy}"
        )
    return values | _special_metadata(folder, rows)


def pre_tokenizer_of(data: Mapping[str, Any]) -> PreTokenizer | None:
    """Return the llama.cpp pre-tokenizer equal to that of a ``tokenizer.json``."""
    normalizer = data.get("normalizer") or {}
    kind = normalizer.get("type")
    if kind == "Sequence" and not normalizer["normalizers"]:
        kind = None
    ignore = bool(data["model"].get("ignore_merges", False))
    rules = _rules(data.get("pre_tokenizer"))
    for known in PRE_TOKENIZERS:
        if (rules, ignore) == (known.rules, known.ignore_merges):
            return known if kind in known.normalizers else None
    return None


def _rules(entry: Mapping[str, Any] | None) -> tuple[str, ...] | None:
    """Return the rules of a ``pre_tokenizer`` entry; ``None`` if one is foreign."""
    if entry is None:
        return None
    steps = entry["pretokenizers"] if entry["type"] == "Sequence" else [entry]
    rules: list[str] = []
    for step in steps:
        if step["type"] == "Digits" and step.get("individual_digits"):
            rules.append("digits")
        elif step["type"] == "Split" and _is_isolating(step):
            rules.append(step["pattern"]["Regex"])
        elif step["type"] == "ByteLevel" and not step.get("add_prefix_space", True):
            rules.append("gpt2 split" if step.get("use_regex", True) else "bytes")
        else:
            return None
    return tuple(rules)


def _is_isolating(step: Mapping[str, Any]) -> bool:
    isolated = step["behavior"] == "Isolated" and not step.get("invert", False)
    return isolated and "Regex" in step["pattern"]


def _is_byte_level(data: Mapping[str, Any]) -> bool:
    rules = _rules(data.get("pre_tokenizer"))
    foreign = '"ByteLevel"' in json.dumps(data.get("pre_tokenizer"))
    return data["model"]["type"] == "BPE" and (rules is not None or foreign)


def _byte_level_metadata(
    path: Path, data: Mapping[str, Any], *, rows: int, remedy: str
) -> dict[str, MetadataValue]:
    known = pre_tokenizer_of(data)
    if known is None:
        names = ", ".join(entry.name for entry in PRE_TOKENIZERS)
        raise ExportError(
            f"{path}: its pre-tokenizer is none of those known for certain ({names}), "
            f"and a guess would split text wrongly; {remedy}"
        )
    tokens, types = _token_table(dict(data["model"]["vocab"]), data, rows)
    merges = [_merge_text(merge) for merge in data["model"]["merges"]]
    return {
        "tokenizer.ggml.model": text("gpt2"),
        "tokenizer.ggml.pre": text(known.name),
        "tokenizer.ggml.tokens": texts(tokens),
        "tokenizer.ggml.token_type": wholes(types),
        "tokenizer.ggml.merges": texts(merges),
        "tokenizer.ggml.add_space_prefix": boolean(False),
    }


def _merge_text(merge: str | list[str]) -> str:
    return merge if isinstance(merge, str) else " ".join(merge)


def _token_table(
    vocabulary: Mapping[str, int], data: Mapping[str, Any], rows: int
) -> tuple[list[str], list[int]]:
    """Return token texts and types by id, padded to ``rows``."""
    tokens = [f"[PAD{index}]" for index in range(rows)]
    types = [int(TokenType.UNUSED)] * rows
    entries = [(index, token, TokenType.NORMAL) for token, index in vocabulary.items()]
    for added in data.get("added_tokens", ()):
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        entries.append((int(added["id"]), added["content"], kind))
    for index, token, kind in entries:
        if index >= rows:
            raise ExportError(
                f"token {token!r} has id {index}, but the embedding has {rows} rows; "
                "resize the embedding of the model"
            )
        tokens[index], types[index] = token, int(kind)
    return tokens, types


def _pieces_of_merges(
    path: Path, data: Mapping[str, Any], remedy: str
) -> tuple[list[Piece], bool]:
    """Return pieces for a byte-fallback BPE, whose order of merges becomes scores.

    llama.cpp joins the neighbours whose union has the best score. That equals the
    merge list only if the list goes by id of the result and leaves no union out.
    """
    vocabulary: dict[str, int] = data["model"]["vocab"]
    listed = [
        (left, right)
        for left, right in (
            _merge_text(merge).split(" ") for merge in data["model"]["merges"]
        )
    ]
    results = [vocabulary[left + right] for left, right in listed]
    possible = {
        (token[:cut], token[cut:])
        for token in vocabulary
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    }
    added = {entry["content"] for entry in data.get("added_tokens", ())}
    missing = {pair for pair in possible - set(listed) if "".join(pair) not in added}
    prefix = _space_prefix(data)
    if results != sorted(results) or missing or prefix is None:
        raise ExportError(
            f"{path}: its merges or its normalizer are not those of a SentencePiece "
            f"model, and tokenizer.model is missing; add tokenizer.model or {remedy}"
        )
    unknown = data["model"].get("unk_token")
    pieces = [
        Piece(token, -float(index), _piece_type(token, unknown))
        for token, index in sorted(vocabulary.items(), key=lambda item: item[1])
    ]
    return pieces, prefix


def _piece_type(token: str, unknown: str | None) -> int:
    if token == unknown:
        return TokenType.UNKNOWN
    is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return TokenType.BYTE if is_byte else TokenType.NORMAL


def _space_prefix(data: Mapping[str, Any]) -> bool | None:
    """Return whether a space is put before the text; ``None`` if it is unclear."""
    normalizer = data.get("normalizer") or {"type": "Sequence", "normalizers": []}
    steps = normalizer.get("normalizers", [normalizer])
    splitter = data.get("pre_tokenizer")
    if splitter is not None:
        if splitter["type"] != "Metaspace" or steps:
            return None
        return {"first": True, "always": True, "never": False}.get(
            str(splitter.get("prepend_scheme"))
        )
    kinds = [step["type"] for step in steps]
    if not steps or kinds[-1] != "Replace" or steps[-1]["content"] != "▁":
        return None
    return {("Prepend",): True, (): False}.get(tuple(kinds[:-1]))


def _sentencepiece_metadata(
    pieces: list[Piece], data: Mapping[str, Any], *, rows: int, prefix: bool
) -> dict[str, MetadataValue]:
    vocabulary = {piece.text: index for index, piece in enumerate(pieces)}
    tokens, types = _token_table(vocabulary, data, rows)
    scores = [-1000.0] * rows  # llama.cpp's own value for tokens that nothing merges to
    for index, piece in enumerate(pieces):
        scores[index] = piece.score
        if piece.type != TokenType.NORMAL:
            types[index] = piece.type
    return {
        "tokenizer.ggml.model": text("llama"),
        "tokenizer.ggml.pre": text("default"),
        "tokenizer.ggml.tokens": texts(tokens),
        "tokenizer.ggml.scores": reals(scores),
        "tokenizer.ggml.token_type": wholes(types),
        "tokenizer.ggml.add_space_prefix": boolean(prefix),
    }


def _special_metadata(folder: Path, rows: int) -> dict[str, MetadataValue]:
    """Return ids of special tokens, what is added to a text, and the chat template."""
    import gguf

    special = gguf.SpecialVocab(folder, load_merges=False, n_vocab=rows)
    names = {"unk": "unknown", "sep": "seperator", "pad": "padding"}  # sic, in GGUF
    values = {
        f"tokenizer.ggml.{names.get(kind, kind)}_token_id": whole(index)
        for kind, index in special.special_token_ids.items()
        if kind in ("bos", "eos", "unk", "sep", "pad", "eot", "eom")
    }
    # llama.cpp's defaults depend on the kind of tokenizer, so always say it.
    for kind in ("bos", "eos"):
        added = bool(special.add_special_token.get(kind, False))
        values[f"tokenizer.ggml.add_{kind}_token"] = boolean(added)
    template = special.chat_template
    if isinstance(template, str):
        values["tokenizer.chat_template"] = text(template)
    elif template:
        named = {entry["name"]: entry["template"] for entry in template}
        default = named.pop("default", None)
        if default is not None:
            values["tokenizer.chat_template"] = text(default)
        values["tokenizer.chat_templates"] = texts(sorted(named))
        for name, content in named.items():
            values[f"tokenizer.chat_template.{name}"] = text(content)
    return values
