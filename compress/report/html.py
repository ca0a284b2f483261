"""What the pages share: their frame, tables that scroll, and paragraphs."""

from __future__ import annotations

from html import escape

from compress.report.style import SCRIPT, STYLE
from compress.report.svg import element
from compress.report.tables import Table
from compress.report.wording import GRADES

# Says to the browser what a page promises: nothing is fetched.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def document(title: str, body: str) -> str:
    """Return a whole page around the markup of its body."""
    head = (
        '<meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>"
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>'
        f"<body>{body}<script>{SCRIPT}</script></body></html>"
    )


def draw(table: Table, *, class_: str = "") -> str:
    """Return a table that scrolls inside its own box, with the caption below."""
    if not table.rows:
        return ""
    sides = ["r" if side == "r" else "" for side in table.align]
    sides[0] = ""  # names of rows stand on the left, and so does their heading
    if len(table.headers) == 2:  # facts and values: a phone has room if values wrap
        class_ = f"plain {class_}".strip()
    heads = [
        element("th", escape(text), scope="col", class_=side)
        for text, side in zip(table.headers, sides, strict=True)
    ]
    rows = [
        element(
            "tr",
            element("th", escape(row[0]), scope="row"),
            *(_cell(text, side) for text, side in zip(row[1:], sides[1:], strict=True)),
        )
        for row in table.rows
    ]
    drawn = element(
        "table", element("thead", element("tr", *heads)), element("tbody", *rows)
    )
    box = element(
        "div",
        drawn,
        class_=f"scroll {class_}".strip(),
        tabindex=0,
        role="region",
        aria_label=table.title,
    )
    return box + (paragraph(table.caption, "caption") if table.caption else "")


def _cell(text: str, side: str) -> str:
    """Return a cell; a lamp and a failure are marked as such."""
    grades = {grade.label: grade.name for grade in GRADES}
    class_ = f"light {grades[text]}" if text in grades else side
    if text.startswith(("FAILED", "DIFFERENT")):
        class_ = "failed"
    return element("td", escape(text), class_=class_)


def paragraph(text: str, class_: str = "") -> str:
    """Return escaped text as a paragraph; nothing for none."""
    return element("p", escape(text), class_=class_) if text else ""
