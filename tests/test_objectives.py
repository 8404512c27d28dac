"""Objectives against hand-worked values and an independent derivation of the gradient; pairing."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

from gmail_cli.components import objectives
from gmail_cli.components.objectives import Batch, Objective, Scales
from gmail_cli.errors import UsageError


def _unit(rows: int, dim: int, *, seed: int) -> torch.Tensor:
    return normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)


def _batch(generated: torch.Tensor, real: torch.Tensor, **more: Any) -> Batch:
    return Batch(generated=generated, real=real, **more)


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
    assert objective(_batch(real.roll(3, 0), real))[0].item() == pytest.approx(0, abs=1e-12)
    moved = normalize(real + 0.3, dim=1)
    assert objective(_batch(moved, real))[0].item() > 1e-3
    assert objective(_batch(moved.roll(1, 0), real))[0].item() == pytest.approx(
        objective(_batch(moved, real))[0].item(), rel=1e-9
    )


def _descended(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embeddings before and after descending one term on free vectors, and the real ones."""
    real = _unit(16, 6, seed=5)
    free = (real + 1.2 * _unit(16, 6, seed=6) + 0.5).requires_grad_()
    before = normalize(free.detach(), dim=1)
    optimizer = torch.optim.Adam([free], lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        Objective.parse(name)(_batch(normalize(free, dim=1), real))[0].backward()
        optimizer.step()
    return before, normalize(free.detach(), dim=1), real


@pytest.mark.parametrize("name", ["cosine", "coral", "mmd"])
def test_descending_closes_the_gap_between_the_means(name: str):
    def apart(vectors: torch.Tensor) -> float:
        return torch.linalg.vector_norm(vectors.mean(0) - real.mean(0)).item()

    before, after, real = _descended(name)
    assert apart(after) < 0.3 * apart(before)


@pytest.mark.parametrize("name", ["eq1", "symmetric", "cosine", "siglip"])
def test_descending_brings_each_image_to_its_partner(name: str):
    def found(vectors: torch.Tensor) -> float:
        return ((vectors @ real.T).argmax(1) == torch.arange(16)).double().mean().item()

    before, after, real = _descended(name)
    assert found(before) < 0.7
    assert found(after) == 1


def test_symmetric_is_the_mean_of_both_directions():
    generated, real = _unit(4, 5, seed=7), _unit(4, 5, seed=8)
    both = objectives.contrastive(generated, real) + objectives.contrastive(real, generated)
    assert Objective.parse("symmetric")(_batch(generated, real))[0].item() == pytest.approx(both.item() / 2, rel=1e-12)


def test_sums_are_weighted():
    generated, real = _unit(4, 5, seed=7), _unit(4, 5, seed=8)
    loss, terms = Objective.parse("cosine+0.5*eq1", temperature=0.2)(_batch(generated, real))
    eq1 = objectives.contrastive(generated, real, temperature=0.2)
    assert terms["eq1"].item() == pytest.approx(eq1.item())
    assert loss.item() == pytest.approx(objectives.cosine_regression(generated, real).item() + eq1.item() / 2)
    assert Objective.parse("paper").terms == (("eq1", 1.0),)
    assert str(Objective.parse("cosine+0.50*eq1")) == "cosine+0.5*eq1"


@pytest.mark.parametrize("text", ["", "eq2", "eq1+", "0*eq1", "-1*cosine", "cosine-eq1"])
def test_unknown_objectives_are_refused(text: str):
    with pytest.raises(UsageError, match="eq1, symmetric, cosine"):
        Objective.parse(text)


G = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
R = torch.tensor([[0.6, 0.8], [0.0, 1.0]])


def test_bank_rows_are_negatives_but_for_the_masked():
    """Row 1 of the worked example of Eq. 1 with two further negatives, (0.8, 0.6) and (1, 0), the second masked."""
    bank = torch.tensor([[0.8, 0.6], [1.0, 0.0]])
    masked = torch.tensor([[False, True], [False, True]])
    first = -math.log(math.exp(1.2) / (math.exp(1.2) + math.exp(0.0) + math.exp(1.6)))
    second = -math.log(math.exp(2.0) / (math.exp(1.6) + math.exp(2.0) + math.exp(1.2)))
    loss = objectives.contrastive(G, R, temperature=0.5, bank=bank, bank_false=masked)
    assert loss.item() == pytest.approx((first + second) / 2, rel=1e-6)
    every = objectives.contrastive(G, R, temperature=0.5, bank=bank)
    assert every > loss


def test_siglip_on_a_worked_example():
    """Logits 5 sim - 2: 1, -2 and 2, 3; the partners on the diagonal."""

    def log_sigmoid(x: float) -> float:
        return -math.log(1 + math.exp(-x))

    loss = objectives.sigmoid_pairs(G, R, scale=torch.tensor(5.0), bias=torch.tensor(-2.0))
    wanted = -(log_sigmoid(1) + log_sigmoid(2) + log_sigmoid(-2) + log_sigmoid(3)) / 2
    assert loss.item() == pytest.approx(wanted, rel=1e-6)
    mask = torch.tensor([[False, False], [True, False]])
    masked = objectives.sigmoid_pairs(
        G, R, scale=torch.tensor(5.0), bias=torch.tensor(-2.0), false_negatives=mask, bank=G[:1]
    )
    wanted = -(log_sigmoid(1) + log_sigmoid(2) + log_sigmoid(3) + log_sigmoid(-3) + log_sigmoid(2)) / 2
    assert masked.item() == pytest.approx(wanted, rel=1e-6)


def test_stablerep_on_a_worked_example():
    """Rows 0 and 1 are of one caption, row 2 alone: it is a negative and has no loss of its own."""
    generated = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    siblings = torch.tensor([[True, True, False], [True, True, False], [False, False, True]])
    first = -math.log(math.exp(1.2) / (math.exp(1.2) + math.exp(0.0)))
    second = -math.log(math.exp(1.2) / (math.exp(1.2) + math.exp(1.6)))
    loss = objectives.multi_positive(generated, siblings, temperature=0.5)
    assert loss.item() == pytest.approx((first + second) / 2, rel=1e-6)
    assert objectives.multi_positive(generated, torch.eye(3, dtype=torch.bool), temperature=0.5).item() == 0


def test_stablerep_spreads_over_several_siblings():
    generated, siblings = _unit(4, 3, seed=9), torch.ones(4, 4, dtype=torch.bool)
    logits = (generated @ generated.T / 0.2).masked_fill(torch.eye(4, dtype=torch.bool), -torch.inf)
    rows = -logits.log_softmax(1)
    mean = torch.stack([rows[i][[j for j in range(4) if j != i]].mean() for i in range(4)]).mean()
    assert objectives.multi_positive(generated, siblings, temperature=0.2).item() == pytest.approx(mean.item())


def test_text_contrast_is_clips_loss_without_equal_captions():
    images, texts = _unit(3, 4, seed=10), _unit(3, 4, seed=11)
    apart = torch.eye(3, dtype=torch.bool)
    logits = images @ texts.T / 0.1
    truth = torch.arange(3)
    wanted = (torch.nn.functional.cross_entropy(logits, truth) + torch.nn.functional.cross_entropy(logits.T, truth)) / 2
    found = objectives.text_contrast(images, texts, temperature=0.1, same_caption=apart)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-12)
    alike = torch.ones(3, 3, dtype=torch.bool)
    assert objectives.text_contrast(images, texts, temperature=0.1, same_caption=alike).item() == pytest.approx(0)


def test_hycd_is_a_divergence_from_teacher_and_truth():
    """Against torch's own KL divergence; 0 where the student gives the targets themselves."""
    images, before, texts = (_unit(4, 5, seed=seed) for seed in (12, 13, 14))
    total = 0.0
    for student, teacher in (
        (images @ texts.T, before @ texts.T),
        ((images @ texts.T).T, (before @ texts.T).T),
    ):
        target = 0.5 * (teacher / 0.3).softmax(1) + 0.5 * torch.eye(4, dtype=torch.float64)
        total += torch.nn.functional.kl_div((student / 0.3).log_softmax(1), target, reduction="batchmean").item() / 2
    assert objectives.hybrid_distillation(images, before, texts, temperature=0.3).item() == pytest.approx(total)
    sure = torch.eye(3) * 1.0
    assert objectives.hybrid_distillation(sure, sure, sure, temperature=0.01).item() == pytest.approx(0, abs=1e-6)


def test_rafa_pulls_towards_images_at_random():
    generated, anywhere = _unit(4, 5, seed=15), _unit(4, 5, seed=16)
    found = Objective.parse("rafa")(_batch(generated, generated, anywhere=anywhere))[0]
    assert found.item() == pytest.approx(1 - (generated * anywhere).sum(1).mean().item())


def test_a_learned_temperature_and_siglips_scale_move():
    objective = Objective.parse("eq1+siglip", temperature=0.5, learn_temperature=True)
    scales = Scales(objective)
    assert scales.temperature.item() == pytest.approx(0.5)
    loss, told = objective(_batch(G, R), scales)
    assert told["temperature"].item() == pytest.approx(0.5)
    loss.backward()
    for name, parameter in scales.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.item() != 0, name
    fixed = Scales(Objective.parse("eq1"))
    assert not any(parameter.requires_grad for parameter in fixed.parameters())
