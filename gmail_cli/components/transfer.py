"""Did alignment help? What a model trained on generated images gains on real ones, before any such model is trained.

Small gaps prove nothing (a collapsed encoder has none), so alignment is judged by *transfer*: the smallest head that
downstream training would fit is fitted to embeddings of generated images and tried on embeddings of held-out real
ones. It needs no downstream artifact, costs seconds, and stands for the training of Algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import minimize
from scipy.special import log_softmax

from gmail_cli.components.heads import Residual
from gmail_cli.components.loop import batch_indices
from gmail_cli.components.metrics import gap
from gmail_cli.components.metrics.retrieval import retrieval_ranks
from gmail_cli.components.objectives import NAMED
from gmail_cli.components.partners import GeneratedFrom, Pairing, RealImage
from gmail_cli.components.tasks import contrastive_loss

PENALTY = 0.1
"""Weight penalty of the class probe, on features scaled as `heads.Probe` scales them: about where 200 steps of AdamW at
1e-3 stop. Cross-validation on generated images would choose a far weaker one, for they do not show the gap."""
TOLERANCE = 1e-4
"""Largest component of the gradient at which the class probe counts as converged."""
STEPS, BATCH, RATE, DECAY = 100, 256, 1e-3, 10.0
"""Training of the text map: steps, captions a step, learning rate, and the pull towards the identity, which takes
back 1 % of the map in every step."""
COLLAPSED = 0.01
"""Spread of f_g's embeddings, relative to real ones, below which it teaches nothing. A text map then stays near the
identity, and where training on generated images does harm, that would pass for help."""
FOLDS = 5
"""Of the cross-validated probe that tells real from generated."""


@dataclass(frozen=True, eq=False)
class Classes:
    """Tell which of few captions or classes a real image shows: what a linear probe learns.

    Attributes:
        said: Which answer each training image shows.
        right: For each held-out real image, which answers are right.
    """

    kind: ClassVar[str] = "classes"
    measure: ClassVar[str] = "accuracy"
    said: Int[np.ndarray, " train"]
    right: Bool[np.ndarray, "test answers"]

    def scores(
        self, train: Float[np.ndarray, "train dim"], *, test: Float[np.ndarray, "test dim"]
    ) -> Float[np.ndarray, " test"]:
        """Fit on ``train``; 1 for each held-out real image whose answer is right, else 0."""
        weights = softmax_regression(_scaled(train), self.said, classes=self.right.shape[1])
        answers = (_scaled(test) @ weights).argmax(axis=1)
        return self.right[np.arange(len(answers)), answers].astype(np.float64)


def _scaled(vectors: Float[np.ndarray, "rows dim"]) -> Float[np.ndarray, "rows dim_and_one"]:
    """As `heads.Probe` sees them, with a column of ones for the intercept."""
    dim = vectors.shape[1]
    return np.concatenate([vectors.astype(np.float64) * math.sqrt(dim), np.ones((len(vectors), 1))], axis=1)


def softmax_regression(
    x: Float[np.ndarray, "train features"], labels: Int[np.ndarray, " train"], *, classes: int, penalty: float = PENALTY
) -> Float[np.ndarray, "features classes"]:
    """Weights that minimise the mean cross-entropy plus half ``penalty`` times their squared length (L-BFGS, fp64)."""
    wanted = np.eye(classes)[labels]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(-1, classes)
        log_shares = log_softmax(x @ weights, axis=1)
        value = penalty / 2 * np.square(flat).sum() - (log_shares * wanted).sum() / len(x)
        return value, (x.T @ (np.exp(log_shares) - wanted) / len(x) + penalty * weights).ravel()

    found = minimize(
        loss, np.zeros(x.shape[1] * classes), jac=True, method="L-BFGS-B", options={"gtol": TOLERANCE, "ftol": 0}
    )
    return found.x.reshape(-1, classes)


@dataclass(frozen=True, eq=False)
class Captions:
    """Find a real image's captions among many and the image by each of them: what a text tower learns.

    Attributes:
        said: Row in ``texts`` of what each training image was drawn from.
        owners: A number for the image that the caption of each training image describes; siblings share it.
        texts: Text embeddings, beside f_r, of the training captions.
        candidates: Of the captions of the held-out real images.
        right: (candidate, held-out real image) of each caption that describes an image.
        scale: CLIP's inverse temperature.
        seed: Of the order of the training images.
    """

    kind: ClassVar[str] = "captions"
    measure: ClassVar[str] = "mean reciprocal rank"
    said: Int[np.ndarray, " train"]
    owners: Int[np.ndarray, " train"]
    texts: Float[np.ndarray, "texts dim"]
    candidates: Float[np.ndarray, "candidates dim"]
    right: Int[np.ndarray, "pairs 2"]
    scale: float
    seed: int

    def scores(
        self, train: Float[np.ndarray, "train dim"], *, test: Float[np.ndarray, "test dim"]
    ) -> Float[np.ndarray, " test"]:
        """Fit on ``train``; for each held-out real image the mean of two reciprocal ranks.

        One is of the best of its captions among all, the other of the image among all, averaged over its captions.
        """
        head = self.fit(train)
        with torch.no_grad():
            texts = head(torch.from_numpy(self.candidates).float()).numpy()
        candidate, image = self.right.T
        first = np.full(len(texts), -1)
        first[candidate[::-1]] = image[::-1]
        ranks = retrieval_ranks(test.astype(np.float32), texts=texts, owners=first, extra_positives=self.right)
        by_text, by_image = ranks.text_to_image.reciprocal_rank(), np.zeros(len(test))
        by_image[ranks.image_to_text.query] = ranks.image_to_text.reciprocal_rank()
        captions = np.bincount(image, minlength=len(test))
        return (np.bincount(image, by_text[candidate], len(test)) / np.maximum(captions, 1) + by_image) / 2

    def fit(self, train: Float[np.ndarray, "train dim"]) -> Residual:
        """Train a linear map of the text embeddings, from the identity, against fixed image embeddings (LiT-like)."""
        images, texts = torch.from_numpy(train).float(), torch.from_numpy(self.texts).float()
        said, owners = torch.from_numpy(self.said), torch.from_numpy(self.owners)
        head = Residual(images.shape[1])
        optimiser = torch.optim.AdamW(head.parameters(), lr=RATE, weight_decay=DECAY)
        for step in range(STEPS):
            drawn = batch_indices(len(images), min(BATCH, len(images)), seed=self.seed, step=step)
            rows = torch.from_numpy(drawn)
            same = said[rows, None] == said[None, rows]
            value, _ = contrastive_loss(
                images[rows],
                head(texts[said[rows]]),
                scale=torch.tensor(self.scale),
                positives=same,
                excluded=(owners[rows, None] == owners[None, rows]) & ~same,
            )
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
        return head


Task: TypeAlias = Classes | Captions


def make_task(
    generated: Sequence[GeneratedFrom],
    real: Sequence[RealImage],
    *,
    embed: Callable[[list[str]], Float[np.ndarray, "texts dim"]] | None,
    scale: float,
    captioned: bool = False,
    seed: int = 0,
) -> Task | None:
    """The task that the captions at hand allow; None where there is none.

    Few captions that repeat make classes. So do labels, where captions of generated and of real images have nothing in
    common, or f_r reads no texts.

    Args:
        generated: The generated training images.
        real: The held-out real images.
        embed: Text embeddings beside f_r, where it has any; used where captions hardly repeat.
        scale: CLIP's inverse temperature; likewise.
        captioned: Every generated image was drawn from a caption of one real image, so labels do not stand in.
        seed: See `Captions`.
    """
    said = [image.text for image in generated]
    told: list[frozenset[str]] = [image.texts for image in real]
    labelled = all(each.label for each in generated) and all(each.label for each in real)
    if labelled and (embed is None or not (captioned or set(said) & set().union(*told))):
        said = [str(image.label) for image in generated]
        told = [frozenset({str(image.label)}) for image in real]
    spoken, numbers = np.unique(said, return_inverse=True)
    answers = sorted(set().union(*told))
    if 2 * len(answers) <= len(real):
        return Classes(numbers, np.array([[answer in own for answer in spoken] for own in told]))
    if embed is None:
        return None
    row_of = {answer: row for row, answer in enumerate(answers)}
    return Captions(
        said=numbers,
        owners=np.unique([image.owner for image in generated], return_inverse=True)[1],
        texts=embed(spoken.tolist()),
        candidates=embed(answers),
        right=np.array([(row_of[text], row) for row, own in enumerate(told) for text in sorted(own)]),
        scale=scale,
        seed=seed,
    )


def neighbours_found(
    generated: Float[np.ndarray, "generated dim"], real: Float[np.ndarray, "real dim"], *, pairs: Pairing
) -> float:
    """Share of generated images whose most similar real image is one of their candidates (recall@1)."""
    pieces = [(generated[start : start + 1024] @ real.T).argmax(axis=1) for start in range(0, len(generated), 1024)]
    spans = zip(np.concatenate(pieces), pairs.start, pairs.size, strict=True)
    return float(np.mean([row in pairs.candidates[start : start + size] for row, start, size in spans]))


@dataclass(frozen=True, eq=False)
class View:
    """Generated images as one encoder sees them: those trained on, and those held out."""

    train: Float[np.ndarray, "train dim"]
    held: Float[np.ndarray, "held dim"]


def validate(
    before: View,
    after: View,
    *,
    partners: Float[np.ndarray, "train dim"],
    real: Float[np.ndarray, "real dim"],
    pairs: Pairing,
    task: Task,
    objective: str,
    seed: int = 0,
) -> dict[str, Any]:
    """Gap and transfer on held-out images before and after alignment, and a verdict in words.

    Args:
        before: Through f_r.
        after: Through f_g.
        partners: f_r of a real image of the caption of each generated training image: what to reach.
        real: f_r of the held-out real images.
        pairs: Of the held-out generated images with rows of ``real``.
        task: What to tell of the real images.
        objective: As the profile names it, for the advice.
        seed: Of the choice among several partners.

    Returns:
        For ``before`` and ``after`` the gap, ``spread`` (variance of the training images' embeddings relative to
        that of real ones) and ``transfer``; ``transfer_real``, the same of a head fitted to real
        images; ``transfer_gain`` with its ``transfer_standard_error`` over held-out real images (each is one unit,
        with all its captions); ``transfer_share_closed`` of the distance from before to real, None where that
        distance is not measurable; whether f_g has ``collapsed``; and the ``verdict``.
    """
    partner = pairs.rows(np.arange(len(pairs.start)), seed=seed)
    trained = {"before": before.train, "after": after.train, "real": partners}
    found = {name: task.scores(train, test=real) for name, train in trained.items()}
    gain, error = _difference(found["after"], found["before"])
    distance, unsure = _difference(found["real"], found["before"])
    report: dict[str, Any] = {
        when: {
            **_gap(real[partner], view.held, groups=partner),
            "generated_to_real_recall_at_1": neighbours_found(view.held, real, pairs=pairs),
            "spread": _spread(view.train) / max(_spread(partners), 1e-12),
            "transfer": float(found[when].mean()),
        }
        for when, view in (("before", before), ("after", after))
    }
    collapsed = report["after"]["spread"] < COLLAPSED <= report["before"]["spread"]
    report |= {
        "held_out": {"generated": len(partner), "real": len(real)},
        "transfer_task": task.kind,
        "transfer_real": float(found["real"].mean()),
        "transfer_gain": gain,
        "transfer_standard_error": error,
        "transfer_share_closed": gain / distance if distance > 2 * unsure and not collapsed else None,
        "collapsed": collapsed,
    }
    return {**report, "verdict": _verdict(report, measure=task.measure, objective=objective)}


def _difference(one: Float[np.ndarray, " test"], other: Float[np.ndarray, " test"]) -> tuple[float, float]:
    """Mean difference of paired scores, and its standard error."""
    each = one - other
    return float(each.mean()), float(each.std(ddof=1) / math.sqrt(len(each)))


def _spread(vectors: Float[np.ndarray, "rows dim"]) -> float:
    return float(np.square(vectors - vectors.mean(axis=0)).sum(axis=1).mean())


def _gap(
    real: Float[np.ndarray, "held dim"], generated: Float[np.ndarray, "held dim"], *, groups: Int[np.ndarray, " held"]
) -> dict[str, float]:
    found = {
        "paired_cosine": float(gap.paired_cosine(real, generated=generated).mean()),
        "centroid_distance": gap.centroid_distance(real, generated=generated),
    }
    if len(np.unique(groups)) >= FOLDS:
        found["linear_separability"] = gap.linear_separability(
            real, generated=generated, real_groups=groups, generated_groups=groups, folds=FOLDS
        )
    return found


def _verdict(report: Mapping[str, Any], *, measure: str, objective: str) -> str:
    gain, error, share = (report[f"transfer_{name}"] for name in ("gain", "standard_error", "share_closed"))
    change = (
        f"{measure} on held-out real images {report['before']['transfer']:.3f} -> {report['after']['transfer']:.3f} "
        f"({gain:+.3f}, standard error {error:.3f}; {report['transfer_real']:.3f} when trained on real images"
    )
    if gain > 2 * error and not report["collapsed"]:
        closed = "" if share is None else f", {share:.0%} of the distance closed"
        return f"alignment helps: transfer {change}{closed})"
    if report["collapsed"]:
        change += f"; f_g has collapsed, its embeddings vary {report['after']['spread']:.2%} as much as real ones"
    hurts = report["collapsed"] or gain < -2 * error
    found = "alignment hurts" if hurts else "alignment makes no measurable difference"
    best = NAMED["recommended"]
    advice = "" if NAMED.get(objective, objective) == best else "; try --set align.objective=recommended"
    return f"{found}: transfer {change}){advice}"
