"""A FAISS index over unit vectors: building, searching, changing, writing and reading one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from gmail_cli.components.metrics.gap import evenly_spaced
from gmail_cli.components.search.kinds import Kind, Recipe, inverted, load_faiss
from gmail_cli.errors import InputError

NORM_TOLERANCE = 1e-3
"""How far the length of a sampled vector may lie from 1."""

BLOCK = 65536
"""Vectors handled at once."""

_NORM_SAMPLE = 4096
_TRAINING_ROWS = 65536
_POINTS_PER_CELL = 64
_CODES = {"ivf-pq": 256, "ivf-opq": 256, "ivf-pq-fastscan": 16}
_WITHOUT_LISTS = (b"IxFI", b"IHNf")
_CLASSES: dict[str, Kind] = {
    "IndexFlatIP": "flat",
    "IndexFlat": "flat",
    "IndexHNSWFlat": "hnsw",
    "IndexIVFFlat": "ivf-flat",
    "IndexIVFScalarQuantizer": "ivf-sq8",
    "IndexIVFPQ": "ivf-pq",
    "IndexRefine IndexIVFPQFastScan": "ivf-pq-fastscan",
    "IndexPreTransform IndexIVFPQ": "ivf-opq",
    "IndexRefine IndexPreTransform IndexIVFRaBitQ": "ivf-rabitq",
}


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
        if self.kind == "flat":
            return None
        return int(self._index.hnsw.efSearch if self.kind == "hnsw" else inverted(self._index).nprobe)

    def set_effort(self, effort: int) -> None:
        """Probe so many cells, or keep so many candidates, per query from now on."""
        if self.kind == "hnsw":
            self._index.hnsw.efSearch = effort
        elif self.kind != "flat":
            inverted(self._index).nprobe = effort

    @property
    def most(self) -> int:
        """The effort that looks at everything; for hnsw one beyond which exact search is faster."""
        ivf = inverted(self._index)
        return min(self.count, 4096) if ivf is None else int(ivf.nlist)

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
        scores, ids = self._index.search(as_rows(queries), min(k, self.count))
        return Hits(ids, scores)

    def on_gpus(self) -> VectorIndex:
        """The same index, copied to the GPUs that FAISS sees; itself where there are none or none can hold its kind."""
        faiss = load_faiss()
        if not faiss.get_num_gpus() or self.kind not in ("flat", "ivf-flat", "ivf-sq8", "ivf-pq", "ivf-opq"):
            return self
        return VectorIndex(self.kind, faiss.index_cpu_to_all_gpus(self._index))

    def write(self, path: Path, *, lists: str = "") -> None:
        """Write the index as a file that :func:`load` reads; ``lists`` names the file beside it that holds its
        inverted lists, where they are on disk."""
        faiss = load_faiss()
        if lists:
            faiss.downcast_InvertedLists(inverted(self._index).invlists).filename = lists
        faiss.write_index(self._index, str(path))


def load(path: Path, *, resident: bool = False, lists: bool = False) -> VectorIndex:
    """Read an index that :meth:`VectorIndex.write` wrote.

    Args:
        path: The file.
        resident: Read all of it into memory, as changing it wants; else the file is mapped and read as needed.
        lists: The inverted lists are in a file of their own beside it, which is mapped.

    Raises:
        InputError: The file is cut short, damaged, or another kind of index.
    """
    faiss = load_faiss()
    remedy = "Run `gmail index` again; `gmail artifacts verify` tells which files changed."
    try:
        with path.open("rb") as stream:
            plain = stream.read(4) in _WITHOUT_LISTS
        # FAISS maps inverted lists in one way, plain vectors in another
        mapped = faiss.IO_FLAG_MMAP_IFC if plain else faiss.IO_FLAG_MMAP
        index = faiss.read_index(str(path), 0 if resident and not lists else mapped)
        if lists:  # not by IO_FLAG_ONDISK_SAME_DIR, which prints to standard output
            on_disk = faiss.downcast_InvertedLists(inverted(index).invlists)
            on_disk.filename, on_disk.read_only = str(path.with_name(Path(on_disk.filename).name)), True
            on_disk.do_mmap()
    except (OSError, RuntimeError, MemoryError) as error:
        size = path.stat().st_size if path.is_file() else 0
        raise InputError(f"{path} ({size} bytes) is not a whole FAISS index: {_reason(error)}", hint=remedy) from error
    found = _class(index)
    if found not in _CLASSES or index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise InputError(f"{path} is a {found}; allowed are inner-product {', '.join(_CLASSES)}", hint=remedy)
    return VectorIndex(_CLASSES[found], index)


def _class(index: Any) -> str:
    """Names of the classes of an index, outside in."""
    faiss = load_faiss()
    name = type(index).__name__
    if name in ("IndexRefine", "IndexPreTransform"):
        inner = index.base_index if name == "IndexRefine" else index.index
        return f"{name} {_class(faiss.downcast_index(inner))}"
    return name


# -- building -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cells:
    """The inverted lists that every IVF kind shares.

    Attributes:
        centroids: Unit centres of the cells, from spherical k-means.
        nearest: The cell of each vector.
    """

    centroids: Float[np.ndarray, "cells dim"]
    nearest: Int[np.ndarray, " count"]

    @classmethod
    def find(cls, vectors: Float[np.ndarray, "count dim"], *, cells: int, seed: int) -> Cells:
        """Cluster the vectors (at most 64 for each cell), and say which cell each belongs to."""
        centroids = cluster(vectors, cells=cells, seed=seed)
        nearest = np.empty(len(vectors), dtype=np.int64)
        for start, rows in blocks(vectors):
            nearest[start : start + len(rows)] = assign(rows, centroids)
        return cls(centroids, nearest)


def cluster(vectors: Float[np.ndarray, "count dim"], *, cells: int, seed: int) -> Float[np.ndarray, "cells dim"]:
    """Centres of ``cells`` clusters: spherical k-means in 10 rounds over at most 64 vectors a cell, on the GPUs that
    FAISS sees."""
    faiss = load_faiss()
    kmeans = faiss.Kmeans(
        vectors.shape[1],
        cells,
        niter=10,
        spherical=True,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=_POINTS_PER_CELL,
        gpu=faiss.get_num_gpus() > 0,
    )
    kmeans.train(_sample(vectors, cells * _POINTS_PER_CELL))
    return kmeans.centroids


def assign(rows: Float[np.ndarray, "rows dim"], centroids: Float[np.ndarray, "cells dim"]) -> Int[np.ndarray, " rows"]:
    """The nearest centroid of each row."""
    faiss = load_faiss()
    return faiss.knn(rows, centroids, 1, metric=faiss.METRIC_INNER_PRODUCT)[1][:, 0]


def trained(
    recipe: Recipe,
    vectors: Float[np.ndarray, "count dim"],
    *,
    centroids: Float[np.ndarray, "cells dim"] | None,
    seed: int,
    name: str = "vectors",
) -> Any:
    """The empty FAISS index of a recipe, trained on at most 65,536 of the vectors.

    Raises:
        InputError: There are fewer vectors than a code book has entries.
    """
    index = recipe.empty(vectors.shape[1])
    if centroids is None:
        return index
    needed = _CODES.get(recipe.kind, 1)
    if len(vectors) < needed:
        hint = "Use --set index.kind=flat: for so few, exact search is faster and smaller."
        raise InputError(f"{recipe.kind} learns codes from {needed} vectors and {name} has {len(vectors)}", hint=hint)
    ivf, sample, centres = inverted(index), _sample(vectors, _TRAINING_ROWS), centroids
    rotation = _rotation(index)
    if rotation is not None:
        if hasattr(rotation, "niter"):  # OPQ alternates rotation and codes; its own 50 rounds take minutes
            rotation.niter, rotation.max_train_points = 10, _TRAINING_ROWS // 4
            rotation.train(sample)
        else:
            rotation.init(seed)
        centres = rotation.apply(centroids)
    if recipe.kind in _CODES:
        ivf.pq.cp.seed, ivf.pq.cp.niter, ivf.pq.cp.max_points_per_centroid = seed, 10, _POINTS_PER_CELL
        ivf.pq.cp.min_points_per_centroid = 1
    if recipe.kind in ("ivf-pq", "ivf-opq"):
        ivf.do_polysemous_training = False  # orders codes for a filter that is never used, and takes a minute
    ivf.quantizer.add(as_rows(centres))
    index.train(sample)
    return index


def fill(
    index: Any, vectors: Float[np.ndarray, "count dim"], *, nearest: Int[np.ndarray, " count"] | None, first: int = 0
) -> None:
    """Add vectors to a trained FAISS index.

    Args:
        index: To add to; ids go on from its count.
        vectors: To add.
        nearest: The cell of each, where known: finding it again would take most of the time.
        first: Id of the first vector, for an IVF index that is one shard of several.
    """
    faiss = load_faiss()
    ivf, rotation = inverted(index), _rotation(index)
    # Fast-scan packs codes in blocks and finds the cells itself.
    known = nearest if ivf is not None and not isinstance(ivf, faiss.IndexIVFFastScan) else None
    for start, rows in blocks(vectors):
        if known is None:
            index.add(rows)
            continue
        turned = rows if rotation is None else rotation.apply(rows)
        ids = np.arange(first + index.ntotal, first + index.ntotal + len(rows), dtype=np.int64)
        cells = np.ascontiguousarray(known[start : start + len(rows)])
        ivf.add_core(len(rows), faiss.swig_ptr(turned), faiss.swig_ptr(ids), faiss.swig_ptr(cells))
        if isinstance(index, faiss.IndexRefine):
            index.refine_index.add(rows)
        _count_again(index)


def wrap(kind: Kind, index: Any) -> VectorIndex:
    """A filled FAISS index under the name of its kind."""
    return VectorIndex(kind, index)


# -- changing -------------------------------------------------------------------------------------------------------


def edit(index: VectorIndex, *, keep: Bool[np.ndarray, " count"], add: Float[np.ndarray, "added dim"]) -> VectorIndex:
    """Take rows out of a resident index and put others behind the rest; ids close up as the rows do.

    Cells and codes stay as they were trained; an HNSW graph that loses rows is linked anew.

    Args:
        index: As :func:`load` gives it with ``resident``; it is used up.
        keep: For each row whether it stays.
        add: Unit vectors.

    Raises:
        InputError: The added vectors do not fit, or not all have unit length.
    """
    check_added(index, add)
    raw = index._index
    if not keep.all():
        raw = _without(index.kind, raw, keep)
    fill(raw, add, nearest=None)
    return VectorIndex(index.kind, raw)


def check_added(index: VectorIndex, add: Float[np.ndarray, "added dim"]) -> None:
    """Refuse vectors to add that do not fit an index.

    Raises:
        InputError: They have another dimension, or not all have unit length.
    """
    if add.shape[1] != index.dim:
        raise InputError(f"the vectors to add have {add.shape[1]} dimensions and the index has {index.dim}")
    check_unit(add, name="the vectors to add")


def _without(kind: Kind, index: Any, keep: np.ndarray) -> Any:
    faiss = load_faiss()
    if kind == "hnsw":
        storage = index.reconstruct_n(0, index.ntotal)
        links, effort = index.hnsw.nb_neighbors(1), index.hnsw.efSearch
        index = faiss.IndexHNSWFlat(index.d, links, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efSearch = effort
        index.add(storage[keep])
        return index
    gone = faiss.IDSelectorBatch(np.flatnonzero(~keep).astype(np.int64))
    ivf = inverted(index)
    if ivf is None:
        index.remove_ids(gone)
        return index
    ivf.remove_ids(gone)
    if isinstance(index, faiss.IndexRefine):
        faiss.downcast_index(index.refine_index).remove_ids(gone)
    numbers = np.cumsum(keep) - 1
    lists = ivf.invlists
    for cell in range(ivf.nlist):
        size = lists.list_size(cell)
        if size:
            ids = faiss.rev_swig_ptr(lists.get_ids(cell), size)
            ids[:] = numbers[ids]
    _count_again(index)
    return index


def _count_again(index: Any) -> None:
    """Tell the indexes around an IVF index how many vectors it holds."""
    faiss = load_faiss()
    if isinstance(index, faiss.IndexRefine):
        _count_again(faiss.downcast_index(index.base_index))
        index.ntotal = index.base_index.ntotal
    elif isinstance(index, faiss.IndexPreTransform):
        index.ntotal = index.index.ntotal


# -- measuring ------------------------------------------------------------------------------------------------------


def exact(vectors: Float[np.ndarray, "count dim"], queries: Float[np.ndarray, "queries dim"], *, k: int) -> Hits:
    """Exact search without building an index, in blocks: the oracle the approximate kinds are measured against."""
    faiss = load_faiss()
    asked = as_rows(queries)
    best = faiss.ResultHeap(len(asked), min(k, len(vectors)), keep_max=True)
    for start, rows in blocks(vectors):
        scores, ids = faiss.knn(asked, rows, min(k, len(rows)), metric=faiss.METRIC_INNER_PRODUCT)
        best.add_result(np.ascontiguousarray(scores), np.ascontiguousarray(ids + start))
    best.finalize()
    return Hits(best.I, best.D)


def recall_of_each(
    best: Hits,
    found: Hits,
    *,
    vectors: Float[np.ndarray, "count dim"],
    queries: Float[np.ndarray, "queries dim"],
) -> Float[np.ndarray, " queries"]:
    """For each query the share of the exact ``k`` nearest that were found, in [0, 1].

    What was found counts by its exact score, for an index of codes has only an estimate of it. A row that scores as
    high as the last of the exact ``k`` counts as one of them: duplicates cost nothing.
    """
    hits = np.zeros(found.ids.shape, dtype=bool)
    for row, (ids, query) in enumerate(zip(found.ids, as_rows(queries), strict=True)):
        there = np.flatnonzero(ids >= 0)
        scores = as_rows(vectors[ids[there]]) @ query
        hits[row, there] = scores >= best.scores[row, -1] - 1e-6
    return hits.mean(axis=1)


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


# -- inside ---------------------------------------------------------------------------------------------------------


def blocks(vectors: Float[np.ndarray, "count dim"]) -> Iterator[tuple[int, Float[np.ndarray, "rows dim"]]]:
    """The vectors as float32, some at a time, each block with the number of its first row."""
    for start in range(0, len(vectors), BLOCK):
        yield start, as_rows(vectors[start : start + BLOCK])


def as_rows(vectors: np.ndarray) -> Float[np.ndarray, "count dim"]:
    """Vectors as FAISS reads them: float32, row after row."""
    return np.ascontiguousarray(vectors, dtype=np.float32)


def _sample(vectors: np.ndarray, most: int) -> np.ndarray:
    return as_rows(vectors[evenly_spaced(len(vectors), limit=most)])


def _rotation(index: Any) -> Any:
    """The rotation in front of an IVF index; None where there is none."""
    faiss = load_faiss()
    if isinstance(index, faiss.IndexRefine):
        return _rotation(faiss.downcast_index(index.base_index))
    return faiss.downcast_VectorTransform(index.chain.at(0)) if isinstance(index, faiss.IndexPreTransform) else None


def _reason(error: BaseException) -> str:
    text = str(error)
    return text.rsplit("failed: ", 1)[-1].strip() or type(error).__name__
