import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_fixtures import byte_tokenizer

from compress.calibration.data import (
    check_sources,
    load_tokens,
    parse_sources,
    share_windows,
)
from compress.core.errors import CalibrationError
from compress.data import MIX
from compress.evaluation.texts import BUNDLED, evaluation_text

TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"


def load(spec, tokenizer=None, *, samples=4, length=8, seed=0):
    return load_tokens(
        spec,
        tokenizer or byte_tokenizer(),
        samples=samples,
        sequence_length=length,
        seed=seed,
    )


def numbered(tmp_path, windows=20, name="numbers.txt"):
    """A file whose n-th window of 8 bytes says n."""
    path = tmp_path / name
    path.write_text("".join(f"{index:08d}" for index in range(windows)))
    return str(path)


def positions(tokens, tokenizer):
    return [int(tokenizer.decode(row)) for row in tokens]


def test_windows_are_whole_aligned_and_distinct(tmp_path):
    tokenizer = byte_tokenizer()
    found = load(numbered(tmp_path), tokenizer, samples=7).tokens
    assert (found.shape, found.dtype) == ((7, 8), torch.int64)
    assert len(set(positions(found, tokenizer))) == 7


def test_one_window_comes_from_each_part_of_the_text(tmp_path):
    tokenizer = byte_tokenizer()
    found = load(numbered(tmp_path), tokenizer, samples=4).tokens
    assert {position // 5 for position in positions(found, tokenizer)} == {0, 1, 2, 3}


def test_all_windows_can_be_taken(tmp_path):
    tokenizer = byte_tokenizer()
    found = load(numbered(tmp_path), tokenizer, samples=20).tokens
    assert sorted(positions(found, tokenizer)) == list(range(20))


def test_same_seed_gives_the_same_tokens_and_digest(tmp_path):
    path = numbered(tmp_path)
    first, second = load(path, seed=3), load(path, seed=3)
    assert torch.equal(first.tokens, second.tokens)
    assert first.digest == second.digest


def test_another_seed_gives_other_windows(tmp_path):
    path = numbered(tmp_path, windows=400)
    assert not torch.equal(load(path, seed=0).tokens, load(path, seed=1).tokens)


def test_digest_follows_the_text(tmp_path):
    one, two = numbered(tmp_path), tmp_path / "numbers2.txt"
    # The tail is no whole window: equal tokens, another text.
    two.write_text((tmp_path / "numbers.txt").read_text() + "x")
    assert load(one).digest != load(str(two)).digest


def test_digest_follows_the_tokenizer(tmp_path):
    path = numbered(tmp_path)
    larger = byte_tokenizer()
    larger.add_tokens(["<more>"])
    assert load(path).digest != load(path, larger).digest


def test_windows_begin_with_bos_where_the_tokenizer_adds_it(tmp_path):
    tokenizer = byte_tokenizer(bos=True)
    found = load(numbered(tmp_path), tokenizer, samples=4, length=9).tokens
    assert set(found[:, 0].tolist()) == {tokenizer.bos_token_id}
    assert not (found[:, 1:] == tokenizer.bos_token_id).any()


def test_weights_share_the_windows(tmp_path):
    one = numbered(tmp_path)
    two = numbered(tmp_path, name="other.txt")
    found = load([{"source": one, "weight": 3}, {"source": two}], samples=8)
    assert found.sources == ((one, 6), (two, 2))


def test_entries_may_be_objects(tmp_path):
    path = numbered(tmp_path)
    entry = SimpleNamespace(source=path, weight=1.0)
    assert load([entry]).sources == ((path, 4),)


@pytest.mark.parametrize(
    ("weights", "total", "parts"),
    [([1, 1, 1], 4, [2, 1, 1]), ([3, 1], 2, [2, 0]), ([1, 2, 3], 7, [1, 2, 4])],
)
def test_largest_remainder_by_hand(weights, total, parts):
    assert share_windows(weights, total) == parts


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8), st.integers(1, 2000))
def test_shares_sum_to_the_total_and_miss_by_less_than_one(weights, total):
    parts = share_windows(weights, total)
    assert sum(parts) == total
    for part, weight in zip(parts, weights, strict=True):
        assert abs(part - total * weight / sum(weights)) < 1 + 1e-6


def test_jsonl_may_mix_texts_and_chats(tmp_path):
    path = tmp_path / "rows.jsonl"
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    path.write_text(json.dumps({"text": "abcde"}) + "\n\n" + json.dumps(chat) + "\n")
    tokenizer = byte_tokenizer(chat_template=TEMPLATE)
    found = load(str(path), tokenizer, samples=1, length=16)
    assert tokenizer.decode(found.tokens[0]) == "abcde\n\n<user> hi"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r":2:2: not JSON"),
        ('{"body": "x"}', r":2: found 'body'; each line needs"),
        ("{}", r":2: found an empty object"),
        ("[1]", r":2: found list"),
        ('{"text": 3}', r":2: found 'text'"),
        ('{"messages": []}', r":2: found 'messages'"),
        ('{"messages": [{"role": "user"}]}', r":2: found 'messages'"),
    ],
)
def test_a_bad_line_is_named_before_a_model_loads(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(CalibrationError, match=message):
        check_sources(str(path))


def test_chats_need_a_template(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    with pytest.raises(CalibrationError, match=r"rows.jsonl:1: .* no chat template"):
        load(str(path))


def test_a_template_that_refuses_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    tokenizer = byte_tokenizer(chat_template="{{ raise_exception('system first') }}")
    with pytest.raises(CalibrationError, match=r":1: .*system first"):
        load(str(path), tokenizer)


def test_too_little_text_says_how_many_windows_there_are(tmp_path):
    with pytest.raises(CalibrationError, match="has 24 tokens: 3 windows of 8, and 4"):
        load(numbered(tmp_path, windows=3))


@pytest.mark.parametrize(
    ("name", "content"), [("a.txt", b""), ("b.txt", b" \n"), ("c.jsonl", b"\n\n")]
)
def test_empty_text_is_an_error_before_a_model_loads(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match="holds no text"):
        check_sources(str(tmp_path / name))


def test_rows_of_empty_text_are_an_error(tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text('{"text": ""}\n{"text": " "}\n')
    with pytest.raises(CalibrationError, match="holds no text"):
        check_sources(str(path))


def test_text_that_is_not_utf8_is_an_error(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9 au lait")
    with pytest.raises(CalibrationError, match="byte 3 is not UTF-8"):
        check_sources(str(path))


def test_missing_file_is_an_error_before_a_model_loads(tmp_path):
    with pytest.raises(CalibrationError, match=r"no.txt does not exist"):
        check_sources([{"source": str(tmp_path / "no.txt")}])


def test_unknown_name_lists_the_nearest():
    with pytest.raises(CalibrationError, match="did you mean 'mix/prose'"):
        check_sources("mix/pros")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ([], "no calibration source"),
        ([{"source": "mix", "weight": 0}], "weight 0.0 of .*positive"),
        ([{"source": "mix", "weight": float("nan")}], "positive"),
        ([{"source": "mix", "weight": "much"}], "is not a number"),
        ([{"weight": 1}], "each entry is"),
        ([{"source": "mix", "wieght": 1}], "each entry is"),
        ("hf:", "write hf:NAME"),
        ("hf:a:b:c:d", "write hf:NAME"),
    ],
)
def test_a_bad_spec_is_an_error(spec, message):
    with pytest.raises(CalibrationError, match=message):
        parse_sources(spec)


@pytest.mark.parametrize(("samples", "length"), [(0, 8), (4, 1)])
def test_sizes_must_make_sense(samples, length):
    with pytest.raises(CalibrationError, match="at least"):
        load("mix", samples=samples, length=length)


def fake_load_dataset(monkeypatch, rows):
    calls = []

    def load_dataset(name, config, *, split, streaming):
        calls.append((name, config, split, streaming))
        if isinstance(rows, Exception):
            raise rows
        return iter(rows)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize(
    ("source", "call"),
    [
        ("hf:org/name", ("org/name", None, "train", True)),
        ("hf:org/name:test", ("org/name", None, "test", True)),
        ("hf:org/name:en:test", ("org/name", "en", "test", True)),
    ],
)
def test_hf_source_names_config_and_split(monkeypatch, source, call):
    calls = fake_load_dataset(monkeypatch, [{"text": "x" * 100}])
    load(source)
    assert calls == [call]


def test_a_dataset_is_read_only_as_far_as_needed(monkeypatch):
    def endless():
        while True:
            yield {"text": "0123456789"}

    fake_load_dataset(monkeypatch, endless())
    assert load("hf:org/name").tokens.shape == (4, 8)


def test_a_dataset_out_of_reach_says_what_to_do(monkeypatch):
    fake_load_dataset(monkeypatch, ConnectionError("no route"))
    with pytest.raises(CalibrationError, match="ConnectionError: no route; .*mix"):
        load("hf:org/name")


def test_dataset_rows_without_text_are_named(monkeypatch):
    fake_load_dataset(monkeypatch, [{"text": "a"}, {"label": 1}])
    with pytest.raises(CalibrationError, match=r"row 1: found 'label'"):
        load("hf:org/name")


def test_mix_has_all_its_parts_in_proportion():
    total = sum(MIX.values())
    found = load("mix", samples=int(total) * 2, length=64)
    assert found.sources == tuple((f"mix/{p}", int(w) * 2) for p, w in MIX.items())


def test_mix_chats_go_through_the_chat_template():
    tokenizer = byte_tokenizer(chat_template=TEMPLATE)
    text = tokenizer.decode(load("mix/chat", tokenizer, length=4096).tokens[0])
    assert "<user> " in text and "<assistant> " in text


def test_mix_chats_are_plain_without_a_template():
    tokenizer = byte_tokenizer()
    text = tokenizer.decode(load("mix/chat", tokenizer, length=4096).tokens[0])
    assert "messages" not in text and "<user>" not in text


def word_runs(text, length=13):
    words = text.split()
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


@pytest.mark.parametrize("name", BUNDLED)
def test_calibration_and_evaluation_texts_share_no_run_of_13_words(name):
    from compress.data import read_text

    calibration = set().union(*(word_runs(read_text(f"mix_{part}")) for part in MIX))
    assert not calibration & word_runs(evaluation_text(name).raw)
