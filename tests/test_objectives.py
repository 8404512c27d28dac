"""Objectives against hand-worked values and an independent derivation of the gradient; pairing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

from gmail_cli.components import objectives
from gmail_cli.components.objectives import GeneratedFrom, Objective, RealImage
from gmail_cli.errors import InputError, UsageError


def _unit(rows: int, dim: int, *, seed: int) -> torch.Tensor:
    return normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)


# -- Eq. 1 -------------------------------------------------------------------------------------------------------


def test_eq1_on_a_worked_example():
    """Two pairs in the plane: g = (1,0), (0,1); r = (0.6,0.8), (0,1); t = 0.5.

    Cosines: row 1: 0.6, 0; row 2: 0.8, 1. Over t: 1.2, 0 and 1.6, 2.
    """
    generated = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    real = torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    first = -math.log(math.exp(1.2) / (math.exp(1.2) + math.exp(0.0)))
    second = -math.log(math.exp(2.0) / (math.exp(1.6) + math.exp(2.0)))
    loss = objectives.contrastive(generated, real, temperature=0.5)
    assert loss.item() == pytest.approx((first + second) / 2, rel=1e-6)


def test_eq1_gradient_against_its_derivation():
    """dL/dg_i = (sum_j p_ij r_j - r_i) / (t |B|), worked out in numpy with the siblings' columns left out."""
    generated, real, temperature = _unit(6, 5, seed=0), _unit(6, 5, seed=1), 0.07
    partners = np.array([0, 1, 0, 2, 1, 3])
    real = real[torch.from_numpy(partners)]
    mask = objectives.false_negatives(partners, captions=np.arange(6), mode="mask")
    generated.requires_grad_()
    loss = objectives.contrastive(generated, real, temperature=temperature, false_negatives=mask)
    loss.backward()

    g, r = generated.detach().numpy(), real.numpy()
    wanted, total = np.empty_like(g), 0.0
    for i in range(6):
        others = [j for j in range(6) if j == i or partners[j] != partners[i]]
        scores = np.array([g[i] @ r[j] for j in others]) / temperature
        p = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
        wanted[i] = (p @ r[others] - r[i]) / (temperature * 6)
        total -= math.log(p[others.index(i)]) / 6
    assert loss.item() == pytest.approx(total, rel=1e-12)
    np.testing.assert_allclose(generated.grad.numpy(), wanted, rtol=1e-10, atol=1e-14)


def test_siblings_are_no_negatives():
    """A generated image that sits on its partner has no loss left but its siblings', which the mask removes."""
    real = torch.eye(3)[[0, 0, 1]]
    kept = objectives.contrastive(real, real, temperature=0.01)
    mask = objectives.false_negatives(np.array([0, 0, 1]), captions=np.arange(3), mode="mask")
    masked = objectives.contrastive(real, real, temperature=0.01, false_negatives=mask)
    assert kept.item() == pytest.approx(2 / 3 * math.log(2), rel=1e-5)
    assert masked.item() == pytest.approx(0, abs=1e-6)


def test_false_negatives_by_partner_and_by_caption():
    partners, captions = np.array([0, 0, 1, 2]), np.array([5, 6, 6, 7])
    by_partner = objectives.false_negatives(partners, captions=captions, mode="mask")
    by_caption = objectives.false_negatives(partners, captions=captions, mode="mask-caption")
    assert by_partner is not None
    assert by_caption is not None
    assert by_partner.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert by_caption.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
    assert objectives.false_negatives(partners, captions=captions, mode="keep") is None


@given(st.permutations(range(5)))
def test_eq1_does_not_depend_on_the_order_of_pairs(order: list[int]):
    generated, real = _unit(5, 4, seed=2), _unit(5, 4, seed=3)
    one = objectives.contrastive(generated, real)
    assert objectives.contrastive(generated[order], real[order]).item() == pytest.approx(one.item(), rel=1e-12)


# -- the other terms ---------------------------------------------------------------------------------------------


def test_terms_on_worked_examples():
    generated = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    real = torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    assert objectives.cosine_regression(generated, real).item() == pytest.approx(0.2)
    # means (.5,.5) and (.3,.9); covariances [[.25,-.25],[-.25,.25]] and [[.09,-.03],[-.03,.01]]
    shift = (0.2**2 + 0.4**2) / (0.3**2 + 0.9**2)
    spread = (0.16**2 + 2 * 0.22**2 + 0.24**2) / (0.09**2 + 2 * 0.03**2 + 0.01**2)
    assert objectives.moment_matching(generated, real).item() == pytest.approx(shift + spread, rel=1e-5)
    one, two = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    kernel = sum(math.exp(-1 / scale) for scale in (0.25, 1.0, 4.0)) / 3  # the median distance is the only distance
    assert objectives.mean_discrepancy(one, two).item() == pytest.approx(2 - 2 * kernel, rel=1e-6)


@pytest.mark.parametrize("name", ["coral", "mmd"])
def test_distribution_terms_ignore_the_pairing_and_vanish_on_equal_sets(name: str):
    real = _unit(16, 6, seed=4)
    objective = Objective.parse(name)
    assert objective(real.roll(3, 0), real)[0].item() == pytest.approx(0, abs=1e-12)
    moved = normalize(real + 0.3, dim=1)
    assert objective(moved, real)[0].item() > 1e-3
    assert objective(moved.roll(1, 0), real)[0].item() == pytest.approx(objective(moved, real)[0].item(), rel=1e-9)


def _descended(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embeddings before and after descending one term on free vectors, and the real ones."""
    real = _unit(16, 6, seed=5)
    free = (real + 1.2 * _unit(16, 6, seed=6) + 0.5).requires_grad_()
    before = normalize(free.detach(), dim=1)
    optimizer = torch.optim.Adam([free], lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        Objective.parse(name)(normalize(free, dim=1), real)[0].backward()
        optimizer.step()
    return before, normalize(free.detach(), dim=1), real


@pytest.mark.parametrize("name", ["cosine", "coral", "mmd"])
def test_descending_closes_the_gap_between_the_means(name: str):
    def apart(vectors: torch.Tensor) -> float:
        return torch.linalg.vector_norm(vectors.mean(0) - real.mean(0)).item()

    before, after, real = _descended(name)
    assert apart(after) < 0.3 * apart(before)


@pytest.mark.parametrize("name", ["eq1", "symmetric", "cosine"])
def test_descending_brings_each_image_to_its_partner(name: str):
    def found(vectors: torch.Tensor) -> float:
        return ((vectors @ real.T).argmax(1) == torch.arange(16)).double().mean().item()

    before, after, real = _descended(name)
    assert found(before) < 0.7
    assert found(after) == 1


def test_symmetric_is_the_mean_of_both_directions():
    generated, real = _unit(4, 5, seed=7), _unit(4, 5, seed=8)
    both = objectives.contrastive(generated, real) + objectives.contrastive(real, generated)
    assert Objective.parse("symmetric")(generated, real)[0].item() == pytest.approx(both.item() / 2, rel=1e-12)


def test_sums_are_weighted():
    generated, real = _unit(4, 5, seed=7), _unit(4, 5, seed=8)
    loss, terms = Objective.parse("cosine+0.5*eq1", temperature=0.2)(generated, real)
    eq1 = objectives.contrastive(generated, real, temperature=0.2)
    assert terms["eq1"].item() == pytest.approx(eq1.item())
    assert loss.item() == pytest.approx(objectives.cosine_regression(generated, real).item() + eq1.item() / 2)
    assert Objective.parse("paper").terms == (("eq1", 1.0),)
    assert str(Objective.parse("cosine+0.50*eq1")) == "cosine+0.5*eq1"


@pytest.mark.parametrize("text", ["", "eq2", "eq1+", "0*eq1", "-1*cosine", "cosine-eq1"])
def test_unknown_objectives_are_refused(text: str):
    with pytest.raises(UsageError, match="eq1, symmetric, cosine"):
        Objective.parse(text)


# -- partners ----------------------------------------------------------------------------------------------------

CATS_AND_DOGS = [RealImage(f"r{row}", frozenset({"a cat" if row < 4 else "a dog"})) for row in range(8)]


def test_partner_by_owner():
    real = [RealImage("a", frozenset({"one", "two"})), RealImage("b", frozenset({"three"}))]
    generated = [GeneratedFrom("b", "three"), GeneratedFrom("a", "two"), GeneratedFrom("a", "one")]
    pairing = objectives.pair(generated, real)
    assert pairing.method == "caption"
    assert pairing.rows(np.array([2, 0, 1]), seed=9).tolist() == [0, 1, 0]
    with pytest.raises(InputError, match=r"1 of 4 .* 'nobody'"):
        objectives.pair([*generated, GeneratedFrom("nobody", "x")], real, method="caption")


def test_random_partners_share_the_caption_and_cover_it():
    generated = [GeneratedFrom(f"g{row}", "a dog" if row % 2 else "a cat") for row in range(6)]
    pairing = objectives.pair(generated, CATS_AND_DOGS)
    assert pairing.method == "random"
    indices = np.arange(6)
    drawn = np.stack([pairing.rows(indices, seed=seed) for seed in range(64)])
    assert set(drawn[:, ::2].ravel()) == {0, 1, 2, 3}
    assert set(drawn[:, 1::2].ravel()) == {4, 5, 6, 7}
    np.testing.assert_array_equal(pairing.rows(indices, seed=5), drawn[5])


def test_class_stands_in_for_an_unknown_caption():
    real = [RealImage("a", frozenset({"x"}), "cat"), RealImage("b", frozenset({"y"}), "dog")]
    assert objectives.pair([GeneratedFrom("g", "z", "dog")], real).rows(np.array([0]), seed=0).tolist() == [1]
    with pytest.raises(InputError, match="no real image of its caption"):
        objectives.pair([GeneratedFrom("g", "z", "bird")], real)


def test_nearest_may_share_and_transport_may_not():
    """Both generated cats lie nearest to real row 1; one-to-one, the second goes to row 0."""
    real_vectors = np.array([[0.6, 0.8], [1, 0], [-1, 0], [0, -1], [0, 1], [0, 1], [0, 1], [0, 1]], dtype=np.float64)
    generated = [GeneratedFrom("g0", "a cat"), GeneratedFrom("g1", "a cat")]
    vectors = np.array([[1, 0], [0.96, 0.28]])
    both = np.array([0, 1])
    nearest = objectives.pair(
        generated, CATS_AND_DOGS, method="nearest", generated_vectors=vectors, real_vectors=real_vectors
    )
    assert nearest.rows(both, seed=0).tolist() == [1, 1]
    moved = objectives.pair(
        generated, CATS_AND_DOGS, method="optimal-transport", generated_vectors=vectors, real_vectors=real_vectors
    )
    assert moved.rows(both, seed=0).tolist() == [1, 0]


def test_transport_of_more_generated_than_real_uses_every_real_image(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(objectives, "ASSIGNED_AT_ONCE", 3)
    rng = np.random.default_rng(0)
    generated = [GeneratedFrom(f"g{row}", "a cat") for row in range(10)]
    pairing = objectives.pair(
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
    chosen = [objectives.held_out(str(row), share=share, seed=0) for row in range(4000)]
    assert np.mean(chosen) == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 4000))
    wider = [objectives.held_out(str(row), share=min(1.0, share + 0.1), seed=0) for row in range(4000)]
    assert all(more for more, some in zip(wider, chosen, strict=True) if some)
    other = [objectives.held_out(str(row), share=share, seed=1) for row in range(4000)]
    assert (other != chosen) == (0 < share < 1)
