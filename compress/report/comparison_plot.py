"""A comparison as a figure: a row a model; size, KL and accuracy beside each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from compress.report.style import STYLE
from compress.report.svg import Axis, element, figure, label, line, marker
from compress.report.wording import branch, nats, number_at, percent, size

Data = Mapping[str, Any]
Row = Mapping[str, Any]

_WIDTH, _TOP, _STEP, _BAR = 900, 50.0, 34.0, 14.0
_PANELS = ((150.0, 330.0), (390.0, 620.0), (680.0, 880.0))
_TITLE = "Size, distance to the base, and accuracy"
_MARGIN, _KEY = 1.15, 18.0
_TASK, _MEAN = 0, 3  # markers


def comparison_svg(data: Data) -> str:
    """Return the figure as a file of its own, which follows light and dark."""
    names = [str(model["name"]) for model in data["models"]]
    bottom = _TOP + _STEP * len(names)
    body = element("style", STYLE + "svg { font-family: system-ui, sans-serif; }")
    body += element("rect", width="100%", height="100%", fill="var(--ground)")
    for index, name in enumerate(names):
        body += label(_PANELS[0][0] - 10, _y(index) + 4, _cut(name), anchor="end")
    body += _sizes(data, bottom) + _distances(data, names, bottom)
    body += _accuracies(data, names, bottom)
    height = bottom + 50 + _KEY * max(1, len(_kinds(data)))
    drawn = figure(body, width=_WIDTH, height=round(height), title=_TITLE)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{drawn}\n'


def _y(index: int) -> float:
    return _TOP + _STEP * (index + 0.5)


def _cut(name: str, most: int = 20) -> str:
    """Return a name of at most ``most`` letters; its end tells more than its start."""
    return name if len(name) <= most else "…" + name[1 - most :]


def _sizes(data: Data, bottom: float) -> str:
    left, right = _PANELS[0]
    values = [number_at(model, "size_bytes") or 0.0 for model in data["models"]]
    axis = Axis.over([value / 1e6 for value in values], left, right)
    body = _panel(axis, bottom, "MB (millions of bytes)", "Size")
    for index, value in enumerate(values):
        bits = number_at(data["models"][index], "bits_per_weight")
        hint = f"{size(value)}, {bits:.2f} bits per weight" if bits else size(value)
        body += element(
            "rect",
            element("title", hint),
            x=left,
            y=_y(index) - _BAR / 2,
            width=axis.at(value / 1e6) - left,
            height=_BAR,
            class_="p0",
        )
    return body


def _distances(data: Data, names: Sequence[str], bottom: float) -> str:
    """Return mean KL of each text and protocol with its interval, on decades."""
    rows = [row for row in data["texts"] if branch(row, "kl_interval")]
    kinds = _kinds(data)
    ends = [_ends(branch(row, "kl_interval")) for row in rows]
    known = [value for found in ends for value in found if value > 0]
    if not known:
        return ""
    axis = Axis.over(known, *_PANELS[1], is_log=True)
    body = _panel(axis, bottom, "KL, nats a token", "Distance to the base")
    for index, kind in enumerate(kinds):
        body += _key(index, axis.start, bottom, index, _cut(", ".join(kind), 48))
    for row, (value, low, high) in zip(rows, ends, strict=True):
        series = kinds.index((row["text"], row["protocol"]))
        y = _y(names.index(row["model"])) + _offset(series, len(kinds))
        hint = f"{row['text']}, {row['protocol']}: {nats(value)}"
        body += _whisker(series, axis.at, (value, low, high), y, hint)
    return body


def _accuracies(data: Data, names: Sequence[str], bottom: float) -> str:
    """Return differences of accuracy: the mean with its interval, tasks as dots."""
    means = [row for row in data["means"] if branch(row, "accuracy_difference")]
    tasks = [row for row in data["tasks"] if branch(row, "accuracy_difference")]
    if not means:
        return ""
    ends = [_points(branch(row, "accuracy_difference")) for row in means]
    dots = [_points(branch(row, "accuracy_difference"))[0] for row in tasks]
    reach = _MARGIN * max(0.5, *(abs(v) for e in ends for v in e), *map(abs, dots))
    axis = Axis(-reach, reach, *_PANELS[2])
    body = _panel(axis, bottom, "points", "Accuracy less the base's")
    body += line(axis.at(0), _TOP, axis.at(0), bottom, class_="axis")
    body += _key(_MEAN, axis.start, bottom, 0, "mean and 95 % of it")
    body += _key(_TASK, axis.start + 150, bottom, 0, "a task", hollow=True)
    for row, value in zip(tasks, dots, strict=True):
        hint = f"{row['task']}: {value:+.1f}, flips {percent(row['flips'])}"
        y = _y(names.index(row["model"]))
        body += marker(_TASK, axis.at(value), y, hint=hint, hollow=True)
    for row, found in zip(means, ends, strict=True):
        hint = f"mean of {row['tasks']} tasks: {found[0]:+.1f}"
        body += _whisker(_MEAN, axis.at, found, _y(names.index(row["model"])), hint)
    return body


def _kinds(data: Data) -> list[tuple[str, str]]:
    """Return each text with its protocol."""
    pairs = ((str(row["text"]), str(row["protocol"])) for row in data["texts"])
    return list(dict.fromkeys(pairs))


def _key(
    series: int, x: float, bottom: float, row: int, text: str, *, hollow: bool = False
) -> str:
    """Return a marker and what it stands for, below a panel."""
    y = bottom + 56 + _KEY * row
    mark = marker(series, x, y - 4, hollow=hollow, scale=1.3)
    return mark + label(x + 10, y, text, class_="small")


def _offset(kind: int, kinds: int) -> float:
    return (kind - (kinds - 1) / 2) * min(9.0, (_STEP - 10) / max(1, kinds))


def _ends(interval: Row) -> tuple[float, float, float]:
    """Return value, low and high; the value thrice where there is no interval."""
    value, low, high = (number_at(interval, key) for key in ("value", "low", "high"))
    assert value is not None, "an interval has a value"
    return value, value if low is None else low, value if high is None else high


def _points(interval: Row) -> tuple[float, float, float]:
    value, low, high = _ends(interval)
    return 100 * value, 100 * low, 100 * high


def _whisker(
    series: int,
    at: Callable[[float], float],
    found: tuple[float, float, float],
    y: float,
    hint: str,
) -> str:
    value, low, high = found
    bar = line(at(low), y, at(high), y, class_=f"trace s{series % 8}")
    return bar + marker(series, at(value), y, hint=hint, scale=1.3)


def _panel(axis: Axis, bottom: float, name: str, title: str) -> str:
    parts = [label(axis.start, _TOP - 16, title, class_="name")]
    for value, text in axis.ticks():
        x = axis.at(value)
        parts.append(line(x, _TOP, x, bottom, class_="grid"))
        parts.append(label(x, bottom + 16, text, anchor="middle", class_="small"))
    middle = (axis.start + axis.end) / 2
    parts.append(label(middle, bottom + 34, name, anchor="middle"))
    return "".join(parts)
