"""Which tables the given set and the artifacts beside it call for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from gmail_cli.artifacts import Artifact
from gmail_cli.components import prompts
from gmail_cli.components.captions import Dataset
from gmail_cli.components.metrics.gap import evenly_spaced
from gmail_cli.errors import InputError
from gmail_cli.profile.schema import Profile
from gmail_cli.stages import sources
from gmail_cli.stages.embed.jobs import Wanted

if TYPE_CHECKING:
    from gmail_cli.components.encoders import Clip
    from gmail_cli.components.images import GeneratedSet
    from gmail_cli.components.tables import Flow

TEXT_TASKS = ("clip-text", "long-clip", "clip")
"""Tasks whose cells have a text tower of their own."""


def labelled_images(profile: Profile, test: Dataset) -> tuple[Dataset, list[int]] | None:
    """The training set and those of its images that features of a labelled test set are classified by, if wanted.

    Raises:
        InputError: The training set has no labels, or lacks a class of the test set.
    """
    embed = profile.embed
    if not embed.train_count or embed.flow == "generated" or not (test.has_images and test.class_names):
        return None
    training = sources.read_partners(profile)
    labelled = [row for row, image in enumerate(training.images) if image.label is not None]
    if not labelled:
        hint = "Give a labelled set as data.train, or set embed.train_count=0."
        raise InputError(f"embed.train_count = {embed.train_count}, and {training.name} has no labels", hint=hint)
    rows = [labelled[place] for place in evenly_spaced(len(labelled), limit=embed.train_count).tolist()]
    known = {training.images[row].label for row in rows}
    lacking = next((image.label for image in test.images if image.label not in known), None)
    if lacking is not None:
        raise InputError(
            f"the test images have class {lacking!r}, and none of the {len(rows)} training images taken has it",
            hint="Raise embed.train_count, or set it to 0.",
        )
    return training, rows


class Plan:
    """Which tables the inputs call for."""

    def __init__(self, profile: Profile, test: Dataset, inputs: Mapping[str, Artifact], *, device: str) -> None:
        self.profile, self.test, self.inputs, self.device = profile, test, inputs, device
        self._train = labelled_images(profile, test)
        self._loaded: tuple[str, Clip] | None = None

    def sets(self) -> Iterator[Wanted]:
        """The tables, those of one model after another."""
        space, embed = self._space(), self.profile.embed
        through: dict[str, Any] = {"clip": self._original, "encoder": space, "flow": "real"}
        if embed.flow == "generated" or embed.real_encoder == "tuned":
            through = {"clip": self._aligned, "encoder": self._aligned_digest(), "flow": "generated"}
        yield from self._images("", space=space, **through)
        if self._original().reads_texts:
            yield from self._texts("", clip=self._original, encoder=space, space=space)
        if "generated" in self.inputs and self.profile.embed.gap_count:
            yield from self._gap(space)
        if "train" in self.inputs:
            for row in self.inputs["train"].read_json("cells.json"):
                if row["task"] in TEXT_TASKS and (row["task"], row["arm"]) != ("clip-text", "none"):
                    yield from self._cell(row, shared=space)

    def _space(self) -> str:
        from gmail_cli.components.clip_files import model_digest

        model = self.profile.model
        return model_digest(model.clip, revision=model.revision, seed=self.profile.seed)

    def _original(self) -> Clip:
        return self._clip(self.profile.model.clip, name=self.profile.model.clip, revision=self.profile.model.revision)

    def _aligned(self) -> Clip:
        return self._clip(str(self.inputs["aligned"].folder("clip")), name=f"{self.profile.model.clip} aligned")

    def _aligned_digest(self) -> str:
        from gmail_cli.components.clip_files import model_digest

        return model_digest(self.inputs["aligned"].folder("clip"))

    def _clip(self, ref: str, *, name: str, revision: str = "") -> Clip:
        """A model; only the last one is held."""
        from gmail_cli.components.clip_files import load_clip
        from gmail_cli.components.encoders import rounded

        if self._loaded is None or self._loaded[0] != ref:
            embed = self.profile.embed
            clip = load_clip(
                ref, revision=revision, device=self.device, precision=embed.precision, seed=self.profile.seed
            )
            self._loaded = ref, dataclasses.replace(rounded(clip), name=name)
        return self._loaded[1]

    def _images(
        self, suffix: str, *, clip: Callable[[], Clip], encoder: str, space: str, flow: Flow = "real"
    ) -> Iterator[Wanted]:
        """The test images, and the labelled training images, through one encoder."""
        through = partial(Wanted, clip=clip, encoder=encoder, space=space, flow=flow)
        if self.test.has_images:
            yield through(name=f"test-images{suffix}", **_images_of(self.test, range(len(self.test))))
        if self._train is not None:
            yield through(name=f"train-images{suffix}", **_images_of(*self._train))

    def _texts(self, suffix: str, *, clip: Callable[[], Clip], encoder: str, space: str) -> Iterator[Wanted]:
        captions, texts = self.test.captions, partial(Wanted, clip=clip, encoder=encoder, space=space)

        def row(at: int) -> Mapping[str, Any]:
            each = captions[at]
            return {"id": each.id, "owner": each.owner, "text": each.text, "kind": each.kind}

        def said() -> Iterator[str]:
            return (each.text for each in captions)

        if captions:
            yield texts(name=f"test-texts{suffix}", count=len(captions), row=row, content=said)
        classes = prompts.rows(self.test, self.profile.embed.templates)

        def prompted() -> Iterator[str]:
            return (str(each["text"]) for each in classes)

        if classes:
            name, row_of = f"test-classes{suffix}", classes.__getitem__
            yield texts(name=name, count=len(classes), row=row_of, content=prompted)

    def _cell(self, row: Mapping[str, Any], *, shared: str) -> Iterator[Wanted]:
        from gmail_cli.components.clip_files import model_digest

        folder = self.inputs["train"].folder(f"{row['folder']}/clip")
        own = row["image_encoder"] == "own"
        encoder = model_digest(folder)
        space = encoder if own else shared
        suffix, name = f"@{row['folder']}", str(row["name"])

        def clip() -> Clip:
            return self._clip(str(folder), name=name)

        if own:
            yield from self._images(suffix, clip=clip, encoder=encoder, space=space)
        yield from self._texts(suffix, clip=clip, encoder=encoder, space=space)

    def _gap(self, space: str) -> Iterator[Wanted]:
        from gmail_cli.components.images import GeneratedSet

        generated = GeneratedSet.load(self.inputs["generated"].path)
        partners = sources.read_partners(self.profile)
        held = self.profile.align.validation if "aligned" in self.inputs else 0.0
        pairs = _pairs(generated, partners, held=held, seed=self.profile.seed)[: self.profile.embed.gap_count]
        if not pairs:
            hint = "Give the real images of the generated captions as data.train, or set embed.gap_count=0."
            raise InputError("no generated image has a real partner to measure the gap with", hint=hint)
        here = [pair.generated for pair in pairs]
        there = [pair.real for pair in pairs]
        real = [{"id": partners.images[pair.real].id, "held_out": pair.held_out} for pair in pairs]
        drawn = [
            {
                "id": generated.rows[pair.generated].key,
                "owner": partners.images[pair.real].id,
                "text": generated.rows[pair.generated].caption,
                "held_out": pair.held_out,
            }
            for pair in pairs
        ]

        def partner_bytes(row: int) -> bytes:
            return partners.image_bytes(there[row])

        def drawn_bytes(row: int) -> bytes:
            return generated.image_bytes(here[row])

        def photographs(name: str) -> Wanted:
            return Wanted(
                name=name,
                count=len(pairs),
                row=real.__getitem__,
                clip=self._original,
                space=space,
                encoder=space,
                content=lambda: (partners.image_identities[row] for row in there),
                image_bytes=partner_bytes,
                flow="real",
            )

        def images(name: str, clip: Callable[[], Clip], encoder: str, flow: Flow) -> Wanted:
            return Wanted(
                name=name,
                count=len(pairs),
                row=drawn.__getitem__,
                clip=clip,
                space=space,
                encoder=encoder,
                content=lambda: (generated.rows[row].sha256 for row in here),
                image_bytes=drawn_bytes,
                flow=flow,
            )

        yield photographs("gap-real")
        yield images("gap-generated-naive", self._original, space, "real")
        if "aligned" in self.inputs:
            yield images("gap-generated-aligned", self._aligned, self._aligned_digest(), "generated")


def _images_of(dataset: Dataset, rows: Sequence[int]) -> dict[str, Any]:
    """What a :class:`Wanted` wants to know of some images."""

    def row(at: int) -> Mapping[str, Any]:
        image = dataset.images[rows[at]]
        return {"id": image.id, "label": image.label}

    return {
        "count": len(rows),
        "row": row,
        "content": lambda: (dataset.image_identities[at] for at in rows),
        "image_bytes": lambda at: dataset.image_bytes(rows[at]),
    }


@dataclass(frozen=True)
class _Pair:
    generated: int
    real: int
    held_out: bool


def _pairs(generated: GeneratedSet, partners: Dataset, *, held: float, seed: int) -> list[_Pair]:
    """Generated images with real partners, each real image once; those held out of alignment first.

    The partner is the owner, or else the next unused real image with the same caption.
    """
    from gmail_cli.components.partners import held_out

    row_of = {image.id: row for row, image in enumerate(partners.images)}
    kept = {image.id for image in partners.images if held_out(image.id, share=held, seed=seed)}
    free: dict[tuple[str, bool], list[int]] = {}
    for caption in reversed(partners.captions_of_kind("short")):
        free.setdefault((caption.text, caption.owner in kept), []).append(row_of[caption.owner])
    used: set[int] = set()
    pairs = []
    for place, row in enumerate(generated.rows):
        own = row_of.get(row.owner)
        aside = held_out(row.owner, share=held, seed=seed)
        choices = [own] if own is not None else free.get((row.caption, aside), [])
        while choices and choices[-1] in used:
            choices.pop()
        if choices:
            used.add(choices[-1])
            pairs.append(_Pair(place, choices[-1], aside))
    return sorted(pairs, key=lambda pair: not pair.held_out)
