"""Classification: hand-worked scores, brute-force votes, ties, and what must not change an accuracy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmail_cli.components.metrics.classification import (
    centroid_scores,
    centroids,
    class_embeddings,
    classify,
    linear_probe,
    neighbour_scores,
    probe_scores,
    zero_shot,
)
from gmail_cli.errors import InputError, UsageError


def test_accuracies_worked_by_hand() -> None:
    scores = np.array([[3.0, 1, 2], [1, 1, 0], [0, 2, 1], [5, 5, 5]])
    found = classify(scores, labels=np.array([0, 0, 2, 1]))
    np.testing.assert_allclose(found.correct(1), [1, 1 / 2, 0, 1 / 3])
    np.testing.assert_allclose(found.correct(2), [1, 1, 1, 2 / 3])
    np.testing.assert_allclose(found.correct(3), 1)
    expected = [[1.5, 0.5, 0], [1 / 3, 1 / 3, 1 / 3], [0, 1, 0]]
    np.testing.assert_allclose(found.confusion, expected)
    assert found.mean_per_class() == pytest.approx((1.5 / 2 + 1 / 3 + 0) / 3)
    assert found.metrics() == pytest.approx(
        {"top_1_accuracy": (1.5 + 1 / 3) / 4, "mean_per_class_accuracy": (1.5 / 2 + 1 / 3) / 3}
    )


def test_mean_per_class_skips_classes_that_do_not_occur() -> None:
    assert classify(np.eye(3)[[0, 0, 1]], labels=np.array([0, 0, 1])).mean_per_class() == 1


def test_a_collapsed_model_scores_one_in_classes() -> None:
    vector = np.random.default_rng(0).normal(size=(1, 96)).astype(np.float32)
    images, prompts = np.repeat(vector, 50, axis=0), np.repeat(vector, 21, axis=0)
    vectors = class_embeddings(prompts, class_rows=np.arange(21) % 7, classes=7)
    found = zero_shot(images, class_vectors=vectors, labels=np.arange(50) % 7)
    assert found.metrics() == pytest.approx(
        {"top_1_accuracy": 1 / 7, "top_5_accuracy": 5 / 7, "mean_per_class_accuracy": 1 / 7}
    )


def test_templates_are_normalised_before_and_after_averaging() -> None:
    prompts = np.array([[10.0, 0], [0, 1], [0, 3]], np.float32)
    vectors = class_embeddings(prompts, class_rows=np.array([1, 1, 0]), classes=2)
    np.testing.assert_allclose(vectors, [[0, 1], [0.5**0.5, 0.5**0.5]], rtol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(0, 2))
def test_accuracies_are_fractions_that_grow_with_k_and_ignore_order(seed: int, classes: int, spread: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(-spread, spread + 1, (12, classes)).astype(np.float32)
    labels = rng.integers(0, classes, 12)
    kept = scores.copy()
    found = classify(scores, labels=labels)
    np.testing.assert_array_equal(scores, kept)
    accuracy = np.stack([found.correct(k) for k in range(1, classes + 1)])
    assert (accuracy >= 0).all()
    assert (np.diff(accuracy, axis=0) >= 0).all()
    np.testing.assert_array_equal(accuracy[-1], 1)
    np.testing.assert_allclose(np.trace(found.confusion), found.correct(1).sum())
    np.testing.assert_allclose(found.confusion.sum(axis=1), np.bincount(labels, minlength=classes))
    rows, columns = rng.permutation(12), rng.permutation(classes)
    moved = classify(scores[np.ix_(rows, columns)], labels=np.argsort(columns)[labels[rows]])
    assert moved.metrics() == pytest.approx(found.metrics())


def test_the_nearest_centroid_is_the_nearest() -> None:
    rng = np.random.default_rng(0)
    train, test, labels = rng.normal(size=(90, 5)), rng.normal(size=(40, 5)), np.arange(90) % 3
    means = centroids(train, labels=labels, classes=3)
    np.testing.assert_allclose(means, [train[labels == c].mean(axis=0) for c in range(3)], rtol=1e-5, atol=1e-6)
    distances = np.linalg.norm(test[:, None] - means, axis=2)
    scores = centroid_scores(test, centroids=means)
    np.testing.assert_array_equal(scores.argmax(axis=1), distances.argmin(axis=1))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.booleans())
def test_votes_equal_a_brute_force_count(seed: int, k: int, grouped: bool) -> None:
    rng = np.random.default_rng(seed)
    samples, references = rng.integers(-1, 2, (5, 3)), rng.integers(-1, 2, (12, 3))
    labels = rng.integers(0, 3, 12)
    groups, reference_groups = np.arange(5), np.arange(12) % 6
    votes = neighbour_scores(
        samples.astype(np.float32),
        references=references.astype(np.float32),
        labels=labels,
        classes=3,
        k=k,
        groups=groups if grouped else None,
        reference_groups=reference_groups if grouped else None,
    )
    for row, sample in enumerate(samples):
        expected = np.zeros(3)
        allowed = [r for r in range(12) if not grouped or reference_groups[r] != groups[row]]
        left = k
        for score in sorted({int(sample @ references[r]) for r in allowed}, reverse=True):
            at = [r for r in allowed if int(sample @ references[r]) == score]
            for r in at:
                expected[labels[r]] += min(left, len(at)) / len(at)
            left = max(left - len(at), 0)
        np.testing.assert_allclose(votes[row], expected, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_classified_is_refused() -> None:
    vectors = np.eye(3, dtype=np.float32)
    labels = np.arange(3)
    with pytest.raises(InputError, match="class 1 of 4 has no prompt"):
        class_embeddings(vectors, class_rows=np.array([0, 2, 3]), classes=4)
    with pytest.raises(InputError, match="prompt vector 0 has length 0"):
        class_embeddings(np.zeros((3, 3), np.float32), class_rows=labels, classes=3)
    with pytest.raises(InputError, match="labels go from 0 to 2, classes from 0 to 1"):
        classify(vectors[:, :2], labels=labels)
    with pytest.raises(InputError, match="labels have shape"):
        classify(vectors, labels=labels[:2])
    with pytest.raises(InputError, match="not finite"):
        classify(np.full((2, 2), np.nan), labels=np.zeros(2, np.int64))
    with pytest.raises(InputError, match="one dimension in common"):
        zero_shot(vectors, class_vectors=vectors[:, :2], labels=labels)
    with pytest.raises(InputError, match="k = 4 neighbours of 3"):
        neighbour_scores(vectors, references=vectors, labels=labels, classes=3, k=4)
    with pytest.raises(InputError, match="fewer than 3 references"):
        neighbour_scores(
            vectors,
            references=vectors,
            labels=labels,
            classes=3,
            k=3,
            groups=labels,
            reference_groups=labels,
        )
    with pytest.raises(UsageError, match="one side only"):
        neighbour_scores(vectors, references=vectors, labels=labels, classes=3, k=1, groups=labels)
    with pytest.raises(UsageError, match="top-0"):
        classify(vectors, labels=labels).correct(0)


# -- linear probe ------------------------------------------------------------------------------------------------


def test_a_linear_probe_is_where_the_gradient_of_its_objective_vanishes() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 90)
    vectors = np.eye(3)[labels][:, [0, 1, 2, 0]] + rng.normal(size=(90, 4))
    found = linear_probe(vectors, labels=labels, classes=3, strength=0.7)

    def loss(weights: np.ndarray) -> float:
        logits = vectors @ weights[:, :-1].T + weights[:, -1]
        likelihood = logits[np.arange(90), labels] - np.log(np.exp(logits).sum(axis=1))
        return float(-likelihood.sum() + (weights[:, :-1] ** 2).sum() / 1.4)

    for place in np.ndindex(found.shape):
        step = np.zeros_like(found)
        step[place] = 1e-4
        assert abs(loss(found + step) - loss(found - step)) / 2e-4 < 1e-3
    assert loss(found) < loss(np.zeros_like(found)) - 5
    close = linear_probe(vectors, labels=labels, classes=3, strength=100.0)
    assert np.square(close[:, :-1]).sum() > np.square(found[:, :-1]).sum()


def test_a_linear_probe_of_two_mirrored_points() -> None:
    """By symmetry b = 0 and w = (a, -a), and a^2 + 2 log(1 + exp(-2 a)) is least where a = 2 / (1 + exp(2 a))."""
    found = linear_probe(np.array([[1.0], [-1.0]]), labels=np.array([0, 1]), classes=2, strength=1.0)
    a = found[0, 0]
    assert found == pytest.approx(np.array([[a, 0], [-a, 0]]), abs=1e-6)
    assert a == pytest.approx(2 / (1 + np.exp(2 * a)), abs=1e-5)
    assert probe_scores(np.array([[2.0]]), weights=found) == pytest.approx(np.array([[2 * a, -2 * a]]), abs=1e-6)
