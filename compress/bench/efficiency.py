"""Efficiency of a model in six figures, from what was read while it ran.

| figure | definition |
| --- | --- |
| AMU | integral of used memory over the window, over its length |
| PCU | the same of utilization: a time average, whatever its name says |
| AL | mean time of a request: first token, then all others |
| IT | generated tokens a second |
| AEC | integral of power over the window, over its length: watts |
| MCR | original bytes / compressed bytes times compressed / original performance |

Integrals are by trapezoids: readings are not evenly spaced. Utilization says that some
kernel ran, not how well, so MFU (achieved over peak operations) stands beside it; the
energy of a token is net of what the device uses when idle. What was not read is
``None``.

Source: "EfficientLLM" (arXiv 2505.13840), section on metrics. Differs: energy counters
of the driver come before integrals of power; MCR of perplexities takes their inverse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from compress.bench.counters import Sample, Trace


@dataclass(frozen=True)
class Usage:
    """What a span of time cost.

    Attributes:
        seconds: Its length.
        amu_bytes: Mean memory in use.
        peak_bytes: Largest reading of it.
        pcu: Mean utilization, 0 to 1.
        power_watts: Mean power (AEC).
        energy_joules: Of the whole span.
    """

    seconds: float
    amu_bytes: float | None
    peak_bytes: float | None
    pcu: float | None
    power_watts: float | None
    energy_joules: float | None

    def to_dict(self) -> dict[str, float | None]:
        """Return the figures by name."""
        return asdict(self)


def usage_of(trace: Trace) -> Usage:
    """Return what the readings of a span of time add up to."""
    times = [sample.seconds for sample in trace.samples]
    seconds = times[-1] - times[0] if times else 0.0
    memory = [sample.memory_bytes for sample in trace.samples]
    power = mean_of(trace.samples, [sample.power_watts for sample in trace.samples])
    energy = trace.energy_joules
    if energy is None and power is not None:
        energy = power * seconds
    elif energy is not None and seconds > 0:
        power = energy / seconds
    return Usage(
        seconds,
        mean_of(trace.samples, memory),
        max((m for m in memory if m is not None), default=None),
        mean_of(trace.samples, [sample.utilization for sample in trace.samples]),
        power,
        energy,
    )


def mean_of(samples: Sequence[Sample], values: Sequence[float | None]) -> float | None:
    """Return the integral of readings over their time, over that time.

    Args:
        samples: Whose clocks count.
        values: One for each; readings that are missing are left out.
    """
    points = [
        (sample.seconds, value)
        for sample, value in zip(samples, values, strict=True)
        if value is not None
    ]
    if not points:
        return None
    span = points[-1][0] - points[0][0]
    if span <= 0:
        return points[0][1]
    area = sum(
        (later - earlier) * (a + b) / 2
        for (earlier, a), (later, b) in zip(points, points[1:], strict=False)
    )
    return area / span


def joules_per_token(
    usage: Usage, tokens: int, *, idle_watts: float | None
) -> float | None:
    """Return energy of a token, net of the idle device's; ``None`` if not measured.

    Args:
        usage: Of a span in which only these tokens were made.
        tokens: How many.
        idle_watts: Power of the device before.
    """
    if usage.energy_joules is None or idle_watts is None or not tokens:
        return None
    return (usage.energy_joules - idle_watts * usage.seconds) / tokens


def compression_rate(
    bytes_: tuple[float, float], performance: tuple[float, float] | None
) -> float | None:
    """Return MCR; ``None`` if no performance was measured.

    Args:
        bytes_: Of the original and of the compressed artefact.
        performance: Of both; larger is better. Of perplexities give the inverse.
    """
    if performance is None or not bytes_[1] or not performance[0]:
        return None
    return bytes_[0] / bytes_[1] * performance[1] / performance[0]


def flops_utilization(
    parameters: float, tokens_per_second: float, peak_flops: float | None
) -> float | None:
    """Return MFU: two operations a parameter and token, over the device's peak.

    Args:
        parameters: That a token is multiplied by; attention's own work is left out.
        tokens_per_second: Of all sequences together.
        peak_flops: Operations a second, as measured or as the maker says.
    """
    if not peak_flops:
        return None
    return 2 * parameters * tokens_per_second / peak_flops
