"""The documents agree with the code and with one another."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from compress.config import SweepConfig, load_config
from compress.core.families import FAMILIES
from compress.core.scheme import Scheme
from compress.registry import names

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def generator() -> ModuleType:
    path = ROOT / "docs" / "generate_config.py"
    spec = importlib.util.spec_from_file_location("generate_config", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    text = page.read_text("utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.S | re.M)


def test_config_reference_is_up_to_date() -> None:
    module = generator()
    assert module.TARGET.read_text("utf-8") == module.render(), (
        "run: python docs/generate_config.py"
    )


def test_config_reference_describes_every_key() -> None:
    rows = re.findall(r"^\| `.*\|$", generator().render(), re.M)
    assert len(rows) > 40
    assert [row for row in rows if row.rstrip(" |").endswith("| ")] == []


@by_page
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text("utf-8"))
    local = [t for t in targets if "://" not in t and "mailto:" not in t]
    assert [t for t in local if not (page.parent / t).exists()] == []


@by_page
def test_yaml_configs_in_pages_are_valid(page: Path, tmp_path: Path) -> None:
    for index, block in enumerate(blocks(page, "yaml")):
        if block.startswith("model:"):
            file = tmp_path / f"{index}.yaml"
            file.write_text(block)
            load_config(file)


@by_page
def test_python_in_pages_compiles(page: Path) -> None:
    for block in blocks(page, "python"):
        compile(block, str(page), "exec")


def test_readme_quantizer_keeps_the_contract() -> None:
    import torch

    (source,) = (b for b in blocks(ROOT / "README.md", "python") if "class " in b)
    space: dict[str, object] = {"__name__": "readme"}
    exec(source, space)  # noqa: S102 - our own page
    plugin = space["Clipped"]
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    coded = plugin().quantize(weight, Scheme.parse("int8-g32"), None)  # type: ignore[operator]
    step = coded.scale.float().repeat_interleave(32, 1)
    inside = (coded.codes > -128) & (coded.codes < 127)
    assert bool(((coded.dequantize() - weight).abs() <= 0.5001 * step)[inside].all())


def test_readme_names_every_family_and_plugin() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    kinds = [kind for family in FAMILIES for kind in family.model_types]
    wanted = [*kinds, *names("exporters")]
    wanted += [name for name in names("quantizers") if name in ("rtn", "gptq")]
    assert [word for word in wanted if f"`{word}`" not in text] == []


def test_the_page_on_sweeps_describes_every_key() -> None:
    text = (ROOT / "docs" / "sweep.md").read_text("utf-8")
    assert [k for k in SweepConfig.model_fields if f"| `{k}` |" not in text] == []


def test_mkdocs_lists_every_page() -> None:
    from ruamel.yaml import YAML

    text = re.sub(r"!!python/\S+", "", (ROOT / "mkdocs.yml").read_text("utf-8"))
    site = YAML(typ="safe", pure=True).load(text)

    def files(node: object) -> list[str]:
        if isinstance(node, str):
            return [node]
        values = node.values() if isinstance(node, dict) else node
        return [file for value in values for file in files(value)]  # type: ignore[union-attr]

    pages = {p.name for p in (ROOT / "docs").glob("*.md")}
    assert set(files(site["nav"])) == pages


def test_the_page_on_commands_names_every_command() -> None:
    import typer

    from compress.cli import app

    text = (ROOT / "docs" / "commands.md").read_text("utf-8")
    group = typer.main.get_command(app)
    assert [n for n in group.commands if f"| `compress {n}" not in text] == []  # type: ignore[attr-defined]
