"""FAISS search against an exact oracle, and refusal of what would rank wrongly."""

from __future__ import annotations

import numpy as np
import pytest

from gmail_cli.components import search
from gmail_cli.errors import InputError


def unit(count: int, dim: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


VECTORS = unit(3000, 16, seed=0)
QUERIES = unit(50, 16, seed=1)


def test_four_hand_placed_vectors_come_back_in_order_of_their_cosine() -> None:
    vectors = np.array([[1, 0], [0, 1], [-1, 0], [0.6, 0.8]], dtype=np.float32)
    index, recall = search.build(vectors, queries=vectors, k=4)
    hits = index.search(np.array([[1, 0]], dtype=np.float32), k=9)
    assert hits.ids.tolist() == [[0, 3, 1, 2]]
    np.testing.assert_allclose(hits.scores, [[1, 0.6, 0, -1]], atol=1e-6)
    assert recall == 1.0


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf"])
def test_every_kind_reaches_its_target_against_the_full_score_matrix(kind: str) -> None:
    index, recall = search.build(VECTORS, kind=kind, queries=QUERIES, recall_target=0.99)
    oracle = np.argsort(-(QUERIES @ VECTORS.T), axis=1)[:, :10]
    found = index.search(QUERIES, k=10).ids
    agreement = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(oracle, found, strict=True)])
    assert index.kind == kind
    assert agreement >= 0.99
    assert recall == pytest.approx(agreement, abs=1e-9)


def test_the_effort_is_what_buys_recall() -> None:
    lazy, low = search.build(VECTORS, kind="ivf", queries=QUERIES, recall_target=0.0)
    eager, high = search.build(VECTORS, kind="ivf", queries=QUERIES, recall_target=1.0)
    assert lazy.effort is not None
    assert eager.effort is not None
    assert lazy.effort == 1 < eager.effort
    assert low < 0.9 < high


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf"])
def test_an_index_survives_its_bytes(kind: str) -> None:
    index, _ = search.build(VECTORS, kind=kind, queries=QUERIES)
    again = search.load(index.dump(), name="table.faiss")
    assert (again.kind, again.count, again.dim, again.effort) == (kind, 3000, 16, index.effort)
    np.testing.assert_array_equal(again.search(QUERIES, k=5).ids, index.search(QUERIES, k=5).ids)


@pytest.mark.parametrize("damage", ["half", "one byte short", "empty", "another magic"])
def test_a_damaged_index_is_named_and_refused(damage: str) -> None:
    data = search.build(VECTORS, queries=QUERIES)[0].dump()
    cut = {
        "half": data[: len(data) // 2],
        "one byte short": data[:-1],
        "empty": b"",
        "another magic": b"PNG!" + data[4:],
    }
    with pytest.raises(InputError, match=r"photos\.faiss .* is not a whole FAISS index"):
        search.load(cut[damage], name="photos.faiss")


def test_another_metric_is_refused() -> None:
    import faiss

    index = faiss.IndexFlatL2(16)
    index.add(VECTORS)
    with pytest.raises(InputError, match="IndexFlatL2"):
        search.load(faiss.serialize_index(index).tobytes(), name="photos.faiss")


@pytest.mark.parametrize("length", [0.0, 0.99, 1.01, float("nan")])
def test_vectors_that_are_not_unit_length_are_refused(length: float) -> None:
    vectors = VECTORS.copy()
    vectors[7] *= length
    with pytest.raises(InputError, match=r"photos: row 7 has length"):
        search.build(vectors, queries=QUERIES, name="photos")


def test_half_precision_rows_pass_the_check() -> None:
    index, recall = search.build(VECTORS.astype(np.float16), queries=QUERIES)
    assert index.count == 3000
    assert recall == 1.0


def test_queries_from_another_encoder_are_refused() -> None:
    index, _ = search.build(VECTORS, queries=QUERIES)
    with pytest.raises(InputError, match="8 dimensions and the index has 16"):
        index.search(unit(1, 8, seed=2), k=1)
    with pytest.raises(InputError, match="queries: row 0"):
        index.search(2 * QUERIES, k=1)


def test_nothing_to_index_is_an_error() -> None:
    with pytest.raises(InputError, match="holds no vectors"):
        search.build(VECTORS[:0], queries=QUERIES)


def test_duplicates_do_not_lower_recall() -> None:
    vectors = np.repeat(VECTORS[:20], 50, axis=0)
    _, recall = search.build(vectors, kind="ivf", queries=QUERIES, recall_target=1.0)
    assert recall == 1.0


def test_auto_is_exact_up_to_its_limit() -> None:
    assert search.resolve("auto", count=search.FLAT_LIMIT) == "flat"
    assert search.resolve("auto", count=search.FLAT_LIMIT + 1) == "ivf"
    assert search.resolve("hnsw", count=10) == "hnsw"
