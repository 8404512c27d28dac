"""Inverted lists on disk, for sets beyond memory: filled shard by shard, then merged into one mapped file."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from gmail_cli.components.search.indexes import (
    VectorIndex,
    as_rows,
    assign,
    blocks,
    check_added,
    cluster,
    fill,
    trained,
    wrap,
)
from gmail_cli.components.search.kinds import Recipe, inverted, load_faiss

_MEASURED = "measured.json"
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

    def measured(self) -> dict[str, dict[str, Any]]:
        """What an interrupted choice of a kind has measured: kind -> its row."""
        file = self.scratch / _MEASURED
        return json.loads(file.read_bytes()) if file.is_file() else {}

    def keep_measured(self, rows: Mapping[str, Mapping[str, Any]]) -> None:
        """Keep what has been measured so far, for :meth:`measured`."""
        self.scratch.mkdir(parents=True, exist_ok=True)
        temporary = (self.scratch / _MEASURED).with_suffix(".tmp")
        temporary.write_text(json.dumps(rows), encoding="utf-8")
        temporary.replace(self.scratch / _MEASURED)

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


def edit(
    opened: Callable[[], VectorIndex],
    *,
    keep: Bool[np.ndarray, " count"],
    add: Float[np.ndarray, "added dim"],
    shards: Shards,
) -> VectorIndex:
    """Take rows out of an index with lists on disk and put others behind the rest, in a new file; ids close up.

    Cells and codes stay as they were trained. Memory is that of a shard.

    Args:
        opened: Opens the index anew, its lists mapped.
        keep: For each row whether it stays.
        add: Unit vectors.
        shards: Where the new one is put together.

    Raises:
        InputError: The added vectors do not fit, or not all have unit length.
    """
    faiss = load_faiss()
    old, empty = opened(), opened()
    check_added(old, add)
    source, bare = inverted(old._index), inverted(empty._index)
    lists = faiss.ArrayInvertedLists(bare.nlist, bare.code_size)
    lists.this.disown()
    bare.replace_invlists(lists, True)
    bare.reset()
    empty._index.ntotal = 0
    shards.scratch.mkdir(parents=True, exist_ok=True)
    start = shards.scratch / "empty.faiss"
    _write(empty._index, start)
    files: list[str] = []

    def close(index: Any) -> None:
        files.append(str(shards.scratch / f"{len(files):06d}.faiss"))
        _write(index, Path(files[-1]))

    numbers, kept = np.cumsum(keep) - 1, int(keep.sum())
    index, held = faiss.read_index(str(start)), 0
    for cell in range(source.nlist):
        ids, codes = _entries(source.invlists, cell, source.code_size)
        stays = keep[ids]
        ids, codes = np.ascontiguousarray(numbers[ids[stays]]), np.ascontiguousarray(codes[stays])
        if len(ids):
            inverted(index).invlists.add_entries(cell, len(ids), faiss.swig_ptr(ids), faiss.swig_ptr(codes))
            held += len(ids)
        if held >= shards.rows or (held and cell == source.nlist - 1):
            index.ntotal = inverted(index).ntotal = held
            close(index)
            index, held = faiss.read_index(str(start)), 0
    centroids = as_rows(centroids_of(index))
    for first in range(0, len(add), shards.rows):
        index = faiss.read_index(str(start))
        shards._fill(index, add[first : first + shards.rows], centroids, kept + first)
        close(index)
    return wrap(old.kind, merged(faiss.read_index(str(start)), files, shards.lists))


def _entries(lists: Any, cell: int, code_size: int) -> tuple[Int[np.ndarray, " size"], UInt8[np.ndarray, "size code"]]:
    """Ids and codes of an inverted list."""
    faiss, size = load_faiss(), lists.list_size(cell)
    if not size:
        return np.empty(0, dtype=np.int64), np.empty((0, code_size), dtype=np.uint8)
    ids, codes = lists.get_ids(cell), lists.get_codes(cell)
    return faiss.rev_swig_ptr(ids, size).copy(), faiss.rev_swig_ptr(codes, size * code_size).copy().reshape(size, -1)


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
