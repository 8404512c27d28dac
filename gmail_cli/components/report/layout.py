"""The numbers in the layout of the paper's tables: what its columns are, in its order; one row per arm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gmail_cli.components import latex
from gmail_cli.components.report import names

Group = tuple[str, tuple[tuple[str, str], ...]]
"""A heading over columns, and each column's (name, metric)."""


def _recalls(direction: str, title: str, ks: Sequence[int]) -> Group:
    return title, tuple((f"R@{k}", f"{direction}_recall_at_{k}") for k in ks)


@dataclass(frozen=True)
class PaperTable:
    """One table.

    Attributes:
        title: What it shows, and the table of the paper it stands beside.
        groups: Its columns.
        rows: The name of each row, and the result of each column or None.
    """

    title: str
    groups: tuple[Group, ...]
    rows: tuple[tuple[str, tuple[Mapping[str, Any] | None, ...]], ...]

    @property
    def columns(self) -> tuple[tuple[str, str], ...]:
        """(name, metric) of each column, the heading in the name where there are several."""
        return tuple(
            (f"{title} {name}" if title else name, metric) for title, columns in self.groups for name, metric in columns
        )


def paper_tables(results: Mapping[str, Any]) -> tuple[PaperTable, ...]:
    """The tables that ``results`` (``gmail.results/1``) can fill; a column that nobody measured is left out."""
    ks = sorted({int(row["metric"].rpartition("_")[2]) for row in results["aggregates"] if _is_recall(row["metric"])})
    layouts: tuple[tuple[str, tuple[Group, ...]], ...] = (
        (
            "caption metrics (Table 1)",
            (
                (
                    "",
                    (
                        ("B@4", "bleu_4"),
                        ("METEOR", "meteor"),
                        ("CIDEr", "cider"),
                        ("ROUGE-L", "rouge_l"),
                        ("CLIPScore", "clip_score"),
                    ),
                ),
            ),
        ),
        (
            "retrieval (Tables 2 and 3)",
            (_recalls("image_to_text", "Image-to-Text", ks), _recalls("text_to_image", "Text-to-Image", ks)),
        ),
        (
            "classification, top-1 accuracy (Table 4)",
            (
                (
                    "",
                    (
                        ("Zero-shot", "zero_shot_top_1_accuracy"),
                        ("Mean per class", "zero_shot_mean_per_class_accuracy"),
                        ("Linear probe", "probe_top_1_accuracy"),
                        ("Linear probe", "linear_probe_top_1_accuracy"),
                    ),
                ),
            ),
        ),
        (
            "long captions, R@1 (Table 5)",
            (
                (
                    "",
                    (
                        ("Image-to-Text", "long_image_to_text_recall_at_1"),
                        ("Text-to-Image", "long_text_to_image_recall_at_1"),
                    ),
                ),
            ),
        ),
        ("cosine of paired real and generated images (Table 14)", (("", (("Cosine", "paired_cosine"),)),)),
    )
    cells = {(row["task"], row["arm"], row["dual_projection"], row["metric"]): row for row in results["aggregates"]}
    found = []
    for task in dict.fromkeys(task for task, *_ in cells):
        for title, groups in layouts:
            table = _table(
                f"{names.task_title(task)}: {title}", groups, {k[1:]: v for k, v in cells.items() if k[0] == task}
            )
            if table is not None:
                found.append(table)
    return tuple(found)


def _is_recall(metric: str) -> bool:
    return metric.startswith(("text_to_image_recall_at_", "image_to_text_recall_at_"))


def _table(
    title: str, groups: Sequence[Group], cells: Mapping[tuple[str, bool, str], Mapping[str, Any]]
) -> PaperTable | None:
    there = {metric for *_, metric in cells}
    kept = tuple((name, tuple(each for each in columns if each[1] in there)) for name, columns in groups)
    kept = tuple((name, columns) for name, columns in kept if columns)
    metrics = [metric for _, columns in kept for _, metric in columns]
    arms = dict.fromkeys((arm, dual) for arm, dual, metric in cells if metric in metrics)
    rows = tuple(
        (arm + ", dual projection" * dual, tuple(cells.get((arm, dual, metric)) for metric in metrics))
        for arm, dual in sorted(arms, key=lambda each: (names.arm_rank(each[0]), each[1]))
    )
    return PaperTable(title, kept, rows) if rows else None


def latex_tables(results: Mapping[str, Any]) -> str:
    """:func:`paper_tables` for LaTeX with ``booktabs``: a value, its interval small beside it, ± sd over seeds."""
    level = f"{100 * results['confidence']:g}"
    lines = [
        f"% protocol {results['protocol']}; shares and caption scores times 100; {level} % intervals over test images;",
        "% needs \\usepackage{booktabs}",
    ]
    for table in paper_tables(results):
        width = len(table.columns)
        head = ["", *(latex.escape(name) for _, columns in table.groups for name, _ in columns)]
        body = [[latex.escape(name), *map(_cell, cells)] for name, cells in table.rows]
        groups = [("", 1), *((latex.escape(name), len(columns)) for name, columns in table.groups)]
        lines += ["", f"% {table.title}", latex.tabular("l" + "c" * width, head=head, rows=body, groups=groups)]
    return "\n".join(lines) + "\n"


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "--"
    metric = row["metric"]
    text = names.show(metric, row["mean"])
    if row["sd"] is not None:
        text += f" $\\pm$ {names.show(metric, row['sd'])}"
    if row["low"] is not None:
        text += f" {{\\scriptsize ({names.show(metric, row['low'])} to {names.show(metric, row['high'])})}}"
    return text.replace("−", "$-$")
