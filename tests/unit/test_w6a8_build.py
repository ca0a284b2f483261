"""The kernels compile, are kept, and failures say what to do."""

from __future__ import annotations

import ctypes
import shutil
import stat
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from compress.core.errors import KernelError
from compress.runtime.w6a8 import abi, build
from compress.runtime.w6a8.schedule import HOPPER_BLOCKS, hopper_schedule, schedule

FAKE = """#!/bin/sh
if [ "$1" = --version ]; then echo "fake nvcc VERSION"; exit 0; fi
echo run >> "LOG"
while [ "$1" != -o ]; do shift; done
echo made > "$2"
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that writes down its calls; returns where."""
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    write_fake(tmp_path, "1")
    return tmp_path / "log"


def write_fake(folder: Path, version: str, text: str = FAKE) -> None:
    path = folder / "bin" / "nvcc"
    path.parent.mkdir(exist_ok=True)
    text = text.replace("VERSION", version).replace("LOG", str(folder / "log"))
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90a"])
def test_the_real_compiler_makes_a_library_with_our_functions(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path))
    path = build.build(arch)
    kept = {file.name for file in (tmp_path / "kernels").iterdir()}
    assert kept == {path.name, path.with_suffix(".lock").name}
    opened = ctypes.CDLL(str(path))
    assert all(hasattr(opened, name) for name in abi.FUNCTIONS)
    assert opened.w6a8_abi() == abi.ABI
    assert [16 * (2 if t <= 16 else 4) for t in (8, 16, 32, 64)] == [
        opened.w6a8_rows_of_block(t) for t in (8, 16, 32, 64)
    ]
    kernels = abi.Kernels(path)  # there is no device 99, and maybe no driver
    with pytest.raises(KernelError, match="w6a8_probe: CUDA error [0-9]+, [a-zA-Z]"):
        kernels.probe(99)
    with pytest.raises(KernelError, match="w6a8_linear: CUDA error [0-9]+, [a-zA-Z]"):
        kernels.linear(abi.LinearArguments(device=99), 0, "portable")


def test_a_library_is_compiled_once(fake: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(build.build, ["90a"] * 4))
    assert len(paths) == 1
    assert fake.read_text() == "run\n"
    assert paths.pop().read_text() == "made\n"


def test_a_library_that_the_package_brings_needs_no_compiler(
    fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "PREBUILT", tmp_path / "prebuilt")
    monkeypatch.setattr("sys.argv", ["build", "90a", "--into", str(build.PREBUILT)])
    build.main()
    (fake.parent / "bin" / "nvcc").unlink()
    monkeypatch.setattr(build, "find_compiler", lambda: pytest.fail("was asked for"))
    assert build.build("90a") == build.prebuilt("90a", tmp_path / "prebuilt")
    assert build.build("90a").read_text() == "made\n"


def test_another_architecture_or_compiler_is_another_library(fake: Path) -> None:
    first, second = build.build("90a"), build.build("80")
    write_fake(fake.parent, "2")
    assert len({first, second, build.build("90a")}) == 3


def test_a_compiler_that_fails_leaves_nothing(fake: Path) -> None:
    failing = FAKE.replace("echo run", "echo 'error: broken' >&2; exit 3; echo run")
    write_fake(fake.parent, "1", failing)
    with pytest.raises(KernelError, match="failed with 3:\nerror: broken"):
        build.build("90a")
    kept = list((fake.parent / "cache" / "kernels").iterdir())
    assert [path.suffix for path in kept] == [".lock"]


def test_no_compiler_is_an_error_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(build, "_USUAL", tmp_path / "nvcc")
    with pytest.raises(KernelError, match="install the CUDA toolkit or set CUDA_HOME"):
        build.find_compiler()


def test_a_cache_that_cannot_be_written_is_an_error(
    fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fake.parent / "file").write_text("")
    monkeypatch.setenv("COMPRESS_CACHE", str(fake.parent / "file"))
    with pytest.raises(KernelError, match="set COMPRESS_CACHE"):
        build.build("90a")


def test_architectures_have_their_names() -> None:
    names = [build.architecture(c) for c in [(8, 0), (8, 9), (9, 0), (12, 0)]]
    assert names == ["80", "89", "90a", "120"]
    with pytest.raises(KernelError, match="7.5 has not the instructions"):
        build.architecture((7, 5))


@pytest.mark.parametrize(
    ("capability", "reason"), [((7, 0), "from 8.0"), ((9, 0), "cannot be opened")]
)
def test_why_there_are_no_kernels_is_returned(
    fake: Path,
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    reason: str,
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: capability)
    abi.kernels_of.cache_clear()
    found = abi.kernels_of(0)
    abi.kernels_of.cache_clear()
    assert isinstance(found, KernelError) and reason in str(found)


def test_what_is_no_library_is_refused(fake: Path) -> None:
    with pytest.raises(KernelError, match="cannot be opened"):
        abi.Kernels(build.build("90a"))


def test_a_library_of_another_version_is_refused(tmp_path: Path) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    functions = "".join(
        f"int {name}(void) {{ return 999; }}\n" for name in abi.FUNCTIONS
    )
    (tmp_path / "old.c").write_text(functions)
    command = ["gcc", "-shared", "-fPIC", "-o", "old.so", "old.c"]
    subprocess.run(command, cwd=tmp_path, check=True)
    with pytest.raises(KernelError, match=r"old\.so has interface 999, not 3"):
        abi.Kernels(tmp_path / "old.so")


@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "tile", "splits"),
    [
        (1, 4096, 4096, 8, 2),  # 128 blocks would leave half of 132 x 2 places empty
        (8, 22016, 4096, 8, 1),
        (16, 4096, 4096, 16, 2),
        (17, 4096, 4096, 32, 4),
        (64, 4096, 4096, 64, 4),
        (4096, 4096, 4096, 64, 1),
        (1, 16, 128, 8, 1),
    ],
)
def test_the_cut_fills_the_device(
    tokens: int, rows: int, columns: int, tile: int, splits: int
) -> None:
    cut = schedule(tokens, -(-rows // 16), -(-columns // 128), 132)
    assert (cut.token_tile, cut.splits) == (tile, splits)


@pytest.mark.parametrize("tokens", [1, 9, 33, 200])
@pytest.mark.parametrize("columns", [32, 3072, 28672])
def test_no_part_of_the_columns_is_empty(tokens: int, columns: int) -> None:
    across = -(-columns // 128)
    cut = schedule(tokens, 3, across, 132)
    steps = -(-across // (4 if cut.token_tile <= 16 else 2))
    assert 1 <= cut.splits <= steps


@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "tile", "panels", "splits"),
    [
        (1, 4096, 4096, 16, 1, 1),  # a part that joins costs more than idle places
        (1, 4096, 11008, 16, 1, 2),
        (32, 8192, 8192, 32, 1, 1),
        (64, 8192, 8192, 64, 1, 1),
        (128, 8192, 8192, 128, 2, 2),
        (4096, 22016, 4096, 128, 3, 1),
    ],
)
def test_hoppers_cut(
    tokens: int, rows: int, columns: int, tile: int, panels: int, splits: int
) -> None:
    cut = hopper_schedule(tokens, rows // 16, columns // 128, 132, "groups")
    assert (cut.token_tile, cut.panels, cut.splits) == (tile, panels, splits)
    assert (cut.workspace > 0) == (splits > 1)


@pytest.mark.parametrize("scales", ["one", "groups", "any"])
@pytest.mark.parametrize("tokens", [1, 17, 100, 5000])
@pytest.mark.parametrize("across", [1, 3, 224])
def test_hoppers_cut_is_one_that_the_kernel_has(
    scales: str, tokens: int, across: int
) -> None:
    cut = hopper_schedule(tokens, 12, across, 132, scales)
    assert 1 <= cut.splits <= across
    assert any(
        (block.tokens, block.panels) == (cut.token_tile, cut.panels)
        for block in HOPPER_BLOCKS
        if scales in block.scales
    )
