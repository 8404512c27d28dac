"""How sure a number is: bootstrap intervals by image, paired tests, spread over seeds, Holm's correction.

Captions of one image are dependent, so the bootstrap draws images (clusters) with replacement and takes all
the rows of a drawn image along (the cluster bootstrap; Field and Welsh 2007). Intervals are percentile
intervals. Every draw comes from the given seed, so a result can be had again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from gmail_cli.errors import InputError, UsageError

_CELLS = 1 << 22  # weights held at once: 32 MiB


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
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Interval of a mean over rows, resampling the groups (images) they belong to.

    Args:
        values: One value per query, e.g. ``Ranks.hits(1)`` or CIDEr per image.
        groups: The image of each row; None when every row is its own unit.

    Raises:
        InputError: For no rows, values that are not finite, or groups of another length.
        UsageError: For a level outside (0, 1) or fewer than 100 draws.
    """
    columns = np.stack([_checked(values), np.ones(len(values))], axis=1)
    return bootstrap_sums(columns, statistic=_mean_of_sums, groups=groups, draws=draws, level=level, seed=seed)


def bootstrap_sums(
    columns: Float[np.ndarray, "rows columns"],
    *,
    statistic: Callable[[Float[np.ndarray, "draws columns"]], Float[np.ndarray, " draws"]],
    groups: Int[np.ndarray, " rows"] | None = None,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Interval of any statistic of column sums: ratios, mean-per-class accuracy, corpus BLEU.

    Args:
        columns: One row of countable things per query.
        statistic: From summed columns, one row per draw, to one value per draw.

    Raises:
        InputError, UsageError: As :func:`bootstrap_mean`.
    """
    _check_settings(draws, level)
    totals = _group_sums(_checked(columns), groups)
    estimate = float(statistic(totals.sum(axis=0, keepdims=True))[0])
    drawn = np.concatenate([statistic(sums) for sums in _resampled(totals, draws, seed)])
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value=estimate, low=float(low), high=float(high), level=level, clusters=len(totals))


def paired_difference(
    base: Float[np.ndarray, " rows"],
    *,
    other: Float[np.ndarray, " rows"],
    groups: Int[np.ndarray, " rows"] | None = None,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> PairedDifference:
    """Compare two systems on the same queries (paired bootstrap).

    The p-value is two-sided: the share of draws, centred on the observed difference, that lie at least as far
    from it as it lies from zero, with one added to both counts so that it is never 0.

    Raises:
        InputError, UsageError: As :func:`bootstrap_mean`; also when the two lengths differ.
    """
    base, other = _checked(base), _checked(other)
    require_same_queries(len(base), len(other))
    columns = np.stack([other - base, np.ones(len(base))], axis=1)
    return difference_of_sums(columns, statistic=_mean_of_sums, groups=groups, draws=draws, level=level, seed=seed)


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
    columns: Float[np.ndarray, "rows columns"],
    *,
    statistic: Callable[[Float[np.ndarray, "draws columns"]], Float[np.ndarray, " draws"]],
    groups: Int[np.ndarray, " rows"] | None = None,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> PairedDifference:
    """:func:`paired_difference` of two systems by a statistic of column sums, such as corpus BLEU.

    Args:
        columns: One row per query: what both systems did with it.
        statistic: From summed columns, one row per draw, to other minus base of each draw.

    Raises:
        InputError, UsageError: As :func:`bootstrap_mean`.
    """
    _check_settings(draws, level)
    totals = _group_sums(_checked(columns), groups)
    observed = float(statistic(totals.sum(axis=0, keepdims=True))[0])
    drawn = np.concatenate([statistic(sums) for sums in _resampled(totals, draws, seed)])
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    rounding = 1e-12 * max(1.0, abs(observed))
    extreme = int((np.abs(drawn - observed) >= abs(observed) - rounding).sum())
    return PairedDifference(
        difference=Interval(value=observed, low=float(low), high=float(high), level=level, clusters=len(totals)),
        p_value=(extreme + 1) / (draws + 1),
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


def _mean_of_sums(sums: Float[np.ndarray, "draws 2"]) -> Float[np.ndarray, " draws"]:
    return sums[:, 0] / sums[:, 1]


def _group_sums(
    columns: Float[np.ndarray, "rows columns"], groups: Int[np.ndarray, " rows"] | None
) -> Float[np.ndarray, "groups columns"]:
    if groups is None:
        return columns
    if groups.shape != (len(columns),):
        raise InputError(
            f"groups have shape {groups.shape}, the values have {len(columns)} rows",
            hint="Give the image of each row.",
        )
    _, index = np.unique(groups, return_inverse=True)
    sums = [np.bincount(index.reshape(-1), weights=column) for column in columns.T]
    return np.stack(sums, axis=1)


def _resampled(
    totals: Float[np.ndarray, "groups columns"], draws: int, seed: int
) -> Iterator[Float[np.ndarray, "chunk columns"]]:
    """Column sums of resampled groups, some draws at a time."""
    rng = np.random.default_rng(seed)
    count = len(totals)
    step = max(1, _CELLS // count)
    for start in range(0, draws, step):
        size = min(step, draws - start)
        drawn = rng.integers(count, size=(size, count)) + count * np.arange(size)[:, None]
        weights = np.bincount(drawn.reshape(-1), minlength=size * count).reshape(size, count)
        yield weights @ totals


def _checked(values: np.ndarray) -> Float[np.ndarray, "rows ..."]:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim not in (1, 2) or not len(values) or not np.isfinite(values).all():
        raise InputError(
            f"values of shape {values.shape} are empty, not finite or of more than two dimensions",
            hint="Give one finite value per query.",
        )
    return values


def _check_settings(draws: int, level: float) -> None:
    if draws < 100 or not 0 < level < 1:
        raise UsageError(
            f"{draws} draws at level {level}: at least 100 draws and a level between 0 and 1 are needed",
            hint="Use 2000 draws at level 0.95.",
        )
