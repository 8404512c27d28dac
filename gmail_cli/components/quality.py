"""How good generated images are, as columns: by their caption, one another, real images, their pixels; and which to
keep."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from gmail_cli.components import search
from gmail_cli.components.embedding import embed_images, embed_texts
from gmail_cli.components.encoders import Clip
from gmail_cli.components.images import decode
from gmail_cli.components.metrics.clipscore import clip_score
from gmail_cli.errors import InputError

CHUNK = 2048
"""Images that are scored at a time, up to the last of a caption."""
COLUMNS = ("clip_score", "twin_similarity", "partner_similarity", "copy_similarity", "contrast", "detail")
"""The numbers among the scores of an image; ``copy_of`` says what ``copy_similarity`` is to."""

Row = dict[str, Any]


@dataclass(frozen=True)
class RealImages:
    """The real images that generated ones are held against.

    Attributes:
        ids: Of each.
        vectors: Unit embeddings by f_r, in that order.
        partners: For every generated image the row of the one that its caption describes.
    """

    ids: Sequence[str]
    vectors: Float[np.ndarray, "real dim"]
    partners: Sequence[int]


def chunks(captions: Sequence[str], *, size: int = CHUNK) -> list[range]:
    """Rows in parts of about ``size`` that do not divide the images of one caption: equal neighbours."""
    parts: list[range] = []
    start = 0
    for row in range(1, len(captions) + 1):
        if row == len(captions) or (row - start >= size and captions[row] != captions[row - 1]):
            parts.append(range(start, row))
            start = row
    return parts


def score(
    clip: Clip,
    rows: range,
    *,
    image_bytes: Callable[[int], bytes],
    captions: Sequence[str],
    real: RealImages | None = None,
    workers: int = 2,
) -> list[Row]:
    """Scores of some images by a frozen CLIP, and of their pixels.

    ``clip_score``: 2.5 max(cos, 0) of image and caption (Hessel et al. 2021). ``twin_similarity``: the highest cosine
    with another image of the same caption, None for an only one; near 1 the generator repeats itself.
    ``partner_similarity``: cosine with the real image that the caption describes. ``copy_similarity`` and ``copy_of``:
    cosine with the most alike of all real images, and its id; near 1 the generator may have copied it. All three are
    None without real images. ``contrast`` and ``detail``: see :func:`sanity`.

    Args:
        clip: The frozen CLIP, f_r and its text tower.
        rows: Which images: all of each caption.
        image_bytes: Encoded bytes of image i.
        captions: Of every image; equal neighbours are one caption.
        real: The real images, where they are at hand.
        workers: Threads that decode.
    """
    images = embed_images(clip, lambda row: image_bytes(rows[row]), len(rows), workers=workers)
    own = [captions[row] for row in rows]
    texts = list(dict.fromkeys(own))
    places = {text: place for place, text in enumerate(texts)}
    embedded, _ = embed_texts(clip, texts)
    scores = clip_score(images, captions=embedded[[places[text] for text in own]])
    likeness: list[Row] = [{"partner_similarity": None, "copy_similarity": None, "copy_of": None}] * len(rows)
    if real is not None:
        nearest = search.exact(real.vectors, images, k=1).ids[:, 0]
        likeness = [
            {
                "partner_similarity": _cosine(image, real.vectors[real.partners[row]]),
                "copy_similarity": _cosine(image, real.vectors[near]),
                "copy_of": real.ids[near],
            }
            for row, image, near in zip(rows, images, nearest.tolist(), strict=True)
        ]
    with ThreadPoolExecutor(max(1, workers)) as pool:
        pixels = list(pool.map(lambda row: sanity(image_bytes(row), name=f"image {row}"), rows))
    groups: dict[str, list[int]] = defaultdict(list)
    for place, text in enumerate(own):
        groups[text].append(place)
    twins: list[float | None] = [None] * len(rows)
    for group in groups.values():
        if len(group) > 1:
            apart = images[group] @ images[group].T
            np.fill_diagonal(apart, -np.inf)
            for place, value in zip(group, apart.max(axis=1), strict=True):
                twins[place] = _rounded(value)
    return [
        {"clip_score": _rounded(value), "twin_similarity": twin, **like, **pixel}
        for value, twin, like, pixel in zip(scores, twins, likeness, pixels, strict=True)
    ]


def sanity(data: bytes, *, name: str = "image") -> Row:
    """What the pixels of an encoded image say without any model, in shares of the range from black to white.

    ``contrast``: standard deviation of the brightness, 0 for one colour. ``detail``: mean absolute step between
    neighbouring pixels, low where an image is blurred or empty, about 0.3 for noise.

    Raises:
        InputError: The bytes are no image.
    """
    grey = np.asarray(decode(data, name=name).convert("L"), dtype=np.float32) / 255
    steps = [np.abs(np.diff(grey, axis=axis)).mean() for axis in (0, 1) if grey.shape[axis] > 1]
    return {"contrast": _rounded(grey.std()), "detail": _rounded(np.mean(steps)) if steps else 0.0}


def choose(rows: Sequence[Mapping[str, Any]], *, minimum: float, best: int, most_unsafe: float = 1.0) -> list[str]:
    """Why each image is rejected; an empty text keeps it.

    Args:
        rows: ``caption_id``, ``caption``, ``k``, ``clip_score`` of each; where it was checked, ``unsafe``.
        minimum: Least CLIPScore.
        best: Images of each caption to keep, those of the highest scores, of equals the first; 0 for all.
        most_unsafe: Highest value of ``unsafe``.

    Raises:
        InputError: None is kept.
    """
    reasons = ["" if row["clip_score"] >= minimum else f"clip_score below {minimum:g}" for row in rows]
    for place, row in enumerate(rows):
        if row.get("unsafe", 0) > most_unsafe:
            reasons[place] = f"unsafe above {most_unsafe:g}"
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        if not reasons[place]:
            groups[row["caption_id"], row["caption"]].append(place)
    for group in groups.values() if best else ():
        for place in sorted(group, key=lambda place: (-rows[place]["clip_score"], rows[place]["k"]))[best:]:
            reasons[place] = f"not among the {best} best of its caption"
    if all(reasons):
        safe = [row for row in rows if row.get("unsafe", 0) <= most_unsafe]
        if not safe:
            least = min(row["unsafe"] for row in rows)
            raise InputError(
                f"all {len(rows)} images are more unsafe than {most_unsafe:g}; the lowest value is {least:.4g}",
                hint="Raise generate.max_unsafe, or look at the images and at generate.unsafe_label.",
            )
        highest = max(row["clip_score"] for row in safe)
        raise InputError(
            f"no image has a clip_score of {minimum:g} or more; the highest of {len(safe)} is {highest:.4g}",
            hint="Lower generate.min_clip_score.",
        )
    return reasons


def summarise(values: Sequence[float]) -> dict[str, float]:
    """Mean and 5th, 50th and 95th percentile."""
    low, middle, high = np.percentile(values, [5, 50, 95])
    return {
        "mean": _rounded(math.fsum(values) / len(values)),
        "p5": _rounded(low),
        "p50": _rounded(middle),
        "p95": _rounded(high),
    }


def _cosine(left: Float[np.ndarray, " dim"], right: Float[np.ndarray, " dim"]) -> float:
    return _rounded((left.astype(np.float64) * right).sum())


def _rounded(value: Any) -> float:
    """To six decimals: what the machine's arithmetic leaves over is not written down."""
    return round(float(value), 6)
