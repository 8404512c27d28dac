"""From the records of generated images to the page on them: the spread of each score, and the images at its bad end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gmail_cli.components.report.records import GeneratedReport, Histogram, Picture, PictureRow
from gmail_cli.components.report.thumbnails import thumbnail

SHOWN = 6
"""Rows of images at the bad end of each score."""
TWINS = 5
"""Images of one caption shown beside one another."""
SIDE = 96
"""Longest side of an image, pixels."""
_SPREADS = (
    ("clip_score", "CLIPScore", "2.5 times the cosine of image and caption; higher fits better"),
    ("twin_similarity", "Likeness to another image of the caption", "cosine; near 1 the generator repeats itself"),
    ("partner_similarity", "Likeness to the real image of the caption", "cosine"),
    ("copy_similarity", "Likeness to the nearest real image", "cosine; near 1 it may be a copy"),
    ("contrast", "Contrast", "standard deviation of the brightness; 0 is one colour"),
    ("detail", "Detail", "mean step between neighbouring pixels; low is blurred or empty, 0.3 is noise"),
    ("unsafe", "Unsafe", "by the safety checker; 1 is certainly"),
)
_WORST = (
    ("clip_score", False, "Least like their captions", "The lowest CLIPScore, one image of each caption."),
    (
        "twin_similarity",
        True,
        "Most like another image of their caption",
        "Outlined: the image that has a near double among the others.",
    ),
    ("partner_similarity", False, "Least like the real image", "The real image is the one that the caption describes."),
    ("copy_similarity", True, "Most like a real image", "Look whether these are copies of training images."),
    ("detail", False, "Least detail", "Blurred, flat or empty images."),
)

Row = Mapping[str, Any]


def generated_set(
    rows: Sequence[Row],
    *,
    rejected: Sequence[Row],
    summary: Mapping[str, Any],
    image_bytes: Callable[[Row], bytes],
    real_bytes: Callable[[str], bytes | None],
    provenance: Sequence[tuple[str, str]],
) -> GeneratedReport:
    """What the page shows of a set with scores. The images shown are chosen by rule, never by hand.

    Args:
        rows: Records of the images kept, with their scores.
        rejected: Records of those left out, with the ``reason``.
        summary: Of the artifact.
        image_bytes: Encoded bytes of the image of a record.
        real_bytes: Encoded bytes of the real image with an id; None where it is not at hand.
        provenance: (name, value) of what made the set.
    """
    middle = summary["clip_score"]["p50"]
    return GeneratedReport(
        headline=f"{len(rows):,} images of {summary['captions']:,} captions; half have a CLIPScore above {middle:.3f}",
        facts=tuple(_facts(rows, rejected, summary)),
        histograms=tuple(
            Histogram(title, note, _values(rows, name), _values(rejected, name))
            for name, title, note in _SPREADS
            if len(_values(rows, name))
        ),
        worst=tuple(
            (heading, lead, shown)
            for name, highest, heading, lead in _WORST
            if (shown := tuple(_worst(rows, rejected, name, highest, image_bytes=image_bytes, real_bytes=real_bytes)))
        ),
        provenance=tuple(provenance),
    )


def _facts(rows: Sequence[Row], rejected: Sequence[Row], summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Counts, of rejected and redrawn images among them."""
    yield "kept", f"{len(rows):,} images"
    reasons: dict[str, int] = {}
    for row in rejected:
        reasons[row["reason"]] = reasons.get(row["reason"], 0) + 1
    named = "".join(f"; {count:,} {reason}" for reason, count in sorted(reasons.items()))
    yield "left out", f"{len(rejected):,} images{named}"
    if summary.get("captions_without_image"):
        yield "captions", f"{summary['captions_without_image']:,} are left without an image"
    yield "drawn again", f"{summary['redrawn']:,} images, whose first attempts were blank or not a number"
    cut = sum(row["truncated"] for row in rows)
    share = f"{cut:,} images ({100 * cut / len(rows):.1f} %)"
    yield "cut captions", f"{share}, of captions longer than the text encoder reads"
    made: dict[str, int] = {}
    for row in rows:
        made[row["generator"]] = made.get(row["generator"], 0) + 1
    yield "generators", ", ".join(f"{name} ({count:,})" for name, count in sorted(made.items()))
    sizes = {(row["width"], row["height"]) for row in rows}
    least, most = min(sizes), max(sizes)
    yield "size", f"{least[0]} x {least[1]}" + (f" to {most[0]} x {most[1]}" if len(sizes) > 1 else "") + " pixels"


def _values(rows: Sequence[Row], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows if row.get(name) is not None], dtype=np.float64)


def _worst(
    rows: Sequence[Row],
    rejected: Sequence[Row],
    name: str,
    highest: bool,
    *,
    image_bytes: Callable[[Row], bytes],
    real_bytes: Callable[[str], bytes | None],
) -> Iterator[PictureRow]:
    """The images at the bad end of a score, one of each caption."""
    known = [row for row in rows if row[name] is not None]
    order = sorted(range(len(known)), key=lambda place: known[place][name], reverse=highest)
    chosen: dict[tuple[str, str], Row] = {}
    for place in order:
        if len(chosen) == SHOWN:
            break
        row = known[place]
        chosen.setdefault((row["caption_id"], row["caption"]), row)
    for caption, row in chosen.items():
        beside = [row]
        if name == "twin_similarity":
            every = [*rows, *rejected]
            beside += [each for each in every if (each["caption_id"], each["caption"]) == caption and each is not row]
        pictures = [
            Picture(
                thumbnail(image_bytes(each), side=SIDE, name=each["key"]),
                f"k = {each['k']}",
                marked=each is row and len(beside) > 1,
            )
            for each in beside[:TWINS]
        ]
        owner = row["copy_of"] if name == "copy_similarity" else row["owner"]
        data = real_bytes(owner) if owner is not None else None
        if data is not None:
            pictures.append(Picture(thumbnail(data, side=SIDE, name=owner), f"real, {owner}"))
        shown = f"{name} {row[name]:.3f}; image {row['key']} by {row['generator']}"
        yield PictureRow(row["caption"], tuple(pictures), "; ".join([shown, *_prompts(beside[:TWINS])]))


def _prompts(rows: Sequence[Row]) -> Iterator[str]:
    """What a language model made of the caption of these images, where it is not the caption."""
    drawn: dict[str, list[str]] = {}
    for row in rows:
        if row.get("rewritten") not in (None, row["caption"]):
            drawn.setdefault(row["rewritten"], []).append(str(row["k"]))
    for prompt, which in drawn.items():
        yield f"drawn from: {prompt}" if len(rows) == 1 else f"k = {', '.join(which)} drawn from: {prompt}"
