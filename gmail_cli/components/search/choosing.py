"""Which index to build: candidates, measured against exact search, under limits of memory and time."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

import numpy as np
from jaxtyping import Float

from gmail_cli.components.metrics.gap import evenly_spaced
from gmail_cli.components.search import disk
from gmail_cli.components.search.indexes import (
    Cells,
    Hits,
    VectorIndex,
    as_rows,
    check_unit,
    exact,
    fill,
    recall_of_each,
    trained,
    wrap,
)
from gmail_cli.components.search.kinds import DISK_KINDS, KINDS, Kind, Recipe, load_faiss, recipe
from gmail_cli.errors import InputError, UsageError

FLAT_LIMIT = 200_000
"""Vectors up to which ``auto`` takes exact search unless a limit speaks against it."""

MEASURED_ROWS = 1_000_000
"""Vectors the candidates are measured on; of more, an even sample of so many."""

PATIENCE = 300.0
"""Seconds that building may take before a candidate is left until nothing faster to build meets the limits."""

MIB = 1024 * 1024
K = 10
_PLATEAU = 0.02  # gain in recall by twice the effort below which the codes, not the cells, are what is missing
_TIMED_QUERIES = 100
_TIMED_SECONDS = 2.0
_HNSW_TRIAL = 4000
_CODED: tuple[Kind, ...] = ("ivf-sq8", "ivf-pq", "ivf-pq-fastscan", "ivf-opq", "ivf-rabitq")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Limits:
    """What an index must keep to.

    Attributes:
        recall: Recall@10 against exact search, at least.
        memory: Bytes in memory, at most.
        latency: Milliseconds for one query searched alone, at most.
    """

    recall: float = 0.95
    memory: float = float("inf")
    latency: float = float("inf")


@dataclass(frozen=True)
class Candidate:
    """One row of the table of candidates.

    Attributes:
        kind: Kind of index.
        spec: FAISS factory string.
        memory: Bytes in memory, predicted.
        seconds: To build it from the vectors and their cells; None when it was not built.
        recall: Recall@10 against exact search; None when it was not measured.
        latency: Median milliseconds of a query searched alone, for all the vectors; None when it was not measured.
        effort: Cells probed or candidates kept per query.
        verdict: ``chosen``, ``meets the limits``, or what speaks against it.
    """

    kind: Kind
    spec: str
    memory: int
    verdict: str
    seconds: float | None = None
    recall: float | None = None
    latency: float | None = None
    effort: int | None = None


@dataclass(frozen=True)
class Made:
    """An index and how it came about.

    Attributes:
        index: Ready to search.
        recall: Its recall@10 against exact search over all vectors.
        chosen: The row of the index itself.
        candidates: All that were considered; one row when a kind was named.
    """

    index: VectorIndex
    recall: float
    chosen: Candidate
    candidates: tuple[Candidate, ...]


def build(
    vectors: Float[np.ndarray, "count dim"],
    *,
    queries: Float[np.ndarray, "queries dim"],
    kind: Kind | str = "auto",
    limits: Limits | None = None,
    seed: int = 0,
    lists: disk.Shards | None = None,
    name: str = "vectors",
    measured_rows: int = MEASURED_ROWS,
    progress: Progress | None = None,
) -> Made:
    """Index ``vectors`` with a kind, or (``auto``) with the one that serves best, and measure its recall@10.

    ``auto`` takes exact search where it keeps to the limits and nothing is to be gained: up to 200,000 vectors, or
    within a latency that is asked for. Otherwise every kind whose memory fits is built on the vectors (on an even
    sample of 1,000,000 of more), searched harder until its recall reaches the target with two standard errors to
    spare, and timed; the fastest that keeps to the limits is taken. A kind that is named is searched as hard, but a
    recall that stays below the target is only reported.

    Args:
        vectors: Unit rows; may be mapped from a file, and are read in blocks.
        queries: Unit rows that are not among the vectors: texts, where images are indexed.
        kind: One of ``KINDS``, or ``auto``.
        limits: What to keep to.
        seed: Of clustering, codes and rotations.
        lists: Build the inverted lists shard by shard on disk instead of in memory.
        name: How errors call the vectors.
        measured_rows: Sample that candidates are measured on.
        progress: Called with (steps done, steps in all).

    Raises:
        InputError: ``vectors`` is empty, or sampled vectors do not have unit length.
        UsageError: No index keeps to the limits; names the nearest and the limit to relax.
    """
    if not len(vectors):
        raise InputError(f"{name} holds no vectors to index", hint="Embed at least one image first.")
    check_unit(vectors, name=name)
    check_unit(queries, name=f"queries of {name}")
    job = _Job(vectors, queries, limits or Limits(), seed, lists, name, measured_rows, progress)
    return job.choose() if kind == "auto" else job.named(cast("Kind", kind))


def measure_recall(
    index: VectorIndex, vectors: Float[np.ndarray, "count dim"], queries: Float[np.ndarray, "queries dim"]
) -> float:
    """Recall@10 of an index against exact search over the vectors it holds."""
    found = index.search(queries, k=K)
    return float(recall_of_each(exact(vectors, queries, k=K), found, vectors=vectors, queries=queries).mean())


def candidates_table(candidates: Sequence[Candidate]) -> str:
    """The candidates as lines of text under a head."""
    rows = [("kind", "MiB", "recall@10", "ms/query", "effort", "build s", "", "")]
    for each in candidates:
        numbers = (
            f"{each.memory / MIB:.1f}",
            "-" if each.recall is None else f"{each.recall:.4f}",
            "-" if each.latency is None else f"{each.latency:.3f}",
            "-" if each.effort is None else str(each.effort),
            "-" if each.seconds is None else f"{each.seconds:.1f}",
        )
        rows.append((each.kind, *numbers, each.verdict, each.spec))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:6], widths[1:6], strict=True)),
        ]
        lines.append("  ".join([*cells, row[6].ljust(widths[6]), row[7]]).rstrip())
    return "\n".join(lines)


@dataclass
class _Job:
    """One call of :func:`build`."""

    vectors: Any
    queries: Any
    limits: Limits
    seed: int
    lists: disk.Shards | None
    name: str
    measured_rows: int
    progress: Progress | None
    _cells: Cells | None = None
    _truth: dict[int, Hits] = field(default_factory=dict)
    _sampled: Any = None
    _whole_effort: int = 1
    """Cells that whole vectors need: codes in the same cells need no fewer."""

    @property
    def count(self) -> int:
        return len(self.vectors)

    @property
    def dim(self) -> int:
        return int(self.vectors.shape[1])

    def sample(self) -> Any:
        """What candidates are measured on: the vectors themselves unless there are too many."""
        if self.count <= self.measured_rows:
            return self.vectors
        if self._sampled is None:
            self._sampled = self.vectors[evenly_spaced(self.count, limit=self.measured_rows)]
        return self._sampled

    # -- the ways --------------------------------------------------------------------------------------------------

    def named(self, kind: Kind) -> Made:
        if self.lists is not None and kind not in DISK_KINDS:
            raise UsageError(
                f"index.storage = 'disk' has no inverted lists to keep for index.kind = {kind!r}",
                hint=f"Kinds with lists on disk: {', '.join(DISK_KINDS)}.",
            )
        chosen = self.recipe(kind)
        if self.memory(chosen) > self.limits.memory:
            raise self.refusal([self.row(chosen, "too large")])
        index, row, recall = self.whole(chosen)
        if row.latency is not None and row.latency > self.limits.latency:
            raise self.refusal([replace(row, verdict="too slow")])
        return Made(index, recall, row, (row,))

    def choose(self) -> Made:
        kinds = KINDS if self.lists is None else DISK_KINDS
        recipes = [self.recipe(kind) for kind in kinds]
        fits = {each.kind for each in recipes if self.memory(each) <= self.limits.memory}
        rows = {each.kind: self.row(each, "too large" if each.kind not in fits else "not tried") for each in recipes}
        if "flat" in fits:
            timed = self.limits.latency != float("inf") or self.count > FLAT_LIMIT
            latency = self.flat_latency() if timed else None
            slow = latency is not None and latency > self.limits.latency
            rows["flat"] = replace(
                rows["flat"], recall=1.0, latency=latency, verdict="too slow" if slow else "meets the limits"
            )
            if not slow and (self.count <= FLAT_LIMIT or (timed and self.limits.latency != float("inf"))):
                index, row, recall = self.whole(recipes[0])
                rows["flat"] = replace(row, latency=latency, verdict="chosen")
                return Made(index, recall, rows["flat"], tuple(rows.values()))
        tried = [each for each in recipes if each.kind in fits and each.kind != "flat"]
        kept: tuple[Kind, VectorIndex] | None = None
        for done, each in enumerate(tried):
            if self.progress:
                self.progress(done, len(tried) + 1)
            last = each is tried[-1] and not any(self.meets(row) for row in rows.values())
            candidate, rows[each.kind] = self.measured(each, patient=last)
            if candidate is not None and self.best(rows) == each.kind:
                kept = (each.kind, candidate)
        while (best := self.best(rows)) is not None:
            chosen = next(each for each in recipes if each.kind == best)
            whole = self.count <= self.measured_rows and self.lists is None
            if whole and kept is not None and kept[0] == best:
                row = replace(rows[best], verdict="chosen")
                return Made(kept[1], cast("float", row.recall), row, tuple({**rows, best: row}.values()))
            index, row, recall = self.whole(chosen)
            rows[best] = row if best != "flat" else replace(row, latency=rows["flat"].latency)
            if self.meets(rows[best]):
                rows[best] = replace(rows[best], verdict="chosen")
                return Made(index, recall, rows[best], tuple(rows.values()))
            rows[best] = replace(rows[best], verdict=self.verdict(rows[best]) + " in full")
        raise self.refusal(list(rows.values()))

    # -- rows ------------------------------------------------------------------------------------------------------

    def recipe(self, kind: Kind) -> Recipe:
        limit = self.limits.memory
        return recipe(kind, count=self.count, dim=self.dim, max_memory=limit if self.lists is None else float("inf"))

    def memory(self, recipe: Recipe) -> int:
        return recipe.memory if self.lists is None else recipe.resident

    def row(self, recipe: Recipe, verdict: str) -> Candidate:
        return Candidate(recipe.kind, recipe.spec, self.memory(recipe), verdict)

    def meets(self, row: Candidate) -> bool:
        return row.recall is not None and self.verdict(row) == "meets the limits"

    def verdict(self, row: Candidate) -> str:
        if row.memory > self.limits.memory:
            return "too large"
        if row.recall is not None and row.recall < self.limits.recall:
            return "recall too low"
        if row.latency is not None and row.latency > self.limits.latency:
            return "too slow"
        return "meets the limits"

    def best(self, rows: dict[Kind, Candidate]) -> Kind | None:
        """The fastest that keeps to the limits; those that take long to build only when nothing else does."""
        able = [row for row in rows.values() if self.meets(row) and "in full" not in row.verdict]
        quick = [row for row in able if row.kind == "flat" or (row.seconds or 0.0) <= PATIENCE]
        chosen = min(quick or able, key=lambda row: (row.latency or 0.0, row.memory), default=None)
        return None if chosen is None else chosen.kind

    def refusal(self, rows: Sequence[Candidate]) -> UsageError:
        limits = self.limits
        asked = [f"recall@10 >= {limits.recall:g}"]
        if limits.memory != float("inf"):
            asked.append(f"index.max_memory = {limits.memory / MIB:g} MiB")
        if limits.latency != float("inf"):
            asked.append(f"index.max_latency = {limits.latency:g} ms")
        measured = [row for row in rows if row.recall is not None]
        hint = []
        if measured:
            exact_enough = [row for row in measured if cast("float", row.recall) >= limits.recall]
            near = min(exact_enough, key=lambda row: row.latency or 0.0, default=None) or max(
                measured, key=lambda row: cast("float", row.recall)
            )
            said = f"Nearest within memory: {near.kind}, recall@10 {near.recall:.4f}"
            if exact_enough:
                assert near.latency is not None
                hint.append(f"{said}, {near.latency:.3f} ms; raise index.max_latency to {1.25 * near.latency:.2g}")
            else:
                hint.append(f"{said}; lower index.recall_target to {np.floor(100 * (near.recall or 0.0)) / 100:g}")
        if larger := [row for row in rows if row.verdict == "too large"]:
            least = min(larger, key=lambda row: row.memory)
            hint.append(
                f"{'or r' if measured else 'R'}aise index.max_memory to "
                f"{np.ceil(least.memory / MIB):.0f} ({least.kind})"
            )
        message = f"no index of {self.name}, {self.count} x {self.dim}, keeps to {', '.join(asked)}"
        return UsageError(f"{message}\n{candidates_table(rows)}", hint=", ".join(hint) + ".")

    # -- building and measuring --------------------------------------------------------------------------------------

    def measure(self, recipe: Recipe, *, patient: bool) -> tuple[VectorIndex | None, Candidate]:
        """Build a candidate on the sample, search harder until it reaches the target, time it."""
        vectors = self.sample()
        row = self.row(recipe, "")
        scale = self.count / len(vectors)
        if recipe.kind == "hnsw":
            seconds = self.hnsw_seconds(recipe)
            if seconds > PATIENCE and not patient:
                return None, replace(row, seconds=seconds, verdict=f"not tried: slow to build, about {seconds:.0f} s")
        start = time.perf_counter()
        index = self.filled(recipe, vectors)
        seconds = (time.perf_counter() - start) * scale
        recall = self.tune(index, vectors)
        row = replace(row, seconds=seconds, recall=recall, latency=self.latency(index) * scale, effort=index.effort)
        return index, replace(row, verdict=self.verdict(row))

    def measured(self, recipe: Recipe, *, patient: bool) -> tuple[VectorIndex | None, Candidate]:
        """:meth:`measure`; for lists on disk, a row that an interrupted choice has measured is taken from there."""
        if self.lists is None:
            return self.measure(recipe, patient=patient)
        known = self.lists.measured()
        if recipe.kind not in known:
            known[recipe.kind] = asdict(self.measure(recipe, patient=patient)[1])
            self.lists.keep_measured(known)
        row = Candidate(**known[recipe.kind])
        if recipe.kind == "ivf-flat":
            self._whole_effort = row.effort or 1
        return None, row

    def whole(self, recipe: Recipe) -> tuple[VectorIndex, Candidate, float]:
        """Build on all vectors, search harder until the target is reached; timed when there is a limit of time."""
        start = time.perf_counter()
        if self.lists is not None:
            index = wrap(recipe.kind, self.lists.build(recipe, self.vectors, seed=self.seed, name=self.name))
        else:
            index = self.filled(recipe, self.vectors)
        seconds = time.perf_counter() - start
        recall = self.tune(index, self.vectors)
        timed = self.limits.latency != float("inf") and recipe.kind != "flat"
        row = replace(self.row(recipe, "chosen"), recall=recall, effort=index.effort)
        if timed or self.count > FLAT_LIMIT:
            row = replace(row, seconds=seconds, latency=self.latency(index))
        return index, row, recall

    def filled(self, recipe: Recipe, vectors: Any) -> VectorIndex:
        cells = self.cells(recipe, vectors)
        index = trained(
            recipe, vectors, centroids=None if cells is None else cells.centroids, seed=self.seed, name=self.name
        )
        fill(index, vectors, nearest=None if cells is None else cells.nearest)
        return wrap(recipe.kind, index)

    def cells(self, recipe: Recipe, vectors: Any) -> Cells | None:
        """The inverted lists, found once for all kinds that have them."""
        if not recipe.cells:
            return None
        if self._cells is None or len(self._cells.nearest) != len(vectors):
            self._cells = Cells.find(vectors, cells=recipe.cells, seed=self.seed)
        return self._cells

    def truth(self, vectors: Any) -> Hits:
        if len(vectors) not in self._truth:
            self._truth[len(vectors)] = exact(vectors, self.queries, k=K)
        return self._truth[len(vectors)]

    def tune(self, index: VectorIndex, vectors: Any) -> float:
        """Set the least effort whose recall reaches the target with two standard errors to spare; the recall at it.

        Codes are given up where doubling the effort gains next to nothing any more and twice that would not be enough.
        """
        if index.kind == "flat":
            return 1.0  # it is the exact search that the others are measured against
        best = self.truth(vectors)

        def recall_at(effort: int) -> tuple[float, bool]:
            index.set_effort(effort)
            each = recall_of_each(best, index.search(self.queries, k=K), vectors=vectors, queries=self.queries)
            spare = 2 * float(each.std() / len(each) ** 0.5)
            return float(each.mean()), float(each.mean()) - spare >= self.limits.recall

        coded = index.kind in _CODED
        first = 16 if index.kind == "hnsw" else self._whole_effort if coded else 1
        low, before = 0, 0.0
        for effort in _doubling(min(first, index.most), index.most):
            recall, enough = recall_at(effort)
            gain = recall - before
            hopeless = coded and low and gain < _PLATEAU and recall + 2 * gain < self.limits.recall
            if enough or hopeless:
                break
            low, before = effort, recall
        if index.kind == "ivf-flat":
            self._whole_effort = effort
        if not enough:
            return recall
        while effort - low > max(1, effort // 8):  # the least effort between the last two, to an eighth
            middle = (low + effort) // 2
            between, enough = recall_at(middle)
            if enough:
                effort, recall = middle, between
            else:
                low = middle
        index.set_effort(effort)
        return recall

    def latency(self, index: VectorIndex) -> float:
        """Median milliseconds of one query searched alone."""
        faiss_index, times = index, []
        deadline = time.perf_counter() + _TIMED_SECONDS
        for row in evenly_spaced(len(self.queries), limit=_TIMED_QUERIES):
            query = as_rows(self.queries[row : row + 1])
            start = time.perf_counter()
            faiss_index.search(query, k=K)
            times.append(time.perf_counter() - start)
            if start > deadline and len(times) > 5:
                break
        return 1000 * float(np.median(times))

    def flat_latency(self) -> float:
        """Median milliseconds of an exact query over all vectors, from a part of them: it grows with their number."""
        part = self.vectors[: min(self.count, 50_000)]
        index = load_faiss().IndexFlatIP(self.dim)
        fill(index, part, nearest=None)
        return self.latency(wrap("flat", index)) * self.count / len(part)

    def hnsw_seconds(self, recipe: Recipe) -> float:
        """Seconds an HNSW graph over all vectors would take, from a small one: inserting grows with the logarithm."""
        part = self.vectors[evenly_spaced(self.count, limit=_HNSW_TRIAL)]
        start = time.perf_counter()
        fill(recipe.empty(self.dim), part, nearest=None)
        grown = np.log(max(self.count, 2)) / np.log(max(len(part), 2))
        return (time.perf_counter() - start) * self.count / len(part) * float(grown)


def _doubling(first: int, most: int) -> Iterator[int]:
    """``first``, twice that, and so on, up to ``most``."""
    for power in itertools.count():
        effort = min(first << power, most)
        yield effort
        if effort == most:
            return
