"""Brings files of the repository that pages link to into the site.

A hook of MkDocs. Pages in ``docs/`` link to files outside of it by relative paths, as
they must to work where the repository is browsed. Here every such file becomes part of
the site under its own path, and links are turned to where each page is built:
``docs/tuning.md`` is ``tuning.md`` there, ``benchmarks/RESULTS.md`` keeps its path.
Markdown becomes pages and is searched for links in turn; other files are copied. A link
to a folder becomes plain text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(
    r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>[^)#\s]*)(?P<anchor>#[^)\s]*)?\)"
)


def place(path: str) -> str:
    """Return where the file of the repository at ``path`` lies in the site."""
    return path.removeprefix("docs/")


def origin(page: str) -> str:
    """Return the path in the repository of the site's ``page``."""
    return page if (ROOT / page).is_file() else f"docs/{page}"


def resolved(page: str, target: str) -> str | None:
    """Return the path in the repository that a link of ``page`` leads to, if any."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
    return path if target and (ROOT / path).exists() else None


def with_site_links(markdown: str, page: str) -> str:
    """Return the text of ``page`` (a path in the repository) with the site's links."""

    def turned(link: re.Match[str]) -> str:
        path = resolved(page, link["target"])
        if path is None:
            return link[0]
        if (ROOT / path).is_dir():
            return link["text"]
        there = posixpath.relpath(place(path), posixpath.dirname(place(page)) or ".")
        return f"[{link['text']}]({there}{link['anchor'] or ''})"

    return LINK.sub(turned, markdown)


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Add all files outside of ``docs/`` that are linked to, in nav or pages."""
    listed = Path(config.config_file_path).read_text("utf-8")
    nav = re.findall(r": (\S+\.md)$", listed, re.M)
    waiting = [name for name in nav if (ROOT / name).is_file()]
    waiting += [f"docs/{page.src_uri}" for page in files.documentation_pages()]
    seen = set(waiting)
    while waiting:
        page = waiting.pop()
        if not page.startswith("docs/"):
            source = str(ROOT / page)
            files.append(File.generated(config, place(page), abs_src_path=source))
        if not page.endswith(".md"):
            continue
        for link in LINK.finditer((ROOT / page).read_text("utf-8")):
            path = resolved(page, link["target"])
            if path and path not in seen and (ROOT / path).is_file():
                seen.add(path)
                if not path.startswith("docs/"):
                    waiting.append(path)
    for file in files.documentation_pages():
        if origin(file.src_uri) == file.src_uri:  # need not be in the nav
            file.inclusion = InclusionLevel.NOT_IN_NAV
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn the links of a page to where things lie in the site."""
    return with_site_links(markdown, origin(page.file.src_uri))
