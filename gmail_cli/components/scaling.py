"""Results against the amount of training data: the paper's Table 7 as a curve with a log-linear fit."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gmail_cli.components.comparison import Evaluation, require_same, wanted_metrics
from gmail_cli.components.metrics.intervals import USUAL, Bootstrap
from gmail_cli.components.scores import Cell, Scores, combined, over_seeds
from gmail_cli.errors import InputError, UsageError

SCHEMA = "gmail.scaling/1"
FORMATS = ("svg", "png", "pdf")


def scaling(
    evaluations: Sequence[tuple[int, Evaluation]],
    *,
    metrics: Sequence[str] = (),
    bootstrap: Bootstrap = USUAL,
) -> dict[str, Any]:
    """Fit each metric of each model to ``a + b log10(captions)``.

    The slope b is a weighted sum of what the models did with each test query, so it has an interval of its own, from
    resampling images: all sizes meet the same ones. Evaluations of one size are its seeds and are averaged first.

    Args:
        evaluations: (captions trained on, evaluation) of each run.
        metrics: As :func:`gmail_cli.components.comparison.compare`.
        bootstrap: Draws and level of the intervals.

    Returns:
        A ``gmail.scaling/1`` document. Its ``curves`` have ``model``, ``metric``, ``points`` (captions, value, low,
        high), ``slope`` (what ten times the captions add) with ``slope_low`` and ``slope_high``, and ``intercept``.
        Models that are not there at every size, such as the arm none, are left out.

    Raises:
        InputError: Fewer than two sizes, evaluations that do not fit one another, or no model at all of them.
        UsageError: An unknown metric.
    """
    sizes = sorted({captions for captions, _ in evaluations})
    if len(sizes) < 2:
        hint = "Compare runs that were trained on different amounts, such as --set data.train_limit=1000 and 3000."
        raise InputError(f"every run was trained on {sizes[0]:,} captions: there is no curve", hint=hint)
    for _, other in evaluations[1:]:
        require_same(evaluations[0][1], other)
    found: dict[tuple[str, str], dict[int, list[Scores]]] = {}
    wanted = wanted_metrics(metrics, [each for _, each in evaluations])
    for captions, each in evaluations:
        for cell, metric in ((cell, metric) for cell in each.cells for metric in wanted):
            if metric in cell.scores and _trained(cell):
                found.setdefault((cell.name, metric), {}).setdefault(captions, []).append(cell.scores[metric])
    curves = [
        _curve(model, metric, {size: over_seeds(by_size[size]) for size in sizes}, bootstrap=bootstrap)
        for (model, metric), by_size in found.items()
        if set(by_size) == set(sizes)
    ]
    if not curves:
        raise InputError("no model was trained at every size", hint="Give every run the same tasks and arms.")
    first = evaluations[0][1]
    about = {"protocol": first.protocol, "test_set": first.test_set}
    settings = {"confidence": bootstrap.level, "resamples": bootstrap.draws}
    return {"schema": SCHEMA, **about, **settings, "curves": curves}


def _trained(cell: Cell) -> bool:
    return cell.arm != "none" and cell.task != "gap"


def _curve(model: str, metric: str, by_size: Mapping[int, Scores], *, bootstrap: Bootstrap) -> dict[str, Any]:
    logs = np.log10(list(by_size))
    weights = (logs - logs.mean()) / np.square(logs - logs.mean()).sum()
    scores = list(by_size.values())
    slope = combined(scores, weights=weights.tolist())
    points = []
    for captions, found in by_size.items():
        low, high = found.interval(bootstrap)
        points.append({"captions": captions, "value": found.value, "low": low, "high": high})
    low, high = slope.interval(bootstrap)
    middle = float(np.mean([point["value"] for point in points]))
    return {
        "model": model,
        "metric": metric,
        "points": points,
        "slope": slope.value,
        "slope_low": low,
        "slope_high": high,
        "intercept": middle - slope.value * float(logs.mean()),
    }


def text(document: Mapping[str, Any]) -> str:
    """A line for each curve: what ten times the captions add, times 100."""
    lines = []
    for curve in document["curves"]:
        first, last = curve["points"][0], curve["points"][-1]
        lines.append(
            f"{curve['model']}  {curve['metric']}  {100 * first['value']:.2f} at {first['captions']:,} captions, "
            f"{100 * last['value']:.2f} at {last['captions']:,}; {100 * curve['slope']:+.2f} per tenfold"
            + (
                ""
                if curve["slope_low"] is None
                else f" ({100 * curve['slope_low']:+.2f} to {100 * curve['slope_high']:+.2f})"
            )
        )
    return "\n".join(lines)


def plot(document: Mapping[str, Any], *, kind: str) -> bytes:
    """The curves as a picture: a panel for each metric, points with their intervals, the fit as a line.

    Args:
        document: Of :func:`scaling`.
        kind: ``svg``, ``png`` or ``pdf``.

    Raises:
        UsageError: Another kind.
    """
    if kind not in FORMATS:
        raise UsageError(
            f"a plot cannot be a {kind or 'file without an ending'!r}", hint=f"Write {', '.join(FORMATS)}."
        )
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metrics = list(dict.fromkeys(curve["metric"] for curve in document["curves"]))
    with mpl.rc_context({"svg.hashsalt": "gmail", "svg.fonttype": "none", "text.parse_math": False}):
        figure = Figure(figsize=(5.2, 3.6 * len(metrics)), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, metric in zip(figure.subplots(len(metrics), squeeze=False)[:, 0], metrics, strict=True):
            for curve in (each for each in document["curves"] if each["metric"] == metric):
                x = [point["captions"] for point in curve["points"]]
                y = [100 * point["value"] for point in curve["points"]]
                reach = [
                    [
                        0.0 if point[side] is None else abs(100 * point[side] - at)
                        for point, at in zip(curve["points"], y, strict=True)
                    ]
                    for side in ("low", "high")
                ]
                marks = axes.errorbar(x, y, yerr=reach, marker="o", linestyle="", capsize=3, label=curve["model"])
                fit = [100 * (curve["intercept"] + curve["slope"] * math.log10(each)) for each in x]
                axes.plot(x, fit, color=marks[0].get_color(), linewidth=1.2)
            axes.set(xscale="log", xlabel="captions trained on", ylabel=f"{metric} (per cent)")
            axes.legend(fontsize=8)
        content = io.BytesIO()
        figure.savefig(content, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return content.getvalue()
