"""The six efficiency figures on traces whose answer is known, and the counters."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest

from compress.bench.counters import (
    Counters,
    CpuCounters,
    Sample,
    Sampler,
    Trace,
    parse_smi,
)
from compress.bench.efficiency import (
    compression_rate,
    flops_utilization,
    joules_per_token,
    usage_of,
)


def trace(*readings: tuple[float, float | None], energy: float | None = None) -> Trace:
    """Return a trace of power alone: seconds and watts."""
    return Trace([Sample(t, power_watts=p) for t, p in readings], energy)


def test_constant_power_is_itself() -> None:
    usage = usage_of(trace((10, 250.0), (10.3, 250.0), (14, 250.0)))
    assert usage.seconds == 4 and usage.power_watts == pytest.approx(250)
    assert usage.energy_joules == pytest.approx(1000)


def test_a_ramp_is_integrated_exactly_however_it_is_read() -> None:
    times = (0.0, 0.1, 0.7, 3.0, 4.0)  # power is 100 t
    usage = usage_of(trace(*((t, 100 * t) for t in times)))
    assert usage.energy_joules == pytest.approx(100 * 4**2 / 2)
    assert usage.power_watts == pytest.approx(200)


def test_the_devices_own_energy_comes_first() -> None:
    usage = usage_of(trace((0, 100.0), (2, 100.0), energy=300.0))
    assert usage.energy_joules == 300 and usage.power_watts == 150


def test_memory_and_use_are_means_over_time() -> None:
    samples = [Sample(0, 10, 0.0), Sample(1, 10, 1.0), Sample(3, 30, 1.0)]
    usage = usage_of(Trace(samples))
    assert usage.amu_bytes == pytest.approx((10 * 1 + 20 * 2) / 3)
    assert usage.peak_bytes == 30
    assert usage.pcu == pytest.approx((0.5 * 1 + 1 * 2) / 3)


def test_what_was_not_read_is_none() -> None:
    usage = usage_of(Trace([Sample(0), Sample(1)]))
    assert usage.to_dict() == {
        "seconds": 1,
        "amu_bytes": None,
        "peak_bytes": None,
        "pcu": None,
        "power_watts": None,
        "energy_joules": None,
    }
    assert joules_per_token(usage, 10, idle_watts=50) is None


def test_a_reading_that_fails_is_left_out() -> None:
    usage = usage_of(trace((0, 100.0), (1, None), (2, 100.0)))
    assert usage.power_watts == 100


def test_energy_of_a_token_is_net_of_the_idle_device() -> None:
    usage = usage_of(trace((0, 300.0), (10, 300.0)))
    assert joules_per_token(usage, 500, idle_watts=100) == pytest.approx(4)
    assert joules_per_token(usage, 500, idle_watts=None) is None


def test_a_model_against_itself_has_rate_one() -> None:
    assert compression_rate((7e9, 7e9), (0.6, 0.6)) == 1
    # Half the size at 90 % of the performance.
    assert compression_rate((8.0, 4.0), (0.5, 0.45)) == pytest.approx(1.8)
    assert compression_rate((8.0, 4.0), None) is None


def test_operations_are_two_a_weight() -> None:
    assert flops_utilization(1e9, 50, 1e12) == pytest.approx(0.1)
    assert flops_utilization(1e9, 50, None) is None


def test_lines_of_nvidia_smi_are_read() -> None:
    assert parse_smi("1024, 37, 250.5\n", 3.0) == Sample(3.0, 2.0**30, 0.37, 250.5)
    assert parse_smi("1024, [N/A], [N/A]\n", 3.0) == Sample(3.0, 2.0**30)
    assert parse_smi("No devices were found\n", 3.0) == Sample(3.0)


class Steady(Counters):
    """A device of 40 watts."""

    source = "a test"

    def __init__(self) -> None:
        self._start = time.monotonic()

    def sample(self) -> Sample:
        return Sample(time.monotonic(), 1e9, 1.0, 40.0)

    def energy_joules(self) -> float | None:
        return 40 * (time.monotonic() - self._start)


def test_a_sampler_reads_from_start_to_end() -> None:
    begun = time.monotonic()
    with Sampler(Steady(), period=0.01) as sampler:
        time.sleep(0.1)
    spent = time.monotonic() - begun
    usage = usage_of(sampler.trace)
    assert len(sampler.trace.samples) >= 3
    assert 0.1 <= usage.seconds <= spent
    assert usage.energy_joules is not None
    assert usage.energy_joules == pytest.approx(40 * usage.seconds, rel=0.2)


def test_a_cpu_tells_memory_and_use_of_this_process(tmp_path: Path) -> None:
    counters = CpuCounters(rapl=tmp_path)
    sum(i * i for i in range(300_000))
    found = counters.sample()
    assert found.memory_bytes is not None and found.memory_bytes > 1e7
    assert found.utilization is not None and 0 < found.utilization <= 1.5
    assert found.power_watts is None and counters.energy_joules() is None


def test_packages_of_a_cpu_are_added_up(tmp_path: Path) -> None:
    for name, value in (
        ("intel-rapl:0", 2),
        ("intel-rapl:1", 3),
        ("intel-rapl:0:0", 9),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{value * 1_000_000}\n")
    assert math.isclose(CpuCounters(rapl=tmp_path).energy_joules() or 0, 5)
