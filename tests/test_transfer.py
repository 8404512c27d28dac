"""The transfer estimate on worked cases, and what the verdict says."""

from __future__ import annotations

import numpy as np
import pytest

from gmail_cli.components import transfer
from gmail_cli.components.objectives import GeneratedFrom, RealImage, pair
from gmail_cli.components.transfer import Task, View


def test_ridge_recovers_a_linear_map_and_an_unpenalised_intercept():
    x = np.random.default_rng(0).normal(size=(200, 3))
    true = np.array([[1.0, 0.0], [2.0, -1.0], [0.0, 3.0]])
    weights, intercept = transfer.ridge(x, x @ true + [5.0, -7.0], penalty=1e-9)
    np.testing.assert_allclose(weights, true, atol=1e-6)
    np.testing.assert_allclose(intercept, [5, -7], atol=1e-6)
    shrunk, offset = transfer.ridge(x, x @ true + [5.0, -7.0], penalty=1e9)
    np.testing.assert_allclose(shrunk, 0, atol=1e-6)
    np.testing.assert_allclose(offset, (x @ true + [5.0, -7.0]).mean(axis=0), atol=1e-6)


def test_scores_count_right_classes_and_reciprocal_ranks():
    train = np.eye(3)[[0, 1, 2] * 20]
    answers = np.eye(3)
    right = np.array([[True, False, False], [False, False, True]])
    test = np.array([[1.0, 0, 0], [0.5, 0.3, 0.2]])  # the second image's right answer comes third
    for kind, expected in (("classes", [1, 0]), ("captions", [1, 1 / 3])):
        task = Task(kind, answers[[0, 1, 2] * 20], answers, right)
        np.testing.assert_allclose(transfer.scores(task, train=train, test=test), expected)


def test_an_encoder_that_maps_all_to_one_point_scores_by_chance():
    """Equal answers share their ranks: a collapse must not look like a success."""
    answers = np.eye(4)
    task = Task("captions", answers[[0, 1, 2, 3]], answers, np.eye(4, dtype=bool))
    found = transfer.scores(task, train=np.ones((4, 2)), test=np.ones((4, 2)))
    np.testing.assert_allclose(found, 1 / 2.5)


def _classes(rows: int) -> tuple[list[GeneratedFrom], list[RealImage], np.ndarray]:
    texts = ["a cat" if row % 2 else "a dog" for row in range(rows)]
    made = [GeneratedFrom(f"g{row}", text) for row, text in enumerate(texts)]
    real = [RealImage(f"r{row}", frozenset({text})) for row, text in enumerate(texts)]
    noise = np.random.default_rng(1).normal(0, 0.2, (rows, 4))
    vectors = noise + np.where(np.arange(rows)[:, None] % 2, [1, 0, 0, 1], [0, 1, 0, 1])
    return made, real, vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _no_texts(_texts: list[str]) -> np.ndarray:
    raise AssertionError("captions that repeat need no text encoder")


@pytest.mark.parametrize(
    ("objective", "swapped", "says", "advises"),
    [
        ("paper", "before", "alignment helps", False),
        ("paper", "after", "alignment hurts", True),
        ("cosine", "after", "alignment hurts", False),
        ("paper", "", "no measurable difference", True),
    ],
)
def test_verdict(objective: str, swapped: str, says: str, advises: bool):
    """A view whose classes lie the wrong way round teaches the regression the wrong thing."""
    made, real, vectors = _classes(60)
    wrong = vectors[:, [1, 0, 2, 3]]
    before, after = (View(train=wrong if swapped == name else vectors, held=vectors) for name in ("before", "after"))
    report = transfer.validate(
        before,
        after,
        real=vectors,
        pairs=pair(made, real),
        task=transfer.make_task(made, real, embed=_no_texts),
        objective=objective,
    )
    assert report["transfer_task"] == "classes"
    assert says in report["verdict"]
    assert ("align.objective=recommended" in report["verdict"]) == advises
    assert report["before"]["transfer"] == (0 if swapped == "before" else 1)
    assert report["after"]["transfer"] == (0 if swapped == "after" else 1)
    assert report["before"]["generated_to_real_recall_at_1"] == 1


def test_captions_of_their_own_are_told_apart_by_text():
    made = [GeneratedFrom(f"r{row}", f"caption {row}") for row in range(6)]
    real = [RealImage(f"r{row}", frozenset({f"caption {row}", f"other {row}"})) for row in range(3)]
    asked: list[list[str]] = []

    def embed(texts: list[str]) -> np.ndarray:
        asked.append(texts)
        return np.arange(len(texts), dtype=np.float32)[:, None]

    task = transfer.make_task(made, real, embed=embed)
    assert task.kind == "captions"
    assert asked[0] == sorted(f"{kind} {row}" for kind in ("caption", "other") for row in range(3))
    assert task.targets[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert task.right.sum(axis=1).tolist() == [2, 2, 2]


def test_labels_stand_in_where_captions_are_worded_differently():
    made = [GeneratedFrom(f"g{row}", f"drawing {row}", "cat" if row % 2 else "dog") for row in range(8)]
    real = [RealImage(f"r{row}", frozenset({f"photo {row}"}), "cat" if row % 2 else "dog") for row in range(8)]
    task = transfer.make_task(made, real, embed=_no_texts)
    assert task.kind == "classes"
    np.testing.assert_array_equal(task.targets @ task.candidates.T > 0, task.right)
