"""Small charts, drawn by matplotlib as inline SVG that takes its colours and its font from the page.

So they follow light, dark and print. Every function returns markup with its texts escaped. Nothing relies on colour
alone: lines and rows are named where they are.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from markupsafe import Markup, escape

from gmail_cli.components.report.names import arm_rank
from gmail_cli.components.report.records import Breakdown, Chart, Cloud, Histogram

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INCH = 72  # matplotlib's SVG counts points
_WIDTH = 460
_COLOURS = {
    "ink": "#1d1d1b",
    "soft": "#66645e",
    "rule": "#dedad0",
    "paper": "#fdfcf9",
    "real": "#1d1d1c",
    "none": "#98948a",
    "generated-naive": "#c4500c",
    "generated-aligned": "#0b63a5",
    "mixed": "#8a4fa3",
}
"""What matplotlib draws with; each stands for a variable of ``style.css`` and is replaced by it."""
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "gmail",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.size": 10.5,
    "text.color": _COLOURS["soft"],
    "axes.labelcolor": _COLOURS["soft"],
    "axes.edgecolor": _COLOURS["rule"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.spines.bottom": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _COLOURS["rule"],
    "grid.linewidth": 1,
    "xtick.color": _COLOURS["soft"],
    "ytick.color": _COLOURS["soft"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.handlelength": 0,
    "legend.handletextpad": 0,
    "axes.unicode_minus": True,
}


def line_chart(chart: Chart) -> Markup:
    """Lines with optional bands, named beside their ends from top to bottom."""

    def draw(axes: Axes) -> None:
        axes.grid(visible=False, axis="x")
        for curve in sorted(chart.curves, key=lambda curve: arm_rank(curve.arm)):
            colour = _colour(curve.arm)
            if curve.low:
                axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.13, linewidth=0)
            marker = "o" if len(curve.x) <= 12 else ""
            axes.plot(curve.x, curve.y, color=colour, linewidth=1.9, marker=marker, markersize=4.5, label=curve.label)
        axes.set_xlabel(chart.x_label)
        if chart.log_x:
            sizes = sorted({x for curve in chart.curves for x in curve.x})
            axes.set_xscale("log")
            axes.set_xticks(sizes, labels=[f"{x:,.0f}" for x in sizes])
            axes.minorticks_off()
        axes.margins(x=0.01)
        last = {id(line): float(np.asarray(line.get_ydata())[-1]) for line in axes.lines}
        lines = sorted(axes.lines, key=lambda line: -last[id(line)])
        named = axes.legend(handles=lines, loc="center left", bbox_to_anchor=(1.0, 0.5), labelcolor="linecolor")
        for handle in named.legend_handles:
            if handle is not None:
                handle.set_visible(False)

    return _svg(draw, label=f"{chart.title}: {chart.y_label}", height=270)


def interval_chart(rows: Sequence[tuple[str, str, float, float, float]], *, label: str) -> Markup:
    """One row per model: a dot at the value, a line over its interval, the value written beside it.

    Args:
        rows: (name, arm, value, low, high), values in the unit to show.
        label: What is shown, for screen readers.
    """

    def draw(axes: Axes) -> None:
        for y, (_, arm, value, low, high) in enumerate(rows):
            axes.plot([low, high], [y, y], color=_colour(arm), linewidth=2.2, alpha=0.55, solid_capstyle="round")
            axes.plot([value], [y], color=_colour(arm), marker="o", markersize=8)
            beside = axes.get_yaxis_transform()
            axes.text(1.1, y, f"{value:.1f}", transform=beside, ha="right", va="center", color=_COLOURS["ink"])
        _name_rows(axes, [name for name, *_ in rows], colours=[_colour(arm) for _, arm, *_ in rows])

    return _svg(draw, label=label, height=len(rows) * 24 + 26)


def breakdown_chart(breakdown: Breakdown) -> Markup:
    """One row per label, one dot per arm, on one scale of per cent."""
    arms = sorted(breakdown.arms, key=arm_rank)

    def draw(axes: Axes) -> None:
        values = 100 * np.array([breakdown.arms[arm] for arm in arms])
        rows = np.arange(len(breakdown.labels))
        axes.hlines(rows, values.min(axis=0), values.max(axis=0), color=_COLOURS["rule"], linewidth=2)
        for arm, shown in zip(arms, values, strict=True):
            axes.plot(shown, rows, color=_colour(arm), marker="o", linestyle="", markersize=7)
        _name_rows(
            axes, [f"{label} ({count})" for label, count in zip(breakdown.labels, breakdown.counts, strict=True)]
        )

    return _svg(draw, label=breakdown.title, height=len(breakdown.labels) * 19 + 28)


def histogram_chart(histogram: Histogram, *, bins: int = 40) -> Markup:
    """Bars of the images kept and, as an outline upon them, those left out."""

    def draw(axes: Axes) -> None:
        edges = np.histogram_bin_edges(np.concatenate([histogram.kept, histogram.rejected]), bins=bins)
        kept = np.histogram(histogram.kept, bins=edges)[0]
        axes.stairs(kept, edges, fill=True, color=_COLOURS["generated-aligned"])
        if len(histogram.rejected):
            both = kept + np.histogram(histogram.rejected, bins=edges)[0]
            axes.stairs(both, edges, baseline=kept, color=_COLOURS["generated-naive"], linewidth=1.4)
        axes.grid(visible=False, axis="x")
        axes.set_ylabel("images")
        axes.locator_params(axis="x", nbins=6)
        axes.locator_params(axis="y", integer=True)

    return _svg(draw, label=f"histogram: {histogram.title}", height=190)


def cloud_panel(cloud: Cloud, *, extent: tuple[float, float, float, float]) -> Markup:
    """Two sets of points in the plane; ``extent`` (left, right, bottom, top) is shared by the panels of a pair."""

    def draw(axes: Axes) -> None:
        from matplotlib.patches import PathPatch
        from matplotlib.path import Path

        axes.set(xlim=extent[:2], ylim=extent[2:], xticks=[], yticks=[])
        axes.spines[:].set_visible(True)
        for points, name in ((cloud.real, "real"), (cloud.generated, "generated-aligned")):
            dots = Path(np.repeat(points, 2, axis=0), [Path.MOVETO, Path.LINETO] * len(points))
            axes.add_patch(PathPatch(dots, color=_colour(name), linewidth=3.4, capstyle="round", alpha=0.55))

    return _svg(draw, label=cloud.title, width=300, height=300)


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


def _name_rows(axes: Axes, names: Sequence[str], *, colours: Sequence[str] = ()) -> None:
    """Rows from top to bottom, each with its name at the left."""
    axes.grid(visible=False, axis="y")
    axes.set_yticks(range(len(names)), labels=names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.locator_params(axis="x", nbins=5)
    for place, text in enumerate(axes.get_yticklabels()):
        text.set_color(colours[place] if colours else _COLOURS["ink"])


def _colour(arm: str) -> str:
    return _COLOURS.get(arm, _COLOURS["soft"])


def _svg(draw: Callable[[Axes], None], *, label: str, height: int, width: int = _WIDTH) -> Markup:
    """What ``draw`` puts on a pair of axes, as an ``svg`` element for a page with the variables of ``style.css``."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with mpl.rc_context(_STYLE):  # type: ignore[arg-type]
        layout = ConstrainedLayoutEngine(w_pad=1 / _INCH, h_pad=1 / _INCH)
        figure = Figure(figsize=(width / _INCH, height / _INCH), layout=layout)
        draw(figure.add_subplot())
        text = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(text, metadata=nothing)
    body = re.sub(r"^.*?<svg [^>]*>|<style.*?</style>", "", text.getvalue(), flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*">', "<g>", body).replace("'DejaVu Sans'", "var(--sans)")
    for name, colour in _COLOURS.items():
        body = body.replace(colour, f"var(--{name.removeprefix('generated-')})")
    return Markup(  # noqa: S704 - matplotlib has escaped every text in the body
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{body}'
    )
