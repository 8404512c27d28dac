"""Embedding sets of images and texts with a CLIP: decoding ahead, like lengths together, shard after shard."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Float16, Int
from torch import Tensor

from gmail_cli.components.encoders import Clip, Tokens
from gmail_cli.components.images import batches

Progress: TypeAlias = Callable[[int, int], None]


def embed_images(
    clip: Clip,
    image_bytes: Callable[[int], bytes],
    count: int,
    *,
    batch_size: int = 256,
    workers: int = 2,
    progress: Progress | None = None,
) -> Float[np.ndarray, "count dim"]:
    """Unit fp32 embeddings of ``count`` stored images, in order; see :func:`image_shards`."""
    parts = image_shards(clip, image_bytes, [range(count)], batch_size=batch_size, workers=workers, progress=progress)
    return next(parts)


def patch_tokens(
    clip: Clip,
    image_bytes: Callable[[int], bytes],
    count: int,
    *,
    grid: int = 0,
    batch_size: int = 64,
    workers: int = 2,
) -> Float16[np.ndarray, "count tokens width"]:
    """Patch tokens of ``count`` stored images, in order, at half precision; see ``Clip.encode_patches``."""
    read = batches(image_bytes, [range(count)], preprocess=clip.preprocess, batch_size=batch_size, workers=workers)
    return np.concatenate([clip.encode_patches(pixels, grid=grid).half().cpu().numpy() for pixels in read])


def image_shards(
    clip: Clip,
    image_bytes: Callable[[int], bytes],
    shards: Sequence[range],
    *,
    batch_size: int = 256,
    workers: int = 2,
    progress: Progress | None = None,
) -> Iterator[Float[np.ndarray, "rows dim"]]:
    """Unit fp32 embeddings of stored images, one array for each of ``shards``, whatever shards go before it.

    Images are decoded in threads while the model computes; memory is that of a shard's vectors and a few batches of
    pixels. A GPU is given the next shard before the last one is waited for.

    Args:
        clip: Which encoder.
        image_bytes: Encoded bytes (JPEG, PNG, ...) of image ``i``; called from several threads.
        shards: Numbers of the images of each.
        batch_size: Images per forward pass.
        workers: Threads that decode ahead.
        progress: Called with (done, images in all).

    Raises:
        InputError: An image cannot be decoded.
    """
    read = batches(image_bytes, shards, preprocess=clip.preprocess, batch_size=batch_size, workers=workers)
    total, done = sum(map(len, shards)), 0

    def encode(shard: range) -> _Download:
        nonlocal done
        features: list[Tensor] = []
        left = len(shard)
        while left:
            features.append(clip.encode_pixels(next(read)))
            left -= len(features[-1])
            done += len(features[-1])
            if progress:
                progress(done, total)
        return _Download(features, dim=clip.dim)

    with contextlib.closing(read):
        encoded = (encode(shard) for shard in shards)
        for download in _one_behind(encoded) if clip.device.type == "cuda" else encoded:
            yield download.array()


def embed_texts(
    clip: Clip, texts: Sequence[str], *, batch_size: int = 256, progress: Progress | None = None
) -> tuple[Float[np.ndarray, "count dim"], Bool[np.ndarray, " count"]]:
    """Unit fp32 embeddings of texts, in order, and which of them were truncated; see :func:`text_shards`."""
    parts = text_shards(clip, texts.__getitem__, [range(len(texts))], batch_size=batch_size, progress=progress)
    return next(parts)


def text_shards(
    clip: Clip,
    text: Callable[[int], str],
    shards: Sequence[range],
    *,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> Iterator[tuple[Float[np.ndarray, "rows dim"], Bool[np.ndarray, " rows"]]]:
    """Unit fp32 embeddings of texts, in order, and which of them were truncated, for each of ``shards``.

    Texts of like length share a batch, so short captions do not pay for the padding of long ones. The next shard is
    tokenized while the model computes.

    Args:
        clip: Which encoder.
        text: Text ``i``.
        shards: Numbers of the texts of each.
        batch_size: Texts per forward pass.
        progress: Called with (done, texts in all).
    """
    total, done = sum(map(len, shards)), 0

    def tokenize(shard: range) -> Tokens:
        if not shard:
            return Tokens(torch.zeros((0, 1), dtype=torch.long), torch.zeros(0, dtype=torch.bool))
        return clip.tokenize([text(row) for row in shard])

    def encode(tokens: Tokens) -> tuple[_Download, Bool[np.ndarray, " rows"]]:
        nonlocal done
        order = torch.argsort(clip.lengths(tokens.ids), stable=True) if len(tokens.ids) else torch.arange(0)
        features = []
        for rows in order.split(batch_size) if len(order) else ():
            features.append(clip.encode_tokens(tokens.ids[rows]))
            done += len(rows)
            if progress:
                progress(done, total)
        return _Download(features, dim=clip.dim, order=order.numpy()), tokens.truncated.numpy()

    with ThreadPoolExecutor(1) as pool:
        tokenized = _one_behind(pool.submit(tokenize, shard) for shard in shards)
        encoded = (encode(tokens.result()) for tokens in tokenized)
        for download, truncated in _one_behind(encoded) if clip.device.type == "cuda" else encoded:
            yield download.array(), truncated


class _Download:
    """Features on their way to the CPU; from a GPU the copy is only asked for, and waited for when it is read."""

    def __init__(
        self, features: Sequence[Float[Tensor, "batch dim"]], *, dim: int, order: Int[np.ndarray, " rows"] | None = None
    ) -> None:
        whole = torch.cat(list(features)) if features else torch.zeros((0, dim))
        self._order = order
        self._copied: torch.cuda.Event | None = None
        self._host = whole
        if whole.device.type == "cuda":
            self._host = torch.empty(whole.shape, dtype=whole.dtype, pin_memory=True)
            self._host.copy_(whole, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def array(self) -> Float[np.ndarray, "rows dim"]:
        """The features, in the order of the rows they belong to."""
        if self._copied is not None:
            self._copied.synchronize()
        values = self._host.cpu().numpy()
        if self._order is None:
            return values
        sorted_back = np.empty_like(values)
        sorted_back[self._order] = values
        return sorted_back


_Item = TypeVar("_Item")


def _one_behind(items: Iterable[_Item]) -> Iterator[_Item]:
    """The items, each handed out only when the next one has been made."""
    source = iter(items)
    for item in source:
        for following in source:
            yield item
            item = following
        yield item
