"""Records and results to text: the report as HTML and Markdown, and the page of search hits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib import resources
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined, select_autoescape
from markupsafe import Markup

from gmail_cli.components.report import names, plots
from gmail_cli.components.report.layout import paper_tables
from gmail_cli.components.report.records import GeneratedReport, Picture, Report
from gmail_cli.components.report.verdict import outcome_of, verdict
from gmail_cli.components.scores import headlines

_TEMPLATES = (
    "page.html.j2",
    "pictures.html.j2",
    "report.html.j2",
    "search.html.j2",
    "serve.html.j2",
    "report.md.j2",
    "runs.html.j2",
    "generated.html.j2",
)


def html(report: Report) -> str:
    """The report as one page that needs nothing else: no script, no font, no file, no network."""
    return _render("report.html.j2", report)


def markdown(report: Report) -> str:
    """The report's sentences and tables as Markdown."""
    return _render("report.md.j2", report)


def generated_page(report: GeneratedReport) -> str:
    """The report on a set of generated images, as :func:`html` is one on an evaluation."""
    return environment().get_template("generated.html.j2").render(report=report)


def search_page(query: str, hits: Sequence[tuple[str, str, float]], thumbnails: Sequence[bytes | None]) -> str:
    """A page of search results.

    Args:
        query: What was searched for.
        hits: (id, text, score) of each hit, best first; the text may be empty.
        thumbnails: JPEG or PNG bytes for each hit; None where there is no image.
    """
    rows = [
        (*hit, None if thumbnail is None else Picture(thumbnail))
        for hit, thumbnail in zip(hits, thumbnails, strict=True)
    ]
    return environment().get_template("search.html.j2").render(query=query, hits=rows)


def serve_page(
    *,
    title: str,
    tables: Mapping[str, Mapping[str, Any]],
    table: str,
    words: str = "",
    k: int,
    flow: str = "real",
    image: bytes | None = None,
    hits: Sequence[tuple[Mapping[str, Any], str]] | None = None,
    error: str = "",
    most_hits: int,
) -> str:
    """The page of ``gmail serve``: two forms, and what was found.

    Args:
        title: Heading.
        tables: Table -> what ``index.json`` says of it.
        table: The one searched.
        words: The text query.
        k: How many hits were asked for.
        flow: What the image queried with is: ``real`` or ``generated``.
        image: Thumbnail of that image.
        hits: (what is known of the hit, address of its thumbnail), best first; None before a search.
        error: What went wrong.
        most_hits: Largest ``k``.
    """
    shown = [
        {
            "id": hit["id"],
            "score": hit["score"],
            "thumbnail": address,
            "label": hit.get("label") or "",
            "lines": [hit["text"]] if hit.get("text") else list(hit.get("captions") or ()),
        }
        for hit, address in hits or ()
    ]
    return (
        environment()
        .get_template("serve.html.j2")
        .render(
            title=title,
            tables=tables,
            table=table,
            words=words,
            k=k,
            flow=flow,
            image=None if image is None else Picture(image),
            hits=None if hits is None else shown,
            error=error,
            most_hits=most_hits,
        )
    )


def _render(template: str, report: Report) -> str:
    results = report.results
    return (
        environment()
        .get_template(template)
        .render(
            report=report,
            results=results,
            verdict=verdict(results),
            tables=_tables(results),
            paper=paper_tables(results),
            headline_charts=_headline_charts(results),
            gap=_gap(results),
            extent=plots.cloud_extent(report.clouds) if report.clouds else None,
            arms=sorted({row["arm"] for row in results["rows"] if row["arm"] in names.ARM_NOTES}, key=names.arm_rank),
        )
    )


def _tables(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One table per task and family of metrics: arms down, metrics across, each cell an aggregate or None."""
    cells = {
        (row["task"], row["arm"], row["dual_projection"], row["metric"]): row
        for row in results["aggregates"]
        if row["task"] != "gap"
    }
    tables = []
    for task in dict.fromkeys(task for task, *_ in cells):
        of_task = [key for key in cells if key[0] == task]
        for family in names.FAMILIES:
            metrics = {metric for *_, metric in of_task if names.family(metric) == family}
            arms = {(arm, dual) for _, arm, dual, metric in of_task if metric in metrics}
            columns = sorted(metrics, key=names.metric_rank)
            rows = [
                (arm, dual, [cells.get((task, arm, dual, metric)) for metric in columns])
                for arm, dual in sorted(arms, key=lambda each: (names.arm_rank(each[0]), each[1]))
            ]
            if rows:
                tables.append({"task": task, "family": family, "metrics": columns, "rows": rows})
    return tables


def _headline_charts(results: Mapping[str, Any]) -> list[tuple[str, Markup]]:
    """An interval chart for the first headline metric of each task with more than one arm."""
    charts = []
    for task in dict.fromkeys(row["task"] for row in results["aggregates"]):
        plain = [row for row in results["aggregates"] if row["task"] == task and not row["dual_projection"]]
        present = [
            metric for metric in headlines(results.get("protocol", "")) if any(row["metric"] == metric for row in plain)
        ]
        for metric in present[:2]:
            rows = sorted((row for row in plain if row["metric"] == metric), key=lambda row: names.arm_rank(row["arm"]))
            if len(rows) > 1:
                title = f"{names.task_title(task)}: {names.metric_label(metric)}"
                values = [tuple(100 * row[key] for key in ("mean", "low", "high")) for row in rows]
                charts.append(
                    (
                        title,
                        plots.interval_chart(
                            [(row["arm"], row["arm"], *value) for row, value in zip(rows, values, strict=True)],
                            label=title,
                        ),
                    )
                )
    return charts


def _gap(results: Mapping[str, Any]) -> list[tuple[str, dict[str, Any] | None, dict[str, Any] | None]]:
    """(metric, before, after) of the modality gap: the generated images through f_r and through f_g."""
    rows = {(row["arm"], row["metric"]): row for row in results["rows"] if row["task"] == "gap"}
    metrics = {metric for _, metric in rows}
    ordered = [metric for metric in names.GAP_METRICS + names.SET_METRICS if metric in metrics]
    return [(m, rows.get(("generated-naive", m)), rows.get(("generated-aligned", m))) for m in ordered]


def _read(name: str) -> str:
    return resources.files("gmail_cli.components.report").joinpath("templates", name).read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def environment() -> Environment:
    """The templates, with what they call."""
    environment = Environment(
        loader=DictLoader({name: _read(name) for name in _TEMPLATES}),
        autoescape=select_autoescape(enabled_extensions=("html.j2",), default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        style=Markup(_read("style.css")),  # noqa: S704 - our own file
        line_chart=plots.line_chart,
        breakdown_chart=plots.breakdown_chart,
        cloud_panel=plots.cloud_panel,
        histogram_chart=plots.histogram_chart,
        outcome_of=outcome_of,
        arm_notes=names.ARM_NOTES,
    )
    environment.filters.update(
        metric=names.metric_label,
        task=names.task_title,
        show=lambda value, metric: names.show(metric, value),
        signed=lambda value, metric: names.show(metric, value, signed=True),
        interval=lambda row: names.interval(row["metric"], row["low"], row["high"]),
        percent=lambda share: f"{100 * share:.0f}".replace("-", "−"),
        md=_markdown_text,
    )
    return environment


def _markdown_text(text: object) -> str:
    """Text that Markdown shows as it is, inside a table too."""
    escaped = str(text).replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for mark in "`*_[]|#":
        escaped = escaped.replace(mark, f"\\{mark}")
    return " ".join(escaped.split())
