"""Captions, images and the dataset that holds them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Int64

from gmail_cli.components.captions.sources import ImageSource
from gmail_cli.errors import InputError

Kind = Literal["short", "long"]
Attributes: TypeAlias = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Caption:
    """One caption and the image it describes.

    Attributes:
        id: Unique among the captions of a dataset.
        text: The caption without surrounding white space; never empty.
        owner: Id of its image. A caption without an image owns an id of its own.
        kind: ``short`` or ``long``.
    """

    id: str
    text: str
    owner: str
    kind: Kind = "short"


@dataclass(frozen=True, slots=True)
class Image:
    """One image: its id, unique in a dataset, and what else the data say of it.

    Attributes:
        id: Its id.
        label: Its class, where the data name one.
        attributes: Further labels, (name, value): what results are broken down by. No part of the fingerprint.
    """

    id: str
    label: str | None = None
    attributes: Attributes = ()


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images and their captions; the bytes of an image are read when asked for, from any thread.

    Attributes:
        name: What was read, for messages.
        images: In the order of the source.
        captions: Grouped by image, in the order of ``images``.
        class_names: The classes ``Image.label`` may name.
        class_texts: What prompts call them, in the same order, where labels are no words.
        sources: For each image where its bytes lie; None for an image known by its captions only.
        skipped: One message for each bad record that was left out.
    """

    name: str
    images: tuple[Image, ...]
    captions: tuple[Caption, ...]
    class_names: tuple[str, ...]
    sources: tuple[ImageSource | None, ...] = field(repr=False)
    skipped: tuple[str, ...] = ()
    class_texts: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    @property
    def has_images(self) -> bool:
        """Whether every image has bytes."""
        return bool(self.sources) and None not in self.sources

    def image_bytes(self, i: int) -> bytes:
        """Return the encoded bytes of image ``i`` as stored.

        Raises:
            InputError: There are no bytes for this image, or they cannot be read.
        """
        source = self.sources[i]
        if source is None:
            raise InputError(
                f"{self.name} carries no image for {self.images[i].id!r}",
                hint="Name the folder that holds the image files.",
            )
        return source.read()

    @cached_property
    def _captions_by_owner(self) -> dict[str, list[Caption]]:
        groups: dict[str, list[Caption]] = {image.id: [] for image in self.images}
        for caption in self.captions:
            groups[caption.owner].append(caption)
        return groups

    def captions_of(self, owner: str) -> list[Caption]:
        """Return the captions of the image with id ``owner``; InputError for an id that is not here."""
        try:
            return list(self._captions_by_owner[owner])
        except KeyError:
            raise InputError(f"{self.name} has no image {owner!r}") from None

    def captions_of_kind(self, kind: Kind = "short") -> list[Caption]:
        """Return the captions of one kind, in order."""
        return [caption for caption in self.captions if caption.kind == kind]

    def owner_rows(self, kind: Kind = "short") -> Int64[np.ndarray, " captions"]:
        """For each of ``captions_of_kind(kind)``, the row of its image in ``images``."""
        rows = {image.id: row for row, image in enumerate(self.images)}
        return np.array([rows[caption.owner] for caption in self.captions_of_kind(kind)], dtype=np.int64)

    @cached_property
    def image_identities(self) -> tuple[str | None, ...]:
        """SHA-256 of each image's bytes (of its recipe for scenes); None where there are no bytes.

        Reads every image once, on the first use.
        """
        parts = [self.sources[start : start + 256] for start in range(0, len(self), 256)]
        with ThreadPoolExecutor(max_workers=4) as pool:
            return tuple(identity for part in pool.map(_identities, parts) for identity in part)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over ids, labels, captions, class names and image contents, in order.

        Reads every image once, on the first use; whatever the files are called, equal data are equal here.
        """
        digest = hashlib.sha256()
        for row in self._rows():
            digest.update(json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
        return digest.hexdigest()

    def _rows(self) -> Iterable[tuple[str | None, ...]]:
        yield ("classes", *self.class_names)
        if self.class_texts:
            yield ("class texts", *self.class_texts)
        for image, identity in zip(self.images, self.image_identities, strict=True):
            yield ("image", image.id, image.label, identity)
        for caption in self.captions:
            yield ("caption", caption.id, caption.text, caption.owner, caption.kind)


def _identities(sources: Iterable[ImageSource | None]) -> list[str | None]:
    return [None if source is None else source.identity() for source in sources]
