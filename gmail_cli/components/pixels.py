"""Preprocessed pixels of a training set, decoded once where memory allows."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from gmail_cli.components.images import Preprocess

IN_MEMORY = 4 * 2**30
"""Bytes of 8-bit pixels that are kept; a larger set is decoded again for every batch."""


class Pixels:
    """Random access to preprocessed images, held as the 8-bit values they were resized to."""

    def __init__(
        self,
        image_bytes: Callable[[int], bytes],
        count: int,
        *,
        preprocess: Preprocess,
        device: torch.device,
        workers: int = 2,
        in_memory: int = IN_MEMORY,
    ) -> None:
        self._image_bytes = image_bytes
        self._preprocess = preprocess
        self._device = device
        self._pool = ThreadPoolExecutor(max(1, workers))
        self._ahead: tuple[Int[np.ndarray, " batch"], list[Future[UInt8[np.ndarray, "3 size size"]]]] | None = None
        self._held: UInt8[np.ndarray, "count 3 size size"] | None = None
        shape = (count, 3, preprocess.size, preprocess.size)
        if np.prod(shape) <= in_memory:
            self._held = np.empty(shape, dtype=np.uint8)
            for row, image in enumerate(self._pool.map(self._decode, range(count))):
                self._held[row] = image

    def __getitem__(self, rows: Int[np.ndarray, " batch"]) -> Float[Tensor, "batch 3 size size"]:
        """What the image tower reads for these rows, on the device; equal to ``Preprocess`` on each."""
        if self._held is not None:
            values = self._held[rows]
        else:
            if self._ahead is None or not np.array_equal(self._ahead[0], rows):
                self.prefetch(rows)
            assert self._ahead is not None
            values = np.stack([future.result() for future in self._ahead[1]])
        return normalised(torch.from_numpy(values).to(self._device), preprocess=self._preprocess)

    def prefetch(self, rows: Int[np.ndarray, " batch"]) -> None:
        """Start decoding the rows that will be asked for next, where they are not held."""
        if self._held is None:
            self._ahead = rows, [self._pool.submit(self._decode, row) for row in rows.tolist()]

    def _decode(self, row: int) -> UInt8[np.ndarray, "3 size size"]:
        return self._preprocess.pixels(self._image_bytes(row), name=f"image {row}")


def normalised(
    pixels: UInt8[Tensor, "batch 3 size size"], *, preprocess: Preprocess
) -> Float[Tensor, "batch 3 size size"]:
    """The last step of ``Preprocess``, on the device where the pixels are; equal to it on a CPU."""
    mean, std = (
        torch.tensor(each, dtype=torch.float32)[:, None, None].to(pixels.device, non_blocking=True)
        for each in (preprocess.mean, preprocess.std)
    )
    return pixels.float().div_(255).sub_(mean).div_(std)
