"""The page on a set of generated images: what it counts and shows, hostile strings, one file that needs nothing."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_report import HOSTILE, Page

from gmail_cli.components import quality, report
from gmail_cli.errors import InputError


def photo(seed: int, size: int = 512) -> bytes:
    """An image that compresses badly."""
    values = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "JPEG")
    return stream.getvalue()


NOISE = [photo(seed) for seed in range(4)]


def records(captions: int = 30, per_caption: int = 4, text: str = "a cat") -> list[dict[str, Any]]:
    """Images whose every score falls from the first to the last, but likeness, which rises."""
    count = captions * per_caption
    return [
        {
            "key": f"{row}",
            "caption_id": f"c{row // per_caption}",
            "caption": f"{text} {row // per_caption}",
            "owner": f"o{row // per_caption}",
            "k": row % per_caption,
            "attempt": int(row == 3),
            "truncated": row < 6,
            "generator": f"{text} {row % 2}",
            "width": 512,
            "height": 512,
            **dict.fromkeys(quality.COLUMNS, 1 - row / count),
            "twin_similarity": row / count,
            "copy_similarity": row / count,
            "copy_of": f"o{row // per_caption}",
        }
        for row in range(count)
    ]


def page(rows: list[dict[str, Any]], *, rejected: list[dict[str, Any]] | None = None, real: bool = True) -> str:
    summary = {"clip_score": {"p50": 0.5}, "captions": 30, "redrawn": 1, "captions_without_image": 2}
    return report.generated_page(
        report.generated_set(
            rows,
            rejected=rejected or [],
            summary=summary,
            image_bytes=lambda row: NOISE[row["k"]],
            real_bytes=lambda owner: NOISE[0] if real else None,
            provenance=[(HOSTILE, HOSTILE)],
        )
    )


def test_the_page_needs_nothing_and_shows_hostile_texts_as_they_are() -> None:
    rows = records(text=HOSTILE)
    html = page(rows, rejected=[row | {"reason": HOSTILE} for row in records(2, text=HOSTILE)])
    parsed = Page(html)
    assert "script" not in parsed.tags
    assert HOSTILE in parsed.text
    assert not [value for name, value in parsed.attributes if name in ("src", "href") and not value.startswith("data:")]
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    assert "default-src 'none'" in html
    assert "prefers-color-scheme: dark" in html
    assert len(html.encode()) < 3e6


def test_what_is_left_out_redrawn_and_cut_is_counted() -> None:
    rejected = [row | {"reason": "clip_score below 0.1"} for row in records(2)]
    text = " ".join(Page(page(records(), rejected=rejected)).text.split())
    assert "120 images of 30 captions; half have a CLIPScore above 0.500" in text
    assert "left out 8 images; 8 clip_score below 0.1" in text
    assert "2 are left without an image" in text
    assert "drawn again 1 images" in text
    assert "cut captions 6 images (5.0 %)" in text
    assert "a cat 0 (60), a cat 1 (60)" in text


def test_the_images_at_the_bad_end_of_each_score_are_shown_one_of_each_caption() -> None:
    shown = report.generated_set(
        records(),
        rejected=[],
        summary={"clip_score": {"p50": 0.5}, "captions": 30, "redrawn": 0},
        image_bytes=lambda row: NOISE[0],
        real_bytes=lambda owner: None,
        provenance=(),
    )
    notes = {heading: [row.note.split(";")[0] for row in rows] for heading, _, rows in shown.worst}
    last = [f"{1 - row / 120:.3f}" for row in (119, 115, 111, 107, 103, 99)]
    assert notes["Least like their captions"] == [f"clip_score {value}" for value in last]
    assert notes["Most like a real image"] == [f"copy_similarity {1 - float(value):.3f}" for value in last]
    doubles = next(rows for heading, _, rows in shown.worst if heading.startswith("Most like another"))
    assert [len(row.pictures) for row in doubles] == [4] * 6
    assert [[each.marked for each in row.pictures] for row in doubles] == [[True, False, False, False]] * 6


def test_prompts_that_a_language_model_wrote_stand_beside_the_caption() -> None:
    written = ["a cat 0", None, f"one {HOSTILE}", f"one {HOSTILE}"]
    rows = [row | {"rewritten": text} for row, text in zip(records(1), written, strict=True)]
    html = page(rows)
    text = " ".join(Page(html).text.split())
    assert f"twin_similarity 0.750; image 3 by a cat 1; k = 3, 2 drawn from: one {HOSTILE}" in text
    assert f"clip_score 0.250; image 3 by a cat 1; drawn from: one {HOSTILE}" in text
    assert "drawn from: a cat 0" not in text
    assert "drawn from" not in page(records(1))
    assert "script" not in Page(html).tags


def test_scores_that_no_image_has_are_left_out() -> None:
    without = {"twin_similarity": None, "partner_similarity": None, "copy_similarity": None, "copy_of": None}
    html = page([row | without for row in records()], real=False)
    assert html.count("<svg") == 3  # CLIPScore, contrast, detail
    assert "Most like a real image" not in html


def test_contrast_and_detail_tell_flat_blurred_and_noisy_images() -> None:
    def measured(values: np.ndarray) -> dict[str, float]:
        stream = io.BytesIO()
        Image.fromarray(values.astype(np.uint8)).save(stream, "PNG")
        return quality.sanity(stream.getvalue())

    flat = np.full((8, 8, 3), 90)
    halves = np.repeat(np.repeat([[0, 255]], 4, axis=1)[:, :, None], 3, axis=2).repeat(8, axis=0)
    stripes = np.tile(np.array([0, 255])[None, :, None], (8, 4, 3))
    assert measured(flat) == {"contrast": 0.0, "detail": 0.0}
    assert measured(halves) == {"contrast": 0.5, "detail": pytest.approx(1 / 14, abs=1e-6)}  # one of seven steps across
    assert measured(stripes) == {"contrast": 0.5, "detail": 0.5}
    assert measured(flat[:1, :1]) == {"contrast": 0.0, "detail": 0.0}
    with pytest.raises(InputError, match="cannot decode this one"):
        quality.sanity(b"nothing", name="this one")
