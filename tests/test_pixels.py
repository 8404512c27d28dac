"""Pixels of a training set: equal to preprocessing each image, whether held or decoded again."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from gmail_cli.components.images import Preprocess
from gmail_cli.components.pixels import Pixels
from gmail_cli.errors import InputError


def _encoded(row: int) -> bytes:
    noise = np.random.default_rng(row).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("in_memory", [2**20, 0])
@pytest.mark.parametrize("ahead", [[5, 1, 1], [2, 3]])
def test_rows_equal_preprocessing_them(in_memory: int, ahead: list[int]):
    preprocess = Preprocess(16, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
    pixels = Pixels(_encoded, 6, preprocess=preprocess, device=torch.device("cpu"), in_memory=in_memory)
    pixels.prefetch(np.array(ahead))
    wanted = np.stack([preprocess(_encoded(row)) for row in (5, 1, 1)])
    for _ in range(2):
        np.testing.assert_array_equal(pixels[np.array([5, 1, 1])].numpy(), wanted)


def test_held_images_are_decoded_once():
    asked: list[int] = []

    def image_bytes(row: int) -> bytes:
        asked.append(row)
        return _encoded(row)

    pixels = Pixels(image_bytes, 4, preprocess=Preprocess(16), device=torch.device("cpu"))
    for _ in range(3):
        pixels.prefetch(np.array([3, 2]))
        pixels[np.array([0, 1, 2, 3])]
    assert sorted(asked) == [0, 1, 2, 3]


def test_a_damaged_image_is_named():
    with pytest.raises(InputError, match="image 0"):
        Pixels(lambda _row: b"not an image", 1, preprocess=Preprocess(16), device=torch.device("cpu"))
