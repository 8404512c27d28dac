"""Nearest-neighbour search over unit vectors with FAISS.

The metric is the inner product, which equals the cosine because every vector must have length 1; vectors of
other lengths are refused, for they would rank by length as well as by direction. Up to ``FLAT_LIMIT`` vectors
exact search is both faster and simpler than any approximate index. Above it, an approximate one is tuned until
its recall, measured against exact search, reaches a target. That measurement wants *text* queries: they lie
outside the image distribution, and an index tuned on image queries looks better than it is.

Task metrics never come from an approximate index; see :mod:`gmail_cli.components.metrics`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np
from jaxtyping import Float, Int

from gmail_cli.errors import InputError, SetupError

Kind = Literal["flat", "hnsw", "ivf"]

FLAT_LIMIT = 200_000
"""Vectors up to which ``auto`` builds a Flat index."""

NORM_TOLERANCE = 1e-3
"""How far the length of a sampled vector may lie from 1."""

_NORM_SAMPLE = 4096
_HNSW_LINKS = 32


class Hits(NamedTuple):
    """The ``k`` nearest rows of each query, best first; id -1 where an approximate index found fewer."""

    ids: Int[np.ndarray, "queries k"]
    scores: Float[np.ndarray, "queries k"]


@dataclass(frozen=True)
class VectorIndex:
    """A built index: ids are the row numbers of the vectors it was built from."""

    kind: Kind
    _index: Any

    @property
    def count(self) -> int:
        """How many vectors the index holds."""
        return int(self._index.ntotal)

    @property
    def dim(self) -> int:
        """The length of a vector."""
        return int(self._index.d)

    @property
    def effort(self) -> int | None:
        """Cells probed (ivf) or candidates kept (hnsw) per query; None for flat, which sees everything."""
        if self.kind == "ivf":
            return int(self._index.nprobe)
        return int(self._index.hnsw.efSearch) if self.kind == "hnsw" else None

    def search(self, queries: Float[np.ndarray, "queries dim"], *, k: int) -> Hits:
        """The ``min(k, count)`` rows with the largest inner product for each query.

        Raises:
            InputError: A query has another dimension than the index, or not unit length.
        """
        if queries.shape[1] != self.dim:
            raise InputError(
                f"the queries have {queries.shape[1]} dimensions and the index has {self.dim}",
                hint="Embed the queries with the encoder that index.json names.",
            )
        check_unit(queries, name="queries")
        scores, ids = self._index.search(_rows(queries), min(k, self.count))
        return Hits(ids, scores)

    def dump(self) -> bytes:
        """The index as bytes that :func:`load` reads."""
        return cast("bytes", _faiss().serialize_index(self._index).tobytes())


def resolve(kind: str, *, count: int) -> Kind:
    """The kind of index that ``kind`` (``auto`` or a kind) means for ``count`` vectors."""
    if kind == "auto":
        return "flat" if count <= FLAT_LIMIT else "ivf"
    assert kind in get_args(Kind), kind
    return cast("Kind", kind)


def build(
    vectors: Float[np.ndarray, "count dim"],
    *,
    kind: str = "auto",
    queries: Float[np.ndarray, "queries dim"],
    recall_target: float = 0.95,
    k: int = 10,
    seed: int = 0,
    name: str = "vectors",
) -> tuple[VectorIndex, float]:
    """Index ``vectors`` and measure its recall@k against exact search on ``queries``.

    An approximate index searches harder (doubling the cells probed or the candidates kept) until the recall
    reaches ``recall_target`` or it looks at everything.

    Returns:
        The index and its measured recall@k in [0, 1].

    Raises:
        InputError: ``vectors`` is empty, or sampled vectors do not have unit length.
    """
    if not len(vectors):
        raise InputError(f"{name} holds no vectors to index", hint="Embed at least one image first.")
    check_unit(vectors, name=name)
    faiss, rows, chosen = _faiss(), _rows(vectors), resolve(kind, count=len(vectors))
    if chosen == "flat":
        index = faiss.IndexFlatIP(rows.shape[1])
    elif chosen == "hnsw":
        index = faiss.IndexHNSWFlat(rows.shape[1], _HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
    else:
        index = _empty_ivf(rows, seed=seed)
    index.add(rows)

    built = VectorIndex(chosen, index)
    best = exact(rows, queries, k=k)
    for _ in _efforts(built):
        recall = recall_against(best, built.search(queries, k=k))
        if recall >= recall_target:
            break
    return built, recall


def load(data: bytes, *, name: str) -> VectorIndex:
    """Read an index that :meth:`VectorIndex.dump` wrote; ``name`` is how errors call it.

    Raises:
        InputError: The bytes are cut short, damaged, or another kind of index.
    """
    faiss = _faiss()
    remedy = "Run `gmail index` again; `gmail artifacts verify` tells which files changed."
    try:
        index = faiss.deserialize_index(np.frombuffer(data, dtype=np.uint8))
    except (RuntimeError, MemoryError) as error:
        raise InputError(
            f"{name} ({len(data)} bytes) is not a whole FAISS index: {_reason(error)}", hint=remedy
        ) from error
    kinds: dict[str, Kind] = {"IndexFlatIP": "flat", "IndexHNSWFlat": "hnsw", "IndexIVFFlat": "ivf"}
    found = type(index).__name__
    if found not in kinds or index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise InputError(f"{name} is a {found}; allowed are inner-product {', '.join(kinds)}", hint=remedy)
    return VectorIndex(kinds[found], index)


def exact(vectors: Float[np.ndarray, "count dim"], queries: Float[np.ndarray, "queries dim"], *, k: int) -> Hits:
    """Exact search without building an index: the oracle the approximate kinds are measured against."""
    faiss = _faiss()
    scores, ids = faiss.knn(_rows(queries), _rows(vectors), min(k, len(vectors)), metric=faiss.METRIC_INNER_PRODUCT)
    return Hits(ids, scores)


def recall_against(best: Hits, found: Hits) -> float:
    """The share of the exact ``k`` nearest that were found, in [0, 1].

    A row that scores as high as the last of the exact ``k`` counts as one of them: duplicates cost nothing.
    """
    worst = best.scores[:, -1:] - 1e-6
    return float(np.mean((found.ids >= 0) & (found.scores >= worst)))


def check_unit(vectors: Float[np.ndarray, "count dim"], *, name: str) -> None:
    """Refuse vectors whose length is not 1, from an even sample of at most 4,096 of them.

    Raises:
        InputError: A sampled length lies outside 1 +- 1e-3 or is not a number.
    """
    rows = np.unique(np.linspace(0, max(len(vectors) - 1, 0), min(len(vectors), _NORM_SAMPLE)).astype(np.int64))
    lengths = np.linalg.norm(vectors[rows].astype(np.float32), axis=1)
    bad = ~(np.abs(lengths - 1) <= NORM_TOLERANCE)
    if bad.any():
        first = int(np.flatnonzero(bad)[0])
        raise InputError(
            f"{name}: row {rows[first]} has length {lengths[first]:.4g}, allowed is 1 +- {NORM_TOLERANCE:g} "
            f"({int(bad.sum())} of {len(rows)} sampled rows are off)",
            hint="Normalise the vectors in float32; an inner-product index ranks longer vectors first.",
        )


def _empty_ivf(rows: np.ndarray, *, seed: int) -> Any:
    """A trained, empty IVF index with about 4 * sqrt(count) cells and at least 39 vectors a cell."""
    faiss = _faiss()
    cells = max(1, min(int(4 * len(rows) ** 0.5), len(rows) // 39))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(rows.shape[1]), rows.shape[1], cells, faiss.METRIC_INNER_PRODUCT)
    index.cp.spherical, index.cp.seed, index.cp.max_points_per_centroid = True, seed, 64
    index.cp.min_points_per_centroid = 1
    index.train(rows)
    return index


def _efforts(built: VectorIndex) -> Iterator[int]:
    """Set the search effort of ``built`` to 1x, 2x, 4x, ... its start, up to looking at everything."""
    if built.kind == "flat":
        yield built.count
        return
    effort, most = (1, built._index.nlist) if built.kind == "ivf" else (16, built.count)
    while True:
        effort = min(effort, most)
        if built.kind == "ivf":
            built._index.nprobe = effort
        else:
            built._index.hnsw.efSearch = effort
        yield effort
        if effort == most:
            return
        effort *= 2


def _rows(vectors: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(vectors, dtype=np.float32)


def _reason(error: BaseException) -> str:
    text = str(error)
    return text.rsplit("failed: ", 1)[-1].strip() or type(error).__name__


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise SetupError(
            f"FAISS does not import: {error}", hint="pip install faiss-gpu (Linux x86-64) or faiss-cpu."
        ) from error
    # Below this many queries Flat search leaves BLAS aside; the default is 30 times slower at 512 dimensions.
    faiss.cvar.distance_compute_blas_threshold = 20
    return faiss
