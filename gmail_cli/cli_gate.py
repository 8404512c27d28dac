"""The options that hold metrics against a baseline, shared by ``gmail eval`` and ``gmail score``, and what they print.

Everything goes to stderr, annotations too: GitHub reads its commands from both streams, and stdout stays the result's,
so that ``E=$(gmail eval ...)`` loses none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from gmail_cli.errors import RegressionError, SetupError, UsageError


class Annotations(str, Enum):
    """Whose annotations to print."""

    GITHUB = "github"


BaselineOption = Annotated[
    Path | None, typer.Option("--baseline", metavar="FILE", help="Earlier results to hold these against.")
]
ToleranceOption = Annotated[
    list[str] | None,
    typer.Option(
        "--tolerance",
        metavar="METRIC=POINTS",
        help="Allowed fall against the baseline, in points; may be repeated.",
    ),
]
JunitOption = Annotated[
    Path | None, typer.Option("--junit", metavar="FILE", help="Write the comparison as JUnit XML, a test per metric.")
]
AnnotationsOption = Annotated[
    Annotations | None, typer.Option("--annotations", help="Print what fell as annotations of this CI, on stderr.")
]


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One comparison with a baseline.

    Attributes:
        baseline: The file.
        tolerance: Metric -> points it may fall by.
        junit: Where JUnit XML goes.
        annotations: Whether annotations are printed.
    """

    baseline: Path
    tolerance: Mapping[str, float]
    junit: Path | None
    annotations: bool

    @classmethod
    def of(
        cls,
        baseline: Path | None,
        tolerance: list[str] | None,
        junit: Path | None,
        annotations: Annotations | None,
    ) -> Gate | None:
        """The gate that the options ask for; None without ``--baseline``.

        Raises:
            UsageError: A tolerance that is not METRIC=POINTS, or an option that needs ``--baseline`` without it.
        """
        allowed = _tolerances(tolerance or [])
        if baseline is not None:
            return cls(baseline=baseline, tolerance=allowed, junit=junit, annotations=annotations is not None)
        given = {"--tolerance": tolerance, "--junit": junit, "--annotations": annotations and annotations.value}
        for name, value in given.items():
            if value:
                shown = " ".join(value) if isinstance(value, list) else value
                hint = "Name the results to compare with: --baseline FILE."
                raise UsageError(f"{name} {shown} without --baseline", hint=hint)
        return None

    def check(self, baseline: Mapping[str, Any]) -> None:
        """Find out before a long computation whether the tolerances fit the baseline.

        Raises:
            UsageError: A tolerance names no metric, or is negative.
        """
        from gmail_cli.components import gate

        gate.compare({}, baseline=baseline["metrics"], tolerance=self.tolerance)

    def hold(
        self, metrics: Mapping[str, float], *, baseline: Mapping[str, Any], suite: str, title: str, hint: str
    ) -> None:
        """Print, write and judge how ``metrics`` stand against those of ``baseline``.

        Raises:
            RegressionError: A metric fell by more than allowed; a table names each.
            SetupError: The JUnit file cannot be written.
            UsageError: A tolerance names no metric.
        """
        from gmail_cli.components import gate

        checks = gate.compare(metrics, baseline=baseline["metrics"], tolerance=self.tolerance)
        if self.junit is not None:
            try:
                self.junit.write_text(gate.junit(checks, suite=suite), encoding="utf-8")
            except OSError as error:
                why = "Name a file in a folder that exists and can be written."
                raise SetupError(f"cannot write --junit {self.junit}: {error.strerror}", hint=why) from error
        if self.annotations:
            for line in gate.github_annotations(checks, title=title):
                typer.echo(line, err=True)
        fallen: Sequence[gate.Check] = [check for check in checks if check.fell]
        if fallen:
            raise RegressionError(
                f"{len(fallen)} of {len(checks)} metrics fell below {self.baseline}:\n{gate.table(fallen)}", hint=hint
            )
        typer.echo(f"{len(checks)} metrics held against {self.baseline}", err=True)


def _tolerances(texts: list[str]) -> dict[str, float]:
    found = {}
    for text in texts:
        for part in text.split(","):
            name, equals, number = part.partition("=")
            try:
                found[name.strip()] = float(number)
            except ValueError:
                equals = ""
            if not equals or not name.strip():
                hint = 'Write --tolerance "text_to_image_recall_at_1=0.5" (points of a percent).'
                raise UsageError(f"--tolerance {text!r} is not METRIC=POINTS", hint=hint)
    return found
