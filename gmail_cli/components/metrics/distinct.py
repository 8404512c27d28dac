"""Equal vectors get equal scores.

The last bit of a matrix product depends on where in the matrix a cell stands, because BLAS kernels sum edges
in another order. A score must not depend on that when ties decide a rank, so equal vectors are multiplied
once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True, kw_only=True, eq=False)
class Distinct:
    """The different vectors of a table.

    Attributes:
        rows: A table row for each different vector, by first occurrence in the order given.
        slot: For every table row, the place in ``rows`` of its vector.
        copies: How often each vector occurs.
    """

    rows: Int[np.ndarray, " distinct"]
    slot: Int[np.ndarray, " rows"]
    copies: Int[np.ndarray, " distinct"]

    @classmethod
    def of(cls, vectors: Float[np.ndarray, "rows dim"], *, order: Int[np.ndarray, " rows"]) -> Distinct:
        """Find equal vectors in fp32: those whose first values occur twice are hashed, then compared."""
        start = np.ascontiguousarray(vectors[:, :4].astype(np.float32) + 0.0)  # +0.0 makes -0.0 equal to 0.0
        starts = start.view(np.dtype((np.void, start.itemsize * start.shape[1])))[:, 0]
        _, index, count = np.unique(starts, return_inverse=True, return_counts=True)
        original = np.arange(len(vectors))  # for each row, the first row in order that equals it
        first: dict[int, int] = {}
        for row in order[count[index.reshape(-1)[order]] > 1].tolist():
            vector = vectors[row].astype(np.float32) + 0.0
            candidate = first.setdefault(hash(vector.tobytes()), row)
            if np.array_equal(vectors[candidate].astype(np.float32), vector):
                original[row] = candidate
        rows = order[original[order] == order]
        place = np.empty(len(vectors), np.int64)
        place[rows] = np.arange(len(rows))
        slot = place[original]
        return cls(rows=rows, slot=slot, copies=np.bincount(slot))


def inner_products(
    vectors: Float[np.ndarray, "rows dim"],
    *,
    references: Float[np.ndarray, "references dim"],
    distinct: Distinct,
) -> Float[np.ndarray, "rows references"]:
    """``vectors @ references.T`` in fp32, each row giving equal references equal values.

    Args:
        distinct: ``Distinct.of(references, ...)``.
    """
    kept = references[distinct.rows].astype(np.float32, copy=False)
    scores = vectors.astype(np.float32, copy=False) @ kept.T
    whole = len(kept) == len(references) and np.array_equal(distinct.slot, np.arange(len(references)))
    return scores if whole else scores[:, distinct.slot]
