"""Inverted lists on disk, for sets beyond memory: filled shard by shard, then merged into one mapped file."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from gmail_cli.components.search.indexes import as_rows, assign, blocks, cluster, fill, trained
from gmail_cli.components.search.kinds import Recipe, inverted, load_faiss

SHARD_ROWS = 1_000_000
"""Vectors of a shard: what is held in memory at once."""


@dataclass(frozen=True)
class Shards:
    """Where an index on disk is put together.

    Attributes:
        scratch: Folder of the trained, empty index and the shards; what an interrupted build left there is used again.
        lists: File of the merged inverted lists.
        rows: Vectors of a shard.
    """

    scratch: Path
    lists: Path
    rows: int = SHARD_ROWS

    def build(self, recipe: Recipe, vectors: Float[np.ndarray, "count dim"], *, seed: int, name: str) -> Any:
        """The FAISS index of ``recipe`` over the vectors, its inverted lists in ``lists``."""
        faiss = load_faiss()
        self.scratch.mkdir(parents=True, exist_ok=True)
        start = self.scratch / f"{recipe.kind}.faiss"
        if not start.is_file():
            centroids = cluster(vectors, cells=recipe.cells, seed=seed)
            _write(trained(recipe, vectors, centroids=centroids, seed=seed, name=name), start)
        centroids = as_rows(centroids_of(faiss.read_index(str(start))))
        shards = []
        for first in range(0, len(vectors), self.rows):
            shard = self.scratch / f"{recipe.kind}.{first:012d}.faiss"
            shards.append(str(shard))
            if not shard.is_file():
                index = faiss.read_index(str(start))
                self._fill(index, vectors[first : first + self.rows], centroids, first)
                _write(index, shard)
        return merged(faiss.read_index(str(start)), shards, self.lists)

    @staticmethod
    def _fill(index: Any, vectors: np.ndarray, centroids: np.ndarray, first: int) -> None:
        for start, rows in blocks(vectors):
            # add() would number from the shard's own start; the ids here are those of the whole set
            fill(index, rows, nearest=assign(_turned(index, rows), centroids), first=first)
            assert index.ntotal == start + len(rows)


def centroids_of(index: Any) -> Float[np.ndarray, "cells dim"]:
    """The centres of an IVF index, as its codes see them (rotated, where there is a rotation)."""
    quantizer = inverted(index).quantizer
    return np.asarray(quantizer.reconstruct_n(0, quantizer.ntotal))


def merged(empty: Any, shards: list[str], lists: Path) -> Any:
    """``empty`` with the inverted lists of the shards, in the file ``lists``."""
    from faiss.contrib.ondisk import merge_ondisk

    lists.unlink(missing_ok=True)
    with _standard_output_to_error():
        merge_ondisk(empty, shards, str(lists))
    outer = load_faiss().downcast_index(empty)
    if outer.ntotal != inverted(empty).ntotal:
        outer.ntotal = inverted(empty).ntotal
    return empty


@contextlib.contextmanager
def _standard_output_to_error() -> Iterator[None]:
    """FAISS prints the sizes of files to standard output, where only results belong."""
    c = ctypes.CDLL(None)
    sys.stdout.flush()
    c.fflush(None)
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        c.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)


def _turned(index: Any, rows: np.ndarray) -> np.ndarray:
    faiss = load_faiss()
    if isinstance(index, faiss.IndexPreTransform):
        return np.asarray(faiss.downcast_VectorTransform(index.chain.at(0)).apply(rows))
    return rows


def _write(index: Any, path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    load_faiss().write_index(index, str(temporary))
    temporary.replace(path)
