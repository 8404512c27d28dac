"""Which captions a model is trained on, and which images show each of them.

All arms of an experiment train on the same captions, drawn in the same order; only the image a caption is seen with
differs. A caption may have several images (k generated ones, or all photographs of its class): one is drawn each
time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from gmail_cli.components.captions import Caption, Dataset, Kind
from gmail_cli.components.images import GeneratedImage
from gmail_cli.errors import InputError


@dataclass(frozen=True, eq=False)
class Candidates:
    """For each caption the images that show it.

    Attributes:
        group: For each caption its group; the captions of a group share their images.
        offsets: Group g's images are ``members[offsets[g] : offsets[g + 1]]``, at least one.
        members: Rows of images.
    """

    group: Int64[Tensor, " captions"]
    offsets: Int64[Tensor, " groups1"]
    members: Int64[Tensor, " listed"]

    @classmethod
    def of(cls, choices: Iterable[Sequence[int]]) -> Candidates:
        """From the image rows of each caption; equal lists (by identity) are stored once."""
        groups: dict[int, int] = {}
        lists: list[Sequence[int]] = []
        group = []
        for rows in choices:
            if id(rows) not in groups:
                groups[id(rows)] = len(lists)
                lists.append(rows)  # kept alive, so that the identity stays its own
            group.append(groups[id(rows)])
        offsets = np.concatenate([[0], np.cumsum([len(rows) for rows in lists])])
        members = np.fromiter((row for rows in lists for row in rows), dtype=np.int64, count=int(offsets[-1]))
        return cls(torch.tensor(group), torch.from_numpy(offsets.astype(np.int64)), torch.from_numpy(members))

    def draw(
        self, captions: Int64[Tensor, " batch"], *, generator: torch.Generator | None = None
    ) -> Int64[Tensor, " batch"]:
        """An image row for each caption, drawn evenly from its images."""
        group = self.group[captions]
        start, count = self.offsets[group], self.offsets[group + 1] - self.offsets[group]
        chosen = (torch.rand(len(captions), generator=generator, dtype=torch.float64) * count).long()
        return self.members[start + chosen]

    def used(self) -> tuple[Int64[np.ndarray, " images"], Candidates]:
        """The rows of all images listed, ascending, and the same candidates counted among those."""
        rows, members = torch.unique(self.members, return_inverse=True)
        return rows.numpy(), Candidates(self.group, self.offsets, members)


@dataclass(frozen=True, eq=False)
class Pairs:
    """The captions to train on, with their images.

    Attributes:
        texts: The captions.
        records: Id of each caption's image record.
        owners: Number of each caption's image record; captions with equal numbers are siblings.
        text_ids: Equal where texts are equal.
        labels: Class of each caption's image, a row of ``class_names``; -1 where unknown.
        class_names: Names of the classes.
        real: Rows of real images; None when some caption has none.
        generated: Rows of generated images; None without generated images.
    """

    texts: tuple[str, ...]
    records: tuple[str, ...]
    owners: Int64[Tensor, " captions"]
    text_ids: Int64[Tensor, " captions"]
    labels: Int64[Tensor, " captions"]
    class_names: tuple[str, ...]
    real: Candidates | None
    generated: Candidates | None

    def __len__(self) -> int:
        """Number of captions."""
        return len(self.texts)

    def same_text(self, rows: Int64[Tensor, " batch"]) -> Bool[Tensor, "batch batch"]:
        """Which captions of a batch read the same: each fits the other's image, a positive pair."""
        ids = self.text_ids[rows]
        return ids[:, None] == ids[None, :]

    def siblings(self, rows: Int64[Tensor, " batch"]) -> Bool[Tensor, "batch batch"]:
        """Which captions of a batch belong to one image and read differently: no negatives for each other."""
        owners = self.owners[rows]
        return (owners[:, None] == owners[None, :]) & ~self.same_text(rows)


def pair(
    dataset: Dataset, *, generated: Sequence[GeneratedImage] | None = None, kinds: Sequence[Kind] = ("short",)
) -> Pairs:
    """Collect the captions to train on.

    With generated images these are the captions that were drawn from; of a kind that nothing was drawn from, the
    captions whose owner has a generated image. Without, all captions of ``dataset``. A caption's real image is its
    owner's, or, where the owner has none (class captions of another source), any whose caption reads the same.

    Args:
        dataset: The real images and their captions.
        generated: Records of generated images, in order.
        kinds: Kinds of captions to use.

    Raises:
        InputError: No caption is left.
    """
    captions, by_caption, by_owner = _captions(dataset, generated, kinds)
    if not captions:
        raise InputError(
            f"{dataset.name} has no {' or '.join(kinds)} caption to train on", hint="Set train.kinds to others."
        )
    text_numbers = _numbers(caption.text for caption in captions)
    labels = {image.id: image.label for image in dataset.images} | {
        record.owner: record.label for record in generated or () if record.label is not None
    }
    names = tuple(dataset.class_names or sorted({label for label in labels.values() if label is not None}))
    number = {name: row for row, name in enumerate(names)}
    return Pairs(
        texts=tuple(caption.text for caption in captions),
        records=tuple(caption.owner for caption in captions),
        owners=torch.tensor(_numbers(caption.owner for caption in captions)),
        text_ids=torch.tensor(text_numbers),
        labels=torch.tensor([number.get(labels.get(caption.owner) or "", -1) for caption in captions]),
        class_names=names,
        real=_real(dataset, captions),
        generated=None
        if generated is None
        else Candidates.of(by_caption.get(caption.id) or by_owner[caption.owner] for caption in captions),
    )


def _captions(
    dataset: Dataset, generated: Sequence[GeneratedImage] | None, kinds: Sequence[Kind]
) -> tuple[list[Caption], dict[str, list[int]], dict[str, list[int]]]:
    """The captions, and the rows of generated images by caption and by owner."""
    chosen = [caption for caption in dataset.captions if caption.kind in kinds]
    by_caption: dict[str, list[int]] = {}
    by_owner: dict[str, list[int]] = {}
    if generated is None:
        return chosen, by_caption, by_owner
    kind_of = {caption.id: caption.kind for caption in dataset.captions}
    drawn: dict[str, Caption] = {}
    for row, record in enumerate(generated):
        by_caption.setdefault(record.caption_id, []).append(row)
        by_owner.setdefault(record.owner, []).append(row)
        kind = kind_of.get(record.caption_id, "short")
        if kind in kinds and record.caption:
            drawn[record.caption_id] = Caption(record.caption_id, record.caption, record.owner, kind)
    covered = {caption.kind for caption in drawn.values()}
    others = [caption for caption in chosen if caption.kind not in covered and caption.owner in by_owner]
    return [*drawn.values(), *others], by_caption, by_owner


def _real(dataset: Dataset, captions: Sequence[Caption]) -> Candidates | None:
    if not dataset.has_images:
        return None
    of_owner = {image.id: [row] for row, image in enumerate(dataset.images)}
    of_text: dict[str, list[int]] = {}
    if any(caption.owner not in of_owner for caption in captions):
        for caption in dataset.captions:
            of_text.setdefault(caption.text, []).extend(of_owner[caption.owner])
    choices = [of_owner.get(caption.owner) or of_text.get(caption.text) for caption in captions]
    if any(choice is None for choice in choices):
        return None
    return Candidates.of(choice for choice in choices if choice is not None)


def _numbers(values: Iterable[str]) -> list[int]:
    """The values' numbers in the order of their first appearance."""
    seen: dict[str, int] = {}
    return [seen.setdefault(value, len(seen)) for value in values]
