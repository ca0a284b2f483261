"""The tree and the packaging agree."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest

import compress

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = ("quantizers", "pruners", "export")

in_tree = pytest.mark.skipif(
    Path(compress.__file__).resolve().parent != ROOT / "compress",
    reason="an installed wheel is tested, not this tree",
)


def project() -> dict[str, object]:
    return dict(tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8")))


@in_tree
@pytest.mark.parametrize("family", FAMILIES)
def test_family_is_the_root_folder(family: str) -> None:
    module = import_module(f"compress.{family}")
    assert module.__file__ is not None
    assert Path(module.__file__).samefile(ROOT / family / "__init__.py")


@in_tree
@pytest.mark.parametrize("family", FAMILIES)
def test_link_is_relative(family: str) -> None:
    link = ROOT / "compress" / family
    if not link.is_symlink():
        pytest.skip("git made no links here")
    assert link.readlink() == Path("..") / family


def test_every_package_is_listed() -> None:
    setuptools = project()["tool"]["setuptools"]  # type: ignore[index]
    folders = [ROOT / "compress", *(ROOT / family for family in FAMILIES)]
    found = set()
    for folder in folders:
        prefix = [] if folder.name == "compress" else ["compress"]
        for init in folder.rglob("__init__.py"):
            relative = init.parent.relative_to(ROOT)
            if relative.parts[:2] in {("compress", family) for family in FAMILIES}:
                continue  # seen through a link
            found.add(".".join([*prefix, *relative.parts]))
    assert found == set(setuptools["packages"])


def test_every_module_folder_is_a_package() -> None:
    folders = [ROOT / "compress", *(ROOT / family for family in FAMILIES)]
    bare = {
        str(module.parent.relative_to(ROOT))
        for folder in folders
        for module in folder.rglob("*.py")
        if not (module.parent / "__init__.py").exists()
    }
    assert bare == set()


def test_forbidden_imports_name_every_part_of_the_toolkit() -> None:
    tool = project()["tool"]
    contracts = tool["importlinter"]["contracts"]  # type: ignore[index]
    (core,) = (c for c in contracts if c["name"] == "core imports nothing of ours")
    parts = {
        f"compress.{path.stem}"
        for path in (ROOT / "compress").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    listed = set(core["forbidden_modules"])
    exempt = {"compress.core", "compress.data", "compress.__init__"}
    assert parts - exempt - {"compress.__main__"} <= listed


def test_no_file_is_too_long() -> None:
    folders = [ROOT / name for name in ("compress", *FAMILIES, "tests")]
    long = {
        str(path.relative_to(ROOT)): count
        for folder in folders
        for path in folder.rglob("*.py")
        if (count := len(path.read_text("utf-8").splitlines())) >= 400
    }
    assert long == {}


def test_licence_is_the_whole_text() -> None:
    text = (ROOT / "LICENSE").read_text("utf-8")
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert project()["project"]["license"] == "Apache-2.0"  # type: ignore[index]
