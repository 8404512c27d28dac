"""How far generated images lie from real ones in embedding space.

Paired cosine is the paper's Table 14 (0.52 before alignment, 0.89 after), the coordinates are its Fig. 3. A
small gap alone proves nothing (a collapsed encoder has none), so show these beside the task metrics.

``real`` and ``generated`` are embedding tables of one encoder space, unit rows for the cosines.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from gmail_cli.components.metrics.classification import classify, neighbour_scores
from gmail_cli.errors import InputError

_BLOCK_ROWS = 4096  # converted to fp64 at once, so that memory does not grow with a table's rows


@dataclass(frozen=True, kw_only=True)
class FrechetDistance:
    """Frechet distance between Gaussians, and the numbers of samples its bias (about d^2 / 2n) depends on."""

    distance: float
    real_samples: int
    generated_samples: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Coordinates:
    """Two-dimensional positions of a sample of both sets.

    Attributes:
        real_rows, generated_rows: Which rows of the tables are shown.
        real, generated: Their positions.
    """

    real_rows: Int[np.ndarray, " r"]
    generated_rows: Int[np.ndarray, " g"]
    real: Float[np.ndarray, "r 2"]
    generated: Float[np.ndarray, "g 2"]


def paired_cosine(
    real: Float[np.ndarray, "pairs dim"], *, generated: Float[np.ndarray, "pairs dim"]
) -> Float[np.ndarray, " pairs"]:
    """Cosine of each generated image with the real image of the same caption (paper, Table 14).

    Raises:
        InputError: If the tables are not paired row by row, are not finite, or hold a zero vector.
    """
    _check(real, generated, paired=True)
    return np.concatenate(
        [
            (directions(real[rows], first=rows.start) * directions(generated[rows], first=rows.start)).sum(axis=1)
            for rows in _blocks(len(real))
        ]
    )


def unpaired_cosine(
    real: Float[np.ndarray, "r dim"], *, generated: Float[np.ndarray, "g dim"], paired: bool = True
) -> float:
    """Mean cosine over all pairs of *different* captions: what paired cosine must exceed to mean anything.

    Args:
        paired: Row i of both sets belongs to one caption, and is left out. Otherwise every row of one set is
            compared with every row of the other.

    Raises:
        InputError: If ``paired`` and the sets have different lengths or a single row; as :func:`paired_cosine`.
    """
    _check(real, generated, paired=paired)
    if paired and len(real) < 2:
        raise InputError("one pair has no unpaired cosine", hint="Give at least two pairs.")
    sums = [
        np.sum([directions(vectors[rows], first=rows.start).sum(axis=0) for rows in _blocks(len(vectors))], axis=0)
        for vectors in (real, generated)
    ]
    total = float(sums[0] @ sums[1])
    if not paired:
        return total / (len(real) * len(generated))
    return (total - float(paired_cosine(real, generated=generated).sum())) / (len(real) * (len(real) - 1))


def centroid_distance(real: Float[np.ndarray, "r dim"], *, generated: Float[np.ndarray, "g dim"]) -> float:
    """Euclidean distance between the two means."""
    _check(real, generated)
    return float(np.linalg.norm(real.mean(axis=0, dtype=np.float64) - generated.mean(axis=0, dtype=np.float64)))


def centroid_cosine(real: Float[np.ndarray, "r dim"], *, generated: Float[np.ndarray, "g dim"]) -> float:
    """Cosine between the two means."""
    _check(real, generated)
    means = np.stack([real.mean(axis=0, dtype=np.float64), generated.mean(axis=0, dtype=np.float64)])
    a, b = directions(means)
    return float(a @ b)


def frechet_distance(real: Float[np.ndarray, "r dim"], *, generated: Float[np.ndarray, "g dim"]) -> FrechetDistance:
    """Frechet distance of the Gaussians fitted to both sets, in fp64.

    ``|m_r - m_g|^2 + tr(C_r) + tr(C_g) - 2 tr((C_r^1/2 C_g C_r^1/2)^1/2)``. Compare only values of equal
    sample numbers.

    Raises:
        InputError: If a set has fewer than two rows.
    """
    _check(real, generated)
    mean_a, cov_a = _moments(real)
    mean_b, cov_b = _moments(generated)
    shift = mean_a - mean_b
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_b @ root), 0)).sum()
    distance = float(shift @ shift + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)
    return FrechetDistance(distance=max(distance, 0.0), real_samples=len(real), generated_samples=len(generated))


def covariance_distance(real: Float[np.ndarray, "r dim"], *, generated: Float[np.ndarray, "g dim"]) -> float:
    """Frobenius norm of the difference between the two sample covariances, in fp64.

    Raises:
        InputError: If a set has fewer than two rows.
    """
    _check(real, generated)
    return float(np.linalg.norm(_moments(real)[1] - _moments(generated)[1]))


def maximum_mean_discrepancy(real: Float[np.ndarray, "r dim"], *, generated: Float[np.ndarray, "g dim"]) -> float:
    """Unbiased squared MMD with a Gaussian kernel whose width is the median distance (Gretton et al. 2012).

    About 0, and possibly a little below, when both sets have one distribution. The median is taken over at
    most 1,000 evenly spaced rows of each set.

    Raises:
        InputError: If a set has fewer than two rows, or all vectors are equal.
    """
    _check(real, generated)
    if min(len(real), len(generated)) < 2:
        raise InputError("MMD needs at least two rows of each set", hint="Give more images.")
    a, b = real.astype(np.float64), generated.astype(np.float64)
    sample = np.concatenate([a[evenly_spaced(len(a), limit=1000)], b[evenly_spaced(len(b), limit=1000)]])
    upper = np.triu_indices(len(sample), k=1)
    width = float(np.median(_squared_distances(sample, sample)[upper]))
    if width <= 0:
        raise InputError("most vectors are equal, so MMD has no scale", hint="The encoder has collapsed.")

    def kernel_sum(x: Float[np.ndarray, "n dim"], y: Float[np.ndarray, "m dim"]) -> float:
        step = max(1, (1 << 22) // len(y))
        blocks = (x[start : start + step] for start in range(0, len(x), step))
        return sum(float(np.exp(-_squared_distances(block, y) / width).sum()) for block in blocks)

    r, g = len(a), len(b)
    within = (kernel_sum(a, a) - r) / (r * (r - 1)) + (kernel_sum(b, b) - g) / (g * (g - 1))
    return within - 2 * kernel_sum(a, b) / (r * g)


def linear_separability(
    real: Float[np.ndarray, "r dim"],
    *,
    generated: Float[np.ndarray, "g dim"],
    real_groups: Int[np.ndarray, " r"] | None = None,
    generated_groups: Int[np.ndarray, " g"] | None = None,
    folds: int = 5,
    seed: int = 0,
) -> float:
    """Cross-validated balanced accuracy of a linear probe that tells real from generated; 0.5 = it cannot.

    The probe is ridge regression on +1 / -1 with both sets weighted equally. Groups (the caption or image
    behind each row) never straddle folds; by default row i of both sets is one group.

    Raises:
        InputError: If there are fewer groups than folds, or groups do not fit the rows.
    """
    groups = _groups(real, generated, real_groups, generated_groups)
    names, group = np.unique(groups, return_inverse=True)
    if len(names) < folds or folds < 2:
        raise InputError(f"{len(names)} groups cannot fill {folds} folds", hint="Give more images, or 2 folds or more.")
    fold = (np.random.default_rng(seed).permutation(len(names)) % folds)[group.reshape(-1)]
    x = np.concatenate([real, generated]).astype(np.float64)
    y = np.repeat([1.0, -1.0], [len(real), len(generated)])
    right = np.empty(len(x))
    for held in range(folds):
        test = fold == held
        right[test] = _probe(x[~test], y[~test], x[test], y[test])
    return float((right[y > 0].mean() + right[y < 0].mean()) / 2)


def neighbour_separability(
    real: Float[np.ndarray, "r dim"],
    *,
    generated: Float[np.ndarray, "g dim"],
    real_groups: Int[np.ndarray, " r"] | None = None,
    generated_groups: Int[np.ndarray, " g"] | None = None,
    k: int = 5,
) -> float:
    """Balanced accuracy of telling real from generated by the ``k`` most similar images of other groups.

    Sees gaps of any shape, where :func:`linear_separability` sees linear ones; 0.5 = indistinguishable. Use
    equally many real and generated images.

    Raises:
        InputError: If fewer than ``k`` images of other groups are left for some image.
    """
    groups = _groups(real, generated, real_groups, generated_groups)
    x = np.concatenate([directions(real), directions(generated)]).astype(np.float32)
    labels = np.repeat([0, 1], [len(real), len(generated)])
    votes = neighbour_scores(x, references=x, labels=labels, classes=2, k=k, groups=groups, reference_groups=groups)
    return classify(votes, labels=labels).mean_per_class()


def plot_coordinates(
    real: Float[np.ndarray, "r dim"],
    *,
    generated: Float[np.ndarray, "g dim"],
    method: Literal["pca", "tsne"] = "tsne",
    limit: int = 500,
    seed: int = 0,
) -> Coordinates:
    """Positions for the paper's Fig. 3, from at most ``limit`` rows of each set.

    Of equally long sets the same rows are shown, so pairs stay together. ``tsne`` is exact t-SNE (van der
    Maaten and Hinton 2008) at perplexity 30 from the PCA positions; the same input and seed give the same
    picture.
    """
    _check(real, generated)
    rng = np.random.default_rng(seed)
    real_rows = np.sort(rng.permutation(len(real))[:limit])
    same = len(real) == len(generated)
    generated_rows = real_rows if same else np.sort(rng.permutation(len(generated))[:limit])
    x = np.concatenate([real[real_rows], generated[generated_rows]]).astype(np.float64)
    positions = _principal(x)
    if method == "tsne" and len(x) > 3:
        positions = _tsne(x, start=positions)
    return Coordinates(
        real_rows=real_rows,
        generated_rows=generated_rows,
        real=positions[: len(real_rows)],
        generated=positions[len(real_rows) :],
    )


def _probe(
    x: Float[np.ndarray, "n dim"],
    y: Float[np.ndarray, " n"],
    test_x: Float[np.ndarray, "t dim"],
    test_y: Float[np.ndarray, " t"],
) -> Float[np.ndarray, " t"]:
    """Fit on (x, y), return for each test row 1 if right, 0 if wrong, 0.5 if undecided."""
    real_mean, generated_mean = x[y > 0].mean(axis=0), x[y < 0].mean(axis=0)
    centre = (real_mean + generated_mean) / 2
    weight = np.where(y > 0, 0.5 / (y > 0).sum(), 0.5 / (y < 0).sum())
    centred = x - centre
    gram = (centred * weight[:, None]).T @ centred
    ridge = 1e-3 * max(float(np.trace(gram)), 1e-30) / len(gram)
    direction = np.linalg.solve(gram + ridge * np.eye(len(gram)), (real_mean - generated_mean) / 2)
    margin = test_y * ((test_x - centre) @ direction)
    return np.where(margin > 0, 1.0, np.where(margin < 0, 0.0, 0.5))


def _principal(x: Float[np.ndarray, "n dim"]) -> Float[np.ndarray, "n 2"]:
    """The first two principal components; each axis points to its largest absolute coordinate."""
    centred = x - x.mean(axis=0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    positions = np.zeros((len(x), 2))
    kept = min(2, len(values))
    positions[:, :kept] = left[:, :kept] * values[:kept]
    peak = positions[np.abs(positions).argmax(axis=0), [0, 1]]
    return positions * np.where(peak < 0, -1.0, 1.0)


def _tsne(
    x: Float[np.ndarray, "n dim"],
    *,
    start: Float[np.ndarray, "n 2"],
    perplexity: float = 30.0,
    steps: int = 500,
) -> Float[np.ndarray, "n 2"]:
    """Exact t-SNE in fp32: gradient descent with momentum and gains; the first 125 steps exaggerate x12."""
    n = len(x)
    joint = _affinities(x, perplexity=min(perplexity, (n - 1) / 3)).astype(np.float32)
    y = (1e-4 * start / max(float(start[:, 0].std()), 1e-12)).astype(np.float32)
    velocity, gains = np.zeros_like(y), np.ones_like(y)
    rate = max(n / 12 / 4, 50.0)
    for step in range(steps):
        early = step < 125
        near = 1 / (1 + _squared_distances(y, y))
        np.fill_diagonal(near, 0)
        pull = ((12.0 if early else 1.0) * joint - near / near.sum()) * near
        gradient = 4 * (pull.sum(axis=1, keepdims=True) * y - pull @ y)
        gains = np.where(gradient * velocity < 0, gains + 0.2, np.maximum(gains * 0.8, 0.01))
        velocity = (0.5 if early else 0.8) * velocity - rate * gains * gradient
        y = y + velocity
    return (y - y.mean(axis=0)).astype(np.float64)


def _affinities(x: Float[np.ndarray, "n dim"], *, perplexity: float) -> Float[np.ndarray, "n n"]:
    """Symmetric neighbour probabilities: each row a Gaussian whose width gives the perplexity (bisection)."""
    n = len(x)
    squared = _squared_distances(x, x)
    np.fill_diagonal(squared, np.inf)
    squared -= squared.min(axis=1, keepdims=True)
    scale = np.median(squared[np.isfinite(squared)])
    squared /= scale if scale > 0 else 1.0
    low, high = np.full((n, 1), 1e-4), np.full((n, 1), 1e6)
    finite = np.where(np.isfinite(squared), squared, 0.0)
    for _ in range(50):
        precision = np.sqrt(low * high)
        p = np.exp(-squared * precision)
        total = p.sum(axis=1, keepdims=True)
        entropy = np.log(total) + precision * (finite * p).sum(axis=1, keepdims=True) / total
        wide = entropy > np.log(perplexity)
        low, high = np.where(wide, precision, low), np.where(wide, high, precision)
    p /= total
    return np.maximum((p + p.T) / (2 * n), 1e-12)


def _squared_distances(x: Float[np.ndarray, "n dim"], y: Float[np.ndarray, "m dim"]) -> Float[np.ndarray, "n m"]:
    squares = np.square(x).sum(axis=1)[:, None] + np.square(y).sum(axis=1)
    squares -= 2 * (x @ y.T)
    return np.maximum(squares, 0, out=squares)


def evenly_spaced(rows: int, *, limit: int) -> Int[np.ndarray, " n"]:
    """At most ``limit`` of the row numbers 0 .. ``rows`` - 1, the first and the last among them."""
    return np.unique(np.linspace(0, rows - 1, min(rows, limit)).astype(np.int64))


def _moments(vectors: Float[np.ndarray, "n dim"]) -> tuple[Float[np.ndarray, " dim"], Float[np.ndarray, "dim dim"]]:
    """Mean and sample covariance, in fp64."""
    if len(vectors) < 2:
        raise InputError("a covariance needs at least two rows", hint="Give more images.")
    mean = vectors.mean(axis=0, dtype=np.float64)
    scatter = np.zeros((vectors.shape[1], vectors.shape[1]))
    for rows in _blocks(len(vectors)):
        centred = vectors[rows] - mean
        scatter += centred.T @ centred
    return mean, scatter / (len(vectors) - 1)


def _blocks(rows: int) -> Iterator[slice]:
    return (slice(start, min(start + _BLOCK_ROWS, rows)) for start in range(0, rows, _BLOCK_ROWS))


def directions(vectors: Float[np.ndarray, "n dim"], *, first: int = 0) -> Float[np.ndarray, "n dim"]:
    """Rows of length one, in fp64; ``first`` is the number of the first one, for the message.

    Raises:
        InputError: A row has length zero.
    """
    vectors = vectors.astype(np.float64)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    if (lengths < 1e-12).any():
        raise InputError(
            f"vector {first + int(np.argmin(lengths))} has length zero and so no direction",
            hint="Check the encoder's output.",
        )
    return vectors / lengths


def _groups(
    real: np.ndarray,
    generated: np.ndarray,
    real_groups: np.ndarray | None,
    generated_groups: np.ndarray | None,
) -> Int[np.ndarray, " n"]:
    _check(real, generated)
    parts = []
    for name, rows, given in (
        ("real", len(real), real_groups),
        ("generated", len(generated), generated_groups),
    ):
        part = np.arange(rows) if given is None else np.asarray(given)
        if part.shape != (rows,) or part.dtype.kind not in "iu":
            raise InputError(
                f"{name} groups have shape {part.shape} and type {part.dtype}; expected {rows} integers",
                hint="Give the row of the image or caption behind each vector.",
            )
        parts.append(part.astype(np.int64))
    return np.concatenate(parts)


def _check(real: np.ndarray, generated: np.ndarray, *, paired: bool = False) -> None:
    for name, vectors in (("real", real), ("generated", generated)):
        if vectors.ndim != 2 or not vectors.size or vectors.dtype.kind != "f" or not np.isfinite(vectors).all():
            raise InputError(
                f"{name} embeddings of shape {vectors.shape} and type {vectors.dtype} are empty or not "
                "finite floats [rows, dimensions]",
                hint="Embed the set again.",
            )
    if real.shape[1] != generated.shape[1]:
        raise InputError(
            f"real embeddings have {real.shape[1]} dimensions, generated ones {generated.shape[1]}",
            hint="Compare embeddings of one model and its aligned copy.",
        )
    if paired and len(real) != len(generated):
        raise InputError(
            f"{len(real)} real and {len(generated)} generated embeddings are not paired row by row",
            hint="Give each generated image's real partner.",
        )
