"""The level database on disk: codes of layers, by a digest of all that decides them.

An entry is a safetensors file. Codes are stored in as many bits as they need, one plane
of bits after another, so that the database is about as large as the files that can be
made of it. An entry is renamed into place when it is whole: a killed run leaves every
level that it finished, and the next one begins behind them.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.calibration.cache import cache_folder, place
from compress.checksums import checksum, sealed, unsealed
from compress.core.errors import CheckpointError, ConfigError
from compress.core.foreign import MALFORMED, parse_json
from compress.core.scheme import Scheme
from compress.core.tensors import QuantizedTensor

_log = logging.getLogger(__name__)
_CODES = "codes"
_CODE_TYPES = {"int8": torch.int8, "uint8": torch.uint8}


@dataclass(frozen=True)
class Level:
    """What is known of one layer at one scheme, besides its codes.

    Attributes:
        key: Digest that names the entry.
        error: ``tr(E H E^T) / tr(W H W^T)``; of the weights alone without statistics.
        energy: ``tr(W H W^T)`` a token, or ``|W|^2`` without statistics.
        weight_std: Standard deviation of the weights.
        weight_mean: Mean magnitude of the weights.
        input_mean: Root of the mean square of the inputs; 1 without statistics.
        input_max: Root of the largest mean square of a column; 1 without statistics.
        seconds: That the solve took.
    """

    key: str
    error: float
    energy: float
    weight_std: float
    weight_mean: float
    input_mean: float
    input_max: float
    seconds: float


def digest(identity: Any) -> str:
    """Return the SHA-256 of plain data, which names an entry."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


class LevelStore:
    """Entries below one folder.

    Args:
        folder: ``levels`` in the user's cache if not given.

    Raises:
        ConfigError: There is no place for a cache.
    """

    def __init__(self, folder: Path | None = None) -> None:
        try:
            self.folder = folder or cache_folder() / "levels"
        except RuntimeError as error:
            raise ConfigError(
                f"the level database has no place: {error}; set COMPRESS_CACHE to a "
                "folder that can be written"
            ) from error

    def find(self, key: str) -> Level | None:
        """Return what is known of an entry; ``None`` if it is absent or damaged."""
        from safetensors import SafetensorError, safe_open

        path = self._path(key)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                level = Level(**_about(file)["level"])
            if level.key != key:
                raise ValueError(f"it holds the entry {level.key}")
            return level
        except (SafetensorError, OSError, *MALFORMED) as error:
            _log.warning("%s is damaged and made again: %s", path, error)
            return None

    def write(self, level: Level, tensor: QuantizedTensor) -> None:
        """Store an entry.

        Raises:
            ConfigError: The folder cannot be written.
        """
        from safetensors.torch import save

        parts = {k: v.cpu().contiguous() for k, v in tensor.state().items()}
        codes = parts.pop(_CODES)
        planes, about = pack(codes)
        parts[_CODES] = planes
        about |= {"scheme": tensor.scheme.to_dict(), "notes": list(tensor.notes)}
        about |= {"level": asdict(level), "checksum": checksum(parts)}
        data = save(parts, {"about": sealed(json.dumps(about))})
        self._place(self._path(level.key), data)

    def _place(self, path: Path, data: bytes) -> None:
        try:
            place(path, data)
        except OSError as error:
            raise ConfigError(
                f"the level database cannot be written: {error}; set COMPRESS_CACHE to "
                "a folder with more space"
            ) from error

    def read(self, key: str) -> QuantizedTensor:
        """Return the codes of an entry.

        Raises:
            CheckpointError: It is absent or damaged.
        """
        from safetensors import SafetensorError, safe_open

        path = self._path(key)
        try:
            with safe_open(path, framework="pt") as file:
                about = _about(file)
                parts = {name: file.get_tensor(name).clone() for name in file.keys()}
            if checksum(parts) != about["checksum"]:
                raise ValueError("its codes are not those that were stored")
            parts[_CODES] = unpack(parts[_CODES], about)
            scheme = Scheme.from_dict(about["scheme"])
            return QuantizedTensor.from_state(parts, scheme, tuple(about["notes"]))
        except (SafetensorError, OSError, *MALFORMED) as error:
            raise CheckpointError(
                f"{path} is damaged ({error}); delete it and run again with --resume"
            ) from error

    def noted(self, key: str) -> Any | None:
        """Return plain data stored under a digest; ``None`` if there is none."""
        path = self._path(key).with_suffix(".json")
        try:
            return parse_json(path.read_text("utf-8")) if path.is_file() else None
        except (OSError, ValueError) as error:
            _log.warning("%s is damaged and made again: %s", path, error)
            return None

    def note(self, key: str, data: Any) -> None:
        """Store plain data under a digest."""
        self._place(self._path(key).with_suffix(".json"), json.dumps(data).encode())

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


def _about(file: Any) -> dict[str, Any]:
    """Return what an open entry says of itself."""
    about: dict[str, Any] = parse_json(unsealed(file.metadata()["about"]))
    return about


def pack(codes: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Return planes of bits, uint8 ``[B, ceil(n / 8)]``, and what undoes it.

    Args:
        codes: int8 or uint8, any shape.
    """
    values = codes.numpy().astype(np.int16)
    lowest = int(values.min(initial=0))
    bits = max(1, int(values.max(initial=0) - lowest).bit_length())
    shifted = (values - lowest).astype(np.uint8).reshape(-1)
    planes = np.stack([np.packbits((shifted >> b) & 1) for b in range(bits)])
    kind = str(codes.dtype).removeprefix("torch.")
    about = {"shape": list(codes.shape), "lowest": lowest, "type": kind}
    return torch.from_numpy(planes), about


def unpack(planes: Tensor, about: dict[str, Any]) -> Tensor:
    """Return the codes that :func:`pack` was given."""
    shape, lowest = about["shape"], about["lowest"]
    count = int(np.prod(shape))
    values = np.zeros(count, np.int16)
    for bit, plane in enumerate(planes.numpy()):
        values |= np.unpackbits(plane, count=count).astype(np.int16) << bit
    codes = torch.from_numpy(values + np.int16(lowest))
    return codes.view(shape).to(_CODE_TYPES[about["type"]])


def is_table(data: Any, *, like: Sequence[Sequence[float]]) -> bool:
    """Whether plain data is rows of numbers, as many as those of a table."""
    return (
        isinstance(data, list)
        and len(data) == len(like)
        and all(
            isinstance(row, list)
            and len(row) == len(known)
            and all(isinstance(value, int | float) for value in row)
            for row, known in zip(data, like, strict=True)
        )
    )
