"""The transfer estimate where the right answer is known, and what the verdict says."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from gmail_cli.components import transfer
from gmail_cli.components.partners import GeneratedFrom, RealImage, pair
from gmail_cli.components.tasks import contrastive_loss
from gmail_cli.components.transfer import Captions, Classes, View

CLASSES, DIM, ROWS = 4, 16, 400


def _unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def _no_texts(_texts: list[str]) -> np.ndarray:
    raise AssertionError("captions that repeat need no text encoder")


class _Labelled:
    """Gaussian classes around the first axes; generated images lie elsewhere by a known shift."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.labels = np.arange(ROWS) % CLASSES
        self.made = [GeneratedFrom(f"g{row}", f"class {label}") for row, label in enumerate(self.labels)]
        self.images = [RealImage(f"r{row}", frozenset({f"class {label}"})) for row, label in enumerate(self.labels)]
        self.real, self.partners, self.drawn = (
            np.eye(CLASSES, DIM)[self.labels] + rng.normal(0, 0.25, (ROWS, DIM)) for _ in range(3)
        )
        along = np.roll(np.eye(CLASSES, DIM), 1, axis=0)[self.labels]  # evidence for the next class
        self.shift = 0.9 * along + 0.5 * np.eye(DIM)[CLASSES]  # along class directions, and across them

    def report(self, before: np.ndarray, after: np.ndarray, *, objective: str = "paper") -> dict[str, Any]:
        before, after, real = (_unit(vectors) for vectors in (before, after, self.real))
        return transfer.validate(
            View(train=before, held=before),
            View(train=after, held=after),
            partners=_unit(self.partners),
            real=real,
            pairs=pair(self.made, self.images),
            task=transfer.make_task(self.made, self.images, embed=_no_texts, scale=1.0),
            objective=objective,
        )


class _Captioned:
    """Texts and images of one meaning lie together in an 8-dimensional part of the space.

    ``turned`` images have half of the meaning the wrong way round.
    """

    def __init__(self, rows: int = 100, held: int = 40) -> None:
        rng = np.random.default_rng(1)
        meaning = rng.normal(size=(rows + held, 8))
        basis = np.linalg.qr(rng.normal(size=(64, 8)))[0].T

        def placed(what: np.ndarray) -> np.ndarray:
            return what @ basis + rng.normal(0, 0.05, (len(what), 64))

        told = {way: placed(meaning + rng.normal(0, 0.5, meaning.shape)) for way in "ab"}
        self.words = {f"{row} told {way}": told[way][row] for row in range(rows + held) for way in "ab"}
        self.made = [GeneratedFrom(f"i{row // 2}", f"{row // 2} told {'ab'[row % 2]}") for row in range(2 * rows)]
        self.images = [
            RealImage(f"i{row}", frozenset({f"{row} told a", f"{row} told b"})) for row in range(rows, rows + held)
        ]
        shown = meaning[np.arange(2 * rows) // 2]
        self.partners, self.drawn, self.real = placed(shown), placed(shown), placed(meaning[rows:])
        self.turned = placed(shown * np.repeat([1, -1], 4))
        self.held = [GeneratedFrom(image.id, "") for image in self.images]

    def report(self, before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
        before, after, real, partners = (_unit(each) for each in (before, after, self.real, self.partners))
        return transfer.validate(
            View(train=before, held=real),
            View(train=after, held=real),
            partners=partners,
            real=real,
            pairs=pair(self.held, self.images),
            task=self.task(),
            objective="cosine",
        )

    def task(self) -> Captions:
        task = transfer.make_task(self.made, self.images, embed=self.embed, scale=10.0)
        assert isinstance(task, Captions)
        return task

    def embed(self, texts: list[str]) -> np.ndarray:
        return _unit(np.stack([self.words[text] for text in texts]))


def test_alignment_that_undoes_a_shift_helps():
    world = _Labelled()
    report = world.report(world.drawn + world.shift, world.drawn)
    assert report["transfer_task"] == "classes"
    assert report["verdict"].startswith("alignment helps: transfer accuracy")
    assert report["before"]["transfer"] < 0.8
    assert report["after"]["transfer"] > 0.95
    assert report["transfer_share_closed"] == pytest.approx(1, abs=0.05)
    assert "of the distance closed" in report["verdict"]
    assert json.loads(json.dumps(report, allow_nan=False)) == report

    captioned = _Captioned()
    report = captioned.report(captioned.turned, captioned.drawn)
    assert report["transfer_task"] == "captions"
    assert report["verdict"].startswith("alignment helps: transfer mean reciprocal rank")
    assert 0.8 < report["transfer_share_closed"] < 1.2


def test_a_collapse_hurts_although_it_leaves_no_gap():
    world = _Labelled()
    cone = 3 * np.eye(DIM)[-1]  # embeddings of an encoder have a mean, so one point can lie amid them
    world.real, world.partners = world.real + cone, world.partners + cone
    point = np.repeat(world.real.mean(axis=0, keepdims=True), ROWS, axis=0)
    report = world.report(world.drawn + cone + np.eye(DIM)[CLASSES], point)
    assert report["verdict"].startswith("alignment hurts")
    assert report["after"]["transfer"] == 1 / CLASSES
    assert report["after"]["centroid_distance"] < 0.5 * report["before"]["centroid_distance"]


def test_a_collapse_hurts_even_where_learning_nothing_beats_learning_from_generated_images():
    world = _Captioned()
    report = world.report(world.turned, np.repeat(world.drawn[:1], len(world.drawn), axis=0))
    assert report["transfer_gain"] > 2 * report["transfer_standard_error"], "the text map as it was does better"
    assert report["verdict"].startswith("alignment hurts")
    assert report["collapsed"]
    assert report["transfer_share_closed"] is None
    assert "f_g has collapsed, its embeddings vary 0.00% as much as real ones" in report["verdict"]


@pytest.mark.parametrize("world", [_Labelled(), _Captioned()], ids=["classes", "captions"])
def test_no_change_gains_exactly_nothing(world: _Labelled | _Captioned):
    report = world.report(world.drawn, world.drawn)
    assert report["transfer_gain"] == 0
    assert report["transfer_standard_error"] == 0
    assert report["before"] == report["after"]
    assert report["verdict"].startswith("alignment makes no measurable difference")


def test_no_share_of_a_distance_that_cannot_be_measured():
    world = _Labelled()
    report = world.report(world.partners, world.drawn)
    assert report["transfer_share_closed"] is None
    assert "distance" not in report["verdict"]


@pytest.mark.parametrize(("objective", "advises"), [("paper", True), ("cosine", False), ("recommended", False)])
def test_advice_is_for_those_whom_another_objective_did_not_help(objective: str, advises: bool):
    world = _Labelled()
    hurt = world.report(world.drawn, world.drawn + world.shift, objective=objective)["verdict"]
    assert hurt.startswith("alignment hurts")
    assert ("align.objective=recommended" in hurt) == advises
    helped = world.report(world.drawn + world.shift, world.drawn, objective=objective)["verdict"]
    assert "align.objective" not in helped


def test_softmax_regression_ends_where_the_gradient_by_torch_is_zero():
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(60, 5)), rng.integers(0, 3, 60)
    found = torch.from_numpy(transfer.softmax_regression(x, labels, classes=3, penalty=0.1)).requires_grad_()
    value = torch.nn.functional.cross_entropy(torch.from_numpy(x) @ found, torch.from_numpy(labels))
    (value + 0.05 * found.square().sum()).backward()
    assert found.grad is not None
    assert found.grad.abs().max() < 2 * transfer.TOLERANCE


def test_a_class_never_taught_is_never_found():
    made = [GeneratedFrom("g", text) for text in ["cat", "dog"] * 10]
    real = [RealImage("r", frozenset({text})) for text in ["cat", "owl"] * 10]
    task = transfer.make_task(made, real, embed=_no_texts, scale=1.0)
    assert isinstance(task, Classes)
    vectors = np.eye(2)[[0, 1] * 10]
    np.testing.assert_array_equal(task.scores(vectors, test=vectors), [1, 0] * 10)


def test_without_a_text_tower_images_are_judged_by_their_classes():
    made = [GeneratedFrom(f"i{row}", f"caption {row}", "cat dog"[4 * (row % 2) :][:3]) for row in range(8)]
    real = [RealImage(f"i{row}", frozenset({f"caption {row}"}), "cat dog"[4 * (row % 2) :][:3]) for row in range(8)]
    assert isinstance(transfer.make_task(made, real, embed=None, scale=1.0, captioned=True), Classes)
    assert transfer.make_task(made, real[:3], embed=None, scale=1.0) is None
    unnamed = [RealImage(image.id, image.texts) for image in real]
    assert transfer.make_task(made, unnamed, embed=None, scale=1.0) is None


def test_all_captions_of_an_image_count_in_both_directions(monkeypatch: pytest.MonkeyPatch):
    """Untrained, on three images and four texts: ranks worked by hand."""
    monkeypatch.setattr(transfer, "STEPS", 0)
    texts = np.eye(3)[[0, 1, 1, 2]]
    task = Captions(
        said=np.array([0]),
        owners=np.array([0]),
        texts=texts,
        candidates=texts,
        right=np.array([[0, 0], [1, 0], [1, 1], [2, 1], [3, 2]]),  # text 1 describes images 0 and 1
        scale=1.0,
        seed=0,
    )
    np.testing.assert_allclose(task.scores(np.eye(3), test=np.eye(3)), [1, 1, 1])
    # Images that look like text 3, texts 1 and 2, and text 0. Texts 0 and 3 see their own image tied for the last two
    # places, (1/2 + 1/3) / 2; text 1 sees image 1 first, which is right; so does text 2.
    tied = (1 / 2 + 1 / 3) / 2
    by_text = np.array([(tied + 1) / 2, 1, tied])
    # Image 0 sees its texts 0 and 1 tied with text 2 behind text 3; image 2 its text 3 tied with texts 1 and 2.
    by_image = np.array([2 / 3 / 2 + 1 / 3 / 3, 1, (1 / 2 + 1 / 3 + 1 / 4) / 3])
    np.testing.assert_allclose(task.scores(np.eye(3), test=np.eye(3)[[2, 1, 0]]), (by_text + by_image) / 2)


def test_the_text_map_pulls_captions_to_their_images():
    world = _Captioned()
    turned = _unit(world.turned)
    task = world.task()
    head = task.fit(turned)
    with torch.no_grad():
        mapped = head(torch.from_numpy(task.texts)).numpy()[task.said]
    assert (mapped * turned).sum(axis=1).mean() > (task.texts[task.said] * turned).sum(axis=1).mean() + 0.2


def test_siblings_are_no_negatives_of_one_another(monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def spy(*vectors: torch.Tensor, **about: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append((about["positives"], about["excluded"]))
        return contrastive_loss(*vectors, **about)

    monkeypatch.setattr(transfer, "contrastive_loss", spy)
    monkeypatch.setattr(transfer, "STEPS", 1)
    world = _Captioned()
    world.task().fit(_unit(world.drawn))  # 200 captions, two of each image, in one batch
    ((positives, excluded),) = seen
    assert torch.equal(positives, torch.eye(200, dtype=torch.bool))
    assert excluded.sum(dim=1).tolist() == [1] * 200
    assert not excluded.diagonal().any()


def test_captions_of_their_own_are_told_apart_by_text():
    made = [GeneratedFrom(f"r{row}", f"caption {row}") for row in range(6)]
    real = [RealImage(f"r{row}", frozenset({f"caption {row}", f"other {row}"})) for row in range(3)]
    asked: list[list[str]] = []

    def embed(texts: list[str]) -> np.ndarray:
        asked.append(texts)
        return np.arange(len(texts), dtype=np.float32)[:, None]

    task = transfer.make_task(made, real, embed=embed, scale=1.0)
    assert isinstance(task, Captions)
    assert asked[0] == [f"caption {row}" for row in range(6)]
    assert asked[1] == sorted(f"{kind} {row}" for kind in ("caption", "other") for row in range(3))
    assert task.said.tolist() == [0, 1, 2, 3, 4, 5]
    assert task.right.tolist() == [[0, 0], [3, 0], [1, 1], [4, 1], [2, 2], [5, 2]]


def test_labels_stand_in_where_captions_are_worded_differently():
    made = [GeneratedFrom(f"g{row}", f"drawing {row}", "cat" if row % 2 else "dog") for row in range(8)]
    real = [RealImage(f"r{row}", frozenset({f"photo {row}"}), "cat" if row % 2 else "dog") for row in range(8)]
    task = transfer.make_task(made, real, embed=_no_texts, scale=1.0)
    assert isinstance(task, Classes)
    np.testing.assert_array_equal(task.said, [1, 0] * 4)
    np.testing.assert_array_equal(task.right, np.eye(2, dtype=bool)[[1, 0] * 4])


def test_labels_do_not_stand_in_for_captions_of_the_real_images():
    made = [GeneratedFrom(f"r{row}", f"photo {row}", "cat" if row % 2 else "dog") for row in range(8)]
    held = [RealImage(f"h{row}", frozenset({f"held {row}"}), "cat" if row % 2 else "dog") for row in range(8)]

    def embed(texts: list[str]) -> np.ndarray:
        return np.arange(len(texts), dtype=np.float32)[:, None]

    assert isinstance(transfer.make_task(made, held, embed=embed, scale=1.0, captioned=True), Captions)
