"""What a device says about itself while something runs: memory, use, power, energy.

A thread reads the counters every 100 ms beside a monotonic clock. A counter that a
machine does not have is ``None``, never zero.
"""

from __future__ import annotations

import logging
import os
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

_LOG = logging.getLogger(__name__)
PERIOD_SECONDS = 0.1
_RAPL = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Sample:
    """One reading.

    Attributes:
        seconds: Of a monotonic clock.
        memory_bytes: In use on the device, by everyone; on a CPU by this process.
        utilization: 0 to 1: the share of time in which some kernel ran; on a CPU the
            share of all cores that this process used.
        power_watts: Of the device.
    """

    seconds: float
    memory_bytes: float | None = None
    utilization: float | None = None
    power_watts: float | None = None


@dataclass(frozen=True)
class Trace:
    """Readings of a span of time.

    Attributes:
        samples: In order; the first and the last bound the span.
        energy_joules: By the device's own counter, where there is one.
    """

    samples: Sequence[Sample]
    energy_joules: float | None = None


class Counters(ABC):
    """A device that can be read.

    Attributes:
        source: Where readings come from, in words.
    """

    source: str

    @abstractmethod
    def sample(self) -> Sample:
        """Return a reading."""

    def energy_joules(self) -> float | None:
        """Return the energy used since some time in the past, if it is counted."""
        return None


class NvmlCounters(Counters):
    """An NVIDIA GPU through ``pynvml``.

    Args:
        device: Index of torch.

    Raises:
        ImportError: ``pynvml`` (package ``nvidia-ml-py``) is not installed.
        OSError: The library does not know the device.
    """

    source = "NVML"

    def __init__(self, device: int) -> None:
        import pynvml  # type: ignore[import-not-found,unused-ignore]

        self._nvml: Any = pynvml
        name = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        try:
            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(name)
        except pynvml.NVMLError as error:
            raise OSError(f"NVML: {error}") from error

    def sample(self) -> Sample:
        """Return a reading; what the driver refuses is ``None``."""
        nvml, handle = self._nvml, self._handle
        memory = self._asked(lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used)
        used = self._asked(lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
        power = self._asked(lambda: nvml.nvmlDeviceGetPowerUsage(handle))
        return Sample(
            time.monotonic(),
            memory,
            None if used is None else used / 100,
            None if power is None else power / 1e3,
        )

    def energy_joules(self) -> float | None:
        """Return the driver's counter, which Volta and later devices have."""
        counter = self._nvml.nvmlDeviceGetTotalEnergyConsumption
        found = self._asked(lambda: counter(self._handle))
        return None if found is None else found / 1e3

    def _asked(self, question: Any) -> float | None:
        try:
            return float(question())
        except self._nvml.NVMLError:
            return None


class SmiCounters(Counters):
    """An NVIDIA GPU through the program ``nvidia-smi``, which every driver brings.

    Args:
        device: Index of torch.

    Raises:
        OSError: There is no such program.
    """

    source = "nvidia-smi"

    def __init__(self, device: int) -> None:
        name = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        fields = "memory.used,utilization.gpu,power.draw"
        self._command = ["nvidia-smi", "-i", name, f"--query-gpu={fields}"]
        self._command.append("--format=csv,noheader,nounits")
        subprocess.run(self._command, capture_output=True, check=False)

    def sample(self) -> Sample:
        """Return a reading; what the driver refuses is ``None``."""
        done = subprocess.run(
            self._command, capture_output=True, text=True, check=False
        )
        return parse_smi(done.stdout, time.monotonic())


class CpuCounters(Counters):
    """This process, and the energy of the processor where it may be read (RAPL)."""

    source = "process clock and RAPL"

    def __init__(self, rapl: Path = _RAPL) -> None:
        self._before = time.monotonic(), time.process_time()
        self._cores = os.cpu_count() or 1
        self._energy = sorted(rapl.glob("intel-rapl:[0-9]*/energy_uj"))
        self._energy = [path for path in self._energy if os.access(path, os.R_OK)]

    def sample(self) -> Sample:
        """Return a reading."""
        now, spent = time.monotonic(), time.process_time()
        before, earlier = self._before
        self._before = now, spent
        share = (spent - earlier) / max(now - before, 1e-9) / self._cores
        return Sample(now, _resident_bytes(), share)

    def energy_joules(self) -> float | None:
        """Return the energy of all packages, if this user may read it."""
        packages = [p for p in self._energy if p.parent.name.count(":") == 1]
        if not packages:
            return None
        return sum(int(path.read_text()) for path in packages) / 1e6


class NoCounters(Counters):
    """A device that tells nothing."""

    source = "none"

    def sample(self) -> Sample:
        """Return the time alone."""
        return Sample(time.monotonic())


def counters_for(device: torch.device) -> Counters:
    """Return the counters of a device: the first that works, and say what did not.

    A GPU is read by NVML, else by ``nvidia-smi``; a CPU by the system.
    """
    if device.type != "cuda":
        return CpuCounters()
    index = torch.cuda.current_device() if device.index is None else device.index
    for kind in (NvmlCounters, SmiCounters):
        try:
            return kind(index)
        except (ImportError, OSError) as error:
            _LOG.info("counters of %s are not read: %s", kind.source, error)
    return NoCounters()


class Sampler:
    """Reads counters in a thread while a block of code runs.

    Args:
        counters: What is read.
        period: Seconds between readings.
    """

    def __init__(self, counters: Counters, *, period: float = PERIOD_SECONDS) -> None:
        self._counters, self._period = counters, period
        self._samples: list[Sample] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._energy: tuple[float | None, float | None] = (None, None)

    def __enter__(self) -> Sampler:
        """Start reading."""
        self._energy = self._counters.energy_joules(), None
        self._samples.append(self._counters.sample())
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop reading."""
        self._stop.set()
        self._thread.join()
        self._samples.append(self._counters.sample())
        self._energy = self._energy[0], self._counters.energy_joules()

    @property
    def trace(self) -> Trace:
        """What was read between the start and the end of the block."""
        first, last = self._energy
        counted = first is not None and last is not None and last >= first
        energy = last - first if counted and first is not None and last else None
        return Trace(tuple(self._samples), energy)

    def _run(self) -> None:
        while not self._stop.wait(self._period):
            self._samples.append(self._counters.sample())


def parse_smi(line: str, seconds: float) -> Sample:
    """Return the reading of a line such as ``1024, 37, 250.5``.

    Args:
        line: MiB, per cent and watts; ``[N/A]`` where the driver says nothing.
        seconds: When it was read.
    """
    parts = [_number(part) for part in line.strip().split(",")]
    memory, used, power = (parts + [None] * 3)[:3]
    return Sample(
        seconds,
        None if memory is None else memory * 2**20,
        None if used is None else used / 100,
        power,
    )


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _resident_bytes() -> float | None:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return float(pages * os.sysconf("SC_PAGE_SIZE"))
