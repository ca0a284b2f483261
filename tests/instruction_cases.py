"""Instructions of IFEval, each with a text that follows it and one that does not."""

from __future__ import annotations

from typing import Any

CASES: list[tuple[str, dict[str, Any], str, str]] = [
    (
        "change_case:capital_word_frequency",
        {"capital_relation": "less than", "capital_frequency": 2},
        "One WORD here",
        "TWO WORDS here",
    ),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": "Say it. "},
        "say it. Here it is.",
        "Here: say it.",
    ),
    ("combination:two_responses", {}, "a\n******\nb", "a\n******\na"),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a][b]", "[a"),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.S."},
        "x\np. s. y",
        "PS",
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.P.S"},
        "P.P.S b",
        "P.S.",
    ),
    (
        "detectable_format:constrained_response",
        {},
        "So: My answer is no.",
        "my answer is no",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": [1]}\n```', "{a: 1}"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        "SECTION 1 a SECTION 2 b",
        "Section 1 a Section 2 b",
    ),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        "* a\n - b\n**bold**",
        "* a\n* b\n* c",
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        "*a* and *b c*",
        "*a* and **",
    ),
    ("detectable_format:title", {}, "<<a poem>>\nwords", "<< >>"),
    ("keywords:existence", {"keywords": ["Sun", "moon"]}, "sunny, Moon", "sun"),
    ("keywords:forbidden_words", {"forbidden_words": ["rock"]}, "rocks", "a Rock."),
    (
        "keywords:frequency",
        {"keyword": "war", "frequency": 2, "relation": "at least"},
        "War and war",
        "war",
    ),
    (
        "keywords:letter_frequency",
        {"letter": "#", "let_frequency": 2, "let_relation": "at least"},
        "#a #b",
        "#",
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "So"},
        "One.\n\n'so, two.",
        "So.\n\nTwo.",
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        "***\na\n***\nb",
        "a\n***\n***\nb",
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": "less than"},
        "Dr. No came. He left",
        "A b. C d! E f?",
    ),
    (
        "length_constraints:number_words",
        {"num_words": 3, "relation": "at least"},
        "one two three",
        "one, two!",
    ),
    ("punctuation:no_comma", {}, "a b", "a, b"),
    ("startend:end_checker", {"end_phrase": "The end."}, '"So the end."', "The end. X"),
    ("startend:quotation", {}, ' "a" ', '"a" b'),
]
