"""Metrics held against those of an earlier run: what fell, as a table, as JUnit XML, as GitHub annotations.

A tolerance is in points, hundredths of a metric as it is stored: 0.5 lets a recall fall from 0.500 to 0.495.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from gmail_cli.errors import InputError, UsageError

MOST_ANNOTATIONS = 10
"""GitHub shows ten annotations of one level for a step."""
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Check:
    """One metric of the baseline; ``now`` is None when it is gone."""

    metric: str
    before: float
    now: float | None
    allowed: float

    @property
    def change(self) -> float | None:
        """Points it rose by."""
        return None if self.now is None else 100 * (self.now - self.before)

    @property
    def fell(self) -> bool:
        """Whether it is worse by more than allowed, or gone."""
        if self.now is None:
            return True
        worse = self.now - self.before if lower_is_better(self.metric) else self.before - self.now
        return 100 * worse > self.allowed + 1e-7

    @property
    def cells(self) -> tuple[str, str, str, str, str]:
        """Metric, baseline, now, change, allowed, as text; values times 100."""
        now, change = ("missing", "") if self.now is None else (f"{100 * self.now:.2f}", f"{self.change:+.2f}")
        return self.metric, f"{100 * self.before:.2f}", now, change, f"{self.allowed:g}"

    def __str__(self) -> str:
        metric, before, now, change, allowed = self.cells
        return f"{metric}: {before} -> {now}" + (f" ({change}, allowed {allowed})" if change else "")


def lower_is_better(metric: str) -> bool:
    """Whether a smaller value is the better one: distances, ranks, and how well real and generated are told apart."""
    return metric.endswith(("_distance", "_separability", "_discrepancy", "mean_rank", "median_rank"))


def compare(
    metrics: Mapping[str, float], *, baseline: Mapping[str, float], tolerance: Mapping[str, float]
) -> list[Check]:
    """Every metric of the baseline that is held against its value now, by name.

    Args:
        metrics: Full name -> value, as in ``results["metrics"]``.
        baseline: The same of an earlier run. Measures of an evaluation's modality gap are held only when named.
        tolerance: Metric -> points (hundredths) it may fall by: a full name, the last part of names
            (``text_to_image_recall_at_1``) or ``all``. The most specific applies; 0 where none does.

    Raises:
        UsageError: A tolerance names no metric of the baseline, or is negative.
    """
    for name, points in tolerance.items():
        known = {"all", *baseline, *(_short(full) for full in baseline)}
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else "Use a name from the baseline's metrics, or all."
            raise UsageError(f"tolerance {name!r} is no metric of the baseline", hint=hint)
        if not points >= 0:
            raise UsageError(f"tolerance {name}={points:g} is negative", hint="Give the points it may fall by.")
    return [
        Check(full, before, metrics.get(full), _allowed(full, tolerance))
        for full, before in sorted(baseline.items())
        if not full.startswith("gap.") or full in tolerance or _short(full) in tolerance
    ]


def _short(full: str) -> str:
    return full.rpartition(".")[2]


def _allowed(full: str, tolerance: Mapping[str, float]) -> float:
    return next((tolerance[name] for name in (full, _short(full), "all") if name in tolerance), 0.0)


def read(file: Path, *, schema: str, hint: str) -> dict[str, Any]:
    """A baseline: a JSON document of ``schema`` with ``protocol`` and ``metrics``.

    Args:
        file: Where it is.
        schema: What it must say it is.
        hint: What to give instead, for messages.

    Raises:
        InputError: It cannot be read, or is something else.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the baseline {file}: {error.strerror}", hint=hint) from error
    except ValueError as error:
        raise InputError(f"the baseline {file} is not JSON: {error}", hint=hint) from error
    if not isinstance(found, dict) or found.get("schema") != schema:
        raise InputError(f"{file} is not a {schema} document", hint=hint)
    metrics = found.get("metrics")
    if not isinstance(metrics, dict) or not metrics:
        raise InputError(f"the baseline {file} holds no metrics", hint=hint)
    for name, value in metrics.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise InputError(f"the baseline {file}: metric {name} is {value!r}, not a number", hint=hint)
    return found


def require_same(now: Mapping[str, Any], *, baseline: Mapping[str, Any], file: Path, keys: Sequence[str]) -> None:
    """Refuse a baseline that was measured in another way.

    Args:
        now: The document to judge.
        baseline: The earlier one.
        file: Where the baseline was read from.
        keys: What must be equal; a key that the baseline lacks is not compared.

    Raises:
        InputError: Names the first key that differs, and both values.
    """
    for key in keys:
        if key in baseline and baseline[key] != now[key]:
            raise InputError(
                f"the baseline {file} was measured with {key} {baseline[key]!r}, this one with {now[key]!r}",
                hint="Compare results of one protocol on one test set, or make the baseline anew.",
            )


def table(checks: Sequence[Check]) -> str:
    """Metric, baseline, now, change and allowed fall, one line each, in aligned columns."""
    rows = [("metric", "baseline", "now", "change", "allowed"), *(check.cells for check in checks)]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = []
    for name, *cells in rows:
        numbers = (f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        lines.append(f"  {name:{widths[0]}}  {'  '.join(numbers)}")
    return "\n".join(lines)


def junit(checks: Sequence[Check], *, suite: str) -> str:
    """JUnit XML: a test case for each metric (class: what was measured), failed where it fell."""
    failures = sum(check.fell for check in checks)
    counts = {"tests": str(len(checks)), "failures": str(failures), "errors": "0", "skipped": "0"}
    root = ET.Element("testsuites", counts)
    group = ET.SubElement(root, "testsuite", {"name": suite, **counts})
    for check in checks:
        of, _, name = check.metric.rpartition(".")
        about = {"classname": _xml(f"{suite}.{of}" if of else suite), "name": _xml(name)}
        case = ET.SubElement(group, "testcase", about)
        if check.fell:
            ET.SubElement(case, "failure", {"message": _xml(str(check)), "type": "regression"})
        else:
            ET.SubElement(case, "system-out").text = _xml(str(check))
    ET.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ET.tostring(root, encoding="unicode")}\n'


def _xml(text: str) -> str:
    return _NOT_XML.sub("\ufffd", text)


def github_annotations(checks: Sequence[Check], *, title: str) -> list[str]:
    """GitHub workflow commands, one line each: an error for each metric that fell, or one notice that none did.

    GitHub shows the first ten errors of a step: where more fell, the last line counts the others.
    """
    fallen = [str(check) for check in checks if check.fell]
    if not fallen:
        return [_command("notice", title, f"{len(checks)} metrics held")]
    if len(fallen) > MOST_ANNOTATIONS:
        shown = MOST_ANNOTATIONS - 1
        fallen = [*fallen[:shown], f"{len(fallen) - shown} more metrics fell; the log lists them"]
    return [_command("error", title, line) for line in fallen]


def _command(level: str, title: str, message: str) -> str:
    def escaped(text: str) -> str:
        return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")

    return f"::{level} title={escaped(title).replace(':', '%3A').replace(',', '%2C')}::{escaped(message)}"
