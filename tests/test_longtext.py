"""Stretched positions, coarse images, short texts of long captions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_clips import VIT

from gmail_cli.components import clip_files, longtext
from gmail_cli.components.pairs import Candidates, Pairs
from gmail_cli.errors import InputError, UsageError


def test_stretching_by_four_is_long_clips():
    """77 to 248 keeping 20, written out as their paper describes it: quarter steps, the last slope going on."""
    had = torch.randn(77, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = list(had[:20])
    for place in range(20, 76):
        wanted += [torch.lerp(had[place], had[place + 1], quarter / 4) for quarter in range(4)]
    wanted += [had[76] + quarter / 4 * (had[76] - had[75]) for quarter in range(4)]
    found = longtext.stretch(had, length=248, keep=20)
    assert found.shape == (248, 5)
    torch.testing.assert_close(found, torch.stack(wanted))


@given(st.integers(33, 200), st.integers(1, 30))
def test_a_straight_line_stays_straight(length: int, keep: int):
    """Positions that lie on a line are stretched along it, whatever the factor."""
    had = torch.arange(32, dtype=torch.float64).unsqueeze(1)
    found = longtext.stretch(had, length=length, keep=keep).squeeze(1)
    assert found[:keep].tolist() == had[:keep].flatten().tolist()
    steps = np.diff(found[keep:].numpy())
    np.testing.assert_allclose(steps, (32 - keep) / (length - keep), rtol=1e-9)
    assert found[keep] == keep


def test_a_lengthened_tower_reads_more_and_says_the_same_of_short_texts():
    clip = clip_files.build_clip(VIT)
    longer = longtext.lengthened(clip, length=100, keep=12)
    assert (clip.context_length, longer.context_length) == (32, 100)
    assert longer.digest != clip.digest
    short = ["a cat", "a photo of a red bus"]
    torch.testing.assert_close(longer.encode_texts(short), clip.encode_texts(short))
    long = "x " * 60 + "end"
    assert clip.tokenize([long]).truncated.all()
    assert not longer.tokenize([long]).truncated.any()
    assert not torch.allclose(longer.encode_texts([long]), longer.encode_texts(["x " * 60 + "cat"]))
    with pytest.raises(UsageError, match=r"context_length = 32 .* reads 32 tokens"):
        longtext.lengthened(clip, length=32, keep=12)
    with pytest.raises(UsageError, match="keep_positions = 31"):
        longtext.lengthened(clip, length=100, keep=31)


def test_coarse_images_lose_the_smallest_directions():
    """Against the covariance's eigenvectors; all components leave the images as they are."""
    images = torch.nn.functional.normalize(torch.randn(40, 8, generator=torch.Generator().manual_seed(1)), dim=1)
    mean = images.mean(0)
    _, axes = torch.linalg.eigh((images - mean).T @ (images - mean))
    first = axes[:, -3:]
    wanted = torch.nn.functional.normalize(mean + (images - mean) @ first @ first.T, dim=1)
    torch.testing.assert_close(longtext.coarse(images, components=3), wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(longtext.coarse(images, components=8), images, atol=1e-5, rtol=0)
    assert torch.linalg.matrix_rank(longtext.coarse(images, components=3), atol=1e-4) == 4


def _pairs(texts: tuple[str, ...], records: tuple[str, ...]) -> Pairs:
    rows = Candidates.of([[row] for row in range(len(texts))])
    return Pairs(
        texts=texts,
        records=records,
        owners=torch.arange(len(texts)),
        text_ids=torch.arange(len(texts)),
        labels=torch.full((len(texts),), -1),
        class_names=(),
        real=rows,
        generated=None,
    )


def test_short_texts():
    pairs = _pairs(("A dog. It runs!  Fast, at 3.5 m/s.", "A cat?"), ("a", "b"))
    captions = {"a": ["a dog"], "b": ["a cat", "some cat"]}
    options = {"owners": pairs.records, "captions": captions}
    split = ("A dog.", "It runs!", "Fast, at 3.5 m/s.")
    assert longtext.short_texts(pairs, choice="captions", **options) == [("a dog",), ("a cat", "some cat")]
    assert longtext.short_texts(pairs, choice="sentences", **options) == [split, ("A cat?",)]
    assert longtext.short_texts(pairs, choice="both", **options)[0] == ("a dog", *split)
    with pytest.raises(InputError, match="'A cat\\?' has no short caption"):
        longtext.short_texts(pairs, owners=pairs.records, captions={"a": ["a dog"]}, choice="captions")


def test_every_short_text_of_a_row_is_drawn():
    shorts = longtext._Shorts(clip_files.build_clip(VIT), [("one", "two"), ("three",), ("two", "four", "one")])
    torch.manual_seed(0)
    drawn = torch.stack([shorts.draw(torch.tensor([0, 1, 2])) for _ in range(200)])
    assert [set(column.tolist()) for column in drawn.T] == [{0, 1}, {2}, {0, 1, 3}]
