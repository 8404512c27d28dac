"""Intervals: hand-worked cases, scipy as a peer, coverage, and what must not change them."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from gmail_cli.components.metrics.intervals import (
    Bootstrap,
    bootstrap_mean,
    bootstrap_sums,
    holm,
    paired_difference,
    seed_summary,
)
from gmail_cli.errors import InputError, UsageError


def test_the_mean_of_independent_values_agrees_with_scipy() -> None:
    values = np.random.default_rng(0).exponential(size=300)
    ours = bootstrap_mean(values, bootstrap=Bootstrap(draws=4000))
    theirs = stats.bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=1)
    assert ours.value == pytest.approx(values.mean())
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.01)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.01)
    assert ours.clusters == 300


def test_a_half_at_five_thousand_has_the_half_width_of_the_binomial() -> None:
    found = bootstrap_mean(np.arange(5000) % 2, bootstrap=Bootstrap(draws=1000))
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * 0.5 / 5000**0.5, rel=0.1)


def test_rows_of_one_image_are_resampled_together() -> None:
    """Five equal captions per image carry one image's information: the interval must not shrink."""
    per_image = np.random.default_rng(0).random(200)
    once = bootstrap_mean(per_image, bootstrap=Bootstrap(seed=3))
    copied = bootstrap_mean(
        np.repeat(per_image, 5), groups=np.repeat(np.arange(200) * 7, 5), bootstrap=Bootstrap(seed=3)
    )
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high))
    assert copied.clusters == 200
    naive = bootstrap_mean(np.repeat(per_image, 5), bootstrap=Bootstrap(seed=3))
    assert naive.high - naive.low < 0.6 * (once.high - once.low)


def test_images_with_more_captions_weigh_more() -> None:
    found = bootstrap_mean(np.array([1.0, 1.0, 1.0, 0.0]), groups=np.array([4, 4, 4, 9]))
    assert found.value == 0.75
    assert (found.low, found.high) == (0, 1)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(5)
    covered = 0
    for trial in range(200):
        image = rng.normal(size=60)
        rows = np.repeat(image, 3) + rng.normal(size=180)
        found = bootstrap_mean(rows, groups=np.repeat(np.arange(60), 3), bootstrap=Bootstrap(draws=300, seed=trial))
        covered += found.low <= 0 <= found.high
    assert 0.88 <= covered / 200 <= 0.98


def test_a_statistic_of_sums_is_resampled_as_a_whole() -> None:
    columns = np.array([[1.0, 2.0], [3.0, 4.0], [2.0, 2.0]])
    found = bootstrap_sums(columns, statistic=lambda sums: sums[:, 0] / sums[:, 1])
    assert found.value == 6 / 8
    assert found.low >= 1 / 2
    assert found.high <= 1


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(0, 100))
def test_intervals_stay_in_range_and_ignore_order(values: list[float], seed: int) -> None:
    array = np.array(values)
    kept = array.copy()
    groups = np.arange(len(array)) // 2
    found = bootstrap_mean(array, groups=groups, bootstrap=Bootstrap(draws=100, seed=seed))
    np.testing.assert_array_equal(array, kept)
    assert array.min() - 1e-12 <= found.low <= found.high <= array.max() + 1e-12
    order = np.random.default_rng(seed).permutation(len(array))
    again = bootstrap_mean(array[order], groups=groups[order], bootstrap=Bootstrap(draws=100, seed=seed))
    assert (again.low, again.high) == pytest.approx((found.low, found.high))
    assert bootstrap_mean(array, groups=groups, bootstrap=Bootstrap(draws=100, seed=seed)) == found


def test_a_paired_test_sees_what_an_unpaired_one_cannot() -> None:
    rng = np.random.default_rng(0)
    base = rng.random(400)
    better = base + 0.02 + 0.05 * rng.normal(size=400)
    found = paired_difference(base, other=better)
    assert found.difference.value == pytest.approx((better - base).mean())
    assert found.difference.low > 0
    assert found.p_value < 0.002
    reverse = paired_difference(better, other=base)
    assert reverse.difference.value == pytest.approx(-found.difference.value)
    assert reverse.p_value == found.p_value


def test_no_difference_has_p_one_and_random_differences_are_uniform() -> None:
    same = paired_difference(np.ones(20), other=np.ones(20))
    assert same.p_value == 1
    assert (same.difference.low, same.difference.high) == (0, 0)
    rng = np.random.default_rng(1)
    p = [
        paired_difference(np.zeros(80), other=rng.normal(size=80), bootstrap=Bootstrap(draws=200, seed=i)).p_value
        for i in range(200)
    ]
    assert stats.kstest(p, "uniform").pvalue > 0.001
    assert np.mean(np.array(p) <= 0.05) < 0.12


def test_paired_p_values_agree_with_the_t_test() -> None:
    rng = np.random.default_rng(7)
    base, other = rng.normal(size=(2, 300))
    other += 0.12
    ours = paired_difference(base, other=other, bootstrap=Bootstrap(draws=8000)).p_value
    assert ours == pytest.approx(stats.ttest_rel(other, base).pvalue, abs=0.03)


def test_seeds_are_summarised_by_the_t_distribution() -> None:
    found = seed_summary([70.0, 72.0, 74.0])
    assert (found.mean, found.standard_deviation, found.seeds) == (72, 2, 3)
    theirs = stats.t.interval(0.95, 2, loc=72, scale=2 / 3**0.5)
    assert (found.low, found.high) == pytest.approx(theirs)
    one = seed_summary([0.5])
    assert (one.mean, one.standard_deviation, one.low, one.high, one.seeds) == (0.5, None, None, None, 1)


def test_holm_worked_by_hand() -> None:
    # Sorted 0.01 0.02 0.03 0.04 -> 4x 3x 2x 1x = 0.04 0.06 0.06 0.04, made monotone.
    found = holm({"d": 0.04, "a": 0.01, "c": 0.03, "b": 0.02})
    assert list(found) == ["d", "a", "c", "b"]
    assert found == pytest.approx({"a": 0.04, "b": 0.06, "c": 0.06, "d": 0.06})
    assert holm({"only": 0.7}) == {"only": 0.7}
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_lies_between_the_raw_values_and_bonferroni(values: list[float]) -> None:
    raw = {str(i): p for i, p in enumerate(values)}
    adjusted = holm(raw)
    for name, p in raw.items():
        assert p <= adjusted[name] <= 1
        assert adjusted[name] <= max(min(1, len(raw) * q) for q in raw.values() if q <= p)


def test_what_has_no_interval_is_refused() -> None:
    with pytest.raises(InputError, match=r"shape \(0,\)"):
        bootstrap_mean(np.array([]))
    with pytest.raises(InputError, match="finite"):
        bootstrap_mean(np.array([1.0, np.nan]))
    with pytest.raises(InputError, match="groups"):
        bootstrap_mean(np.ones(3), groups=np.zeros(2, np.int64))
    with pytest.raises(InputError, match="2 and 3 queries"):
        paired_difference(np.ones(2), other=np.ones(3))
    with pytest.raises(UsageError, match="50 draws"):
        bootstrap_mean(np.ones(3), bootstrap=Bootstrap(draws=50))
    with pytest.raises(UsageError, match="level 95"):
        bootstrap_mean(np.ones(3), bootstrap=Bootstrap(level=95))
    with pytest.raises(InputError, match=r"p-value of a is 1\.5"):
        holm({"a": 1.5})
    with pytest.raises(InputError, match="empty"):
        seed_summary([])


def test_sums_of_a_thousand_classes_need_bounded_memory() -> None:
    """As many columns as ImageNet has classes, twice, for each of its test images: dense they would be 800 MB."""
    from gmail_cli.components.scores import Scores

    rng = np.random.default_rng(0)
    labels = rng.integers(1000, size=50_000)
    right = (rng.random(50_000) < 0.5 + labels / 4000).astype(float)
    scores = Scores.per_class(right, labels=labels, classes=1000, groups=np.arange(50_000))
    tracemalloc.start()
    low, high = scores.interval(Bootstrap(draws=100))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6
    shares = np.array([right[labels == each].mean() for each in range(1000)])
    assert scores.value == pytest.approx(shares.mean())
    assert low is not None
    assert high is not None
    assert low < shares.mean() < high
    width = 1.96 * np.sqrt((shares * (1 - shares) / np.bincount(labels)).sum()) / 1000
    assert (high - low) / 2 == pytest.approx(width, rel=0.35)
