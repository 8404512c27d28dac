"""``gmail compare`` and ``gmail report``: thin, over :mod:`gmail_cli.stages.compare`."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from gmail_cli.cli_common import WorkspaceOption, say
from gmail_cli.errors import SetupError, UsageError

app = typer.Typer(rich_markup_mode=None)


class TableFormat(str, Enum):
    """How a table is written."""

    TEXT = "text"
    MARKDOWN = "markdown"
    LATEX = "latex"


RunsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="[LABEL=]RUN...",
        help="Names of runs, or eval artifacts; those that share a label are one system's seeds.",
    ),
]
MetricOption = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="Metric to compare, or all; may be repeated. Default: the headline metrics."),
]
ResamplesOption = Annotated[int, typer.Option(min=100, metavar="N", help="Bootstrap resamples.")]
ConfidenceOption = Annotated[float, typer.Option(min=0.5, max=0.999, metavar="P", help="Level of the intervals.")]


@app.command()
def compare(
    runs: RunsArgument,
    metric: MetricOption = None,
    resamples: ResamplesOption = 2000,
    confidence: ConfidenceOption = 0.95,
    format_: Annotated[TableFormat, typer.Option("--format", help="How the table is written.")] = TableFormat.TEXT,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Instead of a table, the metrics against the number of captions trained on, with a log-linear fit "
            "(svg, png or pdf).",
        ),
    ] = None,
    workspace: WorkspaceOption = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Compare evaluations: every other label against the first, paired by query, p-values after Holm."""
    from gmail_cli.components import comparison
    from gmail_cli.components.metrics.intervals import Bootstrap
    from gmail_cli.stages import compare as stage

    bootstrap = Bootstrap(draws=resamples, level=confidence)
    if plot is not None:
        from gmail_cli.components import scaling

        if format_ is not TableFormat.TEXT:
            raise UsageError(f"--format {format_.value} and --plot: there is no table", hint="Leave one of them out.")
        curves = stage.scale(runs, root=workspace, metrics=metric or (), bootstrap=bootstrap)
        picture = scaling.plot(curves, kind=plot.suffix.removeprefix("."))
        try:
            plot.write_bytes(picture)
        except OSError as error:
            hint = "Name a file in a folder that exists and can be written."
            raise SetupError(f"cannot write --plot {plot}: {error.strerror}", hint=hint) from error
        say(f"plot: {plot}")
        typer.echo(json.dumps(curves, allow_nan=False) if as_json else scaling.text(curves))
        return
    found = stage.run(runs, root=workspace, metrics=metric or (), bootstrap=bootstrap)
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False, allow_nan=False))
        return
    write = {TableFormat.MARKDOWN: comparison.markdown, TableFormat.LATEX: comparison.latex}
    typer.echo(write.get(format_, comparison.text)(found))


@app.command()
def report(
    runs: RunsArgument,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where report.html, report.md and report.tex go.")
    ] = Path("report"),
    metric: MetricOption = None,
    resamples: ResamplesOption = 2000,
    confidence: ConfidenceOption = 0.95,
    workspace: WorkspaceOption = Path("runs"),
) -> None:
    """Write one page over several runs: what `gmail compare` finds, charts, the gap of each, where they come from."""
    from gmail_cli.components.metrics.intervals import Bootstrap
    from gmail_cli.stages import compare as stage

    bootstrap = Bootstrap(draws=resamples, level=confidence)
    files = stage.report(runs, root=workspace, metrics=metric or (), bootstrap=bootstrap)
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (output / name).write_text(content, encoding="utf-8")
    except OSError as error:
        raise SetupError(f"cannot write --output {output}: {error.strerror}", hint="Name another folder.") from error
    typer.echo(str(output / "report.html"))
