"""Fidelity metrics: by hand, against their definitions written out, and their invariants."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmail_cli.components.metrics import fidelity
from gmail_cli.components.metrics.fidelity import Manifolds, kernel_distance, manifold_metrics, vendi_score
from gmail_cli.errors import InputError


def line(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float64)[:, None]


def oracle_manifolds(real: np.ndarray, generated: np.ndarray, k: int) -> Manifolds:
    """The definitions, one pair at a time."""

    def distance(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.linalg.norm(x.astype(np.float64) - y.astype(np.float64)))

    def radii(rows: np.ndarray) -> list[float]:
        return [sorted(distance(x, y) for j, y in enumerate(rows) if j != i)[k - 1] for i, x in enumerate(rows)]

    of_real, of_generated = radii(real), radii(generated)
    between = [[distance(x, y) for y in generated] for x in real]
    r, g = range(len(real)), range(len(generated))
    return Manifolds(
        precision=sum(any(between[i][j] <= of_real[i] for i in r) for j in g) / len(g),
        recall=sum(any(between[i][j] <= of_generated[j] for j in g) for i in r) / len(r),
        density=sum(between[i][j] < of_real[i] for i in r for j in g) / (k * len(g)),
        coverage=sum(min(between[i]) < of_real[i] for i in r) / len(r),
    )


def test_manifolds_worked_by_hand() -> None:
    # Radii of real 1 1 2 17, of generated 2 2 1 1. Balls that hold 0.5: two; 2.5: one; 40 and 41: none.
    found = manifold_metrics(line(0, 1, 3, 20), generated=line(0.5, 2.5, 40, 41), k=1)
    assert found == Manifolds(precision=2 / 4, recall=3 / 4, density=3 / 4, coverage=3 / 4)


def test_only_precision_and_recall_count_the_rim() -> None:
    # All radii are 1; the only pair within a ball is (1, 2), at distance 1.
    found = manifold_metrics(line(0, 1), generated=line(2, 3), k=1)
    assert found == Manifolds(precision=1 / 2, recall=1 / 2, density=0, coverage=0)


@pytest.mark.parametrize(("rows", "others", "k", "dtype"), [(30, 20, 5, np.float32), (12, 40, 3, np.float64)])
def test_manifolds_equal_their_definitions(rows: int, others: int, k: int, dtype: type) -> None:
    rng = np.random.default_rng(rows)
    real = (rng.normal(size=(rows, 3)) + 50).astype(dtype)
    generated = (1.2 * rng.normal(size=(others, 3)) + 51).astype(dtype)
    expected = oracle_manifolds(real, generated, k)
    assert 0 < expected.precision < 1
    assert 0 < expected.coverage < 1
    assert manifold_metrics(real, generated=generated, k=k) == expected


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3))
def test_manifolds_are_in_range_and_ignore_order_and_leave_inputs_alone(seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    real, generated = rng.normal(size=(14, 2)).astype(np.float32), rng.normal(size=(9, 2)).astype(np.float32)
    kept = real.copy(), generated.copy()
    found = manifold_metrics(real, generated=generated, k=k)
    assert found == oracle_manifolds(real, generated, k)
    for share in (found.precision, found.recall, found.coverage):
        assert 0 <= share <= 1
    assert 0 <= found.density <= len(real) / k
    assert manifold_metrics(rng.permutation(real), generated=rng.permutation(generated), k=k) == found
    turned = manifold_metrics(generated, generated=real, k=k)
    assert (turned.precision, turned.recall) == (found.recall, found.precision)
    np.testing.assert_array_equal(real, kept[0])
    np.testing.assert_array_equal(generated, kept[1])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([np.float32, np.float64]))
def test_a_set_against_itself_is_faithful_and_covered(seed: int, dtype: type) -> None:
    real = np.random.default_rng(seed).normal(size=(15, 40)).astype(dtype)
    assert manifold_metrics(real, generated=real.copy(), k=3) == Manifolds(precision=1, recall=1, density=1, coverage=1)


def test_rounding_breaks_no_tie(monkeypatch: pytest.MonkeyPatch) -> None:
    """The nearest fellow of half the images is one hub, on the rim of their balls.

    In the real set the hub is a tile of its own, a matrix-vector product, whose last bits differ from those of the
    matrix product it is part of in the generated set.
    """
    monkeypatch.setattr(fidelity, "_TILE_ROWS", 100)
    directions = np.random.default_rng(0).normal(size=(100, 97))
    directions[:50] += 10
    hub = directions[:50].mean(axis=0, keepdims=True)
    real = np.concatenate([directions, hub])
    found = manifold_metrics(real, generated=real[::-1], k=1)
    assert found == Manifolds(precision=1, recall=1, density=1, coverage=1)


def test_copies_lie_in_balls_without_extent() -> None:
    """A collapsed set: every distance is 0, however a matrix product rounds it."""
    vector = np.random.default_rng(0).normal(size=(1, 97)).astype(np.float32)
    found = manifold_metrics(np.repeat(vector, 9, axis=0), generated=np.repeat(vector, 8, axis=0), k=3)
    assert found == Manifolds(precision=1, recall=1, density=0, coverage=0)


def test_blocks_bound_memory_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    real, generated = rng.normal(size=(1500, 4)), rng.normal(size=(1400, 4)) + 0.5
    whole = manifold_metrics(real, generated=generated)
    monkeypatch.setattr(fidelity, "_CELLS", 1 << 16)
    monkeypatch.setattr(fidelity, "_TILE_ROWS", 100)
    seen: list[tuple[int, int]] = []
    tracemalloc.start()
    blocked = manifold_metrics(real, generated=generated, progress=lambda *step: seen.append(step))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert blocked == whole
    assert peak < 4 << 20  # all distances of one set would take 17 MiB
    assert seen[-1] == (2900, 2900)
    assert seen == sorted(seen)


def test_the_kernel_distance_worked_by_hand() -> None:
    # k(x, y) = (xy + 1)^3. Within real: k(0,1) = 1; within generated: k(1,2) = 27; between: 1, 1, 8, 27.
    found = kernel_distance(line(0, 1), generated=line(1, 2))
    assert found.distance == pytest.approx(1 + 27 - 2 * 37 / 4)
    assert (found.standard_deviation, found.subsets, found.subset_size) == (None, 1, 2)


def test_the_kernel_distance_equals_its_definition() -> None:
    rng = np.random.default_rng(0)
    real, generated = rng.normal(size=(12, 5)).astype(np.float32), rng.normal(size=(12, 5)).astype(np.float32) + 1

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return (sum(float(a) * float(b) for a, b in zip(x, y, strict=True)) / 5 + 1) ** 3

    pairs = [(i, j) for i in range(12) for j in range(12)]
    within = [np.mean([kernel(rows[i], rows[j]) for i, j in pairs if i != j]) for rows in (real, generated)]
    between = np.mean([kernel(real[i], generated[j]) for i, j in pairs])
    assert kernel_distance(real, generated=generated).distance == pytest.approx(sum(within) - 2 * between)


def test_the_kernel_distance_averages_subsets_without_bias() -> None:
    rng = np.random.default_rng(0)
    real, generated = rng.normal(size=(300, 4)), rng.normal(size=(200, 4))
    found = kernel_distance(real, generated=generated, subset_size=50)
    assert (found.subsets, found.subset_size) == (100, 50)
    assert found.standard_deviation is not None
    assert abs(found.distance) < found.standard_deviation
    assert kernel_distance(real, generated=generated, subset_size=50) == found
    assert kernel_distance(real, generated=generated + 1, subset_size=50).distance > 5 * found.standard_deviation


def test_vendi_counts_what_is_different() -> None:
    axes = np.eye(3)
    assert vendi_score(axes) == pytest.approx(3)
    assert vendi_score(np.ones((7, 3))) == pytest.approx(1)
    assert vendi_score(axes[[0, 0, 1, 1]] * [[1], [2], [3], [4]]) == pytest.approx(2)
    shares = 0.75, 0.25
    assert vendi_score(axes[[0, 0, 0, 1]]) == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(4, 9), (9, 4), (6, 6)]))
def test_vendi_equals_its_definition_and_is_in_range(seed: int, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=shape)
    kept = vectors.copy()
    unit = [row / math.sqrt(sum(value**2 for value in row)) for row in vectors]
    kernel = np.array([[float(np.dot(x, y)) for y in unit] for x in unit]) / len(unit)
    values = [value for value in np.linalg.eigvals(kernel).real if value > 1e-12]
    found = vendi_score(vectors)
    assert found == pytest.approx(math.exp(-sum(value * math.log(value) for value in values)))
    assert 1 - 1e-9 <= found <= min(shape) + 1e-9
    assert vendi_score(rng.permutation(vectors)) == pytest.approx(found)
    np.testing.assert_array_equal(vectors, kept)


def test_vendi_in_blocks_is_vendi(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = np.random.default_rng(0).normal(size=(50, 6))
    whole = vendi_score(vectors)
    monkeypatch.setattr(fidelity, "_TILE_ROWS", 7)
    assert vendi_score(vectors) == pytest.approx(whole)
    vectors[30] = 0
    with pytest.raises(InputError, match="vector 30 has length zero"):
        vendi_score(vectors)


def test_what_has_no_fidelity_is_refused() -> None:
    rows = np.random.default_rng(0).normal(size=(6, 3))
    with pytest.raises(InputError, match="5 generated images cannot have 5 nearest neighbours"):
        manifold_metrics(rows, generated=rows[:5])
    with pytest.raises(InputError, match="3 dimensions, generated ones 2"):
        manifold_metrics(rows, generated=rows[:, :2])
    with pytest.raises(InputError, match="not finite"):
        kernel_distance(rows, generated=rows * np.nan)
    with pytest.raises(InputError, match="at least two rows"):
        kernel_distance(rows[:1], generated=rows)
