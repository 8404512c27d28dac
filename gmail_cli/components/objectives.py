"""What f_g is trained to do (paper, section 3.2, Eq. 1).

``paper`` is Eq. 1 and nothing else. The other terms exist because Eq. 1 is not always the best choice: where captions
name a class, the other real images of a batch are not negatives at all. Embeddings are unit rows throughout.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from gmail_cli.errors import UsageError

NAMED = {"paper": "eq1", "recommended": "cosine"}
"""Named objectives: the paper's, and the one that served best in the experiments on real images."""
Negatives: TypeAlias = Literal["mask", "mask-caption", "keep"]
TERMS = (*("eq1", "symmetric", "cosine", "siglip", "stablerep", "text", "real-text", "hycd", "rafa", "coral", "mmd"),)
PAIRED = frozenset({"eq1", "symmetric", "cosine", "siglip"})
"""Terms that need to know which real image is a generated one's partner."""
TEXTUAL = frozenset({"text", "real-text", "hycd"})
"""Terms that look at the embeddings of the captions."""
SIGLIP_SCALE, SIGLIP_BIAS = 10.0, -10.0
"""Where SigLIP's scale and bias start (Zhai et al. 2023)."""
TEACHER_SHARE = 0.5
"""Share of the teacher in the targets of ``hycd``; the rest is the caption itself."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """What the terms of an objective see of a batch; each says which fields it needs.

    Attributes:
        generated: f_g of the generated images.
        real: f_r of their partners, row by row (of any real images, where there are no partners).
        false_negatives: True at (i, j): real image j is no negative of generated image i.
        same_caption: True at (i, j): rows i and j have one caption text.
        siblings: True at (i, j): rows i and j were generated from one caption record.
        texts: The captions through the frozen text tower.
        before: f_r of the generated images.
        anywhere: f_r of real images drawn at random, row by row.
        seen: f_g of the partners.
        bank: f_r of further real images, negatives all of them but for ``bank_false``.
        bank_false: True at (i, j): bank image j is no negative of generated image i.
    """

    generated: Float[Tensor, "batch dim"]
    real: Float[Tensor, "batch dim"]
    false_negatives: Bool[Tensor, "batch batch"] | None = None
    same_caption: Bool[Tensor, "batch batch"] | None = None
    siblings: Bool[Tensor, "batch batch"] | None = None
    texts: Float[Tensor, "batch dim"] | None = None
    before: Float[Tensor, "batch dim"] | None = None
    anywhere: Float[Tensor, "batch dim"] | None = None
    seen: Float[Tensor, "batch dim"] | None = None
    bank: Float[Tensor, "bank dim"] | None = None
    bank_false: Bool[Tensor, "batch bank"] | None = None


# -- terms ---------------------------------------------------------------------------------------------------------


def contrastive(
    generated: Float[Tensor, "batch dim"],
    real: Float[Tensor, "batch dim"],
    *,
    temperature: float | Tensor = 0.07,
    false_negatives: Bool[Tensor, "batch batch"] | None = None,
    bank: Float[Tensor, "bank dim"] | None = None,
    bank_false: Bool[Tensor, "batch bank"] | None = None,
) -> Float[Tensor, ""]:
    """Eq. 1: each generated image must find its real partner among the real images of the batch (and of the bank).

    ``-1/|B| sum_i log( exp(sim(g_i, r_i)/t) / sum_j exp(sim(g_i, r_j)/t) )``

    Args:
        generated: f_g of generated images.
        real: f_r of their partners, row by row.
        temperature: t.
        false_negatives: True at (i, j) leaves r_j out of row i's sum; the diagonal always counts.
        bank: Further negatives, beyond the paper (a memory bank; Wu et al. 2018).
        bank_false: True at (i, j) leaves bank row j out of row i's sum.
    """
    logits = generated @ real.T / temperature
    own = logits.diagonal()
    if false_negatives is not None:
        diagonal = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
        logits = logits.masked_fill(false_negatives & ~diagonal, -torch.inf)
    if bank is not None:
        more = generated @ bank.T / temperature
        logits = torch.cat([logits, more if bank_false is None else more.masked_fill(bank_false, -torch.inf)], dim=1)
    return (logits.logsumexp(dim=1) - own).mean()


def cosine_regression(generated: Float[Tensor, "batch dim"], real: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
    """Mean of 1 - cosine between each generated image and its partner: no negatives at all.

    On unit rows the mean squared error is twice this.
    """
    return (1 - (generated * real).sum(dim=-1)).mean()


def sigmoid_pairs(
    generated: Float[Tensor, "batch dim"],
    real: Float[Tensor, "batch dim"],
    *,
    scale: Tensor,
    bias: Tensor,
    false_negatives: Bool[Tensor, "batch batch"] | None = None,
    bank: Float[Tensor, "bank dim"] | None = None,
    bank_false: Bool[Tensor, "batch bank"] | None = None,
) -> Float[Tensor, ""]:
    """SigLIP's loss (Zhai et al. 2023): every pair is judged on its own, partners as 1 and all others as 0.

    ``-1/|B| sum_ij log sigmoid(z_ij (scale sim(g_i, r_j) + bias))``, z = 1 on the diagonal and -1 elsewhere.
    """
    logits = scale * generated @ real.T + bias
    own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    counted = logsigmoid(torch.where(own, logits, -logits))
    if false_negatives is not None:
        counted = counted.masked_fill(false_negatives & ~own, 0.0)
    total = counted.sum()
    if bank is not None:
        more = logsigmoid(-(scale * generated @ bank.T + bias))
        total = total + (more if bank_false is None else more.masked_fill(bank_false, 0.0)).sum()
    return -total / len(logits)


def multi_positive(
    generated: Float[Tensor, "batch dim"], siblings: Bool[Tensor, "batch batch"], *, temperature: float | Tensor
) -> Float[Tensor, ""]:
    """StableRep's loss (Tian et al. 2023): the images of one caption find one another among all of the batch.

    Cross-entropy between the softmax over all other images of the batch and the uniform distribution over those of
    the same caption record. Rows without a sibling do not count; without any, the loss is 0.
    """
    own = torch.eye(len(generated), dtype=torch.bool, device=generated.device)
    wanted = (siblings & ~own).to(generated.dtype)
    logits = (generated @ generated.T / temperature).masked_fill(own, -torch.inf)
    chances = logits.log_softmax(dim=1).masked_fill(own, 0.0)
    counts = wanted.sum(dim=1)
    rows = -(wanted * chances).sum(dim=1) / counts.clamp_min(1)
    return rows.sum() / (counts > 0).sum().clamp_min(1)


def text_contrast(
    images: Float[Tensor, "batch dim"],
    texts: Float[Tensor, "batch dim"],
    *,
    temperature: float,
    same_caption: Bool[Tensor, "batch batch"],
) -> Float[Tensor, ""]:
    """CLIP's symmetric loss (Radford et al. 2021) of images and captions; equal captions are no negatives."""
    both = [(images, texts), (texts, images)]
    return torch.stack(
        [contrastive(a, b, temperature=temperature, false_negatives=same_caption) for a, b in both]
    ).mean()


def hybrid_distillation(
    images: Float[Tensor, "batch dim"],
    before: Float[Tensor, "batch dim"],
    texts: Float[Tensor, "batch dim"],
    *,
    temperature: float,
) -> Float[Tensor, ""]:
    """HyCD of CLIP-Refine (Yamaguchi et al. 2025): keep what f_r knew of image and text while fitting the pairs.

    KL divergence from the mean of f_r's softmax over the batch's captions and the one-hot truth
    (``TEACHER_SHARE`` each) to f_g's softmax, both from images to captions and back.
    """
    truth = torch.eye(len(images), device=images.device, dtype=images.dtype)
    losses = []
    for turn in (False, True):
        student, teacher = images @ texts.T / temperature, before @ texts.T / temperature
        if turn:
            student, teacher = student.T, teacher.T
        target = TEACHER_SHARE * teacher.softmax(dim=1) + (1 - TEACHER_SHARE) * truth
        losses.append((torch.xlogy(target, target) - target * student.log_softmax(dim=1)).sum(dim=1).mean())
    return torch.stack(losses).mean()


def moment_matching(generated: Float[Tensor, "batch dim"], real: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
    """Distance of means and covariances, each relative to the real one: CORAL (Sun and Saenko 2016) with the mean."""
    shift = (generated.mean(dim=0) - real.mean(dim=0)).square().sum() / real.mean(dim=0).square().sum()
    wanted = _covariance(real)
    return shift + (_covariance(generated) - wanted).square().sum() / wanted.square().sum()


def _covariance(x: Float[Tensor, "batch dim"]) -> Float[Tensor, "dim dim"]:
    centred = x - x.mean(dim=0)
    return centred.T @ centred / len(x)


def mean_discrepancy(generated: Float[Tensor, "batch dim"], real: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
    """Squared maximum mean discrepancy (Gretton et al. 2012), Gaussian kernels around the median distance."""
    both = torch.cat([generated, real])
    distances = (2 - 2 * both @ both.T).clamp_min(0)
    median = distances.detach()[~torch.eye(len(both), dtype=torch.bool, device=both.device)].median()
    kernel = torch.stack([torch.exp(-distances / (scale * median)) for scale in (0.25, 1.0, 4.0)]).mean(dim=0)
    n = len(generated)
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()


_TERM = re.compile(rf"(?:(?P<weight>\d+(?:\.\d+)?)\*)?(?P<name>{'|'.join(TERMS)})")


class Scales(nn.Module):
    """What an objective learns beside f_g: its temperature, where asked to, and SigLIP's scale and bias."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        learned = objective.learn_temperature and objective.contrasts
        self.log_scale = nn.Parameter(torch.tensor(-math.log(objective.temperature)), requires_grad=learned)
        siglip = "siglip" in objective.names
        self.siglip_log_scale = nn.Parameter(torch.tensor(math.log(SIGLIP_SCALE)), requires_grad=siglip)
        self.siglip_bias = nn.Parameter(torch.tensor(SIGLIP_BIAS), requires_grad=siglip)

    @property
    def temperature(self) -> Tensor:
        """Of ``eq1``, ``symmetric`` and ``stablerep``; not below 0.01, CLIP's bound."""
        return torch.exp(-self.log_scale).clamp_min(0.01)


@dataclass(frozen=True)
class Objective:
    """A weighted sum of terms.

    Attributes:
        terms: (name, weight), the names out of ``TERMS``.
        temperature: Of ``eq1``, ``symmetric`` and ``stablerep``; where it starts when learned.
        learn_temperature: Whether it is learned.
        text_temperature: Of ``text``, ``real-text`` and ``hycd``: the model's own.
    """

    terms: tuple[tuple[str, float], ...]
    temperature: float = 0.07
    learn_temperature: bool = False
    text_temperature: float = 0.01

    @classmethod
    def parse(cls, text: str, *, temperature: float = 0.07, learn_temperature: bool = False) -> Objective:
        """Read ``paper``, ``recommended`` or a sum such as ``cosine+0.5*eq1``.

        Raises:
            UsageError: No such term.
        """
        found = [_TERM.fullmatch(part) for part in NAMED.get(text, text).split("+")]
        terms = [(match["name"], float(match["weight"] or 1)) for match in found if match]
        if len(terms) < len(found) or not all(weight > 0 for _, weight in terms):
            hint = f"Write paper, recommended, or a sum of {', '.join(TERMS)}: cosine+0.5*eq1."
            raise UsageError(f"align.objective = {text!r} is no objective", hint=hint)
        return cls(tuple(terms), temperature, learn_temperature)

    def __str__(self) -> str:
        return "+".join(name if weight == 1 else f"{weight:g}*{name}" for name, weight in self.terms)

    @property
    def names(self) -> frozenset[str]:
        """The names of its terms."""
        return frozenset(name for name, _ in self.terms)

    @property
    def contrasts(self) -> bool:
        """Whether any term has the temperature."""
        return bool(self.names & {"eq1", "symmetric", "stablerep"})

    @property
    def has_negatives(self) -> bool:
        """Whether any term holds real images of a batch against generated ones."""
        return bool(self.names & {"eq1", "symmetric", "siglip"})

    def __call__(self, batch: Batch, scales: Scales | None = None) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The loss, and each term's value before its weight."""
        scales = scales or Scales(self)
        values = {name: self._term(name, batch, scales) for name, _ in self.terms}
        loss = torch.stack([weight * values[name] for name, weight in self.terms]).sum()
        told = {name: value.detach() for name, value in values.items()}
        if self.learn_temperature and self.contrasts:
            told["temperature"] = scales.temperature.detach()
        return loss, told

    def _term(self, name: str, batch: Batch, scales: Scales) -> Tensor:
        generated, real, mask = batch.generated, batch.real, batch.false_negatives
        temperature = scales.temperature.to(generated) if self.learn_temperature else self.temperature
        bank = {"bank": batch.bank, "bank_false": batch.bank_false}

        def eq1() -> Tensor:
            return contrastive(generated, real, temperature=temperature, false_negatives=mask, **bank)

        def symmetric() -> Tensor:
            turned = None if mask is None else mask.T
            return (eq1() + contrastive(real, generated, temperature=temperature, false_negatives=turned)) / 2

        def siglip() -> Tensor:
            scale, bias = scales.siglip_log_scale.exp().to(generated), scales.siglip_bias.to(generated)
            return sigmoid_pairs(generated, real, scale=scale, bias=bias, false_negatives=mask, **bank)

        def stablerep() -> Tensor:
            return multi_positive(generated, _there(batch.siblings), temperature=temperature)

        def text(images: Tensor) -> Tensor:
            return text_contrast(
                images,
                _there(batch.texts),
                temperature=self.text_temperature,
                same_caption=_there(batch.same_caption),
            )

        def hycd() -> Tensor:
            return hybrid_distillation(
                generated, _there(batch.before), _there(batch.texts), temperature=self.text_temperature
            )

        functions: Mapping[str, Callable[[], Tensor]] = {
            "eq1": eq1,
            "symmetric": symmetric,
            "cosine": lambda: cosine_regression(generated, real),
            "siglip": siglip,
            "stablerep": stablerep,
            "text": lambda: text(generated),
            "real-text": lambda: text(_there(batch.seen)),
            "hycd": hycd,
            "rafa": lambda: cosine_regression(generated, _there(batch.anywhere)),
            "coral": lambda: moment_matching(generated, real),
            "mmd": lambda: mean_discrepancy(generated, real),
        }
        return functions[name]()


def _there(value: Tensor | None) -> Tensor:
    assert value is not None, "the batch lacks what the objective needs"
    return value


def false_negatives(
    partners: Int[np.ndarray, " batch"], *, captions: Int[np.ndarray, " batch"], mode: Negatives
) -> Bool[Tensor, "batch batch"] | None:
    """Which real images of a batch are no negatives of which generated ones.

    Args:
        partners: The real image of each row. Several captions of one image give generated siblings with one partner.
        captions: A number for each row's caption; equal for equal texts.
        mode: ``mask`` leaves siblings out, ``mask-caption`` also rows of the same caption text, ``keep`` none.
    """
    if mode == "keep":
        return None
    same = partners[:, None] == partners[None, :]
    if mode == "mask-caption":
        same |= captions[:, None] == captions[None, :]
    return torch.from_numpy(same)
