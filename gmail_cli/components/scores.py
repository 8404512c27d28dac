"""From what each model did with each test query to results: intervals, spread over seeds, comparisons.

A metric is kept as columns that can be summed over test queries, so that one bootstrap by image serves them all
(:func:`gmail_cli.components.metrics.intervals.bootstrap_sums`), and so that two models can be compared query by query.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from gmail_cli.components import protocols
from gmail_cli.components.metrics.captioning import bleu, meteor
from gmail_cli.components.metrics.intervals import (
    USUAL,
    Bootstrap,
    Columns,
    PairedDifference,
    bootstrap_sums,
    difference_of_sums,
    holm,
    mean_of,
    require_same_queries,
    seed_summary,
    total,
)

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA = "gmail.results/1"

_HEADLINES = (
    "text_to_image_recall_at_1",
    "image_to_text_recall_at_1",
    "zero_shot_top_1_accuracy",
    "probe_top_1_accuracy",
    "cider",
    "clip_score",
    "ref_clip_score",
    "scienceqa_accuracy",
    "mmmu_accuracy",
    "linear_probe_top_1_accuracy",
    "nearest_neighbour_top_1_accuracy",
    "long_text_to_image_recall_at_1",
    "long_image_to_text_recall_at_1",
)

TREATMENT = "generated-aligned"
BASELINES = ("generated-naive", "real", "none")
"""What GMAIL's arm is compared with."""


def headlines(protocol: str) -> tuple[str, ...]:
    """The metrics that models are compared on, and more is better; of accuracies the one that the field quotes of the
    protocol's set."""
    quoted = protocols.quoted_accuracy(protocol)
    return tuple(metric.replace("top_1_accuracy", quoted) for metric in _HEADLINES)


Statistic: TypeAlias = Callable[[Float[np.ndarray, "draws columns"]], Float[np.ndarray, " draws"]]


def mean_over_classes(sums: Float[np.ndarray, "draws columns"]) -> Float[np.ndarray, " draws"]:
    """From sums of [right of class c ... | of class c ...]: accuracy averaged over the classes that were drawn."""
    right, sizes = np.split(sums, 2, axis=1)
    present = sizes > 0
    return (right / np.where(present, sizes, 1)).sum(axis=1) / present.sum(axis=1)


def _bleu(order: int) -> Statistic:
    return lambda sums: bleu(sums)[:, order]


OF_CORPUS: Mapping[str, Statistic] = {**{f"bleu_{n + 1}": _bleu(n) for n in range(4)}, "meteor": meteor}
"""Metrics of a whole set of captions, from the sums of what was counted in each."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """One metric of one model.

    Attributes:
        columns: One row per test query; the metric is ``statistic`` of their sums.
        groups: The image of each query: what the bootstrap draws. None for a number that is known only as a whole
            and has no interval.
        statistic: From sums, one row per draw, to the metric.
    """

    columns: Columns
    groups: Int[np.ndarray, " queries"] | None
    statistic: Statistic = mean_of
    queries: int = 0

    @classmethod
    def mean(cls, values: Float[np.ndarray, " queries"], *, groups: Int[np.ndarray, " queries"]) -> Scores:
        """A metric that is the mean of one value per query."""
        values = np.asarray(values, dtype=np.float64)
        return cls(columns=np.stack([values, np.ones(len(values))], axis=1), groups=groups, queries=len(values))

    @classmethod
    def per_class(
        cls,
        right: Float[np.ndarray, " queries"],
        *,
        labels: Int[np.ndarray, " queries"],
        classes: int,
        groups: Int[np.ndarray, " queries"],
    ) -> Scores:
        """Accuracy averaged over classes, from what was right and the class of each query."""
        rows = np.arange(len(labels))
        values = np.concatenate([np.asarray(right, dtype=np.float64), np.ones(len(rows))])
        places = (np.concatenate([rows, rows]), np.concatenate([labels, labels + classes]))
        columns = sparse.csr_array((values, places), shape=(len(rows), 2 * classes))
        return cls(columns=columns, groups=groups, statistic=mean_over_classes, queries=len(rows))

    @classmethod
    def whole(cls, value: float, *, queries: int) -> Scores:
        """A number without an interval."""
        return cls(columns=np.array([[value, 1.0]]), groups=None, queries=queries)

    @property
    def value(self) -> float:
        """The metric."""
        return float(self.statistic(total(self.columns))[0])

    @property
    def values(self) -> Float[np.ndarray, " queries"]:
        """The value of each query of a mean."""
        assert self.statistic is mean_of, "not a mean over queries"
        return np.asarray(self.columns[:, 0])

    def interval(self, bootstrap: Bootstrap = USUAL) -> tuple[float | None, float | None]:
        """The percentile interval from resampling images; (None, None) without groups or with one image."""
        if self.groups is None or len(np.unique(self.groups)) < 2:
            return None, None
        found = bootstrap_sums(self.columns, statistic=self.statistic, groups=self.groups, bootstrap=bootstrap)
        return found.low, found.high


@dataclass(frozen=True, kw_only=True, eq=False)
class Cell:
    """The scores of one model: what it was trained for, on what, and how it did.

    Attributes:
        task: ``clip-text``, ``clip``, ``clipcap``, ``ifcap``, ``sitta``, ``llava``, ``linear-probe``,
            ``features`` or ``gap``.
        arm: What it was trained on.
        seed: Of its training; None where nothing was trained.
        dual_projection: Whether each flow had its own projection.
        preprocess: Digest of how its test images were preprocessed.
        scores: Metric name -> scores.
    """

    task: str
    arm: str
    seed: int | None = None
    dual_projection: bool = False
    preprocess: str = ""
    scores: Mapping[str, Scores] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """``task.arm``, with ``+dual``; the same for every seed."""
        return f"{self.task}.{self.arm}{'+dual' * self.dual_projection}"


def to_parquet(scores: Mapping[str, Scores]) -> pa.Table | None:
    """What a model did with each query: columns ``metric``, ``image`` (a number), ``value``, ``class``, ``counts``.

    ``value`` is that of a metric that is a mean over queries, with the number of its ``class`` where it is one over
    classes. ``counts`` are what metrics of a whole set of captions (``OF_CORPUS``) sum up. None where there is neither.
    Numbers without queries are left out.
    """
    import pyarrow as pa

    schema = pa.schema(
        {
            "metric": pa.dictionary(pa.int32(), pa.string()),
            "image": pa.int32(),
            "value": pa.float64(),
            "class": pa.int32(),
            "counts": pa.list_(pa.float64()),
        }
    )
    parts = []
    for name, each in scores.items():
        if each.groups is None:
            continue
        rows = each.columns.shape[0]
        values: dict[str, Any] = dict.fromkeys(("value", "class", "counts"), pa.nulls(rows))
        if name in OF_CORPUS:
            values["counts"] = list(each.columns)
        elif each.statistic is mean_over_classes:
            right, member = (each.columns[:, half] for half in _halves(each.columns.shape[1]))
            values |= {"value": np.asarray(right.sum(axis=1)), "class": sparse.csr_array(member).indices}
        elif each.statistic is mean_of:
            values["value"] = each.values
        else:
            continue
        parts.append(pa.table({"metric": [name] * rows, "image": each.groups, **values}).cast(schema))
    return pa.concat_tables(parts).unify_dictionaries() if parts else None


def _halves(columns: int) -> tuple[slice, slice]:
    return slice(columns // 2), slice(columns // 2, None)


def from_parquet(table: pa.Table) -> dict[str, Scores]:
    """Inverse of :func:`to_parquet`."""
    import pyarrow.compute as pc

    found = {}
    for name in pc.unique(table["metric"]).to_pylist():
        rows = table.filter(pc.equal(table["metric"], name))
        images = rows["image"].to_numpy()
        if name in OF_CORPUS:
            counts = pc.list_flatten(rows["counts"]).to_numpy().reshape(len(rows), -1)
            found[name] = Scores(columns=counts, groups=images, statistic=OF_CORPUS[name], queries=len(rows))
        elif rows["class"].null_count:
            found[name] = Scores.mean(rows["value"].to_numpy(), groups=images)
        else:
            labels = rows["class"].to_numpy()
            right, classes = rows["value"].to_numpy(), int(labels.max()) + 1
            found[name] = Scores.per_class(right, labels=labels, classes=classes, groups=images)
    return found


def difference(base: Scores, *, other: Scores, bootstrap: Bootstrap = USUAL) -> PairedDifference:
    """Other minus base on the same queries, the images resampled together; both with an interval of their own.

    Raises:
        InputError: They have different numbers of queries.
    """
    require_same_queries(base.columns.shape[0], other.columns.shape[0])
    both = combined((base, other), weights=(-1.0, 1.0))
    return difference_of_sums(both.columns, statistic=both.statistic, groups=both.groups, bootstrap=bootstrap)


def over_seeds(scores: Sequence[Scores]) -> Scores:
    """The mean of one metric over models that differ in their seed, query by query where that is possible."""
    return scores[0] if len(scores) == 1 else combined(scores, weights=[1 / len(scores)] * len(scores))


def combined(scores: Sequence[Scores], *, weights: Sequence[float]) -> Scores:
    """A weighted sum of one metric over models that answered the same queries, which are resampled together."""
    first = scores[0]
    if first.groups is None:
        return Scores.whole(float(np.dot(weights, [each.value for each in scores])), queries=first.queries)
    if first.statistic is mean_of:
        return Scores.mean(np.tensordot(weights, [each.values for each in scores], axes=1), groups=first.groups)
    ends = np.cumsum([each.columns.shape[1] for each in scores])

    def statistic(sums: Float[np.ndarray, "draws columns"]) -> Float[np.ndarray, " draws"]:
        parts = np.split(sums, ends[:-1], axis=1)
        pieces = [each.statistic(part) for each, part in zip(scores, parts, strict=True)]
        return np.asarray(np.tensordot(weights, pieces, axes=1))

    blocks = [each.columns for each in scores]
    beside = sparse.hstack(blocks, format="csr") if sparse.issparse(blocks[0]) else np.concatenate(blocks, axis=1)
    return Scores(columns=beside, groups=first.groups, statistic=statistic, queries=first.queries)


def results(
    cells: Sequence[Cell], *, protocol: str, bootstrap: Bootstrap = USUAL, test_set: str = "", seed: int = 0
) -> dict[str, Any]:
    """Everything there is to say of ``cells`` in numbers: a ``gmail.results/1`` document.

    Args:
        cells: One per model; those that differ only in their seed are summarised together.
        protocol: Name and version of the evaluation protocol, written into every row.
        bootstrap: Draws and level of every interval.
        test_set: Digest of what was tested on.
        seed: Of the profile.

    Returns:
        ``rows`` (one per cell and metric), ``aggregates`` (over seeds), ``comparisons`` (GMAIL's arm against
        others on `headlines`, paired by query, p-values after Holm), ``shares`` (of the distance from naive to real
        images that alignment closes) and ``metrics`` (full name -> value).
    """
    groups: dict[tuple[str, str, bool], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.task, cell.arm, cell.dual_projection), []).append(cell)
    rows = [
        _row(cell, metric, scores, bootstrap=bootstrap, protocol=protocol)
        for cell in cells
        for metric, scores in cell.scores.items()
    ]
    aggregates = [
        _aggregate(same, metric, bootstrap=bootstrap, protocol=protocol)
        for same in groups.values()
        for metric in same[0].scores
    ]
    return {
        "schema": SCHEMA,
        "protocol": protocol,
        "test_set": test_set,
        "seed": seed,
        "confidence": bootstrap.level,
        "resamples": bootstrap.draws,
        "rows": rows,
        "aggregates": aggregates,
        "comparisons": _comparisons(groups, bootstrap=bootstrap, protocol=protocol),
        "shares": _shares(groups, bootstrap=bootstrap, protocol=protocol),
        "metrics": {f"{_name(row)}.{row['metric']}": row["mean"] for row in aggregates},
    }


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['task']}.{row['arm']}{'+dual' * row['dual_projection']}"


def _row(cell: Cell, metric: str, scores: Scores, *, bootstrap: Bootstrap, protocol: str) -> dict[str, Any]:
    low, high = scores.interval(bootstrap)
    about = {"task": cell.task, "arm": cell.arm, "seed": cell.seed, "dual_projection": cell.dual_projection}
    value = {"metric": metric, "value": scores.value, "low": low, "high": high, "n": scores.queries}
    return {**about, **value, "protocol": protocol, "preprocess": cell.preprocess}


def _aggregate(cells: Sequence[Cell], metric: str, *, bootstrap: Bootstrap, protocol: str) -> dict[str, Any]:
    scores = over_seeds([cell.scores[metric] for cell in cells])
    low, high = scores.interval(bootstrap)
    spread = seed_summary([cell.scores[metric].value for cell in cells], level=bootstrap.level)
    return {
        "task": cells[0].task,
        "arm": cells[0].arm,
        "dual_projection": cells[0].dual_projection,
        "metric": metric,
        "mean": spread.mean,
        "sd": spread.standard_deviation,
        "low": low,
        "high": high,
        "seed_low": spread.low,
        "seed_high": spread.high,
        "seeds": spread.seeds,
        "n": scores.queries,
        "protocol": protocol,
        "preprocess": cells[0].preprocess,
    }


_Groups: TypeAlias = Mapping[tuple[str, str, bool], Sequence[Cell]]


def _matched(
    groups: _Groups, task: str, dual: bool, arms: Sequence[str], metric: str
) -> tuple[list[int | None], dict[str, list[Scores]]] | None:
    """The seeds of the first arm and each arm's scores for them, or None where an arm lacks the metric or a seed.

    An arm without dual projection stands in where it has no cell with it; an arm with a single cell (``none``) stands
    beside every seed.
    """
    found: dict[str, list[Scores]] = {}
    seeds: list[int | None] = []
    for arm in arms:
        cells = groups.get((task, arm, dual)) or groups.get((task, arm, False)) or ()
        by_seed = {cell.seed: cell.scores[metric] for cell in cells if metric in cell.scores}
        seeds = seeds or list(by_seed)
        if len(by_seed) == 1:
            found[arm] = list(by_seed.values()) * len(seeds)
        elif by_seed and set(seeds) <= set(by_seed):
            found[arm] = [by_seed[seed] for seed in seeds]
        else:
            return None
    return seeds, found


def _tasks(groups: _Groups) -> list[tuple[str, bool]]:
    return [(task, dual) for task, arm, dual in groups if arm == TREATMENT and task != "gap"]


def _comparisons(groups: _Groups, *, bootstrap: Bootstrap, protocol: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for task, dual in _tasks(groups):
        for metric in headlines(protocol):
            for baseline in BASELINES:
                matched = _matched(groups, task, dual, (TREATMENT, baseline), metric)
                if matched is None:
                    continue
                seeds, scores = matched
                ours, theirs = over_seeds(scores[TREATMENT]), over_seeds(scores[baseline])
                test = difference(theirs, other=ours, bootstrap=bootstrap)
                found.append(
                    {
                        "task": task,
                        "dual_projection": dual,
                        "metric": metric,
                        "treatment": TREATMENT,
                        "baseline": baseline,
                        "difference": test.difference.value,
                        "low": test.difference.low,
                        "high": test.difference.high,
                        "by_seed": [
                            a.value - b.value for a, b in zip(scores[TREATMENT], scores[baseline], strict=True)
                        ],
                        "seeds": len(seeds),
                        "p_value": test.p_value,
                        "n": ours.queries,
                        "protocol": protocol,
                    }
                )
    corrected = holm({str(n): row["p_value"] for n, row in enumerate(found)})
    return [{**row, "p_value": corrected[str(n)]} for n, row in enumerate(found)]


def _shares(groups: _Groups, *, bootstrap: Bootstrap, protocol: str) -> list[dict[str, Any]]:
    """(aligned - naive) / (real - naive); None unless real is better than naive beyond its interval."""

    def closed(sums: Float[np.ndarray, "draws 3"]) -> Float[np.ndarray, " draws"]:
        naive, aligned, real = sums.T
        return (aligned - naive) / np.maximum(real - naive, 1e-9)

    found: list[dict[str, Any]] = []
    for task, dual in _tasks(groups):
        for metric in headlines(protocol):
            arms = (TREATMENT, "generated-naive", "real")
            matched = _matched(groups, task, dual, arms, metric)
            if matched is None:
                continue
            aligned, naive, real = (over_seeds(matched[1][arm]) for arm in arms)
            distance = difference(naive, other=real, bootstrap=bootstrap).difference
            share: dict[str, float | None] = {"share": None, "low": None, "high": None}
            if distance.low > 0:
                columns = np.stack([naive.values, aligned.values, real.values], axis=1)
                part = bootstrap_sums(columns, statistic=closed, groups=naive.groups, bootstrap=bootstrap)
                share = {"share": part.value, "low": part.low, "high": part.high}
            about = {"task": task, "dual_projection": dual, "metric": metric, "protocol": protocol}
            means = {"naive": naive.value, "aligned": aligned.value, "real": real.value, "n": naive.queries}
            found.append({**about, **means, **share})
    return found
