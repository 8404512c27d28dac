"""What an evaluation looks like: one self-contained HTML page, Markdown; and pages of search results and of images.

Records and results in, text out. Every string that comes from data is escaped; the pages hold no script and
forbid any through their content security policy.
"""

from __future__ import annotations

from gmail_cli.components.report.generated import generated_set
from gmail_cli.components.report.layout import latex_tables
from gmail_cli.components.report.names import metric_label, task_title
from gmail_cli.components.report.pages import generated_page, html, markdown, search_page, serve_page
from gmail_cli.components.report.records import (
    Breakdown,
    CaptionExample,
    Chart,
    Cloud,
    Curve,
    Picture,
    PictureRow,
    Report,
    RunNote,
)
from gmail_cli.components.report.runs import runs_page
from gmail_cli.components.report.thumbnails import thumbnail
from gmail_cli.components.report.verdict import Verdict, verdict

__all__ = [
    "Breakdown",
    "CaptionExample",
    "Chart",
    "Cloud",
    "Curve",
    "Picture",
    "PictureRow",
    "Report",
    "RunNote",
    "Verdict",
    "generated_page",
    "generated_set",
    "html",
    "latex_tables",
    "markdown",
    "metric_label",
    "runs_page",
    "search_page",
    "serve_page",
    "task_title",
    "thumbnail",
    "verdict",
]
