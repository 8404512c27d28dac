"""How good a set of generated images is as a set: near real ones, as varied as they are, and varied in itself.

``real`` and ``generated`` are features of one encoder, used as they are; which encoder it was decides what the numbers
mean. Distances are computed in fp64, block by block, so memory does not grow with the number of pairs. The Frechet
distance is :func:`gmail_cli.components.metrics.gap.frechet_distance`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from gmail_cli.components.metrics.gap import directions
from gmail_cli.errors import InputError

NEIGHBOURS = 5
SUBSETS = 100
SUBSET_SIZE = 1000

_CELLS = 1 << 24  # distances held at once: 128 MiB
_TILE_ROWS = 4096
_TIE = 1e-12  # distances this near, in units of the squared lengths involved, differ by rounding only


@dataclass(frozen=True, kw_only=True)
class Manifolds:
    """Fidelity (precision, density) and variety (recall, coverage) by k nearest neighbours.

    Attributes:
        precision: Share of generated images inside the ball of some real image.
        recall: Share of real images inside the ball of some generated image.
        density: Mean number of real images' balls that a generated image lies in, over k; may exceed 1.
        coverage: Share of real images whose ball holds a generated image.
    """

    precision: float
    recall: float
    density: float
    coverage: float


@dataclass(frozen=True, kw_only=True)
class KernelDistance:
    """KID: mean over subsets, and their standard deviation (None for one subset)."""

    distance: float
    standard_deviation: float | None
    subsets: int
    subset_size: int


def manifold_metrics(
    real: Float[np.ndarray, "r dim"],
    *,
    generated: Float[np.ndarray, "g dim"],
    k: int = NEIGHBOURS,
    progress: Callable[[int, int], None] | None = None,
) -> Manifolds:
    """Precision, recall (Kynkaanniemi et al. 2019, eq. 1), density and coverage (Naeem et al. 2020, section 3).

    The ball of an image reaches to its ``k``-th nearest fellow, itself not counted. Ties follow the papers' authors:
    balls of precision and recall hold their rim, those of density and coverage do not. So a set compared with itself
    has precision and recall 1 and density 1; its coverage is 1 unless an image occurs more than ``k`` times.

    Args:
        k: Neighbours. Kynkaanniemi et al. use 3, Naeem et al. 5.
        progress: Called with (rows done, rows in all).

    Raises:
        InputError: If features are not finite or of different dimensions, or a set has not more than ``k`` rows.
    """
    _check(real, generated)
    for name, rows in (("real", len(real)), ("generated", len(generated))):
        if not 1 <= k < rows:
            raise InputError(
                f"{rows} {name} images cannot have {k} nearest neighbours each",
                hint=f"Give at least {k + 1} images, or ask for fewer neighbours.",
            )
    origin = real.mean(axis=0, dtype=np.float64)  # distances do not depend on it, their rounding does
    total = len(real) + len(generated)

    def tick(done: int) -> None:
        if progress is not None:
            progress(done, total)

    of_real = _balls(real, points=generated, k=k, origin=origin, tick=tick)
    of_generated = _balls(generated, points=real, k=k, origin=origin, tick=lambda done: tick(len(real) + done))
    return Manifolds(
        precision=of_real.inside / len(generated),
        recall=of_generated.inside / len(real),
        density=of_real.memberships / (k * len(generated)),
        coverage=of_real.reached / len(real),
    )


def kernel_distance(
    real: Float[np.ndarray, "r dim"],
    *,
    generated: Float[np.ndarray, "g dim"],
    subsets: int = SUBSETS,
    subset_size: int = SUBSET_SIZE,
    seed: int = 0,
) -> KernelDistance:
    """KID: unbiased squared MMD with the kernel ``(x . y / dim + 1)^3``, averaged over subsets (Binkowski et al. 2018).

    About 0, and possibly a little below, when both sets have one distribution. Each subset takes ``subset_size`` rows
    of each set without replacement, fewer where a set has fewer; when that is all rows of both, there is one subset.

    Raises:
        InputError: If features are not finite or of different dimensions, or a set has fewer than two rows.
    """
    _check(real, generated)
    size = min(subset_size, len(real), len(generated))
    if size < 2:
        raise InputError("the kernel distance needs at least two rows of each set", hint="Give more images.")
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(1 if size == len(real) == len(generated) else subsets):
        x = real[rng.choice(len(real), size, replace=False)].astype(np.float64)
        y = generated[rng.choice(len(generated), size, replace=False)].astype(np.float64)
        within = (_off_diagonal_sum(_cubic(x, x)) + _off_diagonal_sum(_cubic(y, y))) / (size * (size - 1))
        values.append(within - 2 * float(_cubic(x, y).mean()))
    return KernelDistance(
        distance=float(np.mean(values)),
        standard_deviation=float(np.std(values)) if len(values) > 1 else None,
        subsets=len(values),
        subset_size=size,
    )


def vendi_score(vectors: Float[np.ndarray, "n dim"]) -> float:
    """Effective number of different images: 1 when all are alike, at most min(n, dim) (Friedman and Dieng 2023, eq. 3).

    The exponential of the entropy of the eigenvalues of ``K / n``, where ``K`` holds the cosines of all pairs. They are
    those of the ``dim x dim`` matrix ``X^T X / n`` of unit rows ``X``, so ``K`` is never formed.

    Raises:
        InputError: If features are not finite, or a row has length zero.
    """
    _check(vectors, vectors)
    rows, dim = vectors.shape
    if rows <= dim:
        unit = directions(vectors)
        gram = unit @ unit.T
    else:
        gram = np.zeros((dim, dim))
        for block in _blocks(rows, _TILE_ROWS):
            unit = directions(vectors[block], first=block.start)
            gram += unit.T @ unit
    shares = np.linalg.eigvalsh(gram) / rows
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


@dataclass(frozen=True, kw_only=True)
class _Balls:
    """What the balls around one set hold of another.

    Attributes:
        inside: Points in at least one ball, rims counted.
        memberships: Pairs of a ball and a point in it, rims not counted.
        reached: Balls with at least one point, rims not counted.
    """

    inside: int
    memberships: int
    reached: int


def _balls(
    centres: Float[np.ndarray, "n dim"],
    *,
    points: Float[np.ndarray, "m dim"],
    k: int,
    origin: Float[np.ndarray, " dim"],
    tick: Callable[[int], None],
) -> _Balls:
    inside = np.zeros(len(points), dtype=bool)
    memberships = reached = 0
    for rows in _blocks(len(centres), max(1, _CELLS // (len(centres) + len(points)))):
        block = centres[rows] - origin
        fellows = _squared_distances(block, centres, origin)
        fellows[np.arange(len(block)), np.arange(rows.start, rows.stop)] = np.inf
        radius = np.partition(fellows, k - 1, axis=1)[:, k - 1]
        others = _squared_distances(block, points, origin)
        slack = _TIE * (np.square(block).sum(axis=1) + radius)
        inside |= (others <= (radius + slack)[:, None]).any(axis=0)
        within = others < (radius - slack)[:, None]
        memberships += int(within.sum())
        reached += int(within.any(axis=1).sum())
        tick(rows.stop)
    return _Balls(inside=int(inside.sum()), memberships=memberships, reached=reached)


def _squared_distances(
    block: Float[np.ndarray, "b dim"], table: Float[np.ndarray, "n dim"], origin: Float[np.ndarray, " dim"]
) -> Float[np.ndarray, "b n"]:
    """Of centred rows to the rows of a table, which are centred tile by tile."""
    squared = np.empty((len(block), len(table)))
    for columns in _blocks(len(table), _TILE_ROWS):
        tile = table[columns] - origin
        squared[:, columns] = np.square(tile).sum(axis=1) - 2 * (block @ tile.T)
    squared += np.square(block).sum(axis=1)[:, None]
    return np.maximum(squared, 0, out=squared)


def _cubic(x: Float[np.ndarray, "n dim"], y: Float[np.ndarray, "m dim"]) -> Float[np.ndarray, "n m"]:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _off_diagonal_sum(square: Float[np.ndarray, "n n"]) -> float:
    return float(square.sum() - np.trace(square))


def _blocks(rows: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _check(real: np.ndarray, generated: np.ndarray) -> None:
    for vectors in (real, generated):
        if vectors.ndim != 2 or not vectors.size or vectors.dtype.kind != "f" or not np.isfinite(vectors).all():
            raise InputError(
                f"features of shape {vectors.shape} and type {vectors.dtype} are empty or not finite floats "
                "[rows, dimensions]",
                hint="Compute them again.",
            )
    if real.shape[1] != generated.shape[1]:
        raise InputError(
            f"real features have {real.shape[1]} dimensions, generated ones {generated.shape[1]}",
            hint="Compare features of one encoder.",
        )
