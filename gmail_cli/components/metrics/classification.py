"""Classification from embeddings: zero-shot, nearest centroid, nearest neighbours.

Each classifier yields a score per class, and :func:`classify` turns scores into accuracies. A tie between
classes is broken at random in expectation, as in :mod:`gmail_cli.components.metrics.retrieval`: with ``g``
classes scoring above the true one and ``e`` others equal to it, P(true class in top k) is
``clip((k - g) / (e + 1), 0, 1)``. A classifier that prefers nothing scores ``1 / classes``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from gmail_cli.components.metrics.distinct import Distinct, inner_products
from gmail_cli.errors import InputError, UsageError

_BLOCK_CELLS = 1 << 22  # scores held at once
_AGAIN = "Embed the set again."


@dataclass(frozen=True, kw_only=True, eq=False)
class Classification:
    """What a classifier did with each sample.

    Attributes:
        labels: True class of each sample.
        greater: Classes scoring strictly above the true one.
        tied: Other classes scoring exactly as the true one.
        confusion: Expected counts, true class by predicted class; rows sum to the class sizes.
    """

    labels: Int[np.ndarray, " samples"]
    greater: Int[np.ndarray, " samples"]
    tied: Int[np.ndarray, " samples"]
    confusion: Float[np.ndarray, "classes classes"]

    def correct(self, k: int = 1) -> Float[np.ndarray, " samples"]:
        """Probability, per sample, that the true class is among the top ``k``."""
        if k < 1:
            raise UsageError(f"top-{k} accuracy is not defined", hint="Give k of at least 1.")
        return np.clip((k - self.greater) / (self.tied + 1), 0.0, 1.0)

    def mean_per_class(self) -> float:
        """Top-1 accuracy averaged over the classes that occur."""
        sizes = self.confusion.sum(axis=1)
        present = sizes > 0
        return float((np.diag(self.confusion)[present] / sizes[present]).mean())

    def metrics(self) -> dict[str, float]:
        """``top_1_accuracy``, ``mean_per_class_accuracy`` and, above five classes, ``top_5_accuracy``."""
        found = {"top_1_accuracy": float(self.correct(1).mean())}
        if len(self.confusion) > 5:
            found["top_5_accuracy"] = float(self.correct(5).mean())
        found["mean_per_class_accuracy"] = self.mean_per_class()
        return found


def class_embeddings(
    text_vectors: Float[np.ndarray, "prompts dim"], *, class_rows: Int[np.ndarray, " prompts"], classes: int
) -> Float[np.ndarray, "classes dim"]:
    """Zero-shot class vectors: normalise each prompt, average per class, normalise again (CLIP, 2021).

    Args:
        text_vectors: Embedded prompts, every template filled with every class name, in any order.
        class_rows: The class of each prompt.

    Raises:
        InputError: If a class has no prompt, or a prompt or an average has length zero.
    """
    sums = _class_sums(_unit(text_vectors, "prompt"), class_rows, classes, what="prompt")
    return _unit(sums, "class")


def centroids(
    vectors: Float[np.ndarray, "samples dim"], *, labels: Int[np.ndarray, " samples"], classes: int
) -> Float[np.ndarray, "classes dim"]:
    """Mean vector of each class, for :func:`centroid_scores`.

    Raises:
        InputError: If a class has no sample.
    """
    sizes = np.bincount(_check_labels(labels, len(vectors), classes), minlength=classes)
    sums = _class_sums(np.asarray(vectors, np.float64), labels, classes, what="sample")
    return (sums / sizes[:, None]).astype(np.float32)


def centroid_scores(
    vectors: Float[np.ndarray, "samples dim"], *, centroids: Float[np.ndarray, "classes dim"]
) -> Float[np.ndarray, "samples classes"]:
    """Nearness to each centroid: minus the squared distance, up to a constant of the sample."""
    _check_dims(vectors, centroids)
    return _products(vectors, centroids) - 0.5 * np.square(centroids).sum(axis=1)


def neighbour_scores(
    vectors: Float[np.ndarray, "samples dim"],
    *,
    references: Float[np.ndarray, "references dim"],
    labels: Int[np.ndarray, " references"],
    classes: int,
    k: int,
    groups: Int[np.ndarray, " samples"] | None = None,
    reference_groups: Int[np.ndarray, " references"] | None = None,
) -> Float[np.ndarray, "samples classes"]:
    """Votes of the ``k`` references with the highest inner product.

    References tied for the last place share the votes left, so the result does not depend on their order.

    Args:
        vectors: Samples to classify; unit rows make the inner product a cosine.
        labels: Class of each reference.
        k: Votes per sample.
        groups: Of each sample; with ``reference_groups``, a sample ignores the references of its own group.

    Raises:
        InputError: If the shapes do not fit, or fewer than ``k`` references are left for a sample.
    """
    _check_dims(vectors, references)
    labels = _check_labels(labels, len(references), classes)
    if (groups is None) != (reference_groups is None):
        raise UsageError("neighbours were given groups on one side only", hint="Give both groups and reference_groups.")
    if not 1 <= k <= len(references):
        raise InputError(
            f"k = {k} neighbours of {len(references)} references", hint="Use a k within 1 and their number."
        )
    one_hot = np.zeros((len(references), classes), np.float32)
    one_hot[np.arange(len(references)), labels] = 1
    votes = np.empty((len(vectors), classes), np.float32)
    distinct = Distinct.of(references, order=np.arange(len(references)))
    step = max(1, _BLOCK_CELLS // len(references))
    for start in range(0, len(vectors), step):
        rows = slice(start, start + step)
        scores = inner_products(vectors[rows], references=references, distinct=distinct)
        if groups is not None and reference_groups is not None:
            scores[groups[rows, None] == reference_groups] = -np.inf
        last = np.partition(scores, len(references) - k, axis=1)[:, [len(references) - k]]
        if np.isneginf(last).any():
            raise InputError(f"a sample has fewer than {k} references outside its own group", hint="Use a smaller k.")
        above, at = scores > last, scores == last
        share = (k - above.sum(axis=1, keepdims=True)) / at.sum(axis=1, keepdims=True)
        votes[rows] = (above + at * share).astype(np.float32) @ one_hot
    return votes


def linear_probe(
    vectors: Float[np.ndarray, "samples dim"],
    *,
    labels: Int[np.ndarray, " samples"],
    classes: int,
    strength: float,
    iterations: int = 1000,
) -> Float[np.ndarray, "classes columns"]:
    """Weights and, as last column, biases of a multinomial logistic regression (CLIP, 2021, section 3.2).

    Minimises the summed cross-entropy plus ``|W|^2 / (2 strength)``, with free biases, by L-BFGS from zero: the
    objective of scikit-learn's ``LogisticRegression(C=strength)``.

    Args:
        vectors: Samples; unit rows make one ``strength`` fit many encoders.
        labels: Class of each sample.
        classes: How many there are.
        strength: Greater fits the samples more closely.
        iterations: At most.

    Raises:
        InputError: If the shapes do not fit or a label is out of range.
    """
    from scipy.optimize import minimize

    labels = _check_labels(labels, len(vectors), classes)
    inputs = np.concatenate([np.asarray(vectors, np.float64), np.ones((len(vectors), 1))], axis=1)
    target = np.zeros((len(vectors), classes))
    target[np.arange(len(vectors)), labels] = 1

    def objective(flat: Float[np.ndarray, " weights"]) -> tuple[float, Float[np.ndarray, " weights"]]:
        weights = flat.reshape(classes, -1)
        logits = inputs @ weights.T
        logits -= logits.max(axis=1, keepdims=True)
        exponentials = np.exp(logits)
        sums = exponentials.sum(axis=1, keepdims=True)
        penalised = weights * np.append(np.ones(weights.shape[1] - 1), 0)
        loss = (np.log(sums[:, 0]) - logits[np.arange(len(labels)), labels]).sum()
        gradient = (exponentials / sums - target).T @ inputs + penalised / strength
        return float(loss + np.square(penalised).sum() / (2 * strength)), gradient.reshape(-1)

    start = np.zeros(classes * inputs.shape[1])
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": iterations, "gtol": 1e-6})
    return np.asarray(found.x).reshape(classes, -1)


def probe_scores(
    vectors: Float[np.ndarray, "samples dim"], *, weights: Float[np.ndarray, "classes columns"]
) -> Float[np.ndarray, "samples classes"]:
    """Logits of a :func:`linear_probe`."""
    return np.asarray(vectors, np.float64) @ weights[:, :-1].T + weights[:, -1]


def zero_shot(
    vectors: Float[np.ndarray, "samples dim"],
    *,
    class_vectors: Float[np.ndarray, "classes dim"],
    labels: Int[np.ndarray, " samples"],
) -> Classification:
    """Classify images by their cosine with the class vectors of :func:`class_embeddings`."""
    _check_dims(vectors, class_vectors)
    distinct = Distinct.of(class_vectors, order=np.arange(len(class_vectors)))

    def scores(rows: slice) -> Float[np.ndarray, "rows classes"]:
        return inner_products(vectors[rows], references=class_vectors, distinct=distinct)

    return _classify(scores, shape=(len(vectors), len(class_vectors)), labels=labels)


def classify(scores: Float[np.ndarray, "samples classes"], *, labels: Int[np.ndarray, " samples"]) -> Classification:
    """Compare scores with the true classes.

    Raises:
        InputError: If labels do not fit the scores, or a score is not finite.
    """
    return _classify(scores.__getitem__, shape=scores.shape, labels=labels)


def _classify(
    scores_of: Callable[[slice], Float[np.ndarray, "rows classes"]],
    *,
    shape: tuple[int, ...],
    labels: Int[np.ndarray, " samples"],
) -> Classification:
    """:func:`classify` with the scores of some samples at a time: memory does not grow with their number."""
    if len(shape) != 2 or 0 in shape:
        raise InputError(f"class scores of shape {shape} are empty; expected [samples, classes]", hint=_AGAIN)
    samples, classes = shape
    labels = _check_labels(labels, samples, classes)
    greater, tied = np.empty((2, samples), dtype=np.int64)
    confusion = np.zeros((classes, classes))
    step = max(1, _BLOCK_CELLS // classes)
    for rows in (slice(start, min(start + step, samples)) for start in range(0, samples, step)):
        scores, own = scores_of(rows), labels[rows]
        if not np.isfinite(scores).all():
            raise InputError(f"class scores of shape {shape} are not finite", hint=_AGAIN)
        true = scores[np.arange(len(scores)), own][:, None]
        greater[rows] = (scores > true).sum(axis=1)
        tied[rows] = (scores == true).sum(axis=1) - 1
        sample, best = np.nonzero(scores == scores.max(axis=1, keepdims=True))
        np.add.at(confusion, (own[sample], best), 1 / np.bincount(sample)[sample])
    return Classification(labels=labels, greater=greater, tied=tied, confusion=confusion)


def _products(
    vectors: Float[np.ndarray, "samples dim"], classes: Float[np.ndarray, "classes dim"]
) -> Float[np.ndarray, "samples classes"]:
    distinct = Distinct.of(classes, order=np.arange(len(classes)))
    return inner_products(vectors, references=classes, distinct=distinct)


def _class_sums(
    vectors: Float[np.ndarray, "rows dim"], labels: Int[np.ndarray, " rows"], classes: int, *, what: str
) -> Float[np.ndarray, "classes dim"]:
    labels = _check_labels(labels, len(vectors), classes)
    sizes = np.bincount(labels, minlength=classes)
    if not sizes.all():
        raise InputError(f"class {int(np.argmin(sizes))} of {classes} has no {what}", hint=f"Give each class a {what}.")
    sums = np.zeros((classes, vectors.shape[1]))
    np.add.at(sums, labels, vectors)
    return sums


def _unit(vectors: Float[np.ndarray, "rows dim"], what: str) -> Float[np.ndarray, "rows dim"]:
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    wrong = np.flatnonzero(~((lengths[:, 0] > 1e-12) & np.isfinite(lengths[:, 0])))
    if len(wrong):
        raise InputError(
            f"{what} vector {wrong[0]} has length {lengths[wrong[0], 0]}; it cannot be normalised",
            hint="Check the encoder's output.",
        )
    return (vectors / lengths).astype(np.float32)


def _check_labels(labels: np.ndarray, rows: int, classes: int) -> Int[np.ndarray, " rows"]:
    labels = np.asarray(labels)
    if labels.shape != (rows,) or labels.dtype.kind not in "iu":
        raise InputError(
            f"labels have shape {labels.shape} and type {labels.dtype}; expected {rows} integers",
            hint="Give one class number per row.",
        )
    if rows and not (labels.min() >= 0 and labels.max() < classes):
        raise InputError(
            f"labels go from {labels.min()} to {labels.max()}, classes from 0 to {classes - 1}",
            hint="Check the list of class names.",
        )
    return labels.astype(np.int64)


def _check_dims(vectors: np.ndarray, others: np.ndarray) -> None:
    if vectors.ndim != 2 or others.ndim != 2 or vectors.shape[1] != others.shape[1]:
        raise InputError(
            f"vectors of shapes {vectors.shape} and {others.shape} do not have one dimension in common",
            hint="Embed both with the same model.",
        )
