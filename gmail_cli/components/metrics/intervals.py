"""How sure a number is: bootstrap intervals by image, paired tests, spread over seeds, Holm's correction.

Captions of one image are dependent, so the bootstrap draws images (clusters) with replacement and takes all
the rows of a drawn image along (the cluster bootstrap; Field and Welsh 2007). Intervals are percentile
intervals. Every draw comes from the given seed, so a result can be had again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from gmail_cli.errors import InputError, UsageError

Columns: TypeAlias = Float[np.ndarray, "rows columns"] | sparse.csr_array
"""One row of countable things per query; sparse where most of them are 0, such as the classes of an image."""

_CELLS = 1 << 22  # weights held at once: 32 MiB


@dataclass(frozen=True, kw_only=True)
class Bootstrap:
    """How intervals are found.

    Attributes:
        draws: Resamples.
        level: Of the percentile interval.
        seed: Of the draws.

    Raises:
        UsageError: For a level outside (0, 1) or fewer than 100 draws.
    """

    draws: int = 2000
    level: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.draws < 100 or not 0 < self.level < 1:
            raise UsageError(
                f"{self.draws} draws at level {self.level}: at least 100 draws and a level between 0 and 1 are needed",
                hint="Use 2000 draws at level 0.95.",
            )

    def interval(self, drawn: Float[np.ndarray, " draws"]) -> tuple[float, float]:
        """The percentile interval of what was drawn."""
        low, high = np.quantile(drawn, [(1 - self.level) / 2, (1 + self.level) / 2])
        return float(low), float(high)


USUAL = Bootstrap()


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate and its percentile interval; ``clusters`` is the number of independent units."""

    value: float
    low: float
    high: float
    level: float
    clusters: int


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """Difference of means (other minus base) on the same queries, with its interval and two-sided p-value."""

    difference: Interval
    p_value: float


@dataclass(frozen=True, kw_only=True)
class SeedSummary:
    """Mean over seeds; the spread and the t interval are None for a single seed."""

    mean: float
    standard_deviation: float | None
    low: float | None
    high: float | None
    seeds: int


def bootstrap_mean(
    values: Float[np.ndarray, " rows"],
    *,
    groups: Int[np.ndarray, " rows"] | None = None,
    bootstrap: Bootstrap = USUAL,
) -> Interval:
    """Interval of a mean over rows, resampling the groups (images) they belong to.

    Args:
        values: One value per query, e.g. ``Ranks.hits(1)`` or CIDEr per image.
        groups: The image of each row; None when every row is its own unit.
        bootstrap: Draws, level and seed.

    Raises:
        InputError: For no rows, values that are not finite, or groups of another length.
    """
    columns = np.stack([_checked(values), np.ones(len(values))], axis=1)
    return bootstrap_sums(columns, statistic=mean_of, groups=groups, bootstrap=bootstrap)


def bootstrap_sums(
    columns: Columns,
    *,
    statistic: Callable[[Float[np.ndarray, "draws columns"]], Float[np.ndarray, " draws"]],
    groups: Int[np.ndarray, " rows"] | None = None,
    bootstrap: Bootstrap = USUAL,
) -> Interval:
    """Interval of any statistic of column sums: ratios, mean-per-class accuracy, corpus BLEU.

    Args:
        columns: One row of countable things per query.
        statistic: From summed columns, one row per draw, to one value per draw.

    Raises:
        InputError: As :func:`bootstrap_mean`.
    """
    totals = _group_sums(_checked_columns(columns), groups)
    estimate = float(statistic(total(totals))[0])
    drawn = np.concatenate([statistic(sums) for sums in _resampled(totals, bootstrap)])
    low, high = bootstrap.interval(drawn)
    return Interval(value=estimate, low=low, high=high, level=bootstrap.level, clusters=totals.shape[0])


def paired_difference(
    base: Float[np.ndarray, " rows"],
    *,
    other: Float[np.ndarray, " rows"],
    groups: Int[np.ndarray, " rows"] | None = None,
    bootstrap: Bootstrap = USUAL,
) -> PairedDifference:
    """Compare two systems on the same queries (paired bootstrap).

    The p-value is two-sided: the share of draws, centred on the observed difference, that lie at least as far
    from it as it lies from zero, with one added to both counts so that it is never 0.

    Raises:
        InputError: As :func:`bootstrap_mean`; also when the two lengths differ.
    """
    base, other = _checked(base), _checked(other)
    require_same_queries(len(base), len(other))
    columns = np.stack([other - base, np.ones(len(base))], axis=1)
    return difference_of_sums(columns, statistic=mean_of, groups=groups, bootstrap=bootstrap)


def require_same_queries(base: int, other: int) -> None:
    """Refuse a paired test of two systems that did not answer equally many queries.

    Raises:
        InputError: Names both numbers.
    """
    if base != other:
        raise InputError(
            f"the two systems have {base} and {other} queries; a paired test needs the same ones",
            hint="Evaluate both on one test set.",
        )


def difference_of_sums(
    columns: Columns,
    *,
    statistic: Callable[[Float[np.ndarray, "draws columns"]], Float[np.ndarray, " draws"]],
    groups: Int[np.ndarray, " rows"] | None = None,
    bootstrap: Bootstrap = USUAL,
) -> PairedDifference:
    """:func:`paired_difference` of two systems by a statistic of column sums, such as corpus BLEU.

    Args:
        columns: One row per query: what both systems did with it.
        statistic: From summed columns, one row per draw, to other minus base of each draw.

    Raises:
        InputError: As :func:`bootstrap_mean`.
    """
    totals = _group_sums(_checked_columns(columns), groups)
    observed = float(statistic(total(totals))[0])
    drawn = np.concatenate([statistic(sums) for sums in _resampled(totals, bootstrap)])
    low, high = bootstrap.interval(drawn)
    rounding = 1e-12 * max(1.0, abs(observed))
    extreme = int((np.abs(drawn - observed) >= abs(observed) - rounding).sum())
    return PairedDifference(
        difference=Interval(value=observed, low=low, high=high, level=bootstrap.level, clusters=totals.shape[0]),
        p_value=(extreme + 1) / (bootstrap.draws + 1),
    )


def seed_summary(values: Sequence[float], *, level: float = 0.95) -> SeedSummary:
    """Mean, sample standard deviation and t interval over runs that differ only in their seed.

    Raises:
        InputError: For no values, or values that are not finite.
    """
    from scipy import stats

    array = _checked(np.asarray(values, dtype=np.float64))
    mean, count = float(array.mean()), len(array)
    if count == 1:
        return SeedSummary(mean=mean, standard_deviation=None, low=None, high=None, seeds=1)
    deviation = float(array.std(ddof=1))
    half = float(stats.t.ppf((1 + level) / 2, count - 1)) * deviation / count**0.5
    return SeedSummary(mean=mean, standard_deviation=deviation, low=mean - half, high=mean + half, seeds=count)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm-Bonferroni adjusted p-values of a family of comparisons, under the same names.

    Raises:
        InputError: For a p-value outside [0, 1].
    """
    for name, p in p_values.items():
        if not 0 <= p <= 1:
            raise InputError(f"p-value of {name} is {p}; it must lie in [0, 1]", hint="Recompute the test.")
    adjusted: dict[str, float] = {}
    reached = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        reached = max(reached, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = reached
    return {name: adjusted[name] for name in p_values}


def mean_of(sums: Float[np.ndarray, "draws columns"]) -> Float[np.ndarray, " draws"]:
    """The mean, from the sums of (value, 1)."""
    return sums[:, 0] / sums[:, 1]


def total(columns: Columns) -> Float[np.ndarray, "1 columns"]:
    """The sums of all rows."""
    return np.asarray(columns.sum(axis=0), dtype=np.float64).reshape(1, -1)


def _group_sums(columns: Columns, groups: Int[np.ndarray, " rows"] | None) -> Columns:
    if groups is None:
        return columns
    rows = columns.shape[0]
    if groups.shape != (rows,):
        raise InputError(
            f"groups have shape {groups.shape}, the values have {rows} rows",
            hint="Give the image of each row.",
        )
    names, index = np.unique(groups, return_inverse=True)
    index = index.reshape(-1)
    if isinstance(columns, sparse.csr_array):
        return sparse.csr_array((np.ones(rows), (index, np.arange(rows))), shape=(len(names), rows)) @ columns
    return np.stack([np.bincount(index, weights=column) for column in columns.T], axis=1)


def _resampled(totals: Columns, bootstrap: Bootstrap) -> Iterator[Float[np.ndarray, "chunk columns"]]:
    """Column sums of resampled groups, some draws at a time."""
    rng = np.random.default_rng(bootstrap.seed)
    count, columns = totals.shape
    step = max(1, _CELLS // max(count, columns))
    for start in range(0, bootstrap.draws, step):
        size = min(step, bootstrap.draws - start)
        drawn = rng.integers(count, size=(size, count)) + count * np.arange(size)[:, None]
        weights = np.bincount(drawn.reshape(-1), minlength=size * count).reshape(size, count)
        yield np.asarray(weights @ totals)


def _checked_columns(columns: Columns) -> Columns:
    if not isinstance(columns, sparse.csr_array):
        return _checked(columns)
    _checked(columns.data)
    return columns


def _checked(values: np.ndarray) -> Float[np.ndarray, "rows ..."]:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim not in (1, 2) or not len(values) or not np.isfinite(values).all():
        raise InputError(
            f"values of shape {values.shape} are empty, not finite or of more than two dimensions",
            hint="Give one finite value per query.",
        )
    return values
