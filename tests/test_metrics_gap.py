"""Gap metrics: closed forms, independent oracles, and their invariants."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg

from gmail_cli.components.metrics import gap
from gmail_cli.components.metrics.gap import (
    centroid_cosine,
    centroid_distance,
    covariance_distance,
    frechet_distance,
    linear_separability,
    maximum_mean_discrepancy,
    neighbour_separability,
    paired_cosine,
    plot_coordinates,
    unpaired_cosine,
)
from gmail_cli.errors import InputError


def clouds(seed: int, *, rows: int = 60, dim: int = 6, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    real = rng.normal(size=(rows, dim)).astype(np.float32)
    return real, (real + 0.5 * rng.normal(size=(rows, dim)) + shift).astype(np.float32)


def test_cosines_worked_by_hand() -> None:
    real = np.array([[1.0, 0], [0, 2]])
    generated = np.array([[1.0, 1], [0, 5]])
    np.testing.assert_allclose(paired_cosine(real, generated=generated), [0.5**0.5, 1])
    # Different captions: (real 0, generated 1) 0 and (real 1, generated 0) sqrt(1/2).
    assert unpaired_cosine(real, generated=generated) == pytest.approx(0.5**0.5 / 2)
    assert centroid_distance(real, generated=generated) == pytest.approx(2.0)  # (.5, 1) and (.5, 3)
    assert centroid_cosine(real, generated=generated) == pytest.approx(
        (0.25 + 3) / ((0.25 + 1) ** 0.5 * (0.25 + 9) ** 0.5)
    )


def test_sets_that_are_no_pairs_are_compared_all_with_all() -> None:
    real, generated = np.array([[1.0, 0], [0, 2]]), np.array([[1.0, 1], [0, 5], [0, 1]])
    # Real 0: sqrt(1/2), 0, 0; real 1: sqrt(1/2), 1, 1.
    found = unpaired_cosine(real, generated=generated, paired=False)
    assert found == pytest.approx((2 * 0.5**0.5 + 2) / 6)


def test_the_covariance_distance_worked_by_hand() -> None:
    square = np.array([[1.0, 1], [1, -1], [-1, 1], [-1, -1]]) * (3 / 4) ** 0.5  # unit covariance
    # diag(1, 4) against diag(9, 4): |8, 0|. The mean plays no part.
    assert covariance_distance(square * [1, 2], generated=square * [3, 2] + 5) == pytest.approx(8)
    real, generated = clouds(0, rows=50)
    expected = ((np.cov(real, rowvar=False) - np.cov(generated, rowvar=False)) ** 2).sum() ** 0.5
    assert covariance_distance(real, generated=generated) == pytest.approx(expected)


def test_blocks_change_no_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    real, generated = clouds(5, rows=50, shift=0.2)
    metrics = (paired_cosine, unpaired_cosine, covariance_distance)
    whole = [metric(real, generated=generated) for metric in metrics]  # type: ignore[operator]
    distance = frechet_distance(real, generated=generated).distance
    monkeypatch.setattr(gap, "_BLOCK_ROWS", 7)
    for metric, expected in zip(metrics, whole, strict=True):
        assert metric(real, generated=generated) == pytest.approx(expected)  # type: ignore[operator]
    assert frechet_distance(real, generated=generated).distance == pytest.approx(distance)
    generated[33] = 0
    with pytest.raises(InputError, match="vector 33 has length zero"):
        paired_cosine(real, generated=generated)


def test_the_frechet_distance_of_known_gaussians() -> None:
    """For commuting covariances it is |shift|^2 + sum (s_r - s_g)^2."""
    square = np.array([[1.0, 1], [1, -1], [-1, 1], [-1, -1]]) * (3 / 4) ** 0.5  # unit covariance
    real, generated = square * [1, 2], square * [3, 2] + [5, 0]
    found = frechet_distance(real, generated=generated)
    assert found.distance == pytest.approx(25 + (1 - 3) ** 2)
    assert (found.real_samples, found.generated_samples) == (4, 4)


def test_the_frechet_distance_agrees_with_the_matrix_square_root() -> None:
    real, generated = clouds(0, rows=80, dim=10, shift=0.3)
    generated = generated @ np.random.default_rng(1).normal(size=(10, 10)).astype(np.float32)
    cov_r, cov_g = np.cov(real, rowvar=False), np.cov(generated, rowvar=False)
    shift = real.mean(axis=0, dtype=np.float64) - generated.mean(axis=0, dtype=np.float64)
    expected = shift @ shift + np.trace(cov_r + cov_g - 2 * linalg.sqrtm(cov_r @ cov_g).real)
    assert frechet_distance(real, generated=generated).distance == pytest.approx(expected, rel=1e-6)


def test_mmd_equals_its_definition() -> None:
    real, generated = clouds(0, rows=25, shift=0.5)
    generated = generated[:20]
    both = np.concatenate([real, generated]).astype(np.float64)
    squared = ((both[:, None] - both) ** 2).sum(axis=2)
    width = np.median([squared[i, j] for i in range(45) for j in range(i)])
    kernel = np.exp(-squared / width)
    rr = np.mean([kernel[i, j] for i in range(25) for j in range(25) if i != j])
    gg = np.mean([kernel[i, j] for i in range(25, 45) for j in range(25, 45) if i != j])
    expected = rr + gg - 2 * kernel[:25, 25:].mean()
    assert maximum_mean_discrepancy(real, generated=generated) == pytest.approx(expected)


def test_mmd_is_unbiased_at_zero() -> None:
    rng = np.random.default_rng(0)
    values = [
        maximum_mean_discrepancy(rng.normal(size=(40, 4)), generated=rng.normal(size=(40, 4))) for _ in range(100)
    ]
    assert abs(np.mean(values)) < 3 * np.std(values) / 10
    assert min(values) < 0 < max(values)


@pytest.mark.parametrize("separability", [linear_separability, neighbour_separability])
def test_separability_runs_from_a_half_to_one(separability: object) -> None:
    rng = np.random.default_rng(0)
    real, generated = rng.normal(size=(2, 300, 8)).astype(np.float32)
    assert separability(real, generated=generated) == pytest.approx(0.5, abs=0.07)  # type: ignore[operator]
    assert separability(real, generated=generated + 6) > 0.97  # type: ignore[operator]
    assert separability(real, generated=real.copy()) == 0.5  # type: ignore[operator]
    assert separability(real[:150], generated=generated + 6) > 0.97  # type: ignore[operator]


def test_only_neighbours_see_a_gap_that_no_line_splits() -> None:
    rng = np.random.default_rng(0)
    real = rng.normal(size=(200, 2)) * 0.1 + [1, 0]
    generated = rng.normal(size=(200, 2)) * 0.1 + [0, 1]
    flip = rng.choice([-1.0, 1.0], size=(200, 1))
    assert neighbour_separability(real * flip, generated=generated * flip) > 0.99
    assert linear_separability(real * flip, generated=generated * flip) < 0.65


def test_groups_never_straddle_folds() -> None:
    """Rows with a signature per caption: a probe that saw the pair in training would be below a half."""
    rng = np.random.default_rng(0)
    signatures = rng.normal(size=(40, 200))
    real = np.repeat(signatures, 5, axis=0) + 0.01 * rng.normal(size=(200, 200))
    generated = signatures + 0.01 * rng.normal(size=(40, 200))
    groups = np.repeat(np.arange(40), 5)
    grouped = linear_separability(real, generated=generated, real_groups=groups, generated_groups=np.arange(40))
    assert grouped == pytest.approx(0.5, abs=0.1)
    with pytest.raises(InputError, match="1 groups cannot fill 5 folds"):
        linear_separability(real, generated=generated, real_groups=groups * 0, generated_groups=np.zeros(40, np.int64))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-2, 2))
def test_gaps_are_in_range_and_ignore_order_and_leave_inputs_alone(seed: int, shift: float) -> None:
    real, generated = clouds(seed, rows=30, dim=4, shift=shift)
    kept = real.copy(), generated.copy()
    order = np.random.default_rng(seed).permutation(30)
    real_after, generated_after = real[order], generated[order]
    for metric, low, high in (
        (lambda r, g: paired_cosine(r, generated=g).mean(), -1, 1),
        (lambda r, g: unpaired_cosine(r, generated=g), -1, 1),
        (lambda r, g: centroid_distance(r, generated=g), 0, np.inf),
        (lambda r, g: centroid_cosine(r, generated=g), -1, 1),
        (lambda r, g: frechet_distance(r, generated=g).distance, 0, np.inf),
        (lambda r, g: covariance_distance(r, generated=g), 0, np.inf),
        (lambda r, g: maximum_mean_discrepancy(r, generated=g), -2, 2),
        (lambda r, g: neighbour_separability(r, generated=g), 0, 1),
    ):
        value = metric(real, generated)
        assert low - 1e-9 <= value <= high + 1e-9
        assert metric(real_after, generated_after) == pytest.approx(value, rel=1e-4, abs=1e-6)
    np.testing.assert_array_equal(real, kept[0])
    np.testing.assert_array_equal(generated, kept[1])


def test_equal_sets_have_no_gap() -> None:
    real, _ = clouds(3)
    assert paired_cosine(real, generated=real) == pytest.approx(np.ones(60))
    assert centroid_distance(real, generated=real) == 0
    assert covariance_distance(real, generated=real) == 0
    assert frechet_distance(real, generated=real).distance == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_coordinates_keep_pairs_and_separate_what_is_apart(method: str) -> None:
    rng = np.random.default_rng(0)
    real, generated = rng.normal(size=(90, 10)), rng.normal(size=(90, 10)) + 4
    first = plot_coordinates(real, generated=generated, method=method, limit=60)  # type: ignore[arg-type]
    again = plot_coordinates(real, generated=generated, method=method, limit=60)  # type: ignore[arg-type]
    assert first.real.shape == first.generated.shape == (60, 2)
    np.testing.assert_array_equal(first.real_rows, first.generated_rows)
    np.testing.assert_array_equal(first.real, again.real)
    np.testing.assert_array_equal(first.generated, again.generated)
    assert np.isfinite(first.real).all()
    assert linear_separability(first.real, generated=first.generated) > 0.98


def test_tsne_keeps_neighbours_where_pca_cannot() -> None:
    """Thirty tight clusters in 20 dimensions: nearest neighbours must stay within their cluster."""
    rng = np.random.default_rng(0)
    cluster = np.repeat(np.arange(30), 8)
    points = rng.normal(size=(30, 20))[cluster] + 0.3 * rng.normal(size=(240, 20))
    share = {}
    for method in ("pca", "tsne"):
        shown = plot_coordinates(points[::2], generated=points[1::2], method=method)  # type: ignore[arg-type]
        positions = np.empty((240, 2))
        positions[::2], positions[1::2] = shown.real, shown.generated
        distances = np.linalg.norm(positions[:, None] - positions, axis=2)
        np.fill_diagonal(distances, np.inf)
        nearest = np.argsort(distances, axis=1)[:, :3]
        share[method] = (cluster[nearest] == cluster[:, None]).mean()
    assert share["tsne"] > 0.97
    assert share["pca"] < 0.8


def test_what_has_no_gap_is_refused() -> None:
    real, generated = clouds(0, rows=5)
    with pytest.raises(InputError, match="not paired"):
        paired_cosine(real, generated=generated[:3])
    with pytest.raises(InputError, match="6 dimensions, generated ones 2"):
        centroid_distance(real, generated=generated[:, :2])
    with pytest.raises(InputError, match="generated embeddings"):
        frechet_distance(real, generated=np.full((5, 6), np.nan))
    with pytest.raises(InputError, match="length zero"):
        paired_cosine(real, generated=np.zeros((5, 6)))
    with pytest.raises(InputError, match="at least two rows"):
        frechet_distance(real[:1], generated=generated)
    with pytest.raises(InputError, match="no scale"):
        maximum_mean_discrepancy(np.ones((4, 3)), generated=np.ones((4, 3)))
    with pytest.raises(InputError, match="real groups have shape"):
        linear_separability(real, generated=generated, real_groups=np.zeros(2, np.int64))
