"""Evaluations of several runs side by side, paired by test query.

Runs under one label are one system tried with several seeds: what each did with a query is averaged first. The
difference to the first label is resampled by image (captions of one image are dependent), and Holm's correction covers
every test of the table.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gmail_cli.components.latex import escape as latex_text
from gmail_cli.components.latex import tabular
from gmail_cli.components.metrics.intervals import USUAL, Bootstrap, holm, seed_summary
from gmail_cli.components.scores import Cell, headlines, over_seeds
from gmail_cli.components.scores import difference as difference_of
from gmail_cli.errors import InputError, UsageError

SCHEMA = "gmail.compare/1"
COLUMNS = ("model", "metric", "run", "value", "interval", "sd", "seeds", "difference", "interval of it", "p")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One evaluation.

    Attributes:
        label: Of its system; evaluations that share it are its seeds.
        path: Where it lies, for messages.
        protocol: Of its results.
        test_set: Digest of the test set.
        seed: Of its profile.
        cells: Its models, with what each did with each query.
    """

    label: str
    path: str
    protocol: str
    test_set: str
    seed: int
    cells: Sequence[Cell]


def compare(
    evaluations: Sequence[Evaluation], *, metrics: Sequence[str] = (), bootstrap: Bootstrap = USUAL
) -> dict[str, Any]:
    """Tabulate evaluations and test every other label against the first.

    Args:
        evaluations: In the order to show.
        metrics: Names to compare; none takes the headline metrics there are, ``all`` every one.
        bootstrap: Draws and level of the intervals.

    Returns:
        A ``gmail.compare/1`` document: ``rows`` (one per model, metric and label: value, low, high, sd over seeds,
        seeds) and ``comparisons`` (difference to the first label, low, high, p_value after Holm, n).

    Raises:
        InputError: Two evaluations differ in protocol or test set, or nothing can be compared.
        UsageError: An unknown metric.
    """
    first = evaluations[0]
    for other in evaluations[1:]:
        require_same(first, other)
    labels = list(dict.fromkeys(each.label for each in evaluations))
    models: dict[str, dict[str, list[tuple[int, Cell]]]] = {}
    for each in evaluations:
        for cell in each.cells:
            models.setdefault(cell.name, {}).setdefault(each.label, []).append((each.seed, cell))
    wanted = wanted_metrics(metrics, evaluations)
    rows: list[dict[str, Any]] = []
    comparisons: list[dict[str, Any]] = []
    for model, by_label in models.items():
        for metric in wanted:
            found = {
                label: [(seed, cell) for seed, cell in by_label.get(label, ()) if metric in cell.scores]
                for label in labels
            }
            pooled = {
                label: over_seeds([cell.scores[metric] for _, cell in cells]) for label, cells in found.items() if cells
            }
            for label, scores in pooled.items():
                low, high = scores.interval(bootstrap)
                spread = seed_summary([cell.scores[metric].value for _, cell in found[label]], level=bootstrap.level)
                about = {"model": model, "metric": metric, "run": label, "value": scores.value, "low": low}
                seeds = [{"profile": seed, "train": cell.seed} for seed, cell in found[label]]
                sd = spread.standard_deviation
                rows.append({**about, "high": high, "sd": sd, "seeds": seeds, "n": scores.queries})
            for label in labels[1:]:
                if label not in pooled or labels[0] not in pooled:
                    continue
                base = pooled[labels[0]]
                test = difference_of(base, other=pooled[label], bootstrap=bootstrap)
                between = {"model": model, "metric": metric, "run": label, "baseline": labels[0]}
                difference = test.difference
                bounds = {"difference": difference.value, "low": difference.low, "high": difference.high}
                comparisons.append({**between, **bounds, "p_value": test.p_value, "n": base.queries})
    if not rows:
        hint = f"There are: {', '.join(_known(evaluations))}."
        raise InputError(f"no evaluation holds {', '.join(wanted) or 'a headline metric'} query by query", hint=hint)
    if len(labels) > 1 and not comparisons:
        names = {label: sorted(name for name, by in models.items() if label in by) for label in labels}
        there = "; ".join(f"{label}: {', '.join(found)}" for label, found in names.items())
        raise InputError(f"the runs have no model in common ({there})", hint="Compare runs of the same tasks and arms.")
    corrected = holm({str(n): row["p_value"] for n, row in enumerate(comparisons)})
    return {
        "schema": SCHEMA,
        "protocol": first.protocol,
        "test_set": first.test_set,
        "confidence": bootstrap.level,
        "resamples": bootstrap.draws,
        "runs": [{"label": each.label, "path": each.path, "seed": each.seed} for each in evaluations],
        "rows": rows,
        "comparisons": [{**row, "p_value": corrected[str(n)]} for n, row in enumerate(comparisons)],
    }


def require_same(first: Evaluation, other: Evaluation) -> None:
    """Refuse evaluations whose queries are not the same.

    Raises:
        InputError: They differ in protocol or test set.
    """
    if other.protocol != first.protocol:
        raise InputError(
            f"{first.path} was measured with protocol {first.protocol!r}, {other.path} with {other.protocol!r}",
            hint="Compare results of one protocol (data.protocol).",
        )
    if other.test_set != first.test_set:
        raise InputError(
            f"{first.path} and {other.path} were tested on different sets ({first.test_set[:12]}, "
            f"{other.test_set[:12]}), though both say {first.protocol!r}",
            hint="A paired test needs the same images and captions in the same order: evaluate both on one set.",
        )


def _known(evaluations: Sequence[Evaluation]) -> list[str]:
    return list(dict.fromkeys(name for each in evaluations for cell in each.cells for name in cell.scores))


def wanted_metrics(metrics: Sequence[str], evaluations: Sequence[Evaluation]) -> list[str]:
    """The metrics to show: those named, every one for ``all``, the headline metrics there are for none.

    Raises:
        UsageError: None of these evaluations keeps a metric of that name query by query.
    """
    known = _known(evaluations)
    if not metrics:
        return [name for name in headlines(evaluations[0].protocol) if name in known]
    if "all" in metrics:
        return known
    for name in metrics:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(known)}."
            raise UsageError(f"metric {name!r} is not kept query by query in these runs", hint=hint)
    return list(dict.fromkeys(metrics))


def table(document: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """``COLUMNS`` for each row of a ``gmail.compare/1`` document, as text; values and differences times 100."""
    tests = {(row["model"], row["metric"], row["run"]): row for row in document["comparisons"]}
    shown: list[tuple[str, ...]] = []
    for row in document["rows"]:
        test = tests.get((row["model"], row["metric"], row["run"]))
        shown.append(
            (
                row["model"],
                row["metric"],
                row["run"],
                _points(row["value"]),
                _range(row["low"], row["high"]),
                _points(row["sd"]),
                str(len(row["seeds"])),
                _points(test["difference"], signed=True) if test else "",
                _range(test["low"], test["high"], signed=True) if test else "",
                f"{test['p_value']:.2g}" if test else "",
            )
        )
    return shown


def text(document: Mapping[str, Any]) -> str:
    """The table in aligned columns, and below it what it rests on."""
    rows = [COLUMNS, *table(document)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = [
        "  ".join(
            f"{cell:{width}}" if column < 3 else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, basis(document)])


def markdown(document: Mapping[str, Any]) -> str:
    """The table in Markdown."""
    rows = [COLUMNS, tuple("---" if column < 3 else "---:" for column in range(len(COLUMNS))), *table(document)]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([*lines, "", basis(document)])


def latex(document: Mapping[str, Any]) -> str:
    """The table in LaTeX, for the ``booktabs`` package."""
    head, *rows = ([latex_text(cell) for cell in row] for row in [COLUMNS, *table(document)])
    return f"{tabular('lllrrrrrrr', head=head, rows=rows)}\n% {basis(document)}"


def basis(document: Mapping[str, Any]) -> str:
    """What the numbers rest on, in a line."""
    level, draws, tests = document["confidence"], document["resamples"], len(document["comparisons"])
    about = f"protocol {document['protocol']}; times 100; {level:.0%} intervals by image, {draws} resamples"
    if not tests:
        return about
    base = document["comparisons"][0]["baseline"]
    return f"{about}; differences to {base}, paired by query, p after Holm over {tests} tests"


def _points(value: float | None, *, signed: bool = False) -> str:
    return "" if value is None else f"{100 * value:{'+' if signed else ''}.2f}"


def _range(low: float | None, high: float | None, *, signed: bool = False) -> str:
    if low is None or high is None:
        return ""
    return f"{_points(low, signed=signed)} to {_points(high, signed=signed)}"
