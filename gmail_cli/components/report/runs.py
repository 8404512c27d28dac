"""Several runs side by side on one page, from what `gmail compare` finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from gmail_cli.components import comparison
from gmail_cli.components.gate import lower_is_better
from gmail_cli.components.report import names, plots
from gmail_cli.components.report.pages import environment
from gmail_cli.components.report.records import Chart, Curve, RunNote
from gmail_cli.components.report.verdict import Outcome
from gmail_cli.components.scaling import text as scaling_text

_GAP_ARMS = ("generated-naive", "generated-aligned")


def runs_page(document: Mapping[str, Any], *, scaling: Mapping[str, Any] | None, notes: Sequence[RunNote]) -> str:
    """Several runs side by side as one page that needs nothing else.

    Args:
        document: ``gmail.compare/1``.
        scaling: ``gmail.scaling/1`` of the same runs, where they were trained on different amounts.
        notes: What else is known of each evaluation.
    """
    gap = [
        (metric, [[each.metrics.get(f"gap.{arm}.{metric}") for arm in _GAP_ARMS] for each in notes])
        for metric in names.GAP_METRICS + names.SET_METRICS
    ]
    return (
        environment()
        .get_template("runs.html.j2")
        .render(
            document=document,
            headlines=_headlines(document),
            findings=_findings(document),
            charts=_run_charts(document),
            columns=comparison.COLUMNS,
            rows=comparison.table(document),
            gap=[(metric, values) for metric, values in gap if any(v is not None for pair in values for v in pair)],
            scaling_charts=[] if scaling is None else _scaling_charts(scaling),
            scaling_lines=[] if scaling is None else scaling_text(scaling).splitlines(),
            basis=comparison.basis(document),
            notes=notes,
        )
    )


def _headlines(document: Mapping[str, Any]) -> list[str]:
    """For each run compared, in how many comparisons it is better and worse than the first."""
    found = []
    for run in dict.fromkeys(row["run"] for row in document["comparisons"]):
        rows = [row for row in document["comparisons"] if row["run"] == run]
        outcomes = [_outcome(row, document) for row in rows]
        better, worse, unclear = (outcomes.count(each) for each in ("better", "worse", "unclear"))
        found.append(
            f"{run} against {rows[0]['baseline']}: {better} measurably better, {worse} worse, {unclear} without a "
            "measurable difference"
        )
    return found or [", ".join(dict.fromkeys(row["label"] for row in document["runs"]))]


def _findings(document: Mapping[str, Any]) -> list[tuple[Outcome, str]]:
    """(better or worse, a sentence) for each measurable difference."""
    found: list[tuple[Outcome, str]] = []
    for row in document["comparisons"]:
        metric, outcome = row["metric"], _outcome(row, document)
        if outcome != "unclear":
            value = names.beside(metric, row["difference"], row["baseline"])
            sure = f"{names.interval(metric, row['low'], row['high'], signed=True)}; p = {row['p_value']:.2g}"
            found.append((outcome, f"{row['run']}, {row['model']}: {names.metric_label(metric)} is {value} ({sure})"))
    return found


def _outcome(row: Mapping[str, Any], document: Mapping[str, Any]) -> Outcome:
    """Measurable where the interval leaves 0 out and the corrected p-value is below 1 - confidence."""
    low, high = (-row["high"], -row["low"]) if lower_is_better(row["metric"]) else (row["low"], row["high"])
    if row["p_value"] >= 1 - document["confidence"]:
        return "unclear"
    return "better" if low > 0 else "worse" if high < 0 else "unclear"


def _run_charts(document: Mapping[str, Any]) -> list[tuple[str, Markup]]:
    """An interval chart for each metric of each task: every arm, and of every arm every run."""
    groups: dict[tuple[str, str], list[tuple[str, str, float, float, float]]] = {}
    ordered = sorted(document["rows"], key=lambda row: names.arm_rank(_task_and_arm(row["model"])[1]))
    for row in ordered:
        task, arm, dual = _task_and_arm(row["model"])
        value = 100 * row["value"]
        low, high = (value if row[side] is None else 100 * row[side] for side in ("low", "high"))
        name = f"{arm}{', dual' * dual}, {row['run']}"
        groups.setdefault((task, row["metric"]), []).append((name, arm, value, low, high))
    titles = {key: f"{names.task_title(key[0])}: {names.metric_label(key[1])}" for key in groups}
    return [(titles[key], plots.interval_chart(rows, label=titles[key])) for key, rows in groups.items()]


def _scaling_charts(document: Mapping[str, Any]) -> list[Chart]:
    """A chart for each metric of each task, a curve for each of its arms."""
    groups: dict[tuple[str, str], list[Curve]] = {}
    for row in document["curves"]:
        task, arm, dual = _task_and_arm(row["model"])
        y = [100 * point["value"] for point in row["points"]]
        known = all(point["low"] is not None for point in row["points"])
        low, high = (tuple(100 * point[side] for point in row["points"]) if known else () for side in ("low", "high"))
        x = tuple(float(point["captions"]) for point in row["points"])
        groups.setdefault((task, row["metric"]), []).append(Curve(arm, arm + ", dual" * dual, x, tuple(y), low, high))
    return [
        Chart(
            f"{names.task_title(task)}: {names.metric_label(metric)}",
            "captions trained on",
            "points, with intervals over test images",
            tuple(curves),
            log_x=True,
        )
        for (task, metric), curves in groups.items()
    ]


def _task_and_arm(model: str) -> tuple[str, str, bool]:
    name, dual, _ = model.partition("+dual")
    task, _, arm = name.partition(".")
    return task, arm, bool(dual)
