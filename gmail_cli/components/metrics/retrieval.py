"""Exact image-text retrieval ranks in bounded memory, and the recalls that follow from them.

Scores are fp32 inner products, computed tile by tile. Equal vectors are scored once and counted as often as
they occur (see :mod:`gmail_cli.components.metrics.distinct`), and the score of a true pair is read from the
cell that its rivals are compared with: ties between duplicates are exact.

Ties are broken at random in expectation. Let a query's best positive have ``g`` candidates scoring strictly
higher and let it be tied with ``m`` positives (itself included) and ``e`` other candidates. Of the top ``k``,
``s = k - g`` places go to this group of ``m + e``, and all ``m`` positives miss them with the hypergeometric
probability ``C(e, s) / C(m + e, s)``, hence

    P(hit in top k) = 0                                        if s <= 0
                    = 1 - prod_{j=1..m} max(e + j - s, 0) / (e + j)   otherwise

which for one positive (``m = 1``) is ``min(s / (e + 1), 1)``. A collapsed model, all of whose vectors are
equal, therefore scores ``k / n`` and not 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from gmail_cli.components.metrics.distinct import Distinct
from gmail_cli.errors import InputError, UsageError

KS = (1, 5, 10)


@dataclass(frozen=True, kw_only=True, eq=False)
class Ranks:
    """What one direction of retrieval found for each query; everything else is computed from this.

    Attributes:
        query: Row of each query in its own table.
        image: Row of the image a query belongs to: the unit for bootstrapping.
        candidates: Number of items searched.
        positives: Number of correct items of each query.
        greater: Items scoring strictly above the query's best positive.
        tied_positives: Positives with the best positive's score, itself included (at least 1).
        tied_others: Other items with exactly that score.
        pair_query: For every positive, the index of its query in the arrays above; None unless all positives
            were ranked.
        pair_greater: Items scoring strictly above that positive (other positives included).
        pair_tied: Items with exactly that positive's score, itself included.
    """

    query: Int[np.ndarray, " q"]
    image: Int[np.ndarray, " q"]
    candidates: int
    positives: Int[np.ndarray, " q"]
    greater: Int[np.ndarray, " q"]
    tied_positives: Int[np.ndarray, " q"]
    tied_others: Int[np.ndarray, " q"]
    pair_query: Int[np.ndarray, " p"] | None = None
    pair_greater: Int[np.ndarray, " p"] | None = None
    pair_tied: Int[np.ndarray, " p"] | None = None

    def hits(self, k: int) -> Float[np.ndarray, " q"]:
        """Probability, per query, that at least one positive is among the top ``k`` (the usual recall@k)."""
        slots = _positive_k(k) - self.greater
        miss = np.ones(len(self.query))
        for j in range(1, int(self.tied_positives.max(initial=0)) + 1):
            with_j = self.tied_positives >= j
            others = self.tied_others[with_j] + j
            miss[with_j] *= np.maximum(others - slots[with_j], 0) / others
        return np.where(slots > 0, 1.0 - miss, 0.0)

    def true_recall(self, k: int | Int[np.ndarray, " q"]) -> Float[np.ndarray, " q"]:
        """Expected share, per query, of its positives among the top ``k`` (one number, or one for each query).

        Raises:
            UsageError: If the ranks were computed without ``all_positives=True``.
        """
        query, greater, tied = self._pairs()
        places = _positive_k(k) if isinstance(k, int) else k[query]
        found = np.clip((places - greater) / tied, 0.0, 1.0)
        return np.bincount(query, weights=found, minlength=len(self.query)) / self.positives

    def r_precision(self) -> Float[np.ndarray, " q"]:
        """Expected share, per query with R positives, of positives among its top R (ECCV Caption, 2022).

        Raises:
            UsageError: As :meth:`true_recall`.
        """
        return self.true_recall(self.positives)

    def average_precision_at_r(self) -> Float[np.ndarray, " q"]:
        """mAP@R per query (Musgrave et al. 2020; ECCV Caption, 2022): 1/R times the sum, over the positives among the
        top R, of the precision at their places.

        Ties at their expectation. In a group of ``m`` positives and ``e`` others that starts at place ``g + 1`` after
        ``p`` positives, place ``g + s`` holds a positive with probability ``m / (m + e)``, and then
        ``(s - 1) (m - 1) / (m + e - 1)`` of those before it in the group are positives.

        Raises:
            UsageError: As :meth:`true_recall`.
        """
        query, greater, tied = self._pairs()
        groups, members = np.unique(np.stack([query, greater, tied], axis=1), axis=0, return_counts=True)
        total = np.zeros(len(self.query))
        first = np.searchsorted(groups[:, 0], groups[:, 0])
        before = np.cumsum(members) - members
        before -= before[first]
        for (row, g, size), m, p in zip(groups.tolist(), members.tolist(), before.tolist(), strict=True):
            s = np.arange(1, min(size, int(self.positives[row]) - g) + 1)
            precision = (p + 1 + (s - 1) * ((m - 1) / max(size - 1, 1))) / (g + s)
            total[row] += m / size * precision.sum()
        return total / self.positives

    def _pairs(self) -> tuple[Int[np.ndarray, " p"], Int[np.ndarray, " p"], Int[np.ndarray, " p"]]:
        if self.pair_query is None or self.pair_greater is None or self.pair_tied is None:
            raise UsageError(
                "this metric needs the rank of every positive, and only the best ones were ranked",
                hint="Call retrieval_ranks(..., all_positives=True).",
            )
        return self.pair_query, self.pair_greater, self.pair_tied

    def expected_rank(self) -> Float[np.ndarray, " q"]:
        """Expected rank (from 1) of the best-placed positive: ``g + (m + e + 1) / (m + 1)``."""
        tied = self.tied_positives + self.tied_others
        return self.greater + (tied + 1) / (self.tied_positives + 1)

    def reciprocal_rank(self) -> Float[np.ndarray, " q"]:
        """Expectation of 1 / rank of the best-placed positive."""
        values = 1.0 / (self.greater + 1.0)
        tied = np.flatnonzero(self.tied_others)
        groups = np.stack([self.greater[tied], self.tied_positives[tied], self.tied_others[tied]], axis=1)
        unique, inverse = np.unique(groups, axis=0, return_inverse=True)
        expected = np.empty(len(unique))
        for row, (g, m, e) in enumerate(unique.tolist()):
            place = np.arange(1, e + 2)  # of the first positive inside its group of m + e
            later = np.cumprod((e - place[:-1] + 1) / (m + e - place[:-1]))
            probability = m / (m + e) * np.concatenate([[1.0], later])
            expected[row] = (probability / (g + place)).sum()
        values[tied] = expected[inverse.reshape(-1)]
        return values

    def to_array(self) -> Int[np.ndarray, "q 6"]:
        """Columns query, image, positives, greater, tied_positives, tied_others: what a run keeps on disk."""
        columns = (
            self.query,
            self.image,
            self.positives,
            self.greater,
            self.tied_positives,
            self.tied_others,
        )
        return np.stack(columns, axis=1)

    @classmethod
    def from_array(cls, array: Int[np.ndarray, "q 6"], *, candidates: int) -> Ranks:
        """Inverse of :meth:`to_array`.

        Raises:
            InputError: If the array is not an integer array of six columns.
        """
        if array.ndim != 2 or array.shape[1] != 6 or array.dtype.kind not in "iu":
            raise InputError(
                f"stored ranks have shape {array.shape} and type {array.dtype}, not integers [queries, 6]",
                hint="Run the evaluation again to rewrite them.",
            )
        query, image, positives, greater, tied_positives, tied_others = array.astype(np.int64).T
        return cls(
            query=query,
            image=image,
            candidates=candidates,
            positives=positives,
            greater=greater,
            tied_positives=tied_positives,
            tied_others=tied_others,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class RetrievalRanks:
    """Ranks of both directions.

    Attributes:
        text_to_image: One query per text; candidates are all images.
        image_to_text: One query per image that has a caption; candidates are all texts.
        images_without_captions: Images that were candidates but not queries.
    """

    text_to_image: Ranks
    image_to_text: Ranks
    images_without_captions: int


def retrieval_ranks(
    images: Float[np.ndarray, "images dim"],
    *,
    texts: Float[np.ndarray, "texts dim"],
    owners: Int[np.ndarray, " texts"],
    extra_positives: Int[np.ndarray, "pairs 2"] | None = None,
    all_positives: bool = False,
    block_bytes: int = 4 << 20,
    progress: Callable[[int, int], None] | None = None,
) -> RetrievalRanks:
    """Rank every image for every text and every text for every image, exactly.

    Args:
        images: Image embeddings; scores are inner products, so give unit rows for cosine similarity.
        texts: Text embeddings.
        owners: Row of the image that each text describes.
        extra_positives: Further correct (text row, image row) pairs, for annotations beyond the owners.
        all_positives: Also rank every single positive, for :meth:`Ranks.true_recall`. Costs one more count
            per positive of the query with most positives.
        block_bytes: Working memory, beyond the inputs and the per-query results.
        progress: Called with (tiles done, tiles in all).

    Raises:
        InputError: For shapes that do not fit, values that are not finite, rows out of range, empty tables.
    """
    _check_table("image", images)
    _check_table("text", texts)
    if images.shape[1] != texts.shape[1]:
        raise InputError(
            f"image embeddings have {images.shape[1]} dimensions, text embeddings {texts.shape[1]}",
            hint="Embed both with the same model.",
        )
    owners = check_owners(owners, texts=len(texts), images=len(images))
    pair_text, pair_image = np.arange(len(texts)), owners
    if extra_positives is not None:
        extra = check_pairs(extra_positives, name="extra_positives", texts=len(texts), images=len(images))
        extra_text, extra_image = extra.T
        both = np.concatenate([pair_text * len(images) + pair_image, extra_text * len(images) + extra_image])
        pair_text, pair_image = np.divmod(np.unique(both), len(images))

    # Texts in the order of their images: the tiles that hold true pairs are then few, near the diagonal.
    text_set = Distinct.of(texts, order=np.argsort(owners, kind="stable"))
    image_set = Distinct.of(images, order=np.arange(len(images)))
    tiles = _Tiles(texts, text_set, images, image_set, side=_tile_side(block_bytes, dim=images.shape[1]))
    scores = tiles.pair_scores(text_set.slot[pair_text], image_set.slot[pair_image])

    by_text = _Counter(pair_text, scores, queries=text_set, candidates=image_set, all_positives=all_positives)
    by_image = _Counter(pair_image, scores, queries=image_set, candidates=text_set, all_positives=all_positives)
    with ThreadPoolExecutor(max_workers=1) as helper:  # NumPy compares without holding the interpreter
        for done, (rows, columns, block) in enumerate(tiles, start=1):
            other = helper.submit(by_image.count, block.T, queries_at=columns, candidates_at=rows)
            by_text.count(block, queries_at=rows, candidates_at=columns)
            other.result()
            if progress is not None:
                progress(done, tiles.total)

    text_to_image = by_text.ranks(image_of=owners)
    image_to_text = by_image.ranks(image_of=np.arange(len(images)))
    return RetrievalRanks(
        text_to_image=text_to_image,
        image_to_text=image_to_text,
        images_without_captions=len(images) - len(image_to_text.query),
    )


def judged_ranks(
    queries: Float[np.ndarray, "queries dim"],
    *,
    candidates: Float[np.ndarray, "candidates dim"],
    pairs: Int[np.ndarray, "pairs 2"],
    images: Int[np.ndarray, " queries"],
    block_bytes: int = 4 << 20,
) -> Ranks:
    """Rank every right answer of queries that were judged anew, as those of ECCV Caption and CxC, exactly.

    Args:
        queries: Embeddings of texts or images; scores are inner products.
        candidates: Embeddings of what is searched, from the other tower.
        pairs: (query, candidate) rows: all right answers, each query with one or more.
        images: The image that each query belongs to, for the bootstrap.
        block_bytes: Working memory, beyond the inputs and the per-query results.
    """
    query_set, candidate_set = (Distinct.of(rows, order=np.arange(len(rows))) for rows in (queries, candidates))
    side = _tile_side(block_bytes, dim=queries.shape[1])
    tiles = _Tiles(queries, query_set, candidates, candidate_set, side=side)
    query, candidate = np.unique(pairs, axis=0).T
    scores = tiles.pair_scores(query_set.slot[query], candidate_set.slot[candidate])
    counter = _Counter(query, scores, queries=query_set, candidates=candidate_set, all_positives=True)
    for rows, columns, block in tiles:
        counter.count(block, queries_at=rows, candidates_at=columns)
    return counter.ranks(image_of=images)


def retrieval_ranks_in_folds(
    images: Float[np.ndarray, "images dim"],
    *,
    texts: Float[np.ndarray, "texts dim"],
    owners: Int[np.ndarray, " texts"],
    folds: int,
    all_positives: bool = False,
) -> RetrievalRanks:
    """Rank within blocks of consecutive images and their texts, as "COCO 1k, 5 folds" does; all queries together.

    With equal folds the mean over all queries is the mean over folds. ``candidates`` is that of the first fold.

    Args:
        images: As :func:`retrieval_ranks`.
        texts: As :func:`retrieval_ranks`.
        owners: As :func:`retrieval_ranks`.
        folds: How many; they must divide the images.
        all_positives: As :func:`retrieval_ranks`.

    Raises:
        InputError: As :func:`retrieval_ranks`; also when the folds do not divide the images.
    """
    if folds == 1:
        return retrieval_ranks(images, texts=texts, owners=owners, all_positives=all_positives)
    size, rest = divmod(len(images), folds)
    if rest or not size:
        raise InputError(f"{len(images)} images are no {folds} equal folds", hint="Give the protocol's whole set.")
    owners = check_owners(owners, texts=len(texts), images=len(images))
    parts = []
    for start in range(0, len(images), size):
        rows = np.flatnonzero((owners >= start) & (owners < start + size))
        block = images[start : start + size]
        ranks = retrieval_ranks(block, texts=texts[rows], owners=owners[rows] - start, all_positives=all_positives)
        parts.append((ranks, rows, np.arange(start, start + size)))
    return RetrievalRanks(
        text_to_image=_joined([(part.text_to_image, rows, at) for part, rows, at in parts]),
        image_to_text=_joined([(part.image_to_text, at, at) for part, _, at in parts]),
        images_without_captions=sum(part.images_without_captions for part, _, _ in parts),
    )


def _joined(parts: Sequence[tuple[Ranks, Int[np.ndarray, " rows"], Int[np.ndarray, " images"]]]) -> Ranks:
    """Ranks of folds as one, queries by their rows in the whole tables: (ranks, rows of queries, rows of images)."""

    def joined(name: str) -> Int[np.ndarray, " q"]:
        return np.concatenate([getattr(ranks, name) for ranks, _, _ in parts])

    pairs: dict[str, Int[np.ndarray, " p"]] = {}
    if parts[0][0].pair_query is not None:
        before = np.cumsum([0, *(len(ranks.query) for ranks, _, _ in parts)])
        queries = [ranks.pair_query + start for (ranks, _, _), start in zip(parts, before[:-1], strict=True)]
        pairs = {"pair_query": np.concatenate(queries)}
        pairs |= {name: joined(name) for name in ("pair_greater", "pair_tied")}
    return Ranks(
        query=np.concatenate([rows[ranks.query] for ranks, rows, _ in parts]),
        image=np.concatenate([images[ranks.image] for ranks, _, images in parts]),
        candidates=parts[0][0].candidates,
        positives=joined("positives"),
        greater=joined("greater"),
        tied_positives=joined("tied_positives"),
        tied_others=joined("tied_others"),
        **pairs,
    )


def retrieval_metrics(ranks: RetrievalRanks, *, ks: Sequence[int] = KS, true_recall: bool = False) -> dict[str, float]:
    """Recalls as fractions, median and mean rank of the best positive, mean reciprocal rank, both directions.

    Names are ``text_to_image_recall_at_1``, ``image_to_text_median_rank``, ``..._mean_rank``,
    ``..._mean_reciprocal_rank`` and, on request, ``..._true_recall_at_5``.
    """
    metrics: dict[str, float] = {}
    for direction, found in (("text_to_image", ranks.text_to_image), ("image_to_text", ranks.image_to_text)):
        for k in ks:
            metrics[f"{direction}_recall_at_{k}"] = float(found.hits(k).mean())
        if true_recall:
            for k in ks:
                metrics[f"{direction}_true_recall_at_{k}"] = float(found.true_recall(k).mean())
        expected = found.expected_rank()
        metrics[f"{direction}_median_rank"] = float(np.median(expected))
        metrics[f"{direction}_mean_rank"] = float(expected.mean())
        metrics[f"{direction}_mean_reciprocal_rank"] = float(found.reciprocal_rank().mean())
    return metrics


class _Tiles:
    """Scores of the different texts (rows) and images (columns), in square tiles.

    Cells outside the matrix hold -inf, so they never count.
    """

    def __init__(
        self,
        texts: Float[np.ndarray, "texts dim"],
        text_set: Distinct,
        images: Float[np.ndarray, "images dim"],
        image_set: Distinct,
        *,
        side: int,
    ) -> None:
        self._texts, self._text_rows = texts, text_set.rows
        self._images, self._image_rows = images, image_set.rows
        self._side = side
        self._wide = -(-len(self._image_rows) // side)
        self._high = -(-len(self._text_rows) // side)
        self.total = self._high * self._wide
        self._text_block = np.zeros((side, texts.shape[1]), np.float32)
        self._image_block = np.zeros((side, texts.shape[1]), np.float32)
        self._scores = np.empty((side, side), np.float32)

    def __iter__(self) -> Iterator[tuple[slice, slice, Float[np.ndarray, "side side"]]]:
        """Yield (text slots, image slots, scores); the scores' buffer is used again for the next tile."""
        for text_tile in range(self._high):
            rows = self._load_texts(text_tile)
            for image_tile in range(self._wide):
                yield rows, *self._product(rows, image_tile)

    def pair_scores(
        self, text: Int[np.ndarray, " pairs"], image: Int[np.ndarray, " pairs"]
    ) -> Float[np.ndarray, " pairs"]:
        """Scores of single (text slot, image slot) pairs, the same bits as the tiles hold."""
        tile = (text // self._side) * self._wide + image // self._side
        by_tile = np.argsort(tile, kind="stable")
        starts = np.flatnonzero(np.diff(tile[by_tile], prepend=-1))
        scores = np.empty(len(text), np.float32)
        loaded = -1
        for pairs in np.split(by_tile, starts[1:]):
            text_tile, image_tile = divmod(int(tile[pairs[0]]), self._wide)
            if text_tile != loaded:
                rows, loaded = self._load_texts(text_tile), text_tile
            columns, block = self._product(rows, image_tile)
            scores[pairs] = block[text[pairs] - rows.start, image[pairs] - columns.start]
        return scores

    def _load_texts(self, tile: int) -> slice:
        start = tile * self._side
        rows = self._text_rows[start : start + self._side]
        self._text_block[: len(rows)] = self._texts[rows]
        return slice(start, start + len(rows))

    def _product(self, text_slots: slice, tile: int) -> tuple[slice, Float[np.ndarray, "side side"]]:
        start = tile * self._side
        rows = self._image_rows[start : start + self._side]
        consecutive = rows[-1] - rows[0] == len(rows) - 1  # rows of images only ever ascend
        self._image_block[: len(rows)] = self._images[rows[0] : rows[-1] + 1] if consecutive else self._images[rows]
        scores = np.matmul(self._text_block, self._image_block.T, out=self._scores)
        scores[text_slots.stop - text_slots.start :] = -np.inf
        scores[:, len(rows) :] = -np.inf
        return slice(start, start + len(rows)), scores


class _Counter:
    """For one direction, how many candidates score above each positive and how many equal it.

    Queries are kept in the order of their slots. Row 0 of ``_limits`` is each query's best positive; further
    rows hold the others, in falling order, when all are wanted. Where there is no positive stands +inf, which
    nothing reaches.
    """

    def __init__(
        self,
        query: Int[np.ndarray, " pairs"],
        score: Float[np.ndarray, " pairs"],
        *,
        queries: Distinct,
        candidates: Distinct,
        all_positives: bool,
    ) -> None:
        self._row = np.argsort(queries.slot, kind="stable")
        self._slot = queries.slot[self._row]
        count = len(self._row)
        place = np.empty(count, np.int64)
        place[self._row] = np.arange(count)

        falling = np.lexsort((-score, place[query]))
        self._query, self._score = place[query][falling], score[falling]
        self._positives = np.bincount(self._query, minlength=count)
        first = np.cumsum(self._positives) - self._positives
        self._depth = np.arange(len(query)) - first[self._query]
        depths = int(self._positives.max()) if all_positives else 1
        kept = self._depth < depths
        self._limits = np.full((depths, count), np.inf, np.float32)
        self._limits[self._depth[kept], self._query[kept]] = self._score[kept]
        self._greater = np.zeros((depths, count), np.int64)
        self._tied = np.zeros((depths, count), np.int64)
        self._all = all_positives
        self._candidates = len(candidates.slot)
        self._repeated = np.flatnonzero(candidates.copies > 1)
        self._repeats = candidates.copies[self._repeated] - 1

    def count(self, block: Float[np.ndarray, "side side"], *, queries_at: slice, candidates_at: slice) -> None:
        """Add a tile whose rows are query slots (and padding), whose columns are candidate slots."""
        low, high = np.searchsorted(self._repeated, (candidates_at.start, candidates_at.stop))
        repeated, repeats = self._repeated[low:high] - candidates_at.start, self._repeats[low:high]

        def total(mask: Bool[np.ndarray, "rows side"]) -> Int[np.ndarray, " rows"]:
            found = _true_per_row(mask)
            return found + mask[:, repeated] @ repeats if len(repeats) else found

        first, last = np.searchsorted(self._slot, (queries_at.start, queries_at.stop)).tolist()
        for start in range(first, last, len(block)):
            at = slice(start, min(start + len(block), last))
            slots = self._slot[at] - queries_at.start
            distinct = last - first == queries_at.stop - queries_at.start
            rows = block[: len(slots)] if distinct else block[slots]
            for depth, limits in enumerate(self._limits[:, at, None]):
                self._greater[depth, at] += total(rows > limits)
                self._tied[depth, at] += total(rows == limits)

    def ranks(self, *, image_of: Int[np.ndarray, " queries"]) -> Ranks:
        """The result for the queries that have a positive, in the order of their table."""
        at_best = self._score == self._limits[0, self._query]
        tied_positives = np.bincount(self._query[at_best], minlength=len(self._row))
        tied_others = self._tied[0] - tied_positives
        kept = np.argsort(self._row)
        kept = kept[self._positives[kept] > 0]
        assert (tied_others[kept] >= 0).all(), "a recomputed tile differed from itself"
        pairs: dict[str, Int[np.ndarray, " pairs"]] = {}
        if self._all:
            index = np.full(len(self._row), -1)
            index[kept] = np.arange(len(kept))
            pairs = {
                "pair_query": index[self._query],
                "pair_greater": self._greater[self._depth, self._query],
                "pair_tied": self._tied[self._depth, self._query],
            }
        row = self._row[kept]
        return Ranks(
            query=row,
            image=image_of[row],
            candidates=self._candidates,
            positives=self._positives[kept],
            greater=self._greater[0, kept],
            tied_positives=tied_positives[kept],
            tied_others=tied_others[kept],
            **pairs,
        )


def _true_per_row(mask: Bool[np.ndarray, "rows columns"]) -> Int[np.ndarray, " rows"]:
    """Number of true cells in each row, summed as packed bytes: several times faster than count_nonzero.

    ``mask`` is contiguous in one of its two orders, with at most 255 * 8 columns, a multiple of 64.
    """
    rows, columns = mask.shape
    if mask.flags.c_contiguous:  # eight cells to a 64-bit word; no byte of a sum exceeds 255
        words = np.add.reduce(mask.view(np.uint64), axis=1)
        return words.view(np.uint8).reshape(rows, 8).sum(axis=1, dtype=np.int64)
    groups = mask.T.view(np.uint8).reshape(columns // 64, 64, rows)
    return np.add.reduce(groups, axis=1, dtype=np.uint8).sum(axis=0, dtype=np.int64)


def _tile_side(block_bytes: int, *, dim: int) -> int:
    """Largest tile, a multiple of 64 cells a side, whose buffers fit: scores, a mask, two sets of vectors."""
    side = 64
    while side + 64 <= 1984 and 5 * (side + 64) ** 2 + 8 * dim * (side + 64) <= block_bytes:
        side += 64
    return side


def _positive_k(k: int) -> int:
    if k < 1:
        raise UsageError(f"recall at k = {k} is not defined", hint="Give k of at least 1.")
    return k


def _check_table(name: str, vectors: np.ndarray) -> None:
    if vectors.ndim != 2 or vectors.dtype.kind != "f" or not len(vectors) or not vectors.shape[1]:
        raise InputError(
            f"{name} embeddings have shape {vectors.shape} and type {vectors.dtype}; "
            "expected floats [rows, dimensions], neither of them 0",
            hint="Embed the set again.",
        )
    step = max(1, (1 << 20) // vectors.shape[1])
    for start in range(0, len(vectors), step):
        finite = np.isfinite(vectors[start : start + step]).all(axis=1)
        if not finite.all():
            raise InputError(
                f"{name} embedding row {start + int(np.argmin(finite))} holds a value that is not finite",
                hint="Embed the set again in float32.",
            )


def check_owners(owners: np.ndarray, *, texts: int, images: int) -> Int[np.ndarray, " texts"]:
    """For each text the row of its image, checked.

    Raises:
        InputError: They are not one integer for each text, or name an image that there is not.
    """
    return _check_rows("owners", owners, shape=(texts,), limit=images)


def check_pairs(pairs: np.ndarray, *, name: str, texts: int, images: int) -> Int[np.ndarray, "pairs 2"]:
    """(text row, image row) pairs, checked.

    Raises:
        InputError: They are not two integers each, or one names a row that there is not.
    """
    pairs = np.asarray(pairs)
    if pairs.ndim != 2 or pairs.shape[1] != 2:
        raise InputError(
            f"{name} has shape {pairs.shape}; expected one (text row, image row) pair a row",
            hint="Give an integer array of two columns.",
        )
    columns = zip(("texts", "images"), pairs.T, (texts, images), strict=True)
    checked = [_check_rows(f"{name} {what}", rows, shape=(len(pairs),), limit=limit) for what, rows, limit in columns]
    return np.stack(checked, axis=1)


def _check_rows(name: str, rows: np.ndarray, *, shape: tuple[int, ...], limit: int) -> Int[np.ndarray, " n"]:
    rows = np.asarray(rows)
    if rows.shape != shape or rows.dtype.kind not in "iu":
        raise InputError(
            f"{name} has shape {rows.shape} and type {rows.dtype}; expected integers of shape {shape}",
            hint="Give one row number per text.",
        )
    outside = np.flatnonzero((rows < 0) | (rows >= limit))
    if len(outside):
        raise InputError(
            f"{name}[{outside[0]}] is {rows[outside[0]]}; rows go from 0 to {limit - 1}",
            hint="Check that captions and images come from the same set.",
        )
    return rows.astype(np.int64)
