r"""Whether a text follows an instruction of IFEval: a checker for each kind.

The kinds, their arguments and what counts as followed are those of the paper, section 2
and table 4, and of the behaviour of its release. Differs: sentences and words are split
by regular expressions instead of nltk's trained tokenizer, so counts of a text with
abbreviations may differ by one or two. A letter that is none, such as ``#``, is counted
as it is; the release counts another one, drawn at random, in its place.

Three kinds ask for the language of a text (:data:`NEED_LANGUAGE`); they need the
package ``langdetect``, which the release uses. Without it their prompts are left out,
and counted. A text whose language cannot be told counts as followed, as there.

Source: Zhou et al. (2023), "Instruction-Following Evaluation for Large Language
Models", arXiv 2311.07911.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

Arguments = Mapping[str, Any]
"""Of an instruction, by name."""

NEED_LANGUAGE = frozenset(
    {
        "language:response_language",
        "change_case:english_capital",
        "change_case:english_lowercase",
    }
)
"""Kinds that a detector of languages decides."""

_CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_CLOSING = r"[.!?]+[\"'”’)\]*_]*"
_ABBREVIATION = re.compile(
    r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|Inc|Ltd|Co|e\.g|i\.e|[A-Z])\.$|^\d{1,3}\.$"
)


def can_tell_languages() -> bool:
    """Whether a detector of languages is installed."""
    return find_spec("langdetect") is not None


def is_followed(kind: str, text: str, arguments: Arguments) -> bool:
    """Return whether a text follows an instruction; an empty text follows none.

    Args:
        kind: A key of :data:`CHECKERS`.
        text: What a model wrote.
        arguments: Of the instruction, by name.

    Raises:
        KeyError: The kind is unknown, or an argument is missing.
    """
    return bool(text.strip()) and CHECKERS[kind](text, arguments)


def loose_variants(text: str) -> list[str]:
    """Return a text, and what is left of it without frames that models like to add.

    Without its first line, its last one, or both, each with and without asterisks: the
    eight texts of which one has to follow an instruction under the loose criterion.
    """
    lines = text.split("\n")
    kept = [text]
    kept += ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
    return [*kept, *(part.replace("*", "") for part in kept)]


def sentence_count(text: str) -> int:
    """Return the number of sentences: runs that end with ``.``, ``!`` or ``?``.

    Not at abbreviations, initials and numbers, nor where a small letter follows a dot.
    """
    parts = re.split(r"(?<=[.!?\"'”’)\]*_])\s+|\n{2,}", text.strip())
    count, pending = 0, ""
    for part, after in zip(parts, [*parts[1:], ""], strict=True):
        pending = f"{pending} {part}".strip()
        ends = re.search(rf"{_CLOSING}$", pending)
        if ends and not _ABBREVIATION.search(pending):
            if not (pending.endswith(".") and after[:1].islower()):
                count, pending = count + 1, ""
    return count + bool(pending)


def word_count(text: str) -> int:
    r"""Return the number of runs of letters, digits and underscores (``\w+``)."""
    return len(re.findall(r"\w+", text))


def _compared(count: int, relation: str, wanted: int) -> bool:
    if relation not in ("at least", "less than"):
        raise ValueError(f"relation {relation!r} is not 'at least' or 'less than'")
    return count >= wanted if relation == "at least" else count < wanted


def _at_least(found: Sequence[str], wanted: int) -> bool:
    return len(found) >= wanted


def _existence(text: str, given: Arguments) -> bool:
    low = text.lower()
    return all(word.lower() in low for word in given["keywords"])


def _forbidden(text: str, given: Arguments) -> bool:
    return not any(
        re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE)
        for word in given["forbidden_words"]
    )


def _frequency(text: str, given: Arguments) -> bool:
    count = text.lower().count(given["keyword"].lower())
    return _compared(count, given["relation"], given["frequency"])


def _letter_frequency(text: str, given: Arguments) -> bool:
    count = text.lower().count(given["letter"].lower())
    return _compared(count, given["let_relation"], given["let_frequency"])


def _language(text: str, given: Arguments) -> bool:
    return _is_in(text, given["language"])


def _is_in(text: str, language: str) -> bool:
    from langdetect import DetectorFactory, LangDetectException, detect

    DetectorFactory.seed = 0  # it draws at random otherwise
    try:
        return bool(detect(text) == language)
    except LangDetectException:  # no letters
        return True


def _upper_english(text: str, _: Arguments) -> bool:
    return text.isupper() and _is_in(text, "en")


def _lower_english(text: str, _: Arguments) -> bool:
    return text.islower() and _is_in(text, "en")


def _capital_words(text: str, given: Arguments) -> bool:
    words = re.findall(r"\w+(?:[-.'’]\w+)*", text)
    count = sum(word.isupper() for word in words)
    return _compared(count, given["capital_relation"], given["capital_frequency"])


def _no_comma(text: str, _: Arguments) -> bool:
    return "," not in text


def _sentences(text: str, given: Arguments) -> bool:
    return _compared(sentence_count(text), given["relation"], given["num_sentences"])


def _words(text: str, given: Arguments) -> bool:
    return _compared(word_count(text), given["relation"], given["num_words"])


def _parts(text: str, mark: str) -> list[str] | None:
    """Return what marks part, without an empty start and end.

    ``None`` if there is nothing between two marks.
    """
    parts = [part.strip() for part in re.split(mark, text)]
    if len(parts) > 1 and not parts[0]:
        parts = parts[1:]
    if len(parts) > 1 and not parts[-1]:
        parts = parts[:-1]
    return parts if all(parts) else None


def _paragraphs(text: str, given: Arguments) -> bool:
    parts = _parts(text, r"\*\*\*")
    return parts is not None and len(parts) == int(given["num_paragraphs"])


def _nth_paragraph(text: str, given: Arguments) -> bool:
    parts = [part.strip() for part in text.split("\n\n")]
    number = given["nth_paragraph"]
    if sum(map(bool, parts)) != given["num_paragraphs"] or number > len(parts):
        return False
    start = parts[number - 1].split(maxsplit=1)
    if not start:
        return False
    word = re.match(r"[^.,?!'\"]*", start[0].lstrip("'\""))
    return word is not None and word[0].lower() == str(given["first_word"]).lower()


def _placeholders(text: str, given: Arguments) -> bool:
    return _at_least(re.findall(r"\[.*?\]", text), given["num_placeholders"])


def _postscript(text: str, given: Arguments) -> bool:
    marker = re.escape(given["postscript_marker"].lower()).replace(r"\.", r"\.\s?")
    return re.search(marker, text.lower()) is not None


def _bullets(text: str, given: Arguments) -> bool:
    found = re.findall(r"^[ \t]*(?:\*(?!\*)|-)", text, re.MULTILINE)
    return len(found) == int(given["num_bullets"])


def _constrained(text: str, _: Arguments) -> bool:
    return any(answer in text for answer in _CONSTRAINED)


def _highlights(text: str, given: Arguments) -> bool:
    single = re.findall(r"\*[^\n*]*\*", text)
    double = re.findall(r"\*\*[^\n*]*\*\*", text)
    kept = [part for part in (*single, *double) if part.strip("* ")]
    return _at_least(kept, given["num_highlights"])


def _sections(text: str, given: Arguments) -> bool:
    marks = re.findall(rf"{re.escape(given['section_spliter'])}\s?\d+", text)
    return _at_least(marks, given["num_sections"])


def _json(text: str, _: Arguments) -> bool:
    fenced = re.sub(r"^```(?:json)?|```$", "", text.strip(), flags=re.IGNORECASE)
    try:
        json.loads(fenced.strip())
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str, _: Arguments) -> bool:
    marked = re.findall(r"<<[^\n]+>>", text)
    return any(part.lstrip("<").rstrip(">").strip() for part in marked)


def _two_responses(text: str, _: Arguments) -> bool:
    parts = _parts(text, r"\*{6}")
    return parts is not None and len(parts) == 2 and parts[0] != parts[1]


def _repeat_prompt(text: str, given: Arguments) -> bool:
    wanted = given["prompt_to_repeat"].strip().lower()
    return text.strip().lower().startswith(wanted)


def _end(text: str, given: Arguments) -> bool:
    wanted = given["end_phrase"].strip().lower()
    return text.strip().strip('"').lower().endswith(wanted)


def _quotation(text: str, _: Arguments) -> bool:
    inner = text.strip()
    return len(inner) > 1 and inner[0] == inner[-1] == '"'


CHECKERS: Mapping[str, Callable[[str, Arguments], bool]] = {
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": _upper_english,
    "change_case:english_lowercase": _lower_english,
    "combination:repeat_prompt": _repeat_prompt,
    "combination:two_responses": _two_responses,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:constrained_response": _constrained,
    "detectable_format:json_format": _json,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:title": _title,
    "keywords:existence": _existence,
    "keywords:forbidden_words": _forbidden,
    "keywords:frequency": _frequency,
    "keywords:letter_frequency": _letter_frequency,
    "language:response_language": _language,
    "length_constraints:nth_paragraph_first_word": _nth_paragraph,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_sentences": _sentences,
    "length_constraints:number_words": _words,
    "punctuation:no_comma": _no_comma,
    "startend:end_checker": _end,
    "startend:quotation": _quotation,
}
"""Whether a text, not empty, follows an instruction; by kind."""
