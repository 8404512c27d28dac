"""What an evaluation is given: its tables, its test set, and whether the training has seen that."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gmail_cli.artifacts import Artifact, digest_of
from gmail_cli.components import measure, report
from gmail_cli.components.captions import Dataset, check_disjoint
from gmail_cli.components.images import GeneratedSet
from gmail_cli.components.tables import Table
from gmail_cli.errors import GmailError, InputError
from gmail_cli.profile.schema import Profile
from gmail_cli.stages import sources

IMAGES, TEXTS, CLASSES, TRAIN_IMAGES = "test-images", "test-texts", "test-classes", "train-images"
LEAK_SHARE = 0.1
"""Share of test captions found among the training captions above which ``eval.shared_captions = "auto"`` stops."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """One model to measure: a row of the train artifact's ``cells.json``, or CLIP as it came (no ``folder``)."""

    task: str
    arm: str
    seed: int | None
    dual_projection: bool = False
    folder: str = ""
    own_images: bool = False

    @property
    def name(self) -> str:
        return self.folder or f"{self.task}.{self.arm}"


class Inputs:
    """The artifacts of one evaluation, open; ``notes`` are what the report must say of them."""

    def __init__(self, profile: Profile, artifacts: Mapping[str, Artifact]) -> None:
        self.profile, self.artifacts = profile, artifacts
        self.origins = artifacts["embeddings"].summary["origins"]
        self.tables = {table.header.name: table for table in sources.load_tables(artifacts["embeddings"])}
        if IMAGES not in self.tables:
            hint = "Run gmail embed with a test set that has images."
            raise InputError(f"{artifacts['embeddings'].path} holds no table {IMAGES!r}", hint=hint)
        self._check_flow()
        self.generated = GeneratedSet.load(artifacts["generated"].path) if "generated" in artifacts else None
        self.notes: list[str] = []
        self.test = self._test_set()

    def _check_flow(self) -> None:
        """Refuse test images that went through f_g, unless somebody said that they should."""
        told = self.artifacts["embeddings"].manifest["key"]["settings"].get("real_encoder") == "tuned"
        if self.tables[IMAGES].header.flow == "generated" and not (told or self.profile.eval.allow_generated_flow):
            raise InputError(
                f"the test images of {self.artifacts['embeddings'].path} went through f_g, as generated images do",
                hint="Embed real images with --flow real, or allow it with --set eval.allow_generated_flow=true.",
            )

    def _test_set(self) -> Dataset | None:
        """The test set, if what the profile names is what was embedded; the report shows its images."""
        named = self.origins["test"]["source"]
        try:
            dataset = sources.read(self.origins["test"])
        except GmailError as error:
            if len(self.artifacts) > 1:
                raise
            self.notes.append(f"No pictures: {named} cannot be read ({error.message}).")
            return None
        if {image.id for image in dataset.images} >= set(self.tables[IMAGES].ids):
            return dataset
        if len(self.artifacts) > 1:
            raise InputError(f"{named} is no longer the set whose images were embedded", hint="Embed it again.")
        self.notes.append(f"No pictures: {named} is no longer the set that was embedded.")
        return None

    def check_leaks(self) -> None:
        """Refuse training data that hold test data; count captions that both share by right."""
        if self.test is None or not ({"train", "generated"} & set(self.artifacts) or TRAIN_IMAGES in self.tables):
            return
        known = {(row.owner, row.caption) for row in self.generated.rows} if self.generated else set()
        if self._ids_are_foreign():
            known = set()
        leaked = [caption.id for caption in self.test.captions if (caption.owner, caption.text) in known]
        if leaked:
            raise InputError(
                f"{len(leaked)} test captions were generated from, first {leaked[0]!r}",
                hint="Generate from the training captions only (data.train).",
            )
        training = sources.read(self.origins["train"])
        texts = [caption.text for caption in self.test.captions]
        seen = {caption.text.casefold() for caption in training.captions}
        shared = sum(text.casefold() in seen for text in texts)
        by_class = TEXTS in self.tables and measure.names_classes(self.tables[TEXTS])
        rule = self.profile.eval.shared_captions
        refuse = rule == "fail" or (rule == "auto" and shared > LEAK_SHARE * len(texts) and not by_class)
        check_disjoint(training, self.test, captions=refuse)
        self.notes.append(
            f"{shared:,} of {len(texts):,} test captions are also training captions, word for word; no test image is a "
            "training image."
        )

    def _ids_are_foreign(self) -> bool:
        """Whether imported images may carry a test image's id by accident: captions that only name a class."""
        source = self.artifacts["generated"].manifest["key"]["settings"].get("source") if self.generated else None
        assert self.test is not None
        texts = [caption.text for caption in self.test.captions]
        return source == "import" and 2 * len(set(texts)) < len(texts)

    def thumbnail(self, image: str) -> bytes | None:
        """A test image at the size of the report, if the images are at hand."""
        if self.test is None or not self.test.has_images:
            return None
        data = self.test.image_bytes(self.places[image])
        return report.thumbnail(data, side=self.profile.eval.thumbnail, name=image)

    @functools.cached_property
    def places(self) -> dict[str, int]:
        """The row of each test image in the test set."""
        return {image.id: row for row, image in enumerate(self.test.images)} if self.test else {}

    def test_set_digest(self) -> str:
        """SHA-256 over ids, labels and texts of the test set, in order: which queries there were, and which answers."""
        images = [(row["id"], row.get("label")) for row in self.tables[IMAGES].rows]
        texts = self.tables[TEXTS].rows if TEXTS in self.tables else []
        return digest_of([images, [(row["id"], row["owner"], row["text"], row.get("kind")) for row in texts]])

    def table(self, name: str, model: Model) -> Table | None:
        """The table a model made, else (for arm ``none`` and where the model left the tower alone) CLIP's own."""
        return self.tables.get(f"{name}@{model.name}") or (self.tables.get(name) if model.arm == "none" else None)

    def images(self, model: Model, table: str = IMAGES) -> Table:
        """The images as a model's image tower embedded them.

        Raises:
            InputError: The embeddings do not hold them.
        """
        name = f"{table}@{model.name}" if model.own_images else table
        if name not in self.tables:
            raise InputError(f"the embeddings lack table {name!r}", hint="Run gmail embed with this train artifact.")
        return self.tables[name]

    def check_encoder(self, model: Model) -> None:
        """Refuse a model whose training read the embeddings of another f_r than the test images'.

        Raises:
            InputError: It did.
        """
        header = self.images(model).header
        trained = self.artifacts["train"].manifest["key"]["models"].get("clip") if model.folder else None
        if model.own_images or trained is None or header.flow != "real" or header.encoder_digest == trained:
            return
        raise InputError(
            f"{model.name} was trained with encoder {trained[:12]}, the test images were embedded with "
            f"{header.encoder} ({header.encoder_digest[:12]})",
            hint="Embed the test images with the model.clip it was trained with.",
        )

    def references(self) -> dict[str, list[str]]:
        """The short captions of each test image (all captions, where there are only long ones)."""
        texts = self.tables.get(TEXTS)
        rows = list(texts.rows) if texts else []
        if texts is None and self.test:  # CLIP reads no texts, so none were embedded
            rows = [{"owner": each.owner, "text": each.text, "kind": each.kind} for each in self.test.captions]
        short = [row for row in rows if (row.get("kind") or "short") == "short"] or rows
        found: dict[str, list[str]] = {}
        for row in short:
            found.setdefault(row["owner"], []).append(row["text"])
        return found

    def note(self, text: str) -> None:
        """Say it in the report, once."""
        if text not in self.notes:
            self.notes.append(text)

    @functools.cached_property
    def encoder(self) -> Any:
        """The encoder that the test images were embedded with."""
        from gmail_cli.components.clip_files import load_clip, model_digest
        from gmail_cli.components.encoders import pick_device

        wanted = self.tables[IMAGES].header.encoder_digest
        named = self.origins["model"]
        places = [(named["clip"], named["revision"])]
        if "aligned" in self.artifacts:
            places.append((str(self.artifacts["aligned"].folder("clip")), ""))
        for ref, revision in places:
            if model_digest(ref, revision=revision) == wanted:
                return load_clip(ref, revision=revision, device=pick_device(self.profile.runtime.device))
        hint = "Give model.clip as it was when the test images were embedded."
        raise InputError(f"{named['clip']} is no longer the encoder of the test images ({wanted[:12]})", hint=hint)
