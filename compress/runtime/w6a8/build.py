"""Compiles the kernels of ``runtime/csrc`` when they are first needed.

The library is plain C to the outside and links the CUDA runtime statically, so it fits
every release of torch and Python. It is kept in the cache folder under a digest of
sources, options, architecture and compiler; processes that want it at the same time
build it once. Under a minute on two cores with nvcc 13.0. A wheel can bring libraries
along (``make kernels-wheel``), which need no compiler where they are used::

    python -m compress.runtime.w6a8.build 80 90a --into compress/runtime/prebuilt
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from compress.calibration.cache import cache_folder
from compress.core.errors import KernelError

SOURCES = Path(__file__).parents[1] / "csrc"
PREBUILT = SOURCES.with_name("prebuilt")
_LOG = logging.getLogger(__name__)
_OPTIONS = (
    "-O3",
    "-std=c++17",
    "-shared",
    "-Xcompiler=-fPIC",
    "-cudart=static",
    "-t=0",
)
_USUAL = Path("/usr/local/cuda/bin/nvcc")
_LEAST = (8, 0)  # cp.async and m16n8k32


def architecture(capability: tuple[int, int]) -> str:
    """Return what nvcc calls a device: ``80``, ``90a``.

    Args:
        capability: Major and minor number.

    Raises:
        KernelError: The device is too old.
    """
    if capability < _LEAST:
        raise KernelError(
            f"compute capability {capability[0]}.{capability[1]} has not the "
            "instructions that the kernels need; they run from 8.0 (Ampere) on"
        )
    major, minor = capability
    return f"{major}{minor}a" if major == 9 else f"{major}{minor}"


def find_compiler() -> Path:
    """Return nvcc: of ``$CUDA_HOME``, of the path, or of ``/usr/local/cuda``.

    Raises:
        KernelError: There is none.
    """
    home = os.environ.get("CUDA_HOME")
    places = [Path(home) / "bin" / "nvcc"] if home else []
    on_path = shutil.which("nvcc")
    places += [Path(on_path)] if on_path else []
    places.append(_USUAL)
    for place in places:
        if place.is_file():
            return place
    raise KernelError(
        f"nvcc is not at {', '.join(map(str, places))}; install the CUDA toolkit or "
        "set CUDA_HOME to its folder"
    )


def build(arch: str) -> Path:
    """Return the shared library for an architecture, compiled if it is not kept yet.

    One that the package brings along, made from the same sources, comes first.

    Args:
        arch: See :func:`architecture`.

    Raises:
        KernelError: There is no compiler, it fails, or the cache cannot be written.
    """
    import fcntl  # not on Windows, where this fails and the reference is used

    brought = prebuilt(arch, PREBUILT)
    if brought.is_file():
        return brought
    compiler = find_compiler()
    try:
        folder = cache_folder() / "kernels"
        path = folder / f"w6a8-sm{arch}-{_digest(_version_of(compiler), arch)}.so"
        if path.is_file():
            return path
        folder.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
            if not path.is_file():
                _compile(compiler, arch, path)
    except (OSError, RuntimeError) as error:
        raise KernelError(
            f"the kernels cannot be kept: {error}; set COMPRESS_CACHE to a folder that "
            "can be written"
        ) from error
    return path


def prebuilt(arch: str, folder: Path) -> Path:
    """Return where a library lies that was built before, for the sources at hand.

    Args:
        arch: See :func:`architecture`.
        folder: Of such libraries.
    """
    return folder / f"w6a8-sm{arch}-{_digest('', arch)}.so"


def main() -> None:
    """Build libraries for a wheel."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "architectures", nargs="+", help="80 (Ampere), 90a (Hopper) ..."
    )
    parser.add_argument("--into", type=Path, required=True)
    options = parser.parse_args()
    options.into.mkdir(parents=True, exist_ok=True)
    for arch in options.architectures:
        target = prebuilt(arch, options.into)
        _compile(find_compiler(), arch, target)
        print(target)


def _version_of(compiler: Path) -> str:
    return _run([str(compiler), "--version"]).stdout


def _digest(version: str, arch: str) -> str:
    digest = hashlib.sha256("\0".join([arch, version, *_OPTIONS]).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _compile(compiler: Path, arch: str, path: Path) -> None:
    _LOG.info("compiling the W6A8 kernels for sm_%s, once", arch)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
        _run(
            [
                *(str(compiler), *_OPTIONS, target, f"-I{SOURCES}"),
                *("-o", str(made), *map(str, sorted(SOURCES.glob("*.cu")))),
            ]
        )
        os.replace(made, path)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise KernelError(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        raise KernelError(
            f"{' '.join(command)} failed with {done.returncode}:\n{done.stderr[-2000:]}"
        )
    return done


if __name__ == "__main__":
    main()
