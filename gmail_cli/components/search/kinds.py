"""The kinds of index, as FAISS factory strings, and what each takes in memory."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal, get_args

from gmail_cli.errors import SetupError

Kind = Literal["flat", "hnsw", "ivf-flat", "ivf-sq8", "ivf-pq", "ivf-pq-fastscan", "ivf-opq", "ivf-rabitq"]

KINDS: tuple[Kind, ...] = get_args(Kind)

DISK_KINDS: tuple[Kind, ...] = ("ivf-flat", "ivf-sq8", "ivf-pq", "ivf-opq")
"""Kinds whose inverted lists can be merged on disk; the others keep codes of their own layout, or twice, in memory."""

RERANKED = 64
"""Times k that the kinds with two codes (``ivf-pq-fastscan``, ``ivf-rabitq``) look at again with the finer one."""

HNSW_LINKS = 32
_ROUNDED = 1.4
"""Memory of fast-scan's codes over their size: FAISS rounds that of each list up to a power of two."""
_SUBVECTORS = (2, 4, 8, 16)


@dataclass(frozen=True)
class Recipe:
    """One index to build.

    Attributes:
        kind: Its kind.
        spec: FAISS factory string.
        cells: Inverted lists; 0 for kinds without.
        memory: Bytes the index takes in memory when it is loaded whole, predicted.
        resident: Bytes that stay in memory when its inverted lists are on disk, predicted; ``memory`` otherwise.
    """

    kind: Kind
    spec: str
    cells: int
    memory: int
    resident: int

    def empty(self, dim: int) -> Any:
        """The untrained FAISS index."""
        faiss = load_faiss()
        index = faiss.index_factory(dim, self.spec, faiss.METRIC_INNER_PRODUCT)
        if isinstance(index, faiss.IndexRefine):
            index.k_factor = RERANKED
        return index


def cells_for(count: int) -> int:
    """Inverted lists for ``count`` vectors: about 2 sqrt(count), and no fewer than 39 vectors a list."""
    return max(1, min(int(2 * count**0.5), count // 39))


def recipe(kind: Kind, *, count: int, dim: int, cells: int = 0, max_memory: float = float("inf")) -> Recipe:
    """How to build ``kind`` for ``count`` vectors of ``dim`` components.

    The product quantisers of ``ivf-pq`` and ``ivf-opq`` take one byte for every 2 components, or as few more
    components as fit ``max_memory`` (4, 8, 16).
    """
    cells = cells or cells_for(count)
    if kind in ("ivf-pq", "ivf-opq"):
        options = [_recipe(kind, count, dim, cells, wanted) for wanted in _SUBVECTORS]
        return next((each for each in options if each.memory <= max_memory), options[-1])
    return _recipe(kind, count, dim, cells, 2)


def predicted_bytes(kind: Kind, *, count: int, dim: int, spec: str = "") -> int:
    """Bytes that an index of ``kind`` (with a factory string of its own, or the usual one) over ``count`` vectors of
    ``dim`` components takes in memory."""
    if not spec:
        return recipe(kind, count=count, dim=dim).memory
    cells = next((int(part[3:]) for part in spec.split(",") if part.startswith("IVF")), 0)
    return _memory(kind, spec, count, dim, cells)[0]


def _recipe(kind: Kind, count: int, dim: int, cells: int, wanted: int) -> Recipe:
    pieces = dim // max(size for size in range(1, wanted + 1) if dim % size == 0)
    lists = f"IVF{cells}"
    spec = {
        "flat": "Flat",
        "hnsw": f"HNSW{HNSW_LINKS},Flat",
        "ivf-flat": f"{lists},Flat",
        "ivf-sq8": f"{lists},SQ8",
        "ivf-pq": f"{lists},PQ{pieces}x8",
        "ivf-pq-fastscan": f"{lists},PQ{pieces}x4fs,Refine(SQ8)",
        "ivf-opq": f"OPQ{pieces}_{dim},{lists},PQ{pieces}x8",
        "ivf-rabitq": f"RR{dim},{lists},RaBitQ,Refine(SQ8)",
    }[kind]
    memory, resident = _memory(kind, spec, count, dim, cells)
    return Recipe(kind, spec, 0 if kind in ("flat", "hnsw") else cells, memory, resident)


def _memory(kind: Kind, spec: str, count: int, dim: int, cells: int) -> tuple[int, int]:
    whole = 4 * dim
    if kind == "flat":
        return count * whole, count * whole
    if kind == "hnsw":  # links of level 0 are twice those above; a node has 1 / (links - 1) levels above on average
        links = 4 * HNSW_LINKS * (2 + 1 / (HNSW_LINKS - 1))
        total = int(count * (whole + links + 12))
        return total, total
    coded, refined = _code_sizes(spec.replace(f"IVF{cells}", "IVF1"), dim)
    fixed = cells * whole
    if kind in ("ivf-pq", "ivf-opq"):
        fixed += 256 * whole
    if kind == "ivf-pq-fastscan":
        fixed += 16 * whole
        coded = int(coded * _ROUNDED)
    if kind in ("ivf-opq", "ivf-rabitq"):
        fixed += dim * whole
    lists = count * (coded + 8)
    return fixed + lists + count * refined, fixed


@functools.lru_cache(maxsize=64)
def _code_sizes(spec: str, dim: int) -> tuple[int, int]:
    """Bytes of a vector's code in its inverted list, and of the finer code beside it."""
    faiss = load_faiss()
    index = faiss.index_factory(dim, spec, faiss.METRIC_INNER_PRODUCT)
    refined = faiss.downcast_index(index.refine_index).code_size if isinstance(index, faiss.IndexRefine) else 0
    return int(inverted(index).code_size), int(refined)


def inverted(index: Any) -> Any:
    """The IVF index inside an index, in its own class; None where there is none."""
    faiss = load_faiss()
    found = faiss.try_extract_index_ivf(index)
    return None if found is None else faiss.downcast_index(found)


def load_faiss() -> Any:
    """FAISS, set up.

    Raises:
        SetupError: It does not import.
    """
    try:
        import faiss
    except ImportError as error:
        raise SetupError(
            f"FAISS does not import: {error}", hint="pip install faiss-gpu (Linux x86-64) or faiss-cpu."
        ) from error
    # Below this many queries * dim, Flat search and the training of product quantisers leave BLAS aside; the default
    # (128,000) makes the one 30 times slower at 512 dimensions, the other 10 times.
    faiss.cvar.distance_compute_blas_threshold = 20
    return faiss
