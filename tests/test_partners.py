"""Pairing generated images with real ones, and what is kept out of alignment."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gmail_cli.components import partners
from gmail_cli.components.partners import GeneratedFrom, RealImage
from gmail_cli.errors import InputError

CATS_AND_DOGS = [RealImage(f"r{row}", frozenset({"a cat" if row < 4 else "a dog"})) for row in range(8)]


def test_partner_by_owner():
    real = [RealImage("a", frozenset({"one", "two"})), RealImage("b", frozenset({"three"}))]
    generated = [GeneratedFrom("b", "three"), GeneratedFrom("a", "two"), GeneratedFrom("a", "one")]
    pairing = partners.pair(generated, real)
    assert pairing.method == "caption"
    assert pairing.rows(np.array([2, 0, 1]), seed=9).tolist() == [0, 1, 0]
    with pytest.raises(InputError, match=r"1 of 4 .* 'nobody'"):
        partners.pair([*generated, GeneratedFrom("nobody", "x")], real, method="caption")


def test_random_partners_share_the_caption_and_cover_it():
    generated = [GeneratedFrom(f"g{row}", "a dog" if row % 2 else "a cat") for row in range(6)]
    pairing = partners.pair(generated, CATS_AND_DOGS)
    assert pairing.method == "random"
    indices = np.arange(6)
    drawn = np.stack([pairing.rows(indices, seed=seed) for seed in range(64)])
    assert set(drawn[:, ::2].ravel()) == {0, 1, 2, 3}
    assert set(drawn[:, 1::2].ravel()) == {4, 5, 6, 7}
    np.testing.assert_array_equal(pairing.rows(indices, seed=5), drawn[5])


def test_class_stands_in_for_an_unknown_caption():
    real = [RealImage("a", frozenset({"x"}), "cat"), RealImage("b", frozenset({"y"}), "dog")]
    assert partners.pair([GeneratedFrom("g", "z", "dog")], real).rows(np.array([0]), seed=0).tolist() == [1]
    with pytest.raises(InputError, match="no real image of its caption"):
        partners.pair([GeneratedFrom("g", "z", "bird")], real)


def test_nearest_may_share_and_transport_may_not():
    """Both generated cats lie nearest to real row 1; one-to-one, the second goes to row 0."""
    real_vectors = np.array([[0.6, 0.8], [1, 0], [-1, 0], [0, -1], [0, 1], [0, 1], [0, 1], [0, 1]], dtype=np.float64)
    generated = [GeneratedFrom("g0", "a cat"), GeneratedFrom("g1", "a cat")]
    vectors = np.array([[1, 0], [0.96, 0.28]])
    both = np.array([0, 1])
    nearest = partners.pair(
        generated, CATS_AND_DOGS, method="nearest", generated_vectors=vectors, real_vectors=real_vectors
    )
    assert nearest.rows(both, seed=0).tolist() == [1, 1]
    moved = partners.pair(
        generated, CATS_AND_DOGS, method="optimal-transport", generated_vectors=vectors, real_vectors=real_vectors
    )
    assert moved.rows(both, seed=0).tolist() == [1, 0]


def test_transport_of_more_generated_than_real_uses_every_real_image(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(partners, "ASSIGNED_AT_ONCE", 3)
    rng = np.random.default_rng(0)
    generated = [GeneratedFrom(f"g{row}", "a cat") for row in range(10)]
    pairing = partners.pair(
        generated,
        CATS_AND_DOGS,
        method="optimal-transport",
        generated_vectors=rng.normal(size=(10, 2)),
        real_vectors=rng.normal(size=(8, 2)),
    )
    used = np.bincount(pairing.rows(np.arange(10), seed=0), minlength=8)
    assert used[:4].min() >= 1
    assert used[:4].max() <= 4
    assert used[4:].sum() == 0


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_held_out_share(share: float):
    chosen = [partners.held_out(str(row), share=share, seed=0) for row in range(4000)]
    assert np.mean(chosen) == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 4000))
    wider = [partners.held_out(str(row), share=min(1.0, share + 0.1), seed=0) for row in range(4000)]
    assert all(more for more, some in zip(wider, chosen, strict=True) if some)
    other = [partners.held_out(str(row), share=share, seed=1) for row in range(4000)]
    assert (other != chosen) == (0 < share < 1)
