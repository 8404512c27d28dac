"""Every model there is, measured on the test set; what it did with each query is kept."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from gmail_cli.artifacts import Slot, digest_of
from gmail_cli.components import exchange, measure, protocols
from gmail_cli.components import scores as scoring
from gmail_cli.components.metrics.retrieval import RetrievalRanks
from gmail_cli.components.scores import Cell
from gmail_cli.components.tables import Table
from gmail_cli.errors import InputError
from gmail_cli.profile.schema import Profile
from gmail_cli.stages.evaluate import captioners
from gmail_cli.stages.evaluate.inputs import CLASSES, IMAGES, TEXTS, TRAIN_IMAGES, Inputs, Model

GAP_REAL = "gap-real"
GAP_ARMS = ("generated-naive", "generated-aligned")
BROKEN_DOWN = (
    "text_to_image_recall_at_1",
    "zero_shot_top_1_accuracy",
    "probe_top_1_accuracy",
    "cider",
    "linear_probe_top_1_accuracy",
)
"""Metrics that the report shows by class and by attribute of the test images."""


@dataclass(eq=False)
class Seen:
    """What the report wants of the models measured, beside their scores; by arm, without dual projection.

    Attributes:
        ranks: Of short captions, one for each seed.
        retrievals: The first model of each arm, and what it retrieved.
        by_image: (task, metric) -> arm -> its value on each test image, one array for each seed; NaN for none.
        predictions: Task -> arm -> image -> caption, of the first seed.
    """

    ranks: dict[str, list[RetrievalRanks]] = field(default_factory=dict)
    retrievals: dict[str, tuple[Model, measure.Retrieval]] = field(default_factory=dict)
    by_image: dict[tuple[str, str], dict[str, list[Float[np.ndarray, " images"]]]] = field(default_factory=dict)
    predictions: dict[str, dict[str, dict[str, str]]] = field(default_factory=dict)


class Measured:
    """The models of one evaluation, and what has been measured of them so far."""

    def __init__(self, given: Inputs, slot: Slot) -> None:
        self.given, self.slot = given, slot
        self.seen = Seen()
        self.kept: list[dict[str, Any]] = []
        self.zero_shot: dict[str, Any] = {}

    def models(self) -> Iterator[Model]:
        """CLIP as it came, then every trained model that answers about images."""
        rows = self.given.artifacts["train"].read_json("cells.json") if "train" in self.given.artifacts else []
        trained = [
            Model(
                task=row["task"],
                arm=row["arm"],
                seed=row["seed"],
                dual_projection=row["dual_projection"],
                folder=row["folder"],
                own_images=row["image_encoder"] == "own",
            )
            for row in rows
            if row["task"] in _MEASURES
        ]
        text_tasks = [model.task for model in trained if _MEASURES[model.task] == Measured._clip]
        untrained = any(model.task in text_tasks and model.arm == "none" for model in trained)
        if {TEXTS, CLASSES} & self.given.tables.keys() and not untrained:
            yield Model(task=text_tasks[0] if text_tasks else "clip", arm="none", seed=None)
        yield from trained
        if TRAIN_IMAGES in self.given.tables:
            yield Model(task="features", arm="none", seed=None)
            yield from (replace(each, task="features") for each in trained if each.own_images and each.arm != "none")

    def measure(self, model: Model) -> Cell:
        """The scores of one model."""
        self.given.check_encoder(model)
        return Cell(
            task=model.task,
            arm=model.arm,
            seed=model.seed,
            dual_projection=model.dual_projection,
            preprocess=self.given.images(model).header.preprocess,
            scores=_MEASURES[model.task](self, model),
        )

    def keep(self, model: Model, cell: Cell) -> None:
        """Keep what the model did with each query, for `gmail compare`."""
        rows = scoring.to_parquet(cell.scores)
        if rows is None:
            return
        about_features = "features." if model.task == "features" and model.folder else ""
        name = f"queries/{about_features}{model.name}.parquet"
        self.slot.write_parquet(name, rows)
        about = {"task": model.task, "arm": model.arm, "seed": model.seed, "dual_projection": model.dual_projection}
        self.kept.append({**about, "queries": name})

    def _clip(self, model: Model) -> dict[str, scoring.Scores]:
        """Retrieval both ways and zero-shot classification with a model's text tower."""
        chosen = self.given.profile.eval
        images, texts, prompts = (
            self.given.images(model),
            self.given.table(TEXTS, model),
            self.given.table(CLASSES, model),
        )
        if texts is None and prompts is None:
            hint = "Run gmail embed with this train artifact."
            raise InputError(f"the embeddings lack table '{TEXTS}@{model.name}'", hint=hint)
        if texts is None:  # a set of labelled images without captions
            found = measure.Retrieval({})
        elif measure.names_classes(texts):
            self.given.note(
                "Retrieval left out: the captions name classes, so none of them belongs to one image alone."
            )
            found = measure.Retrieval({})
        else:
            found = measure.retrieval(
                images,
                texts=texts,
                ks=chosen.recall_at,
                true_recall=chosen.true_recall,
                folds=protocols.folds_of(self.given.origins["protocol"]),
                extra_positives=extra_positives(self.given.profile),
            )
        for kind, ranks in found.ranks.items():
            for direction in measure.DIRECTIONS:
                name = f"ranks/{model.name}.{kind}.{direction}.npy"
                self.slot.write_npy(name, getattr(ranks, direction).to_array())
        if "short" in found.ranks:
            self.seen.ranks.setdefault(model.arm, []).append(found.ranks["short"])
            self.seen.retrievals.setdefault(model.arm, (model, found))
        scores = dict(found.scores)
        if prompts is not None:
            more, _ = measure.zero_shot(images, prompts=prompts)
            self.zero_shot = _prompts_used(prompts)
            scores |= more
        self._remember(model, scores)
        return scores

    def _probe(self, model: Model) -> dict[str, scoring.Scores]:
        """A linear probe's accuracy on real images."""
        from gmail_cli.components import heads

        images = self.given.images(model)
        probe = heads.load_probe(self.given.artifacts["train"].folder(model.folder))
        predicted = heads.classify(probe, captioners.tensor(images.vectors)).numpy()
        found = measure.probe(images, scores=predicted, class_names=probe.class_names)
        scores = measure.classified(found, prefix="probe_")
        self._remember(model, scores)
        return scores

    def _features(self, model: Model) -> dict[str, scoring.Scores]:
        """k-NN, nearest mean and linear probe on the features of a model's image tower."""
        chosen = self.given.profile.eval
        scores, _ = measure.table_features(
            self.given.images(model, TRAIN_IMAGES),
            test=self.given.images(model),
            neighbours=chosen.neighbours,
            strength=chosen.probe_strength,
        )
        self._remember(model, scores)
        return scores

    def _captions(self, model: Model) -> dict[str, scoring.Scores]:
        """Scores of what a model writes for the test images that have references; written once, kept when killed."""
        images, references = self.given.images(model), self.given.references()
        rows = [row for row, name in enumerate(images.ids) if name in references]
        name = f"predictions/{model.name}.json"
        if not self.slot.has(name):
            texts = captioners.write(self.given, model, rows)
            self.slot.write_json(name, {images.ids[row]: text for row, text in zip(rows, texts, strict=True)})
        held = json.loads(self.slot.path(name).read_text(encoding="utf-8"))
        predictions = {images.ids[row]: str(held[images.ids[row]]) for row in rows}
        scores, found = measure.captions(
            {image: references[image] for image in predictions},
            predictions=predictions,
            meteor=self.given.profile.eval.meteor,
        )
        for reason in found.absent.values():
            self.given.note(reason.splitlines()[0])
        if self._clip_scorer is not None:
            scores |= self._clip_scorer.scores(predictions)
        if not model.dual_projection:
            self.seen.predictions.setdefault(model.task, {}).setdefault(model.arm, predictions)
        self._remember(model, scores, rows=rows)
        return scores

    def _llava(self, model: Model) -> dict[str, scoring.Scores]:
        """Scores of a LLaVA-style model's captions, and of its answers to `eval.questions`."""
        scores = self._captions(model)
        for asked in captioners.questions(self.given.profile):
            name = f"predictions/{model.name}.{asked.benchmark}.json"
            if not self.slot.has(name):
                self.slot.write_json(name, captioners.answers(self.given, model, asked))
            held = json.loads(self.slot.path(name).read_text(encoding="utf-8"))
            found = measure.answers(asked, responses=held)
            scores |= {f"{asked.benchmark}_{metric}": each for metric, each in found.items()}
        return scores

    def _remember(
        self, model: Model, scores: Mapping[str, scoring.Scores], *, rows: Sequence[int] | None = None
    ) -> None:
        """Keep what the report breaks down; ``rows``: the test images asked, where not every one is."""
        count = len(self.given.tables[IMAGES].ids)
        for metric in (each for each in BROKEN_DOWN if each in scores and not model.dual_projection):
            found = scores[metric]
            assert found.groups is not None, "a mean over queries"
            images = found.groups if rows is None else np.asarray(rows)[found.groups]
            sizes = np.bincount(images, minlength=count)
            sums = np.bincount(images, weights=found.values, minlength=count)
            each = np.where(sizes > 0, sums / np.maximum(sizes, 1), np.nan)
            self.seen.by_image.setdefault((model.task, metric), {}).setdefault(model.arm, []).append(each)

    @functools.cached_property
    def _clip_scorer(self) -> captioners.ClipScorer | None:
        return captioners.clip_scorer(self.given)

    def gap(self) -> list[Cell]:
        """The modality gap before alignment (generated images through f_r) and after (through f_g)."""
        real = self.given.tables.get(GAP_REAL)
        there = [(arm, self.given.tables[f"gap-{arm}"]) for arm in GAP_ARMS if f"gap-{arm}" in self.given.tables]
        if real is None or not there:
            return []
        rows = there[0][1].rows
        used = measure.gap_rows(there[0][1])
        kept = "held out of alignment" if rows[used[0]].get("held_out") else "of the training set"
        self.given.note(f"The modality gap is measured on {len(used):,} pairs {kept}.")
        return [
            Cell(
                task="gap",
                arm=arm,
                preprocess=real.header.preprocess,
                scores=measure.modality_gap(real, generated=table),
            )
            for arm, table in there
        ]


def extra_positives(profile: Profile) -> list[dict[str, list[str]]]:
    """All right answers of captions, and of images, where ``eval.extra_positives`` names files of them."""
    return [exchange.read_extra_positives(Path(named)) for named in profile.eval.extra_positives]


def _prompts_used(prompts: Table) -> dict[str, Any]:
    """How many classes and prompts, and the SHA-256 of (label, prompt) in order: zero-shot accuracy depends on them."""
    used = [(row["label"], row.get("text")) for row in prompts.rows]
    return {"classes": len({label for label, _ in used}), "prompts": len(used), "digest": digest_of(used)}


_MEASURES: Mapping[str, Callable[[Measured, Model], dict[str, scoring.Scores]]] = {
    "clip-text": Measured._clip,
    "long-clip": Measured._clip,
    "clip": Measured._clip,
    "clipcap": Measured._captions,
    "ifcap": Measured._captions,
    "sitta": Measured._captions,
    "llava": Measured._llava,
    "linear-probe": Measured._probe,
    "features": Measured._features,
}
