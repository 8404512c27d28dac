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
        """Find vectors that are bit-equal in fp32: by hash, then by comparison."""
        first: dict[int, int] = {}  # hash of a vector -> its place in rows
        rows: list[int] = []
        slot = np.empty(len(order), np.int64)
        for row in order.tolist():
            vector = vectors[row].astype(np.float32) + 0.0  # makes -0.0 equal to 0.0
            place = first.setdefault(hash(vector.tobytes()), len(rows))
            if place < len(rows) and not np.array_equal(vectors[rows[place]].astype(np.float32), vector):
                place = len(rows)
            if place == len(rows):
                rows.append(row)
            slot[row] = place
        return cls(rows=np.array(rows), slot=slot, copies=np.bincount(slot))


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
