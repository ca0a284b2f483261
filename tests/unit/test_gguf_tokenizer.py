from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from gguf_fixtures import ROWS, save_tokenizer

from compress.core.errors import ExportError
from compress.export.gguf_tokenizer import PRE_TOKENIZERS, tokenizer_metadata


def edit(folder: Path, change: Any) -> None:
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text("utf-8"))
    change(data)
    path.write_text(json.dumps(data), "utf-8")


@pytest.mark.parametrize("name", [entry.name for entry in PRE_TOKENIZERS])
def test_published_pre_tokenizers_are_recognized(name: str, tmp_path: Path) -> None:
    save_tokenizer(tmp_path, name)
    assert tokenizer_metadata(tmp_path, ROWS)["tokenizer.ggml.pre"].value == name


def test_an_empty_list_of_normalizers_is_none(tmp_path: Path) -> None:
    """As transformers 5.17 writes it for a tokenizer without one."""
    save_tokenizer(tmp_path, "gpt-2")
    empty = {"type": "Sequence", "normalizers": []}
    edit(tmp_path, lambda data: data.update(normalizer=empty))
    assert tokenizer_metadata(tmp_path, ROWS)["tokenizer.ggml.pre"].value == "gpt-2"


def test_qwen2_split_is_that_of_transformers() -> None:
    module = pytest.importorskip("transformers.models.qwen2.tokenization_qwen2")
    known = {entry.name: entry for entry in PRE_TOKENIZERS}
    assert known["qwen2"].rules[0] == module.PRETOKENIZE_REGEX


def test_tokens_are_padded_to_the_embedding(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path)
    values = tokenizer_metadata(tmp_path, ROWS)
    tokens = values["tokenizer.ggml.tokens"].value
    types = values["tokenizer.ggml.token_type"].value
    count = len(tokenizer)
    assert tokens[:count] == tokenizer.convert_ids_to_tokens(list(range(count)))
    assert tokens[count:] == [f"[PAD{i}]" for i in range(count, ROWS)]
    assert set(types[count:]) == {5}
    assert types[:3] == [3, 3, 1]


def test_special_tokens_and_chat_template_are_written(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path)
    values = tokenizer_metadata(tmp_path, ROWS)
    assert values["tokenizer.ggml.eos_token_id"].value == 0
    assert values["tokenizer.ggml.add_bos_token"].value is False
    assert values["tokenizer.chat_template"].value == tokenizer.chat_template


def test_unknown_split_asks_for_a_template(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, "qwen2")

    def change(data: dict[str, Any]) -> None:
        step = data["pre_tokenizer"]["pretokenizers"][0]
        step["pattern"]["Regex"] = r"\p{L}+|\p{N}{1,2}"

    edit(tmp_path, change)
    with pytest.raises(ExportError, match=r"none of those known .*give `template"):
        tokenizer_metadata(tmp_path, ROWS)


def test_foreign_merge_rule_asks_for_a_template(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, "llama-bpe")
    edit(tmp_path, lambda data: data["model"].update(ignore_merges=False))
    with pytest.raises(ExportError, match="none of those known"):
        tokenizer_metadata(tmp_path, ROWS)


def test_more_tokens_than_rows_is_an_error(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    with pytest.raises(ExportError, match="the embedding has 300 rows"):
        tokenizer_metadata(tmp_path, 300)


def test_missing_files_ask_for_a_template(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"no tokenizer\.json.*give `template"):
        tokenizer_metadata(tmp_path, ROWS)


PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
WORDS = ["▁t", "he", "▁the", "▁", "t", "h", "e"]


def sentencepiece_json(merges: list[str]) -> dict[str, Any]:
    tokens = [*PIECES, *WORDS]
    return {
        "added_tokens": [
            {"id": i, "content": PIECES[i], "special": True} for i in range(3)
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "model": {
            "type": "BPE",
            "byte_fallback": True,
            "unk_token": "<unk>",
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": merges,
        },
    }


def test_merges_in_order_of_ids_become_scores(tmp_path: Path) -> None:
    data = sentencepiece_json(["▁ t", "h e", "▁t he"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), "utf-8")
    values = tokenizer_metadata(tmp_path, 300)
    scores = values["tokenizer.ggml.scores"].value
    types = values["tokenizer.ggml.token_type"].value
    start = len(PIECES)
    assert values["tokenizer.ggml.model"].value == "llama"
    assert values["tokenizer.ggml.add_space_prefix"].value is True
    assert scores[start] > scores[start + 1] > scores[start + 2]
    assert types[:4] == [2, 3, 3, 6]


@pytest.mark.parametrize(
    "merges", [["h e", "▁ t", "▁t he"], ["▁ t", "h e"]], ids=["order", "one missing"]
)
def test_other_merges_are_refused(merges: list[str], tmp_path: Path) -> None:
    data = sentencepiece_json(merges)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), "utf-8")
    with pytest.raises(ExportError, match=r"not those of a SentencePiece"):
        tokenizer_metadata(tmp_path, 300)


def protobuf_field(number: int, payload: bytes) -> bytes:
    return bytes([number << 3 | 2, len(payload)]) + payload


def sentencepiece_model(*, kind: int = 2) -> bytes:
    data = b""
    for index, token in enumerate([*PIECES, *WORDS]):
        special = {0: 2, 1: 3, 2: 3}.get(index, 6 if token in PIECES else 1)
        piece = protobuf_field(1, token.encode())
        piece += b"\x15" + struct.pack("<f", -float(index)) + bytes([0x18, special])
        data += protobuf_field(1, piece)
    data += protobuf_field(2, bytes([0x18, kind]))
    return data + protobuf_field(3, bytes([0x18, 0]))


def test_sentencepiece_model_is_read(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    values = tokenizer_metadata(tmp_path, 300)
    count = len(PIECES) + len(WORDS)
    assert values["tokenizer.ggml.tokens"].value[:count] == [*PIECES, *WORDS]
    assert values["tokenizer.ggml.scores"].value[5] == -5.0
    assert values["tokenizer.ggml.token_type"].value[:4] == [2, 3, 3, 6]
    assert values["tokenizer.ggml.add_space_prefix"].value is False


def test_unigram_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(kind=1))
    with pytest.raises(ExportError, match="not a SentencePiece BPE"):
        tokenizer_metadata(tmp_path, 300)


def test_damaged_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model()[:-3])
    with pytest.raises(ExportError, match=r"tokenizer\.model: damaged"):
        tokenizer_metadata(tmp_path, 300)
