"""The documents agree with the code and with one another."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from ruamel.yaml import YAML

import compress
from compress.config import SweepConfig
from compress.core.families import FAMILIES
from compress.registry import KINDS, names
from compress.transforms.catalog import TRANSFORMS

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "benchmarks/README.md"]
)
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def generator() -> ModuleType:
    path = ROOT / "docs" / "generate_config.py"
    spec = importlib.util.spec_from_file_location("generate_config", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_config_reference_is_up_to_date() -> None:
    module = generator()
    assert module.TARGET.read_text("utf-8") == module.render(), (
        "run: python docs/generate_config.py"
    )


def test_config_reference_describes_every_key() -> None:
    rows = re.findall(r"^\| `.*\|$", generator().render(), re.M)
    assert len(rows) > 40
    assert [row for row in rows if row.rstrip(" |").endswith("| ")] == []


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as MkDocs and code hosts make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.S | re.M)
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    plain = [re.sub(r"[^\w\s-]", "", title).strip().lower() for title in titles]
    made = re.findall(r"^::: ([\w.]+)$", text, re.M)  # by mkdocstrings
    return {re.sub(r"[-\s]+", "-", title) for title in plain} | set(made)


@by_page
def test_links_lead_somewhere(page: Path) -> None:
    lost = []
    for target, anchor in re.findall(
        r"\]\(([^)#\s]*)#?([^)\s]*)\)", page.read_text("utf-8")
    ):
        there = (page.parent / target).resolve() if target else page
        if "://" in target or target.startswith("mailto:"):
            continue
        if not there.exists() or (anchor and anchor not in anchors(there)):
            lost.append((target, anchor))
    assert lost == []


def test_every_family_and_plugin_has_its_place() -> None:
    docs = ROOT / "docs"
    wanted = {
        "supported.md": [k for f in FAMILIES for k in f.model_types],
        "quantizers.md": names("quantizers"),
        "pruning.md": names("pruners"),
        "allocators.md": names("allocators"),
        "transforms.md": list(TRANSFORMS),
    }
    wanted["supported.md"] += [name for kind in KINDS for name in names(kind)]
    lost = [
        (page, word)
        for page, words in wanted.items()
        for word in words
        if f"`{word}`" not in (docs / page).read_text("utf-8")
    ]
    assert lost == []


@pytest.mark.parametrize("method", names("quantizers"))
def test_the_page_of_a_quantizer_says_what_one_must_know(method: str) -> None:
    text = (ROOT / "docs" / "methods" / f"{method}.md").read_text("utf-8")
    assert re.search(r"\*\*Formula\.\*\*", text)
    assert re.search(r"\*\*Source\.\*\*", text)
    assert re.search(r"\*\*Limits\.\*\*|^## Limits$", text, re.M)
    assert "RESULTS.md#" in text  # what we measured
    assert f"methods/{method}.md" in (ROOT / "docs/references.md").read_text("utf-8")


def test_the_page_on_python_names_what_is_public() -> None:
    text = (ROOT / "docs" / "api.md").read_text("utf-8")
    assert [n for n in compress.__all__ if f"`compress.{n}`" not in text] == []
    described = set(re.findall(r"^::: compress\.(\w+)$", text, re.M))
    assert described == set(compress.__all__) - {"__version__"}


def test_the_citation_is_of_this_version() -> None:
    cited = YAML(typ="safe", pure=True).load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    assert (cited["version"], cited["license"]) == (compress.__version__, "Apache-2.0")


def test_the_page_on_sweeps_describes_every_key() -> None:
    text = (ROOT / "docs" / "sweep.md").read_text("utf-8")
    assert [k for k in SweepConfig.model_fields if f"| `{k}` |" not in text] == []


def test_mkdocs_lists_every_page() -> None:
    text = (ROOT / "mkdocs.yml").read_text("utf-8")
    listed = re.findall(r"(?:- |: )(\S+\.md)$", text, re.M)
    assert len(set(listed)) == len(listed)
    docs = ROOT / "docs"
    assert {str(p.relative_to(docs)) for p in docs.glob("**/*.md")} <= set(listed)
    assert [
        p for p in listed if not (docs / p).exists() and not (ROOT / p).exists()
    ] == []


def test_the_page_on_commands_names_every_command() -> None:
    import typer

    from compress.cli import app

    text = (ROOT / "docs" / "commands.md").read_text("utf-8")
    group = typer.main.get_command(app)
    assert [n for n in group.commands if f"| `compress {n}" not in text] == []  # type: ignore[attr-defined]
