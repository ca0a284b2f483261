import hashlib
import re
from importlib import resources

import pytest

from compress.core.errors import ConfigError
from compress.data import MIX, read_text
from compress.evaluation.texts import (
    BUNDLED,
    check_evaluation_text,
    evaluation_text,
    join_rows,
)


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def test_wikitext2_is_the_canonical_raw_test_split():
    text = evaluation_text("wikitext2")
    assert text.size_bytes == 1290590
    assert text.digest == (
        "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
    )


def test_wikitext2_joined_is_what_papers_score():
    joined = evaluation_text("wikitext2").joined
    assert (len(joined), len(joined.encode())) == (1294336, 1296370)
    assert sha256(joined) == (
        "696cca6b65a171b0a358a4be6732cdfdf2dd6164a32e20fd70e3c13fc4dfae83"
    )


def test_blank_rows_become_empty_and_rows_keep_their_newline():
    assert join_rows(" \n = A = \n \n b \n") == "\n\n = A = \n\n\n\n\n b \n"


@pytest.mark.parametrize("name", BUNDLED)
def test_other_texts_are_joined_as_they_are(name):
    text = evaluation_text(name)
    assert (text.joined == text.raw) == (name != "wikitext2")


def test_every_text_stands_in_the_licences_with_its_digest():
    folder = resources.files("compress.data")
    licences = folder.joinpath("LICENSES.md").read_text()
    listed = dict(
        re.findall(r"^\| `(\w+)\.gz` \|.* `([0-9a-f]{64})` \|$", licences, re.M)
    )
    names = [*BUNDLED, *(f"mix_{part}" for part in MIX)]
    assert listed == {name: sha256(read_text(name)) for name in names}


def test_a_file_is_read_byte_for_byte(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_bytes("a\r\nü\n".encode())
    text = evaluation_text(str(path))
    assert (text.raw, text.joined, text.size_bytes) == ("a\r\nü\n", "a\r\nü\n", 6)


def test_unknown_name_lists_the_nearest_and_all():
    with pytest.raises(ConfigError, match="did you mean 'wikitext2'.*speeches, tales"):
        check_evaluation_text("wikitext")


def test_missing_file_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"no\.txt does not exist"):
        check_evaluation_text(str(tmp_path / "no.txt"))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b" \n", "holds no text"), (b"\xff", "byte 0 is not UTF-8")],
)
def test_a_file_without_text_is_an_error(tmp_path, content, message):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        evaluation_text(str(path))
