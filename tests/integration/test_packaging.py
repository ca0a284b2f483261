"""Both ways of installing give the same ``compress``, and nothing beside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = ("quantizers", "pruners", "export")
FILES = ("pyproject.toml", "README.md", "LICENSE", "constraints.txt")
CODE = (
    "import compress, compress.core.scheme, compress.quantizers.rtn\n"
    "import compress.export, compress.pruners, compress.cli\n"
    "print(compress.__file__, compress.quantizers.rtn.__file__, sep='\\n')"
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git would check out, links kept."""
    folder = tmp_path_factory.mktemp("tree") / "compress-llm"
    folder.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("compress", *FAMILIES):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignore)
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)
    return folder


def modules_of(tree: Path) -> set[str]:
    """The names that every module and data file must have in an install."""
    folders = {"compress": "compress", **{f: f"compress/{f}" for f in FAMILIES}}
    names = set()
    for folder, target in folders.items():
        for path in (tree / folder).rglob("*"):
            inner = path.relative_to(tree / folder)
            is_linked = folder == "compress" and inner.parts[0] in FAMILIES
            if path.is_file() and not is_linked:
                names.add(f"{target}/{inner}")
    return names


@pytest.fixture(scope="module")
def wheel(tree: Path) -> Path:
    """The wheel, built without network or isolation."""
    out = tree.parent / "dist"
    copy = tree.parent / "build-tree"  # setuptools writes build/ and egg-info there
    shutil.copytree(tree, copy, symlinks=True)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    pip += ["--no-build-isolation", "--wheel-dir", str(out), str(copy)]
    done = subprocess.run(pip, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    return path


def test_wheel_holds_every_module_and_no_top_level_family(
    tree: Path, wheel: Path
) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n}
    assert "compress/quantizers/rtn.py" in names
    assert {name.split("/")[0] for name in names} == {"compress"}
    assert names == modules_of(tree)


def test_wheel_has_entry_points_and_licences(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = {n.split("/", 1)[1]: n for n in archive.namelist() if "-info/" in n}
        points = archive.read(inside["entry_points.txt"]).decode()
    assert "rtn = compress.quantizers.rtn:RoundToNearest" in points
    assert "llm-compress = compress.cli:main" in points
    assert {"licenses/LICENSE", "licenses/compress/data/LICENSES.md"} <= set(inside)


def test_unpacked_wheel_imports(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    done = python(sys.executable, CODE, cwd=tmp_path, path=tmp_path / "site")
    assert done.splitlines() == [
        str(tmp_path / "site/compress/__init__.py"),
        str(tmp_path / "site/compress/quantizers/rtn.py"),
    ]


def test_editable_install_reads_the_tree(tree: Path, tmp_path: Path) -> None:
    interpreter = environment(tmp_path / "env")
    pip = [interpreter, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    pip += ["--no-build-isolation", "--editable", str(tree)]
    done = subprocess.run(pip, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    package, rtn = python(interpreter, CODE, cwd=tmp_path).splitlines()
    assert Path(package) == tree / "compress/__init__.py"
    assert Path(rtn).samefile(tree / "quantizers/rtn.py")
    (tree / "quantizers" / "just_added.py").write_text("")
    try:  # a new plug-in file needs no new install
        python(interpreter, "import compress.quantizers.just_added", cwd=tmp_path)
    finally:
        (tree / "quantizers" / "just_added.py").unlink()
    script = Path(interpreter).parent / "compress"
    shown = subprocess.run(
        [script, "list", "quantizers"], capture_output=True, text=True, cwd=tmp_path
    )
    assert "gptq" in shown.stdout, shown.stderr


def environment(folder: Path) -> str:
    """Make a virtual environment that sees this one's libraries, but not our package.

    ``system_site_packages`` would show the base interpreter's libraries, which are not
    those of the environment that runs the tests; a path file shows these. Path files
    of that folder are not read again, so its own editable ``compress`` stays unseen.
    """
    venv.create(folder, with_pip=False)
    paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    libraries = sysconfig.get_paths()["purelib"]
    (Path(paths["purelib"]) / "shared.pth").write_text(f"{libraries}\n")
    return str(Path(paths["scripts"]) / "python")


def python(interpreter: str, code: str, *, cwd: Path, path: Path | None = None) -> str:
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if path is not None:
        variables["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [interpreter, "-c", code],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=variables,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_metadata_is_what_an_index_accepts(wheel: Path) -> None:
    """The checks of ``twine check``, by the library that it has them from."""
    from packaging.metadata import Metadata

    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("-info/METADATA"))
        text = archive.read(name)
    metadata = Metadata.from_email(text, validate=True)
    assert metadata.description_content_type == "text/markdown"
    assert metadata.license_expression == "Apache-2.0"
    assert metadata.description


def test_a_model_is_compressed_by_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    from pipeline_fixtures import (
        config_of,
        save_checkpoint,
        write_config,
        write_text,
    )

    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    save_checkpoint(tmp_path / "model")
    settings = config_of(tmp_path / "model", write_text(tmp_path), tmp_path / "run")
    path = write_config(tmp_path / "run.yaml", settings)
    code = f"import compress; print(compress.run({str(path)!r}).workdir)"
    done = python(sys.executable, code, cwd=tmp_path, path=tmp_path / "site")
    assert done.splitlines()[-1] == str(tmp_path / "run")
    assert list((tmp_path / "run/export/safetensors").glob("*.safetensors"))
