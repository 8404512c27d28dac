"""Tables for LaTeX papers, for the ``booktabs`` package."""

from __future__ import annotations

from collections.abc import Sequence

_SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "→": r"$\to$", "−": "$-$"}


def escape(text: str) -> str:
    """A text as LaTeX prints it."""
    return "".join(_SPECIAL.get(letter, f"\\{letter}" if letter in "&%$#_{}" else letter) for letter in text)


def tabular(
    align: str,
    *,
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    groups: Sequence[tuple[str, int]] = (),
) -> str:
    """A table of cells that are LaTeX already.

    Args:
        align: A letter for each column.
        head: A name for each column.
        rows: The cells of each row.
        groups: (name, columns it spans) of a line above the head; none without a name anywhere.
    """
    lines = [rf"\begin{{tabular}}{{{align}}}", r"\toprule"]
    if any(name for name, _ in groups):
        lines.append(
            " & ".join(rf"\multicolumn{{{n}}}{{c}}{{{name}}}" if name else " & " * (n - 1) for name, n in groups)
        )
        lines[-1] += r" \\"
        ends = [sum(n for _, n in groups[: place + 1]) for place in range(len(groups))]
        lines += [rf"\cmidrule(lr){{{end - n + 1}-{end}}}" for (name, n), end in zip(groups, ends, strict=True) if name]
    lines += [" & ".join(head) + r" \\", r"\midrule", *(" & ".join(row) + r" \\" for row in rows)]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])
