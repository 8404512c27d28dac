"""What the numbers say of the method's claim, in plain sentences, whichever way they fall."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gmail_cli.components.gate import lower_is_better
from gmail_cli.components.report.names import beside, interval, metric_label, show, side_of, task_label, task_title
from gmail_cli.components.scores import headlines

Outcome = Literal["better", "worse", "unclear"]


@dataclass(frozen=True)
class Finding:
    """What one task says: aligned against naive on its headline metric."""

    outcome: Outcome
    sentence: str


@dataclass(frozen=True)
class Verdict:
    """One sentence over all tasks, and one for each."""

    headline: str
    findings: tuple[Finding, ...]


def verdict(results: Mapping[str, Any]) -> Verdict:
    """The verdict on ``results`` (``gmail.results/1``).

    A task counts as better or worse only when the interval of the paired difference leaves 0 out and every
    seed falls on the same side.
    """
    comparisons = _headline_comparisons(results)
    if not comparisons:
        return Verdict(_without_arms(results), ())
    findings = tuple(_finding(row, results) for row in comparisons)
    tasks: dict[Outcome, list[str]] = {"better": [], "worse": [], "unclear": []}
    for row in comparisons:
        tasks[outcome_of(row)].append(_in_short(row, results))
    verbs = {"better": "helps", "worse": "hurts", "unclear": "makes no measurable difference to"}
    parts = [f"{verbs[outcome]} {_join(named)}" for outcome, named in tasks.items() if named]
    untrained = [task_label(row["task"]) + _dual(row) for row in comparisons if _untrained(row, results) == "worse"]
    still = f" Without any training, {_join(untrained)} did better than on generated images." if untrained else ""
    return Verdict(f"Alignment {_join(parts)}.{still}", findings)


def outcome_of(comparison: Mapping[str, Any]) -> Outcome:
    """Whether the treatment's paired difference lies clear of 0, in every seed too, and on which side."""
    sides = [comparison["low"], comparison["high"], *comparison["by_seed"]]
    if lower_is_better(comparison["metric"]):
        sides = [-side for side in sides]
    return "better" if min(sides) > 0 else "worse" if max(sides) < 0 else "unclear"


def _headline_comparisons(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Aligned against naive on each task's first headline metric, without and with dual projection."""
    order = headlines(results.get("protocol", ""))
    rows = [
        row
        for row in results.get("comparisons", ())
        if row["treatment"] == "generated-aligned" and row["baseline"] == "generated-naive" and row["metric"] in order
    ]
    rows.sort(key=lambda row: order.index(row["metric"]))
    first: dict[tuple[str, bool], Mapping[str, Any]] = {}
    for row in rows:
        first.setdefault((row["task"], row["dual_projection"]), row)
    return list(first.values())


def _untrained_row(row: Mapping[str, Any], results: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The comparison of aligned with no training, beside that of aligned with naive."""
    same = ("task", "metric", "dual_projection", "treatment")
    rows = (each for each in results["comparisons"] if each["baseline"] == "none")
    return next((each for each in rows if all(each[key] == row[key] for key in same)), None)


def _untrained(row: Mapping[str, Any], results: Mapping[str, Any]) -> Outcome | None:
    """Whether training on aligned generated images beats no training; None where nobody measured that."""
    found = _untrained_row(row, results)
    return None if found is None else outcome_of(found)


def _in_short(row: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    metric = row["metric"]
    difference = show(metric, row["difference"], signed=True)
    text = f"{task_label(row['task'])}{_dual(row)} ({metric_label(metric)} {difference} points"
    share = _share_row(row, results)
    closed = share["share"] if share and outcome_of(row) == "better" else None
    return text + (f", {100 * closed:.0f} % of the way to real images)" if closed is not None else ")")


def _finding(row: Mapping[str, Any], results: Mapping[str, Any]) -> Finding:
    metric, outcome = row["metric"], outcome_of(row)
    side = side_of(row["difference"])
    sure = f"{100 * results['confidence']:g} % interval {interval(metric, row['low'], row['high'], signed=True)}"
    agree = sum(side_of(difference) == side for difference in row["by_seed"])
    doubt = "; no difference that these data can show" if outcome == "unclear" else ""
    return Finding(
        outcome,
        f"{task_title(row['task'])}{_dual(row)}: {metric_label(metric)} with aligned generated images is "
        f"{beside(metric, row['difference'], 'that with the same images taken as real')} "
        f"({sure}; {side} in {agree} of {_seeds(row)}){doubt}{_share(row, results)}{_beside_none(row, results)}.",
    )


def _dual(row: Mapping[str, Any]) -> str:
    return " with dual projection" if row["dual_projection"] else ""


def _seeds(row: Mapping[str, Any]) -> str:
    count = len(row["by_seed"])
    return f"{count} seed{'s' * (count != 1)}"


def _share_row(row: Mapping[str, Any], results: Mapping[str, Any]) -> Mapping[str, Any] | None:
    same = ("task", "metric", "dual_projection")
    return next((each for each in results.get("shares", ()) if all(each[key] == row[key] for key in same)), None)


def _share(row: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """What the task says of the distance to real images, as the end of a sentence."""
    share = _share_row(row, results)
    if share is None:
        return ""
    closed = share["share"]
    if closed is None:
        return "; real images are not measurably better than naive ones here, so there is no distance to close"
    sure = f"{100 * share['low']:.0f} to {100 * share['high']:.0f} %".replace("-", "−")
    if closed < 0:
        return f"; the distance to training on real images grows by {-100 * closed:.0f} % (closed: {sure})"
    return f"; {100 * closed:.0f} % of the distance to training on real images is closed ({sure})"


def _beside_none(row: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """What the task says of training at all, as the end of a sentence."""
    found = _untrained_row(row, results)
    if found is None:
        return ""
    metric = row["metric"]
    sure = interval(metric, found["low"], found["high"], signed=True)
    doubt = ", no measurable difference" if outcome_of(found) == "unclear" else ""
    return f"; it is {beside(metric, found['difference'], 'no training')} ({sure}{doubt})"


def _without_arms(results: Mapping[str, Any]) -> str:
    """The first headline metric there is, when nothing is compared: of what was trained, if anything was."""
    order = headlines(results.get("protocol", ""))
    rows = [row for row in results.get("rows", ()) if row["metric"] in order]
    if not rows:
        return "Nothing to compare: this evaluation holds no trained arms."
    rows.sort(key=lambda row: (row["arm"] == "none", order.index(row["metric"])))
    row = rows[0]
    label = metric_label(row["metric"])
    value = f"{show(row['metric'], row['value'])} % ({interval(row['metric'], row['low'], row['high'])})"
    trained = f" for {task_label(row['task'])} trained on {row['arm']} images" if row["arm"] != "none" else ""
    return f"{label[0].upper()}{label[1:]} is {value} over {row['n']:,} queries{trained}."


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
