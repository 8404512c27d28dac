"""Small charts as inline SVG that takes its colours from the page, so they follow light, dark and print.

Every function returns markup with its texts escaped. Series are coloured by class (``arm-real`` and so on, see
``style.css``); nothing relies on colour alone: lines and rows are labelled where they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float
from markupsafe import Markup, escape

from gmail_cli.components.report.names import arm_rank
from gmail_cli.components.report.records import Breakdown, Chart, Cloud

_WIDTH, _HEIGHT = 460, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 128, 14, 40


def line_chart(chart: Chart) -> Markup:
    """Lines with optional bands, each labelled at its right end."""
    points = [(x, y) for curve in chart.curves for x, y in zip(curve.x, curve.y, strict=True)]
    bands = [value for curve in chart.curves for value in (*curve.low, *curve.high)]
    x_ticks = _ticks(*_extent(x for x, _ in points), most=6)
    y_ticks = _ticks(*_extent([*(y for _, y in points), *bands]), most=5)
    across = _Scale(*_extent(x for x, _ in points), _LEFT, _WIDTH - _RIGHT)
    down = _Scale(y_ticks[0], y_ticks[-1], _HEIGHT - _BOTTOM, _TOP)

    parts = [_frame(x_ticks, y_ticks, across, down)]
    curves = sorted(chart.curves, key=lambda curve: arm_rank(curve.arm))
    for curve in curves:
        if curve.low:
            outline = [*zip(curve.x, curve.low, strict=True), *reversed([*zip(curve.x, curve.high, strict=True)])]
            path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in outline)
            parts.append(f'<polygon class="band {_arm(curve.arm)}" points="{path}"/>')
    for curve in curves:
        path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in zip(curve.x, curve.y, strict=True))
        parts.append(f'<polyline class="line {_arm(curve.arm)}" points="{path}"/>')
        if len(curve.x) <= 12:
            parts += [
                f'<circle class="dot {_arm(curve.arm)}" cx="{across(x):.1f}" cy="{down(y):.1f}" r="2.6"/>'
                for x, y in zip(curve.x, curve.y, strict=True)
            ]
    ends = _apart([down(curve.y[-1]) for curve in curves], gap=13, low=_TOP, high=_HEIGHT - _BOTTOM)
    for curve, y in zip(curves, ends, strict=True):
        parts.append(
            f'<text class="end {_arm(curve.arm)}" x="{_WIDTH - _RIGHT + 8}" y="{y + 3.5:.1f}">'
            f"{escape(curve.label)}</text>"
        )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(
        f'<text class="axis" x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(chart.x_label)}</text>'
    )
    return _svg("".join(parts), label=f"{chart.title}: {chart.y_label}")


def interval_chart(rows: Sequence[tuple[str, float, float, float]], *, label: str) -> Markup:
    """One row per arm: a dot at the value, a line over its interval, the value written beside it.

    Args:
        rows: (arm, value, low, high), values in the unit to show.
        label: What is shown, for screen readers.
    """
    left, right, step = 126, 46, 24
    height = len(rows) * step + 26
    ticks = _ticks(*_extent(value for row in rows for value in row[1:]), most=4)
    across = _Scale(ticks[0], ticks[-1], left, _WIDTH - right)
    parts = [
        f'<line class="grid" x1="{across(tick):.1f}" x2="{across(tick):.1f}" y1="4" y2="{height - 20}"/>'
        f'<text class="tick" x="{across(tick):.1f}" y="{height - 6}" text-anchor="middle">{_number(tick, ticks)}</text>'
        for tick in ticks
    ]
    for n, (arm, value, low, high) in enumerate(rows):
        y = 4 + step * (n + 0.5)
        parts.append(
            f'<text class="row {_arm(arm)}" x="{left - 12}" y="{y + 4:.1f}" text-anchor="end">{escape(arm)}</text>'
            f'<line class="whisker {_arm(arm)}" x1="{across(low):.1f}" x2="{across(high):.1f}" y1="{y}" y2="{y}"/>'
            f'<circle class="dot {_arm(arm)}" cx="{across(value):.1f}" cy="{y}" r="4.5"/>'
            f'<text class="value" x="{_WIDTH - 2}" y="{y + 4:.1f}" text-anchor="end">{value:.1f}</text>'
        )
    return _svg("".join(parts), label=label, height=height)


def cloud_panel(cloud: Cloud, *, extent: tuple[float, float, float, float]) -> Markup:
    """Two sets of points in the plane; ``extent`` (left, right, bottom, top) is shared by the panels of a pair."""
    side = 300
    across, down = _Scale(extent[0], extent[1], 8, side - 8), _Scale(extent[2], extent[3], side - 8, 8)
    parts = [f'<rect class="panel" x="0.5" y="0.5" width="{side - 1}" height="{side - 1}" rx="3"/>']
    for points, name in ((cloud.real, "real"), (cloud.generated, "generated-aligned")):
        path = "".join(f"M{across(x):.1f} {down(y):.1f}h0" for x, y in points.tolist())
        parts.append(f'<path class="points {_arm(name)}" d="{path}"/>')
    return _svg("".join(parts), label=cloud.title, width=side, height=side)


def cloud_extent(clouds: Sequence[Cloud]) -> tuple[float, float, float, float]:
    """The square that holds every point of every cloud."""
    points: Float[np.ndarray, "n 2"] = np.concatenate(
        [part for cloud in clouds for part in (cloud.real, cloud.generated)]
    )
    low, high = points.min(axis=0), points.max(axis=0)
    middle, reach = (low + high) / 2, float((high - low).max()) / 2 * 1.04 or 1.0
    return (
        float(middle[0] - reach),
        float(middle[0] + reach),
        float(middle[1] - reach),
        float(middle[1] + reach),
    )


def breakdown_chart(breakdown: Breakdown) -> Markup:
    """One row per label, one dot per arm, on one scale of per cent."""
    left, right, step = 130, 20, 19
    rows = len(breakdown.labels)
    height = rows * step + 28
    arms = sorted(breakdown.arms, key=arm_rank)
    ticks = _ticks(*_extent(100 * value for arm in arms for value in breakdown.arms[arm]), most=6)
    across = _Scale(ticks[0], ticks[-1], left, _WIDTH - right)
    parts = [
        f'<line class="grid" x1="{across(tick):.1f}" x2="{across(tick):.1f}" y1="4" y2="{height - 22}"/>'
        f'<text class="tick" x="{across(tick):.1f}" y="{height - 7}" text-anchor="middle">{_number(tick, ticks)}</text>'
        for tick in ticks
    ]
    for n, (label, count) in enumerate(zip(breakdown.labels, breakdown.counts, strict=True)):
        y = 4 + step * (n + 0.5)
        values = [across(100 * breakdown.arms[arm][n]) for arm in arms]
        parts.append(
            f'<text class="row" x="{left - 12}" y="{y + 4:.1f}" text-anchor="end">{escape(label)}'
            f'<tspan class="count"> {count}</tspan></text>'
            f'<line class="rule" x1="{min(values):.1f}" x2="{max(values):.1f}" y1="{y}" y2="{y}"/>'
        )
        parts += [
            f'<circle class="dot {_arm(arm)}" cx="{x:.1f}" cy="{y}" r="4"/>'
            for arm, x in zip(arms, values, strict=True)
        ]
    return _svg("".join(parts), label=breakdown.title, height=height)


class _Scale:
    """Values to pixels, linearly."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self._low, self._start = low, start
        self._slope = (end - start) / ((high - low) or 1.0)

    def __call__(self, value: float) -> float:
        return self._start + (value - self._low) * self._slope


def _frame(x_ticks: Sequence[float], y_ticks: Sequence[float], across: _Scale, down: _Scale) -> str:
    parts = [
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{down(tick):.1f}" y2="{down(tick):.1f}"/>'
        f'<text class="tick" x="{_LEFT - 8}" y="{down(tick) + 3.5:.1f}" text-anchor="end">'
        f"{_number(tick, y_ticks)}</text>"
        for tick in y_ticks
    ]
    parts += [
        f'<text class="tick" x="{across(tick):.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">'
        f"{_number(tick, x_ticks)}</text>"
        for tick in x_ticks
        if _LEFT - 1 <= across(tick) <= _WIDTH - _RIGHT + 1
    ]
    return "".join(parts)


def _svg(body: str, *, label: str, width: int = _WIDTH, height: int = _HEIGHT) -> Markup:
    return Markup(  # noqa: S704 - every text in the body has been escaped where it was put in
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{body}</svg>'
    )


def _arm(arm: str) -> str:
    """The class that colours an arm."""
    return f"arm-{arm}" if arm_rank(arm) < arm_rank("") else "arm-other"


def _extent(values: Iterable[float]) -> tuple[float, float]:
    finite = [value for value in values if math.isfinite(value)]
    return (min(finite), max(finite)) if finite else (0.0, 1.0)


def _ticks(low: float, high: float, *, most: int) -> list[float]:
    """At most ``most`` + 2 round numbers whose first and last enclose the range."""
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 10) for n in range(first, last + 1)]


def _number(value: float, ticks: Sequence[float]) -> str:
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    if step == 2.5 * 10.0 ** math.floor(math.log10(step)):
        digits = max(digits, 1 - math.floor(math.log10(step)))
    return f"{value:.{digits}f}"


def _apart(wanted: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """Positions as near to ``wanted`` as can be with ``gap`` between neighbours, inside [low, high]."""
    order = sorted(range(len(wanted)), key=lambda n: wanted[n])
    placed: list[float] = []
    for n in order:
        placed.append(max(wanted[n], placed[-1] + gap) if placed else max(wanted[n], low))
    overflow = placed[-1] - high if placed else 0.0
    if overflow > 0:
        placed[-1] = high
        for n in range(len(placed) - 2, -1, -1):
            placed[n] = min(placed[n], placed[n + 1] - gap)
    result = [0.0] * len(wanted)
    for n, y in zip(order, placed, strict=True):
        result[n] = y
    return result
