"""Retrieval ranks and recalls: worked by hand, against a brute-force oracle, and their invariants."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise, permutations
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmail_cli.components.metrics.retrieval import (
    KS,
    Ranks,
    RetrievalRanks,
    retrieval_metrics,
    retrieval_ranks,
    retrieval_ranks_in_folds,
)
from gmail_cli.errors import InputError, UsageError


def oracle_hit(scores: list[int], positives: set[int], k: int) -> Fraction:
    """P(any positive in the top k) from the definition: count the ways to fill the top k without one."""
    best = max(scores[p] for p in positives)
    above = sum(s > best for s in scores)
    tied = [i for i, s in enumerate(scores) if s == best]
    wrong = sum(i not in positives for i in tied)
    places = min(k - above, len(tied))
    if places <= 0:
        return Fraction(0)
    return 1 - Fraction(comb(wrong, places), comb(len(tied), places))


def oracle_share(scores: list[int], positives: set[int], k: int) -> Fraction:
    """Expected share of the positives in the top k."""
    total = Fraction(0)
    for p in positives:
        above = sum(s > scores[p] for s in scores)
        tied = sum(s == scores[p] for s in scores)
        total += min(max(Fraction(k - above, tied), Fraction(0)), Fraction(1))
    return total / len(positives)


@st.composite
def worlds(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Small integer vectors: products are exact in fp32, and ties are frequent."""
    images, texts = draw(st.integers(1, 12)), draw(st.integers(1, 20))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spread = draw(st.integers(0, 3))
    x = rng.integers(-spread, spread + 1, (images, 3)).astype(np.float32)
    y = rng.integers(-spread, spread + 1, (texts, 3)).astype(np.float32)
    owners = rng.integers(0, images, texts)
    extra = np.stack([rng.integers(0, texts, 4), rng.integers(0, images, 4)], axis=1)
    return x, y, owners, extra[: draw(st.integers(0, 4))]


@settings(max_examples=60, deadline=None)
@given(worlds())
def test_every_query_equals_the_brute_force_oracle(world: tuple[np.ndarray, ...]) -> None:
    images, texts, owners, extra = world
    kept = [array.copy() for array in world]
    ranks = retrieval_ranks(
        images, texts=texts, owners=owners, extra_positives=extra, all_positives=True, block_bytes=1
    )
    for array, before in zip(world, kept, strict=True):
        np.testing.assert_array_equal(array, before)

    pairs = set(enumerate(owners.tolist())) | {(int(t), int(i)) for t, i in extra}
    scores = (texts @ images.T).astype(int).tolist()
    columns = [list(column) for column in zip(*scores, strict=True)]
    captioned = sorted({i for _, i in pairs})
    assert ranks.image_to_text.query.tolist() == captioned
    assert ranks.images_without_captions == len(images) - len(captioned)
    assert ranks.text_to_image.image.tolist() == owners.tolist()
    for k in (1, 2, 5, 100):
        by_text = [{i for t, i in pairs if t == text} for text in range(len(texts))]
        by_image = [{t for t, i in pairs if i == image} for image in captioned]
        for found, rows, positives in (
            (ranks.text_to_image, scores, by_text),
            (ranks.image_to_text, [columns[i] for i in captioned], by_image),
        ):
            hits = [float(oracle_hit(row, own, k)) for row, own in zip(rows, positives, strict=True)]
            shares = [float(oracle_share(row, own, k)) for row, own in zip(rows, positives, strict=True)]
            np.testing.assert_allclose(found.hits(k), hits, atol=1e-12)
            np.testing.assert_allclose(found.true_recall(k), shares, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(worlds())
def test_expected_ranks_follow_from_the_hit_probabilities(world: tuple[np.ndarray, ...]) -> None:
    images, texts, owners, extra = world
    ranks = retrieval_ranks(images, texts=texts, owners=owners, extra_positives=extra)
    for found in (ranks.text_to_image, ranks.image_to_text):
        hits = np.stack([found.hits(k) for k in range(1, found.candidates + 1)])
        at_rank = np.diff(hits, axis=0, prepend=0)
        place = np.arange(1, found.candidates + 1)[:, None]
        assert (at_rank >= -1e-12).all()
        np.testing.assert_allclose(hits[-1], 1)
        np.testing.assert_allclose(found.expected_rank(), (at_rank * place).sum(axis=0))
        np.testing.assert_allclose(found.reciprocal_rank(), (at_rank / place).sum(axis=0))


@settings(max_examples=30, deadline=None)
@given(worlds(), st.randoms(use_true_random=False))
def test_a_joint_permutation_changes_no_metric(world: tuple[np.ndarray, ...], random: object) -> None:
    images, texts, owners, _ = world
    rng = np.random.default_rng(random.getrandbits(32))  # type: ignore[attr-defined]
    to_image, to_text = rng.permutation(len(images)), rng.permutation(len(texts))
    place = np.argsort(to_image)
    before = retrieval_metrics(retrieval_ranks(images, texts=texts, owners=owners))
    after = retrieval_metrics(retrieval_ranks(images[to_image], texts=texts[to_text], owners=place[owners[to_text]]))
    assert after == pytest.approx(before)
    assert all(0 <= value <= 1 for name, value in before.items() if "recall" in name or "reciprocal" in name)


def test_a_worked_example() -> None:
    # Scores (texts by rows):  t0: 3 1 0   t1: 2 2 0   t2: 0 4 5   t3: 1 1 1
    images = np.eye(3, dtype=np.float32)
    texts = np.array([[3, 1, 0], [2, 2, 0], [0, 4, 5], [1, 1, 1]], np.float32)
    ranks = retrieval_ranks(images, texts=texts, owners=np.array([0, 0, 1, 1]), all_positives=True)

    np.testing.assert_allclose(ranks.text_to_image.hits(1), [1, 1 / 2, 0, 1 / 3])
    np.testing.assert_allclose(ranks.text_to_image.hits(2), [1, 1, 1, 2 / 3])
    # Image 0 scores 3 2 0 1 and owns t0, t1; image 1 scores 1 2 4 1 and owns t2, t3 (tied with t0 for last).
    assert ranks.images_without_captions == 1
    np.testing.assert_allclose(ranks.image_to_text.hits(1), [1, 1])
    np.testing.assert_allclose(ranks.image_to_text.true_recall(1), [1 / 2, 1 / 2])
    np.testing.assert_allclose(ranks.image_to_text.true_recall(3), [1, 3 / 4])
    metrics = retrieval_metrics(ranks, ks=(1, 2), true_recall=True)
    assert metrics["text_to_image_recall_at_1"] == pytest.approx(11 / 24)
    assert metrics["text_to_image_mean_rank"] == pytest.approx((1 + 1.5 + 2 + 2) / 4)
    assert metrics["text_to_image_median_rank"] == pytest.approx(1.75)
    assert metrics["text_to_image_mean_reciprocal_rank"] == pytest.approx((1 + 3 / 4 + 1 / 2 + 11 / 18) / 4)
    assert metrics["image_to_text_recall_at_2"] == 1
    assert metrics["image_to_text_true_recall_at_1"] == 1 / 2


def test_a_collapsed_model_scores_one_in_n() -> None:
    vector = np.random.default_rng(0).normal(size=(1, 96)).astype(np.float32)
    images, texts = np.repeat(vector, 40, axis=0), np.repeat(vector, 200, axis=0)
    ranks = retrieval_ranks(images, texts=texts, owners=np.repeat(np.arange(40), 5))
    metrics = retrieval_metrics(ranks)
    assert metrics["text_to_image_recall_at_1"] == pytest.approx(1 / 40)
    assert metrics["image_to_text_recall_at_1"] == pytest.approx(1 / 40)
    assert metrics["text_to_image_recall_at_10"] == pytest.approx(10 / 40)


def test_a_perfect_model_scores_one() -> None:
    images = np.eye(20, dtype=np.float16)
    texts = np.repeat(images, 3, axis=0)
    metrics = retrieval_metrics(retrieval_ranks(images, texts=texts, owners=np.repeat(np.arange(20), 3)))
    assert all(value == 1 for value in metrics.values())


def test_equal_vectors_tie_wherever_they_stand() -> None:
    """Duplicates of each image, spread over tiles of every size, must get bit-equal scores."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=(70, 96)).astype(np.float32)
    base /= np.linalg.norm(base, axis=1, keepdims=True)
    images = np.concatenate([base] * 5)[rng.permutation(350)]
    texts = base[rng.integers(0, 70, 300)] + 0.05 * rng.normal(size=(300, 96)).astype(np.float32)
    owners = (texts @ images.T).argmax(axis=1)
    for block_bytes in (1, 1 << 19, 4 << 20, 64 << 20):
        ranks = retrieval_ranks(images, texts=texts, owners=owners, block_bytes=block_bytes)
        assert (ranks.text_to_image.greater == 0).all()
        assert (ranks.text_to_image.tied_others == 4).all()
        assert retrieval_metrics(ranks)["text_to_image_recall_at_1"] == pytest.approx(1 / 5)


def test_tiles_do_not_change_ranks_and_report_progress() -> None:
    rng = np.random.default_rng(1)
    images, texts = rng.normal(size=(150, 24)), rng.normal(size=(400, 24)).astype(np.float32)
    owners = rng.integers(0, 150, 400)
    seen: list[tuple[int, int]] = []
    small = retrieval_ranks(
        images,
        texts=texts,
        owners=owners,
        block_bytes=1,
        progress=lambda done, total: seen.append((done, total)),
    )
    large = retrieval_ranks(images, texts=texts, owners=owners, block_bytes=64 << 20)
    np.testing.assert_array_equal(small.text_to_image.to_array(), large.text_to_image.to_array())
    np.testing.assert_array_equal(small.image_to_text.to_array(), large.image_to_text.to_array())
    assert seen == [(i, 21) for i in range(1, 22)]  # 7 x 3 tiles of 64

    full = texts @ images.astype(np.float32).T
    own = full[np.arange(400), owners]
    np.testing.assert_array_equal(small.text_to_image.greater, (full > own[:, None]).sum(axis=1))


def test_stored_ranks_give_the_same_metrics() -> None:
    rng = np.random.default_rng(2)
    images, texts = rng.integers(-1, 2, (2, 30, 4)).astype(np.float32)
    ranks = retrieval_ranks(images, texts=texts, owners=np.arange(30) // 2)
    restored = RetrievalRanks(
        text_to_image=Ranks.from_array(ranks.text_to_image.to_array(), candidates=30),
        image_to_text=Ranks.from_array(ranks.image_to_text.to_array(), candidates=30),
        images_without_captions=ranks.images_without_captions,
    )
    assert retrieval_metrics(restored) == retrieval_metrics(ranks)
    with pytest.raises(UsageError, match="all_positives"):
        restored.image_to_text.true_recall(1)
    with pytest.raises(InputError, match=r"\(3, 2\)"):
        Ranks.from_array(np.zeros((3, 2), np.int64), candidates=3)


def test_what_cannot_be_ranked_is_refused() -> None:
    images, texts, owners = np.ones((3, 4), np.float32), np.ones((5, 4), np.float32), np.zeros(5, np.int64)
    broken = images.copy()
    broken[2, 1] = np.nan
    with pytest.raises(InputError, match="image embedding row 2 "):
        retrieval_ranks(broken, texts=texts, owners=owners)
    with pytest.raises(InputError, match="4 dimensions, text embeddings 2"):
        retrieval_ranks(images, texts=texts[:, :2], owners=owners)
    with pytest.raises(InputError, match=r"owners\[4\] is 3"):
        retrieval_ranks(images, texts=texts, owners=np.array([0, 1, 2, 0, 3]))
    with pytest.raises(InputError, match=r"owners\[0\] is -1"):
        retrieval_ranks(images, texts=texts, owners=owners - 1)
    with pytest.raises(InputError, match="owners has shape"):
        retrieval_ranks(images, texts=texts, owners=owners[:4])
    with pytest.raises(InputError, match=r"text embeddings have shape \(0, 4\)"):
        retrieval_ranks(images, texts=texts[:0], owners=owners[:0])
    with pytest.raises(InputError, match=r"extra_positives images\[0\] is 3"):
        retrieval_ranks(images, texts=texts, owners=owners, extra_positives=np.array([[0, 3]]))
    with pytest.raises(UsageError, match="k = 0"):
        retrieval_ranks(images, texts=texts, owners=owners).text_to_image.hits(0)


def test_default_ks_are_the_papers() -> None:
    assert KS == (1, 5, 10)


# -- extra right answers and folds -------------------------------------------------------------------------------


def oracle_precisions(scores: list[int], positives: set[int]) -> tuple[float, float]:
    """mAP@R and R-precision from their definitions, averaged over every order that the scores allow."""
    orders = [
        order for order in permutations(range(len(scores))) if all(scores[a] >= scores[b] for a, b in pairwise(order))
    ]
    places = len(positives)
    average, share = 0.0, 0.0
    for order in orders:
        right = [item in positives for item in order[:places]]
        average += sum(sum(right[: at + 1]) / (at + 1) for at in range(places) if right[at]) / places
        share += sum(right) / places
    return average / len(orders), share / len(orders)


def test_precisions_at_r_equal_their_definitions_over_all_orders_of_ties() -> None:
    rng = np.random.default_rng(0)
    seen = 0
    for _ in range(12):
        images = rng.integers(-1, 2, (6, 2)).astype(np.float32)
        texts = rng.integers(-1, 2, (5, 2)).astype(np.float32)
        owners = rng.integers(0, 6, 5)
        extra = np.stack([rng.integers(0, 5, 7), rng.integers(0, 6, 7)], axis=1)
        found = retrieval_ranks(images, texts=texts, owners=owners, extra_positives=extra, all_positives=True)
        pairs = {*enumerate(owners.tolist()), *map(tuple, extra.tolist())}
        scores = texts @ images.T
        for ranks, matrix, of in (
            (found.text_to_image, scores, lambda row, pairs=pairs: {i for t, i in pairs if t == row}),
            (found.image_to_text, scores.T, lambda row, pairs=pairs: {t for t, i in pairs if i == row}),
        ):
            for at, row in enumerate(ranks.query.tolist()):
                average, share = oracle_precisions(matrix[row].tolist(), of(row))
                assert ranks.average_precision_at_r()[at] == pytest.approx(average)
                assert ranks.r_precision()[at] == pytest.approx(share)
                seen += len(of(row)) > 2
    assert seen > 20


def test_precision_needs_every_positive_and_pairs_two_columns() -> None:
    eye, rows = np.eye(3, dtype=np.float32), np.arange(3)
    with pytest.raises(UsageError, match="needs the rank of every positive"):
        retrieval_ranks(eye, texts=eye, owners=rows).text_to_image.average_precision_at_r()
    with pytest.raises(InputError, match=r"extra_positives has shape \(3,\)"):
        retrieval_ranks(eye, texts=eye, owners=rows, extra_positives=rows)


def test_folds_are_searched_each_for_itself() -> None:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(20, 5)).astype(np.float32)
    owners = rng.permutation(np.repeat(np.arange(20), 3))
    texts = images[owners] + rng.normal(size=(60, 5)).astype(np.float32)
    found = retrieval_ranks_in_folds(images, texts=texts, owners=owners, folds=4, all_positives=True)
    parts = []
    for start in range(0, 20, 5):
        mine = np.flatnonzero(owners // 5 == start // 5)
        block = images[start : start + 5]
        parts.append(
            retrieval_metrics(
                retrieval_ranks(block, texts=texts[mine], owners=owners[mine] - start, all_positives=True),
                true_recall=True,
            )
        )
    joined = retrieval_metrics(found, true_recall=True)
    for name in joined:
        if "median" not in name:
            assert joined[name] == pytest.approx(np.mean([part[name] for part in parts])), name
    assert found.text_to_image.candidates == 5
    assert sorted(found.text_to_image.query.tolist()) == list(range(60))
    assert (owners[found.text_to_image.query] == found.text_to_image.image).all()
    assert found.image_to_text.query.tolist() == found.image_to_text.image.tolist() == list(range(20))
    whole = retrieval_metrics(retrieval_ranks(images, texts=texts, owners=owners))
    assert whole["text_to_image_recall_at_1"] < joined["text_to_image_recall_at_1"]
    with pytest.raises(InputError, match="20 images are no 3 equal folds"):
        retrieval_ranks_in_folds(images, texts=texts, owners=owners, folds=3)
