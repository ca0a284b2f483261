"""The errors a user can cause. Each says what is wrong, where, and what to do."""

from __future__ import annotations


class CompressError(Exception):
    """Base of every error that the toolkit raises on purpose.

    ``exit_code`` is what the command line returns: 1 for a run that failed, 2 for a
    command or a config that cannot be run at all.
    """

    exit_code = 1


class ConfigError(CompressError):
    """The config, or a value given on the command line, cannot be used."""

    exit_code = 2


class SchemeError(ConfigError):
    """A scheme name is unknown, or the scheme does not fit the layer."""


class PlanError(ConfigError):
    """The plan asks for something that a plug-in or a format cannot hold."""


class AllocationError(ConfigError):
    """The budget cannot be kept, or an allocator cannot work on the problem."""


class CheckpointError(CompressError):
    """A checkpoint is missing, damaged, or of a kind that is not supported."""


class CalibrationError(CompressError):
    """The calibration text cannot be read or yields no tokens."""


class ExportError(CompressError):
    """A file could not be written or does not read back as it should."""


class StorageError(CompressError):
    """A file could not be written or read: a full disk, a folder that is read-only."""


class MemoryLimitError(CompressError):
    """The memory of host or device does not suffice."""


class NumericsError(CompressError):
    """Values that a model computes are NaN or infinite."""


class KernelError(CompressError):
    """A GPU kernel could not be built, or the device refused to run it."""


class MissingDependencyError(CompressError):
    """An optional library is needed; the message names the extra that installs it."""

    def __init__(self, library: str, *, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs {library}, which is not installed; "
            f"install it with: pip install 'compress-llm[{extra}]'"
        )
