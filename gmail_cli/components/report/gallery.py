"""From tables, ranks and records to what a report shows. Examples are chosen by rule, never by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from gmail_cli.components import search
from gmail_cli.components.captions import Dataset
from gmail_cli.components.images import GeneratedSet
from gmail_cli.components.metrics.gap import plot_coordinates
from gmail_cli.components.metrics.retrieval import Ranks, RetrievalRanks
from gmail_cli.components.report.names import arm_rank
from gmail_cli.components.report.records import Breakdown, CaptionExample, Chart, Cloud, Curve, Picture, PictureRow
from gmail_cli.components.report.thumbnails import thumbnail

SHOWN_HITS = 6
"""Images shown for a query, and generated images shown for a caption."""
CLOUD_POINTS = 500
"""Most points of each colour."""
CURVE_POINTS = 160
"""Most points of a training curve; longer ones are averaged in equal stretches."""
MOST_LABELS = 40
"""Most classes that a breakdown shows."""
MOST_VALUES = 16
"""Most values of an attribute of a breakdown."""
MOST_ROWS = 80
"""Most values of all its attributes together."""

Thumbnails = Callable[[str], bytes | None]
"""Id of a test image -> its thumbnail, where the image is at hand."""


def recall_charts(ranks: Mapping[str, Sequence[RetrievalRanks]], *, most: int) -> tuple[Chart, ...]:
    """Recall at 1 .. ``most`` for each arm (averaged over its models), one chart per direction."""
    ks = tuple(range(1, most + 1))
    charts = []
    for title, direction in (("Text to image", "text_to_image"), ("Image to text", "image_to_text")):
        curves = []
        for arm, found in ranks.items():
            each: list[Ranks] = [getattr(one, direction) for one in found]
            recalls = tuple(100 * float(np.mean([one.hits(k).mean() for one in each])) for k in ks)
            curves.append(Curve(arm, arm, ks, recalls))
        charts.append(Chart(title, "k", "per cent of queries with a right answer among the first k", tuple(curves)))
    return tuple(charts)


def breakdown(
    title: str, *, labels: Sequence[str], values: Mapping[str, Float[np.ndarray, " images"]]
) -> Breakdown | None:
    """A metric by label, most helped by alignment first; None for fewer than two labels.

    Of more than ``MOST_LABELS`` labels the two ends are shown.

    Args:
        title: What is measured.
        labels: The label of each test image.
        values: Arm -> what it reached on each test image; an image with a NaN was not asked and is left out.
    """
    asked = _asked(values)
    found = np.unique(np.array(labels)[asked], return_inverse=True)
    if len(found[0]) < 2:
        return None
    shares, counts = _by_label(found[1], values, rows=asked)
    aligned, naive = shares.get("generated-aligned"), shares.get("generated-naive")
    gain = aligned - naive if aligned is not None and naive is not None else -next(iter(shares.values()))
    order, half = np.argsort(-gain, kind="stable"), MOST_LABELS // 2
    if len(order) > MOST_LABELS:
        title = f"{title} (the first and the last {half} of {len(order):,})"
        order = np.concatenate([order[:half], order[-half:]])
    return _breakdown(title, found[0], shares, counts, order=order)


def attribute_breakdown(
    title: str, *, attributes: Sequence[Mapping[str, str]], values: Mapping[str, Float[np.ndarray, " images"]]
) -> Breakdown | None:
    """A metric by the value of each attribute that has several, attribute by attribute; None without any.

    The first attributes that fit into ``MOST_ROWS`` rows are shown.

    Args:
        title: What is measured.
        attributes: Name -> value of each test image. An attribute that an image lacks passes over it.
        values: As in :func:`breakdown`.
    """
    asked, rows_shown = _asked(values), 0
    parts: list[tuple[list[str], dict[str, np.ndarray], np.ndarray]] = []
    for name in dict.fromkeys(name for each in attributes for name in each):
        rows = np.array([row for row in asked if name in attributes[row]], dtype=np.int64)
        labels, place = np.unique([attributes[row][name] for row in rows], return_inverse=True)
        if 2 <= len(labels) <= MOST_VALUES and rows_shown + len(labels) <= MOST_ROWS:
            rows_shown += len(labels)
            shares, counts = _by_label(place, values, rows=rows)
            parts.append(([f"{name}: {label}" for label in labels], shares, counts))
    if not parts:
        return None
    labels = np.concatenate([part[0] for part in parts])
    shares = {arm: np.concatenate([part[1][arm] for part in parts]) for arm in parts[0][1]}
    counts = np.concatenate([part[2] for part in parts])
    return _breakdown(title, labels, shares, counts, order=np.arange(len(labels)))


def _asked(values: Mapping[str, Float[np.ndarray, " images"]]) -> Int[np.ndarray, " asked"]:
    return np.flatnonzero(np.isfinite(list(values.values())).all(axis=0))


def _by_label(
    place: Int[np.ndarray, " rows"],
    values: Mapping[str, Float[np.ndarray, " images"]],
    *,
    rows: Int[np.ndarray, " rows"],
) -> tuple[dict[str, Float[np.ndarray, " labels"]], Int[np.ndarray, " labels"]]:
    """The mean of each arm over the images of each label, and how many images there are."""
    counts = np.bincount(place)
    arms = sorted(values, key=arm_rank)
    return {arm: np.bincount(place, weights=values[arm][rows]) / counts for arm in arms}, counts


def _breakdown(
    title: str,
    labels: np.ndarray,
    shares: Mapping[str, Float[np.ndarray, " labels"]],
    counts: Int[np.ndarray, " labels"],
    *,
    order: Int[np.ndarray, " labels"],
) -> Breakdown:
    arms = {arm: tuple(each[order].tolist()) for arm, each in shares.items()}
    return Breakdown(title, tuple(labels[order].tolist()), tuple(counts[order].tolist()), arms)


def clouds(
    real: Float[np.ndarray, "r dim"],
    *,
    naive: Float[np.ndarray, "g dim"],
    aligned: Float[np.ndarray, "g dim"],
) -> tuple[Cloud, Cloud]:
    """Before and after alignment in one plane: the first two principal components of all three sets together."""
    real, naive, aligned = (part[_evenly(len(part), CLOUD_POINTS)] for part in (real, naive, aligned))
    generated = np.concatenate([naive, aligned])
    plane = plot_coordinates(real, generated=generated, method="pca", limit=len(generated) + len(real))
    before, after = plane.generated[: len(naive)], plane.generated[len(naive) :]
    return (
        Cloud("Before", "generated images through f_r", plane.real, before),
        Cloud("After", "generated images through f_g", plane.real, after),
    )


def pairs(generated: GeneratedSet, *, real: Dataset, count: int, side: int) -> tuple[PictureRow, ...]:
    """Evenly chosen real images, each before images generated for it: of one caption, or one for each of its captions.

    Generated images whose owner is not at hand (made elsewhere from captions alone) are shown by caption, before a
    real image of an equal caption where there is one.
    """
    places = {image.id: row for row, image in enumerate(real.images)} if real.has_images else {}
    alike = {caption.text: places[caption.owner] for caption in reversed(real.captions) if places}
    groups: dict[str, list[int]] = {}
    for row, record in enumerate(generated.rows):
        groups.setdefault(record.owner if record.owner in places else record.caption, []).append(row)
    names = list(groups)
    shown = []
    for chosen in _evenly(len(names), count).tolist():
        rows = groups[names[chosen]]
        caption = generated.rows[rows[0]].caption
        same = [row for row in rows if generated.rows[row].caption == caption]
        rows = (same if len(same) > 1 else rows)[:SHOWN_HITS]
        place = places.get(names[chosen], alike.get(caption))
        pictures = []
        if place is not None:
            pictures.append(Picture(thumbnail(real.image_bytes(place), side=side), "real", marked=True))
        pictures += [Picture(thumbnail(generated.image_bytes(row), side=side), "generated") for row in rows]
        note = f"generated from {len(rows)} captions of this image, this one first" if len(same) < len(rows) else ""
        shown.append(PictureRow(caption, tuple(pictures), note))
    return tuple(shown)


def retrievals(
    images: Float[np.ndarray, "images dim"],
    *,
    texts: Float[np.ndarray, "texts dim"],
    image_ids: Sequence[str],
    captions: Sequence[str],
    ranks: Ranks,
    thumbnails: Thumbnails,
    note: str,
    count: int,
) -> tuple[tuple[PictureRow, ...], tuple[PictureRow, ...]]:
    """The surest right text-to-image retrievals (largest lead over the second) and the worst misses.

    Args:
        images: The candidates.
        texts: The queries, in the order of ``ranks.query``.
        image_ids: Id of each candidate.
        captions: Text of each query.
        ranks: Text-to-image ranks.
        thumbnails: Where pictures come from.
        note: What model this was.
        count: How many of each; one per image.
    """
    if len(images) < 2 or not count:
        return (), ()
    best = search.exact(images, texts, k=SHOWN_HITS)
    lead = np.where(best.ids[:, 0] == ranks.image, best.scores[:, 0] - best.scores[:, 1], -np.inf)
    surest = [row for row in np.argsort(-lead, kind="stable").tolist() if np.isfinite(lead[row])]
    worst = [row for row in np.argsort(-ranks.greater, kind="stable").tolist() if ranks.greater[row] > 0]

    def shown(rows: Sequence[int]) -> tuple[PictureRow, ...]:
        chosen: dict[int, int] = {}
        for row in rows:
            if len(chosen) < count:
                chosen.setdefault(int(ranks.image[row]), row)
        return tuple(_retrieval(row) for row in chosen.values())

    def _retrieval(row: int) -> PictureRow:
        right = int(ranks.image[row])
        place = int(ranks.greater[row]) + 1
        listed = [
            (int(image), f"{score:.3f}", int(image) == right)
            for image, score in zip(best.ids[row], best.scores[row], strict=True)
        ]
        if all(not mark for *_, mark in listed):
            score = float(images[right].astype(np.float32) @ texts[row].astype(np.float32))
            listed = [*listed[:-1], (right, f"{score:.3f}, place {place:,}", True)]
        pictures = [
            Picture(data, label, marked)
            for image, label, marked in listed
            if (data := thumbnails(image_ids[image])) is not None
        ]
        return PictureRow(captions[row], tuple(pictures), f"place {place:,} of {len(images):,}; {note}")

    return shown(surest), shown(worst)


def caption_examples(
    ids: Sequence[str],
    *,
    references: Mapping[str, Sequence[str]],
    predictions: Mapping[str, Mapping[str, str]],
    thumbnails: Thumbnails,
    count: int,
) -> tuple[CaptionExample, ...]:
    """Evenly chosen test images with what each arm (arm -> image id -> caption) says of them."""
    arms = sorted(predictions, key=arm_rank)
    examples = []
    for row in _evenly(len(ids), count).tolist():
        data = thumbnails(ids[row])
        picture = Picture(data) if data is not None else None
        said = tuple((arm, predictions[arm][ids[row]]) for arm in arms)
        examples.append(CaptionExample(picture, tuple(references[ids[row]]), said))
    return tuple(examples)


def training_chart(title: str, curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> Chart | None:
    """Training loss over steps for each arm, averaged over equal stretches; None without steps.

    Args:
        title: What was trained.
        curves: Arm -> rows of ``metrics.jsonl`` with ``step`` and ``loss``.
    """
    lines = []
    for arm, rows in curves.items():
        steps = np.array([row["step"] for row in rows], dtype=np.float64)
        losses = np.array([row["loss"] for row in rows], dtype=np.float64)
        if len(rows) < 2:
            continue
        stretches = np.array_split(np.arange(len(rows)), min(CURVE_POINTS, len(rows)))
        x = tuple(float(steps[part].mean()) for part in stretches)
        y = tuple(float(losses[part].mean()) for part in stretches)
        lines.append(Curve(arm, arm, x, y))
    return Chart(title, "step", "loss", tuple(lines)) if lines else None


def _evenly(length: int, count: int) -> Int[np.ndarray, " chosen"]:
    """At most ``count`` of ``length`` positions, spread evenly."""
    return np.unique(np.linspace(0, max(length - 1, 0), min(length, count)).round().astype(np.int64))[:length]
