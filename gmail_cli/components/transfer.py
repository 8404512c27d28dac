"""Did alignment help? What a model trained on generated images gains on real ones, before any such model is trained.

Small gaps prove nothing (a collapsed encoder has none), so alignment is judged by *transfer*: a closed-form ridge
regression from embeddings of generated images to what their captions say, applied to embeddings of held-out real
images. It needs no labels, costs seconds, and stands for the downstream training of Algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from gmail_cli.components.metrics import gap
from gmail_cli.components.objectives import NAMED, GeneratedFrom, Pairing, RealImage

RIDGE = 1e-2
"""Weight penalty, relative to the mean variance of a component."""
FOLDS = 5
"""Of the cross-validated probe that tells real from generated."""


@dataclass(frozen=True, eq=False)
class Task:
    """What is to be told of a real image from its embedding.

    Attributes:
        kind: ``classes`` where captions repeat (which caption?), else ``captions`` (which of many texts?).
        targets: What the embedding of each generated training image is regressed to: one-hot, or the text embedding.
        candidates: The possible answers, in the same space.
        right: For each held-out real image, which candidates are right.
    """

    kind: Literal["classes", "captions"]
    targets: Float[np.ndarray, "train space"]
    candidates: Float[np.ndarray, "candidates space"]
    right: Bool[np.ndarray, "test candidates"]


def ridge(
    x: Float[np.ndarray, "train dim"], y: Float[np.ndarray, "train space"], *, penalty: float = RIDGE
) -> tuple[Float[np.ndarray, "dim space"], Float[np.ndarray, " space"]]:
    """Weights and intercept of the ridge regression of ``y`` on ``x``, in fp64; the intercept is not penalised."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    mean_x, mean_y = x.mean(axis=0), y.mean(axis=0)
    centred = x - mean_x
    gram = centred.T @ centred / len(x)
    damped = gram + (penalty * np.trace(gram) / len(gram) + 1e-12) * np.eye(len(gram))
    weights = np.linalg.solve(damped, centred.T @ (y - mean_y) / len(x))
    return weights, mean_y - mean_x @ weights


def scores(
    task: Task, *, train: Float[np.ndarray, "train dim"], test: Float[np.ndarray, "test dim"]
) -> Float[np.ndarray, " test"]:
    """For each real image how well its caption is found: 0 or 1 for classes, the reciprocal rank among captions.

    Args:
        task: What to find.
        train: Embeddings of the generated training images.
        test: f_r of the held-out real images.
    """
    weights, intercept = ridge(train, task.targets)
    answers = (test.astype(np.float64) @ weights + intercept) @ task.candidates.astype(np.float64).T
    best_right = np.where(task.right, answers, -np.inf).max(axis=1, keepdims=True)
    wrong = np.where(task.right, -np.inf, answers)
    rank = 1 + (wrong > best_right).sum(axis=1) + (wrong == best_right).sum(axis=1) / 2
    return (rank == 1).astype(np.float64) if task.kind == "classes" else 1 / rank


def make_task(
    generated: Sequence[GeneratedFrom],
    real: Sequence[RealImage],
    *,
    embed: Callable[[list[str]], Float[np.ndarray, "texts dim"]],
) -> Task:
    """The task that the captions at hand allow.

    Args:
        generated: The generated training images.
        real: The held-out real images.
        embed: Text embeddings beside f_r; used where captions hardly repeat.
    """
    said = [image.text for image in generated]
    told: list[frozenset[str]] = [image.texts for image in real]
    if (
        not set(said) & set().union(*told)
        and all(each.label for each in generated)
        and all(each.label for each in real)
    ):
        said = [str(image.label) for image in generated]
        told = [frozenset({str(image.label)}) for image in real]
    answers = sorted(set().union(*told))
    repeated = 2 * len(answers) <= len(real)
    if repeated:
        answers = sorted({*answers, *said})
    right = np.array([[answer in own for answer in answers] for own in told])
    spoken = sorted(set(said))
    if repeated:
        candidates = np.eye(len(answers), dtype=np.float32)
        vectors = candidates[np.searchsorted(answers, spoken)]
    else:
        candidates, vectors = embed(answers), embed(spoken)
    return Task("classes" if repeated else "captions", vectors[np.searchsorted(spoken, said)], candidates, right)


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
        real: f_r of the held-out real images.
        pairs: Of the held-out generated images with rows of ``real``.
        task: What to tell of the real images.
        objective: As the profile names it, for the advice.
        seed: Of the choice among several partners.
    """
    partner = pairs.rows(np.arange(len(pairs.start)), seed=seed)
    found = {"before": scores(task, train=before.train, test=real), "after": scores(task, train=after.train, test=real)}
    gain = found["after"] - found["before"]
    error = float(gain.std(ddof=1) / math.sqrt(len(gain)))
    report: dict[str, Any] = {
        when: {
            **_gap(real[partner], view.held, groups=partner),
            "generated_to_real_recall_at_1": neighbours_found(view.held, real, pairs=pairs),
            "transfer": float(found[when].mean()),
        }
        for when, view in (("before", before), ("after", after))
    }
    return {
        **report,
        "held_out": {"generated": len(partner), "real": len(real)},
        "transfer_task": task.kind,
        "transfer_gain": float(gain.mean()),
        "transfer_standard_error": error,
        "verdict": _verdict(task.kind, report, gain=float(gain.mean()), error=error, objective=objective),
    }


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


def _verdict(kind: str, report: Mapping[str, Any], *, gain: float, error: float, objective: str) -> str:
    what = "accuracy" if kind == "classes" else "mean reciprocal rank"
    before, after = report["before"]["transfer"], report["after"]["transfer"]
    change = f"{what} on held-out real images {before:.3f} -> {after:.3f} ({gain:+.3f}, standard error {error:.3f})"
    if gain > 2 * error:
        return f"alignment helps: transfer {change}"
    found = "alignment hurts" if gain < -2 * error else "alignment makes no measurable difference"
    best = NAMED["recommended"]
    advice = "" if NAMED.get(objective, objective) == best else "; try --set align.objective=recommended"
    return f"{found}: transfer {change}{advice}"
