"""Named, versioned protocols: how many images, which captions and folds, or how many classes and which accuracy.

The same CLIP B/16 reads an image-to-text R@1 of 82.2 or 44.1 on Flickr30k depending on the protocol, so a result names
one, and a name is given only to data that fit it. In retrieval a hit is any right answer among the first k, ties
count at their expectation, and captions stand as they are, without a prompt before them. In classification a class is
its prompts' mean of unit vectors, and the name says which accuracy the field quotes. A changed rule gets a new version.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from gmail_cli.components.captions import Dataset
from gmail_cli.components.captions.records import Kind
from gmail_cli.errors import InputError, UsageError


@dataclass(frozen=True, kw_only=True)
class _Named:
    """A name in ``data.protocol``, how many images it is of, where the rule comes from, and the rule's version."""

    name: str
    images: int
    about: str
    version: int = 1

    @property
    def label(self) -> str:
        """``name/version``, as it stands in every result row."""
        return f"{self.name}/{self.version}"


@dataclass(frozen=True, kw_only=True)
class Protocol(_Named):
    """What a protocol demands of a test set, and what it does with it.

    Attributes:
        name: As in ``data.protocol``.
        images: How many images there must be.
        captions: Captions of each image that are used: the first so many, and every image must have them.
        about: The set, and where the rule comes from.
        kind: Kind of captions.
        folds: Blocks of consecutive images that are searched each for itself; metrics are averaged over them.
        version: Of the rule.
    """

    captions: int
    kind: Kind = "short"
    folds: int = 1

    def apply(self, dataset: Dataset) -> Dataset:
        """The test set as the protocol uses it: its kind of captions, the first so many of each image.

        Raises:
            InputError: As :meth:`rows`.
        """
        captions = dataset.captions_of_kind(self.kind)
        owners = dataset.owner_rows(self.kind).tolist()
        kept = self.rows(owners, ids=[image.id for image in dataset.images], source=dataset.name)
        return replace(dataset, captions=tuple(captions[row] for row in kept))

    def rows(self, owners: Sequence[int], *, ids: Sequence[str], source: str) -> list[int]:
        """Which captions the protocol uses, in order.

        Args:
            owners: For each caption of its kind, the row of its image.
            ids: What each image is called, for messages.
            source: Where they come from, for messages.

        Raises:
            InputError: The data are not what the protocol demands; says what was found.
        """
        counts = Counter(owners)
        poor = [row for row in range(len(ids)) if counts[row] < self.captions]
        if len(ids) != self.images or poor:
            found = f"{len(ids):,} images"
            if poor:
                first = f"{counts[poor[0]]} for {ids[poor[0]]!r}"
                found += f", {len(poor):,} of them with fewer {self.kind} captions (first: {first})"
            raise InputError(
                f"protocol {self.label} is of {self.images:,} images with at least {self.captions} {self.kind} "
                f"caption{'s' * (self.captions > 1)} each; {source} has {found}",
                hint="Give the whole set, without a limit, or name no protocol for another set.",
            )
        used: Counter[int] = Counter()
        kept = []
        for row, owner in enumerate(owners):
            if used[owner] < self.captions:
                used[owner] += 1
                kept.append(row)
        return kept


@dataclass(frozen=True, kw_only=True)
class ClassProtocol(_Named):
    """What a protocol of zero-shot classification demands of a test set.

    Attributes:
        name: As in ``data.protocol``.
        images: How many images there must be, each with a label.
        classes: How many different labels.
        about: The set, and which split.
        metric: The accuracy that the field quotes: over all images, or the mean of that of each class.
        version: Of the rule.
    """

    classes: int
    metric: Literal["top_1_accuracy", "mean_per_class_accuracy"] = "top_1_accuracy"

    def apply(self, dataset: Dataset) -> Dataset:
        """The test set, which is the protocol's.

        Raises:
            InputError: It is not; says what was found.
        """
        labels = [image.label for image in dataset.images if image.label is not None]
        found = (len(dataset.images), len(labels), len(set(labels)))
        if found != (self.images, self.images, self.classes):
            raise InputError(
                f"protocol {self.label} is of {self.images:,} labelled images of {self.classes:,} classes; "
                f"{dataset.name} has {found[0]:,} images, {found[1]:,} of them labelled, and {found[2]:,} classes",
                hint="Give the whole set, without a limit, or name no protocol for another set.",
            )
        return dataset


REGISTRY: dict[str, Protocol | ClassProtocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="coco-karpathy-5k",
            images=5000,
            captions=5,
            about="COCO, test split of Karpathy and Fei-Fei (2015); the first 5 of 25,010 captions.",
        ),
        Protocol(
            name="coco-karpathy-1k-folds",
            images=5000,
            captions=5,
            folds=5,
            about="The same in 5 folds of 1,000 images, averaged (Karpathy and Fei-Fei 2015; VSE++).",
        ),
        Protocol(
            name="coco-val2017-5k",
            images=5000,
            captions=5,
            about="COCO val2017, the first 5 of 25,014 captions (Long-CLIP, and the paper).",
        ),
        Protocol(
            name="flickr30k-1k",
            images=1000,
            captions=5,
            about="Flickr30k, test split of Karpathy and Fei-Fei (2015).",
        ),
        Protocol(
            name="flickr30k-31k",
            images=31783,
            captions=5,
            about="Every image of Flickr30k's annotation file (Long-CLIP, and the paper).",
        ),
        Protocol(
            name="flickr8k-1k",
            images=1000,
            captions=5,
            about="Flickr8k, test split of Karpathy and Fei-Fei (2015).",
        ),
        Protocol(
            name="sharegpt4v-1k",
            images=1000,
            captions=1,
            kind="long",
            about="The first 1,000 images of ShareGPT4V's captions (Long-CLIP, and the paper).",
        ),
        Protocol(name="urban-1k", images=1000, captions=1, kind="long", about="Urban-1k (Long-CLIP)."),
        Protocol(
            name="dci",
            images=7805,
            captions=1,
            kind="long",
            about="Densely Captioned Images, all splits, short and extra caption joined (LoTLIP).",
        ),
        Protocol(name="docci-5k", images=5000, captions=1, kind="long", about="DOCCI, test split (Onoe et al. 2024)."),
        Protocol(
            name="iiw-612",
            images=612,
            captions=1,
            kind="long",
            about="ImageInWords: IIW-400, and its 112 images of DCI and 100 of DOCCI (LoTLIP).",
        ),
        ClassProtocol(name="imagenet-1k", images=50_000, classes=1000, about="ImageNet 2012, validation."),
        ClassProtocol(name="dtd", images=1880, classes=47, about="Describable Textures, first test split."),
        ClassProtocol(name="stanford-cars", images=8041, classes=196, about="Stanford Cars, test."),
        ClassProtocol(
            name="sun397", images=108_754, classes=397, about="SUN397, every image (CLIP_benchmark, DataComp)."
        ),
        ClassProtocol(
            name="sun397-partition-1", images=19_850, classes=397, about="SUN397, first test partition (CLIP)."
        ),
        ClassProtocol(name="food-101", images=25_250, classes=101, about="Food-101, test."),
        ClassProtocol(
            name="fgvc-aircraft",
            images=3333,
            classes=100,
            metric="mean_per_class_accuracy",
            about="FGVC-Aircraft, test, variants.",
        ),
        ClassProtocol(
            name="oxford-pets",
            images=3669,
            classes=37,
            metric="mean_per_class_accuracy",
            about="Oxford-IIIT Pet, test, breeds.",
        ),
        ClassProtocol(
            name="caltech-101",
            images=6085,
            classes=102,
            metric="mean_per_class_accuracy",
            about="Caltech-101, VTAB's test split, with the background class (CLIP_benchmark, DataComp).",
        ),
    )
}


def find(label: str) -> Protocol | ClassProtocol | None:
    """The protocol that a label names, with or without its version; None for a label of one's own.

    Raises:
        UsageError: A known name with another version.
    """
    name, slash, version = label.partition("/")
    protocol = REGISTRY.get(name.strip().lower())
    if protocol is None or (name == protocol.name and (not slash or version == str(protocol.version))):
        return protocol
    raise UsageError(
        f"protocol {label!r}: the protocol of that name is {protocol.label!r}",
        hint=f"Write {protocol.name!r}, or give a protocol of your own another name.",
    )


def folds_of(label: str) -> int:
    """Blocks of images that retrieval is searched in: 1 but where a protocol says otherwise."""
    protocol = find(label)
    return protocol.folds if isinstance(protocol, Protocol) else 1


def quoted_accuracy(label: str) -> str:
    """Which zero-shot accuracy the field quotes of the set that a result's label names: top-1 of unknown ones."""
    protocol = REGISTRY.get(label.partition("/")[0])
    return protocol.metric if isinstance(protocol, ClassProtocol) else "top_1_accuracy"
