"""Pack the bundled texts of ``compress/data`` and write their LICENSES.md.

    python benchmarks/bundle_texts.py MATERIAL

MATERIAL is a folder with the files that ``bundle_sources.py`` lists, taken from where
it says. Packing is deterministic: the same material gives the same bytes.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from bundle_sources import BUNDLES, CODE_EVALUATION, PROVENANCE, Excerpt

DATA = Path(__file__).parent.parent / "compress" / "data"
HEADER = """# Licences of bundled texts

The texts in this folder are data, not code: each keeps the licence of its source and
the Apache-2.0 licence of the toolkit does not apply to them. `wikitext2` and the
WikiText part of `mix_prose` are under CC BY-SA 3.0
(https://creativecommons.org/licenses/by-sa/3.0/; authors: the contributors of
Wikipedia; collected by Merity et al. 2016). Calibration texts (`mix_*`) and evaluation
texts (the others) come from different works or different files. Python files of the two
sides are listed in `benchmarks/bundle_sources.py`.

"""


def main(material: Path) -> None:
    """Write every bundle and the table of sources."""
    rows = []
    for name, excerpts in BUNDLES.items():
        separator = "" if name == "mix_chat" else "\n\n"
        text = separator.join(_read(material, excerpt) for excerpt in excerpts)
        data = text.encode()
        packed = gzip.compress(data, 9, mtime=0)
        (DATA / f"{name}.gz").write_bytes(packed)
        digest = hashlib.sha256(data).hexdigest()
        rows.append(f"| `{name}.gz` | {len(data)} | {len(packed)} | `{digest}` |")
        print(rows[-1])
    table = (
        "| file | bytes | packed | sha256 of the text |\n| --- | --- | --- | --- |\n"
    )
    sources = "\n\n| text | made from |\n| --- | --- |\n" + "\n".join(
        f"| `{name}` | {_describe(excerpts)} |" for name, excerpts in BUNDLES.items()
    )
    licences = (
        "\n\n| source | where from | licence |\n| --- | --- | --- |\n"
        + "\n".join(
            f"| {key} | {origin} | {licence} |"
            for key, (origin, licence) in PROVENANCE.items()
        )
    )
    notices = "\n\n" + (Path(__file__).parent / "bundle_notices.md").read_text()
    (DATA / "LICENSES.md").write_text(
        HEADER + table + "\n".join(rows) + sources + licences + notices
    )


def _describe(excerpts: tuple[Excerpt, ...]) -> str:
    """Return the files of each source, with their extent if they are not whole."""
    files: dict[str, list[str]] = {}
    for excerpt in excerpts:
        end = excerpt.start + excerpt.size
        extent = f" (bytes {excerpt.start}-{end})" if excerpt.size else ""
        files.setdefault(excerpt.source, []).append(f"`{excerpt.file}`{extent}")
    return "; ".join(f"{source}: {', '.join(names)}" for source, names in files.items())


def _read(material: Path, excerpt: Excerpt) -> str:
    """Return the excerpt, cut at its separators."""
    raw = (material / excerpt.file).read_bytes()
    if excerpt.file == "wiki.test.raw":  # evaluation.md wants these bytes untouched
        return raw.decode()
    text = raw.decode().replace("\r\n", "\n").replace("\x1a", "")
    text = FORMS[excerpt.form](text)
    if not excerpt.size:
        return text.strip("\n") + "\n"
    data = text.encode()
    cut = excerpt.separator.encode()
    start = data.find(cut, excerpt.start) + len(cut) if excerpt.start else 0
    end = data.rfind(cut, start, start + excerpt.size)
    return data[start:end].decode().strip("\n") + "\n"


def _plain(text: str) -> str:
    return text


def _paragraphs(text: str) -> str:
    """Return the headings and paragraphs of an HTML page."""
    body = text[text.index("<body") :]
    parts = re.findall(r"<(h\d|p)[^>]*>(.*?)</\1>", body, flags=re.DOTALL)
    plain = [html.unescape(re.sub(r"<[^>]+>", "", part)).strip() for _, part in parts]
    return "\n\n".join(part for part in plain if part) + "\n\n"


def _exercises(text: str) -> str:
    """Return grade-school problems as chats, without the calculator marks."""
    lines = []
    for line in text.splitlines()[:200]:
        row = json.loads(line)
        answer = re.sub(r"<<.*?>>", "", row["answer"])
        answer = re.sub(r"\n#### (.*)", r"\nThe answer is \1.", answer)
        lines.append(_chat(row["question"], answer))
    return "\n".join(lines) + "\n"


def _glossary(text: str) -> str:
    """Return definitions of the Jargon File as chats."""
    entries = re.findall(
        r"\n   :([^\n:]+):[^\n]*\n\n((?:   [^:\n][^\n]*\n|\n){3,14}?)(?=\n   :)", text
    )
    lines = []
    for index, (term, definition) in enumerate(entries):
        answer = re.sub(r"\s*\n\s*", " ", definition.replace("\n\n", "\0"))
        answer = re.sub(r"[{}]", "", answer).replace("\0", "\n\n").strip()
        if index % 7 == 0 and len(answer) > 200:
            lines.append(_chat(f'What do programmers mean by "{term}"?', answer))
    return "\n".join(lines) + "\n"


def _chat(question: str, answer: str) -> str:
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
    return json.dumps({"messages": messages}, ensure_ascii=False)


FORMS: dict[str, Callable[[str], str]] = {
    "plain": _plain,
    "paragraphs": _paragraphs,
    "exercises": _exercises,
    "glossary": _glossary,
}

if __name__ == "__main__":
    assert not {e.file for e in BUNDLES["mix_code"]} & set(CODE_EVALUATION)
    main(Path(sys.argv[1]))
