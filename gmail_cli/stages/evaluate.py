"""``gmail eval``: every trained model on real test images, against its rivals, with intervals and a report.

All models are tested on the same real images through f_r. What a model did with each query is kept (``ranks/``,
``queries/``, ``predictions/``), so that any later question about the numbers can be answered from the artifact.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from gmail_cli.artifacts import Artifact, Slot, StageKey, Workspace, digest_of, file_sha256
from gmail_cli.components import exchange, gate, measure, protocols, report
from gmail_cli.components import scores as scoring
from gmail_cli.components.captions import Dataset, check_disjoint
from gmail_cli.components.images import GeneratedSet
from gmail_cli.components.metrics.classification import Classification
from gmail_cli.components.metrics.clipscore import PROMPT
from gmail_cli.components.metrics.retrieval import RetrievalRanks
from gmail_cli.components.questions import QuestionSet, read_questions
from gmail_cli.components.report import gallery
from gmail_cli.components.scores import Cell
from gmail_cli.components.tables import Table
from gmail_cli.errors import GmailError, InputError, UsageError
from gmail_cli.profile import Profile, require_file, settings
from gmail_cli.stages import sources

if TYPE_CHECKING:
    from gmail_cli.components.encoders import Clip

RESULTS = "results.json"
IMAGES, TEXTS, CLASSES, TRAIN_IMAGES = "test-images", "test-texts", "test-classes", "train-images"
GAP_REAL = "gap-real"
GAP_ARMS = ("generated-naive", "generated-aligned")
LEAK_SHARE = 0.1
"""Share of test captions found among the training captions above which ``eval.shared_captions = "auto"`` stops."""
EXAMPLE_ARMS = ("generated-aligned", "real", "generated-naive", "none")
"""Whose retrievals the report shows: the first there is."""

Progress = Callable[[int, int], None]


def plan_key(
    profile: Profile,
    *,
    embeddings: str,
    train: str | None = None,
    aligned: str | None = None,
    generated: str | None = None,
    index: str | None = None,
) -> StageKey:
    """What `run` would make from the artifacts with these digests."""
    inputs = {"embeddings": embeddings, "train": train, "aligned": aligned, "generated": generated, "index": index}
    chosen = settings(profile.eval)
    if profile.eval.extra_positives:
        inputs["extra_positives"] = digest_of(_extra_positives(profile))
    for asked in _questions(profile):
        files = [require_file(str(file), key="eval.questions") for file in asked.files]
        inputs[asked.benchmark] = digest_of([file_sha256(file) for file in files])
    for name in (
        "extra_positives",
        "questions",
        *(() if profile.eval.questions else ("question_split", "answer_tokens")),
    ):
        del chosen[name]
    return StageKey(
        stage="eval",
        settings=chosen,
        inputs={name: digest for name, digest in inputs.items() if digest is not None},
        seed=profile.seed,
    )


def run(
    profile: Profile,
    workspace: Workspace,
    *,
    embeddings: Artifact,
    train: Artifact | None = None,
    aligned: Artifact | None = None,
    generated: Artifact | None = None,
    index: Artifact | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Measure every model there is, and write results and report.

    Args:
        profile: Sections used: ``eval``, ``data``, ``runtime``; and ``name``, ``seed``.
        workspace: Where the artifact goes.
        embeddings: Test images and texts, and what the trained models make of the texts.
        train: The trained models. Without it, CLIP is measured as it came.
        aligned: For the training curve of f_g.
        generated: For rows of real and generated images of one caption, and the check for leaks.
        index: For what the report says of the search index.
        progress: Called with (models done, models in all).

    Returns:
        The artifact: ``results.json`` (``gmail.results/1``), ``report.html``, ``report.md``, ``ranks/*.npy``,
        ``queries/*.parquet`` and ``predictions/*.json`` (captions; answers as ``gmail score qa`` reads them). Its
        summary has the ``verdict``.

    Raises:
        InputError: Tables that do not fit each other, or training data that hold test data.
        SetupError: METEOR is required and this machine lacks Java.
    """
    given = {"train": train, "aligned": aligned, "generated": generated, "index": index}
    key = plan_key(profile, embeddings=embeddings.digest, **{name: a.digest for name, a in given.items() if a})
    with workspace.open(key) as slot:
        if slot.done:
            return slot.artifact
        work = _Work(profile, slot, {"embeddings": embeddings, **{name: a for name, a in given.items() if a}})
        work.check_leaks()
        models = list(work.models())
        if profile.eval.questions and not any(model.task == "llava" for model in models):
            hint = "Train a cell of task llava, or leave eval.questions empty."
            raise InputError(f"eval.questions = {list(profile.eval.questions)}: no model here answers them", hint=hint)
        cells = []
        for done, model in enumerate(models):
            if progress:
                progress(done, len(models))
            cells.append(work.measure(model))
            work.keep(model, cells[-1])
        cells += work.gap()
        results = scoring.results(
            cells,
            protocol=work.origins["protocol"],
            draws=profile.eval.resamples,
            level=profile.eval.confidence,
            test_set=work.test_set_digest(),
            seed=profile.seed,
        )
        results |= {"cells": work.kept, **({"zero_shot": work.zero_shot} if work.zero_shot else {})}
        slot.write_json(RESULTS, results)
        shown = work.shown(results)
        slot.write_text("report.html", report.html(shown))
        slot.write_text("report.md", report.markdown(shown))
        if progress:
            progress(len(models), len(models))
        headline = report.verdict(results).headline
        return slot.commit(
            summary={"verdict": headline, "protocol": results["protocol"], "metrics": results["metrics"]}
        )


def _extra_positives(profile: Profile) -> dict[str, list[str]] | None:
    named = profile.eval.extra_positives
    return exchange.read_extra_positives(Path(named)) if named else None


@functools.lru_cache(maxsize=1)
def _questions(profile: Profile) -> tuple[QuestionSet, ...]:
    """The questions that LLaVA models are asked; read once for the plan and the work."""
    chosen = profile.eval
    found = [
        read_questions(require_file(path, key="eval.questions"), split=chosen.question_split)
        for path in chosen.questions
    ]
    names = [asked.benchmark for asked in found]
    if len(set(names)) < len(names):
        raise UsageError(f"eval.questions = {list(chosen.questions)} names {names[0]} twice", hint="Give one of each.")
    return tuple(found)


def read_baseline(baseline: Path) -> dict[str, Any]:
    """The ``results.json`` of an earlier evaluation, or of its artifact's folder.

    Raises:
        InputError: It cannot be read, or is something else.
    """
    file = baseline / RESULTS if baseline.is_dir() else baseline
    return gate.read(file, schema=scoring.SCHEMA, hint="Give the results.json of an eval.")


def comparable_metrics(artifact: Artifact, *, baseline: Mapping[str, Any], file: Path) -> dict[str, float]:
    """The metrics of an evaluation, to hold against a baseline.

    Args:
        artifact: What ``run`` made.
        baseline: What ``read_baseline`` read from ``file``.
        file: For the message.

    Raises:
        InputError: The baseline was measured with another protocol or on another test set.
    """
    now = artifact.read_json(RESULTS)
    gate.require_same(now, baseline=baseline, file=file, keys=("protocol", "test_set"))
    return dict(now["metrics"])


@dataclass(frozen=True, kw_only=True)
class _Model:
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


@dataclass(eq=False)
class _Seen:
    """What the report wants of the models measured, beside their scores; by arm, without dual projection."""

    ranks: dict[str, list[RetrievalRanks]] = field(default_factory=dict)
    retrievals: dict[str, tuple[_Model, measure.Retrieval]] = field(default_factory=dict)
    classified: dict[str, dict[str, list[Classification]]] = field(default_factory=dict)
    predictions: dict[str, dict[str, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class _Work:
    """One evaluation: its tables, its data, and what has been measured so far."""

    def __init__(self, profile: Profile, slot: Slot, inputs: Mapping[str, Artifact]) -> None:
        self.profile, self.slot, self.inputs = profile, slot, inputs
        self.origins = inputs["embeddings"].summary["origins"]
        self.tables = {table.header.name: table for table in sources.load_tables(inputs["embeddings"])}
        if IMAGES not in self.tables:
            hint = "Run gmail embed with a test set that has images."
            raise InputError(f"{inputs['embeddings'].path} holds no table {IMAGES!r}", hint=hint)
        self._check_flow()
        self.generated = GeneratedSet.load(inputs["generated"].path) if "generated" in inputs else None
        self.seen = _Seen()
        self.kept: list[dict[str, Any]] = []
        self.zero_shot: dict[str, Any] = {}
        self.test = self._test_set()

    # -- data ------------------------------------------------------------------------------------------------------

    def _check_flow(self) -> None:
        """Refuse test images that went through f_g, unless somebody said that they should."""
        told = self.inputs["embeddings"].manifest["key"]["settings"].get("real_encoder") == "tuned"
        if self.tables[IMAGES].header.flow == "generated" and not (told or self.profile.eval.allow_generated_flow):
            raise InputError(
                f"the test images of {self.inputs['embeddings'].path} went through f_g, as generated images do",
                hint="Embed real images with --flow real, or allow it with --set eval.allow_generated_flow=true.",
            )

    def _test_set(self) -> Dataset | None:
        """The test set, if what the profile names is what was embedded; the report shows its images."""
        named = self.origins["test"]["source"]
        try:
            dataset = sources.read(self.origins["test"])
        except GmailError as error:
            if len(self.inputs) > 1:
                raise
            self.seen.notes.append(f"No pictures: {named} cannot be read ({error.message}).")
            return None
        if {image.id for image in dataset.images} >= set(self.tables[IMAGES].ids):
            return dataset
        if len(self.inputs) > 1:
            raise InputError(f"{named} is no longer the set whose images were embedded", hint="Embed it again.")
        self.seen.notes.append(f"No pictures: {named} is no longer the set that was embedded.")
        return None

    def check_leaks(self) -> None:
        """Refuse training data that hold test data; count captions that both share by right."""
        if self.test is None or not ({"train", "generated"} & set(self.inputs) or TRAIN_IMAGES in self.tables):
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
        self.seen.notes.append(
            f"{shared:,} of {len(texts):,} test captions are also training captions, word for word; no test image is a "
            "training image."
        )

    def _ids_are_foreign(self) -> bool:
        """Whether imported images may carry a test image's id by accident: captions that only name a class."""
        source = self.inputs["generated"].manifest["key"]["settings"].get("source") if self.generated else None
        assert self.test is not None
        texts = [caption.text for caption in self.test.captions]
        return source == "import" and 2 * len(set(texts)) < len(texts)

    def thumbnail(self, image: str) -> bytes | None:
        """A test image at the size of the report, if the images are at hand."""
        if self.test is None or not self.test.has_images:
            return None
        data = self.test.image_bytes(self._places[image])
        return report.thumbnail(data, side=self.profile.eval.thumbnail, name=image)

    @functools.cached_property
    def _places(self) -> dict[str, int]:
        return {image.id: row for row, image in enumerate(self.test.images)} if self.test else {}

    # -- models ----------------------------------------------------------------------------------------------------

    def models(self) -> Iterator[_Model]:
        """CLIP as it came, then every trained model that answers about images."""
        rows = self.inputs["train"].read_json("cells.json") if "train" in self.inputs else []
        trained = [
            _Model(
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
        text_tasks = [model.task for model in trained if _MEASURES[model.task] == _Work._clip]
        if TEXTS in self.tables and not any(m.task in text_tasks and m.arm == "none" for m in trained):
            yield _Model(task=text_tasks[0] if text_tasks else "clip", arm="none", seed=None)
        yield from trained
        if TRAIN_IMAGES in self.tables:
            yield _Model(task="features", arm="none", seed=None)
            yield from (replace(each, task="features") for each in trained if each.own_images and each.arm != "none")

    def measure(self, model: _Model) -> Cell:
        """The scores of one model."""
        return Cell(
            task=model.task,
            arm=model.arm,
            seed=model.seed,
            dual_projection=model.dual_projection,
            preprocess=self._images(model).header.preprocess,
            scores=_MEASURES[model.task](self, model),
        )

    def keep(self, model: _Model, cell: Cell) -> None:
        """Keep what the model did with each query, for `gmail compare`."""
        rows = scoring.to_parquet(cell.scores)
        if rows is None:
            return
        about_features = "features." if model.task == "features" and model.folder else ""
        name = f"queries/{about_features}{model.name}.parquet"
        self.slot.write_parquet(name, rows)
        about = {"task": model.task, "arm": model.arm, "seed": model.seed, "dual_projection": model.dual_projection}
        self.kept.append({**about, "queries": name})

    def test_set_digest(self) -> str:
        """SHA-256 over ids, labels and texts of the test set, in order: which queries there were, and which answers."""
        images = [(row["id"], row.get("label")) for row in self.tables[IMAGES].rows]
        texts = self.tables[TEXTS].rows if TEXTS in self.tables else []
        return digest_of([images, [(row["id"], row["owner"], row["text"], row.get("kind")) for row in texts]])

    def _table(self, name: str, model: _Model) -> Table | None:
        """The table a model made, else (for arm ``none`` and where the model left the tower alone) CLIP's own."""
        return self.tables.get(f"{name}@{model.name}") or (self.tables.get(name) if model.arm == "none" else None)

    def _images(self, model: _Model, table: str = IMAGES) -> Table:
        name = f"{table}@{model.name}" if model.own_images else table
        if name not in self.tables:
            raise InputError(f"the embeddings lack table {name!r}", hint="Run gmail embed with this train artifact.")
        return self.tables[name]

    def _clip(self, model: _Model) -> dict[str, scoring.Scores]:
        """Retrieval both ways and zero-shot classification with a model's text tower."""
        chosen = self.profile.eval
        images, texts, prompts = self._images(model), self._table(TEXTS, model), self._table(CLASSES, model)
        if texts is None:
            hint = "Run gmail embed with this train artifact."
            raise InputError(f"the embeddings lack table '{TEXTS}@{model.name}'", hint=hint)
        if measure.names_classes(texts):
            self._note("Retrieval left out: the captions name classes, so none of them belongs to one image alone.")
            found = measure.Retrieval({})
        else:
            protocol = protocols.find(self.origins["protocol"])
            found = measure.retrieval(
                images,
                texts=texts,
                ks=chosen.recall_at,
                true_recall=chosen.true_recall,
                folds=protocol.folds if protocol else 1,
                extra_positives=_extra_positives(self.profile),
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
            more, classified = measure.zero_shot(images, prompts=prompts)
            self.zero_shot = _prompts_used(prompts)
            scores |= more
            self._remember("Zero-shot accuracy", model, classified)
        return scores

    def _probe(self, model: _Model) -> dict[str, scoring.Scores]:
        """A linear probe's accuracy on real images."""
        from gmail_cli.components import heads

        images = self._images(model)
        probe = heads.load_probe(self.inputs["train"].folder(model.folder))
        predicted = heads.classify(probe, _tensor(images.vectors)).numpy()
        found = measure.probe(images, scores=predicted, class_names=probe.class_names)
        self._remember("Linear probe", model, found)
        return measure.classified(found, prefix="probe_")

    def _features(self, model: _Model) -> dict[str, scoring.Scores]:
        """k-NN, nearest mean and linear probe on the features of a model's image tower."""
        chosen = self.profile.eval
        scores, found = measure.table_features(
            self._images(model, TRAIN_IMAGES),
            test=self._images(model),
            neighbours=chosen.neighbours,
            strength=chosen.probe_strength,
        )
        self._remember("Linear probe on features", model, found["linear_probe"])
        return scores

    def _captions(self, model: _Model) -> dict[str, scoring.Scores]:
        """Captions of real images by a prefix captioner, scored against what people wrote."""
        from gmail_cli.components import heads

        chosen = self.profile.eval

        def write(rows: list[int]) -> list[str]:
            captioner = heads.load_captioner(self.inputs["train"].folder(model.folder))
            vectors = _tensor(self._images(model).vectors[rows])
            return heads.generate_captions(captioner, vectors, beams=chosen.beams, max_tokens=chosen.caption_tokens)

        return self._captioned(model, write)

    def _llava(self, model: _Model) -> dict[str, scoring.Scores]:
        """Captions of real images by a LLaVA-style model, scored against what people wrote; and its answers."""
        from gmail_cli.components import llava
        from gmail_cli.components.encoders import pick_device

        chosen = self.profile.eval

        @functools.cache
        def load() -> llava.Llava:
            folder = self.inputs["train"].folder(model.folder)
            made = llava.load_llava(folder, device=pick_device(self.profile.runtime.device))
            self._check_encoder(model, str(made.about["encoder"]))
            return made

        def write(rows: list[int]) -> list[str]:
            made, images = load(), self._images(model)
            if made.about["visual"] == "pooled":
                tokens = _tensor(images.vectors[rows])[:, None]
            else:
                tokens = self._patches([images.ids[row] for row in rows], grid=int(made.about["visual_grid"]))
            prompts = [llava.caption_prompt(made)] * len(rows)
            return llava.answer(made, prompts, tokens, beams=chosen.beams, max_tokens=chosen.caption_tokens)

        scores = self._captioned(model, write)
        for asked in _questions(self.profile):
            name = f"predictions/{model.name}.{asked.benchmark}.json"
            if not self.slot.has(name):
                see = functools.partial(self._see, load().about)
                written = llava.answer_questions(load(), asked, see=see, max_tokens=chosen.answer_tokens)
                self.slot.write_json(name, written)
            held = json.loads(self.slot.path(name).read_text(encoding="utf-8"))
            found = measure.answers(asked, responses=held)
            scores |= {f"{asked.benchmark}_{metric}": each for metric, each in found.items()}
        return scores

    def _see(self, about: Mapping[str, Any], images: Sequence[bytes]) -> Any:
        """Image tokens of images from elsewhere, through the encoder of the test images."""
        from gmail_cli.components import encoders

        workers = self.profile.runtime.workers
        if about["visual"] == "pooled":
            vectors = encoders.embed_images(self._encoder(), images.__getitem__, len(images), workers=workers)
            return _tensor(vectors)[:, None]
        grid = int(about["visual_grid"])
        return _tensor(
            encoders.patch_tokens(self._encoder(), images.__getitem__, len(images), grid=grid, workers=workers)
        )

    def _check_encoder(self, model: _Model, digest: str) -> None:
        """Refuse a model that was trained on the tokens of another f_r."""
        header = self.tables[IMAGES].header
        if header.flow == "real" and header.encoder_digest != digest:
            raise InputError(
                f"{model.name} was trained on tokens of encoder {digest[:12]}, the test images were embedded with "
                f"{header.encoder} ({header.encoder_digest[:12]})",
                hint="Embed the test images with the model.clip it was trained with.",
            )

    @functools.lru_cache(maxsize=1)  # noqa: B019 - a _Work lives as long as its evaluation
    def _encoder(self) -> Any:
        """The encoder that the test images were embedded with."""
        from gmail_cli.components.encoders import load_clip, model_digest, pick_device

        wanted = self.tables[IMAGES].header.encoder_digest
        named = self.origins["model"]
        places = [(named["clip"], named["revision"])]
        if "aligned" in self.inputs:
            places.append((str(self.inputs["aligned"].folder("clip")), ""))
        for ref, revision in places:
            if model_digest(ref, revision=revision) == wanted:
                return load_clip(ref, revision=revision, device=pick_device(self.profile.runtime.device))
        hint = "Give model.clip as it was when the test images were embedded."
        raise InputError(f"{named['clip']} is no longer the encoder of the test images ({wanted[:12]})", hint=hint)

    def _patches(self, ids: list[str], *, grid: int) -> Any:
        """Patch tokens of test images, which the embeddings do not hold."""
        import torch

        from gmail_cli.components.encoders import patch_tokens

        if self.test is None or not self.test.has_images:
            hint = "Evaluate where the test images are, or train with --set train.visual=pooled."
            raise InputError("LLaVA's patch tokens need the test images, and they are not at hand", hint=hint)
        test, places = self.test, self._places
        return torch.from_numpy(
            patch_tokens(
                self._encoder(),
                lambda i: test.image_bytes(places[ids[i]]),
                len(ids),
                grid=grid,
                workers=self.profile.runtime.workers,
            )
        )

    def _captioned(self, model: _Model, write: Callable[[list[int]], list[str]]) -> dict[str, scoring.Scores]:
        """Scores of what a model writes for the test images that have references; written once, kept when killed."""
        images, references = self._images(model), self._references()
        rows = [row for row, name in enumerate(images.ids) if name in references]
        name = f"predictions/{model.name}.json"
        if not self.slot.has(name):
            texts = write(rows)
            self.slot.write_json(name, {images.ids[row]: text for row, text in zip(rows, texts, strict=True)})
        held = json.loads(self.slot.path(name).read_text(encoding="utf-8"))
        predictions = {images.ids[row]: str(held[images.ids[row]]) for row in rows}
        scores, found = measure.captions(
            {image: references[image] for image in predictions},
            predictions=predictions,
            meteor=self.profile.eval.meteor,
        )
        for reason in found.absent.values():
            self._note(reason.splitlines()[0])
        if self._clip_scorer is not None:
            scores |= self._clip_scorer.scores(predictions)
        if not model.dual_projection:
            self.seen.predictions.setdefault(model.arm, predictions)
        return scores

    @functools.cached_property
    def _clip_scorer(self) -> _ClipScorer | None:
        """Scores captions by the CLIP that embedded the test images; None (and a note) where it is not at hand."""
        from gmail_cli.components import encoders

        if not self.profile.eval.clip_score:
            return None
        model, seed = self.origins["model"], self.inputs["embeddings"].manifest["key"]["seed"]
        name, chosen = model["clip"], {"revision": model["revision"], "seed": seed}
        images = self.tables[IMAGES]
        try:
            if encoders.model_digest(name, **chosen) != images.header.encoder_digest:
                raise InputError(f"the test images did not go through {name} as it is now")
            device = encoders.pick_device(self.profile.runtime.device)
            clip = encoders.load_clip(name, device=device, **chosen)
        except GmailError as error:
            self._note(f"CLIPScore left out: {error.message}.")
            return None
        return _ClipScorer(clip, images, self._references(), batch_size=self.profile.embed.batch_size)

    def _references(self) -> dict[str, list[str]]:
        """The short captions of each test image (all captions, where there are only long ones)."""
        texts = self.tables.get(TEXTS)
        rows = texts.rows if texts else []
        short = [row for row in rows if (row.get("kind") or "short") == "short"] or rows
        found: dict[str, list[str]] = {}
        for row in short:
            found.setdefault(row["owner"], []).append(row["text"])
        return found

    def _remember(self, title: str, model: _Model, found: Classification) -> None:
        if not model.dual_projection:
            self.seen.classified.setdefault(title, {}).setdefault(model.arm, []).append(found)

    def _note(self, text: str) -> None:
        if text not in self.seen.notes:
            self.seen.notes.append(text)

    def gap(self) -> list[Cell]:
        """The modality gap before alignment (generated images through f_r) and after (through f_g)."""
        real = self.tables.get(GAP_REAL)
        there = [(arm, self.tables[f"gap-{arm}"]) for arm in GAP_ARMS if f"gap-{arm}" in self.tables]
        if real is None or not there:
            return []
        rows = there[0][1].rows
        used = measure.gap_rows(there[0][1])
        kept = "held out of alignment" if rows[used[0]].get("held_out") else "of the training set"
        self._note(f"The modality gap is measured on {len(used):,} pairs {kept}.")
        return [
            Cell(
                task="gap",
                arm=arm,
                preprocess=real.header.preprocess,
                scores=measure.modality_gap(real, generated=table),
            )
            for arm, table in there
        ]

    # -- report ----------------------------------------------------------------------------------------------------

    def shown(self, results: Mapping[str, Any]) -> report.Report:
        """Everything the report shows."""
        chosen, seen = self.profile.eval, self.seen
        gap = [self.tables.get(name) for name in (GAP_REAL, *(f"gap-{arm}" for arm in GAP_ARMS))]
        vectors = [
            np.asarray(table.vectors[measure.gap_rows(table)], dtype=np.float32) for table in gap if table is not None
        ]
        best, worst = self._retrievals()
        references = self._references()
        return report.Report(
            title=f"GMAIL on {self.profile.name}",
            results=results,
            recall_charts=gallery.recall_charts(seen.ranks, most=max(chosen.recall_at)) if seen.ranks else (),
            training_charts=tuple(self._curves()),
            clouds=gallery.clouds(vectors[0], naive=vectors[1], aligned=vectors[2]) if len(vectors) == 3 else (),
            breakdowns=tuple(self._breakdowns()),
            pairs=self._pairs(),
            best=best,
            worst=worst,
            captions=gallery.caption_examples(
                list(next(iter(seen.predictions.values()))),
                references=references,
                predictions=seen.predictions,
                thumbnails=self.thumbnail,
                count=chosen.examples,
            )
            if seen.predictions
            else (),
            notes=tuple(seen.notes),
            provenance=tuple(self._provenance()),
        )

    def _retrievals(self) -> tuple[tuple[report.PictureRow, ...], tuple[report.PictureRow, ...]]:
        arm = next((arm for arm in EXAMPLE_ARMS if arm in self.seen.retrievals), None)
        if arm is None or self.test is None:
            return (), ()
        model, found = self.seen.retrievals[arm]
        images, texts = self._images(model), self._table(TEXTS, model)
        assert texts is not None, "it has been measured"
        rows = found.rows["short"][found.ranks["short"].text_to_image.query]
        return gallery.retrievals(
            np.asarray(images.vectors, dtype=np.float32),
            texts=np.asarray(texts.vectors[rows], dtype=np.float32),
            image_ids=images.ids,
            captions=[texts.rows[row]["text"] for row in rows],
            ranks=found.ranks["short"].text_to_image,
            thumbnails=self.thumbnail,
            note=f"{model.task}, {model.arm}" + (f", seed {model.seed}" if model.seed is not None else ""),
            count=self.profile.eval.examples,
        )

    def _breakdowns(self) -> Iterator[report.Breakdown]:
        labels = [str(row.get("label")) for row in self.tables[IMAGES].rows]
        if any(row.get("label") is None for row in self.tables[IMAGES].rows):
            return
        for title, by_arm in self.seen.classified.items():
            correct = {arm: np.mean([each.correct(1) for each in found], axis=0) for arm, found in by_arm.items()}
            chart = gallery.breakdown(title, labels=labels, correct=correct)
            if chart is not None:
                yield chart

    def _pairs(self) -> tuple[report.PictureRow, ...]:
        if self.generated is None or not self.profile.eval.examples:
            return ()
        training = sources.read(self.origins["train"])
        chosen = self.profile.eval
        return gallery.pairs(self.generated, real=training, count=chosen.examples, side=chosen.thumbnail)

    def _curves(self) -> Iterator[report.Chart]:
        if "aligned" in self.inputs:
            curve = self.inputs["aligned"].read_jsonl("metrics.jsonl")
            if chart := gallery.training_chart("Alignment: f_g", {"generated-aligned": curve}):
                yield chart
        by_task: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for row in self.inputs["train"].read_json("cells.json") if "train" in self.inputs else []:
            if not row["dual_projection"]:
                curves = by_task.setdefault(row["task"], {})
                if row["arm"] not in curves:
                    curves[row["arm"]] = self.inputs["train"].read_jsonl(f"{row['folder']}/metrics.jsonl")
        for task, curves in by_task.items():
            if chart := gallery.training_chart(f"{report.task_title(task)}, first seed", curves):
                yield chart

    def _provenance(self) -> Iterator[tuple[str, str]]:
        yield "profile", self.profile.name
        yield "protocol", self.origins["protocol"]
        yield "evaluation", self.slot.key.digest
        for name, artifact in self.inputs.items():
            manifest = artifact.manifest
            made = f"made {manifest['created']} in {manifest['seconds']:.0f} s"
            yield (
                f"{name} ({artifact.stage})",
                f"{artifact.digest[:12]}, {made}, {manifest['machine']}, {manifest['device']}",
            )
        if "index" in self.inputs:
            for name, entry in self.inputs["index"].read_json("index.json")["tables"].items():
                yield f"index of {name}", f"{entry['kind']}, recall@10 {entry['recall_at_10']:.4f} against exact search"
        yield "seed", str(self.profile.seed)
        images = self.tables[IMAGES].header
        yield (
            "image encoder",
            f"{images.encoder}, {images.encoder_digest[:12]}, {images.dim} dimensions, {images.dtype}",
        )
        versions = self.inputs["embeddings"].manifest["versions"]
        yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items())


class _ClipScorer:
    """CLIPScore and RefCLIPScore of captions of the test images; the references are embedded once."""

    def __init__(self, clip: Clip, images: Table, references: Mapping[str, Sequence[str]], *, batch_size: int) -> None:
        self._clip, self._batch_size = clip, batch_size
        self._names = [name for name in images.ids if name in references]
        rows = {name: row for row, name in enumerate(images.ids)}
        self._pictures = np.asarray(images.vectors[[rows[name] for name in self._names]], dtype=np.float32)
        self._truths = self._embed([text for name in self._names for text in references[name]])
        self._owners = np.repeat(np.arange(len(self._names)), [len(references[name]) for name in self._names])

    def scores(self, predictions: Mapping[str, str]) -> dict[str, scoring.Scores]:
        """The scores of one caption for each image that has references."""
        captions = self._embed([predictions[name] for name in self._names])
        return measure.clip_scores(self._pictures, captions=captions, references=self._truths, owners=self._owners)

    def _embed(self, texts: Sequence[str]) -> Float[np.ndarray, "texts dim"]:
        from gmail_cli.components import encoders

        return encoders.embed_texts(self._clip, [PROMPT + text for text in texts], batch_size=self._batch_size)[0]


def _prompts_used(prompts: Table) -> dict[str, Any]:
    """How many classes and prompts, and the SHA-256 of (label, prompt) in order: zero-shot accuracy depends on them."""
    used = [(row["label"], row.get("text")) for row in prompts.rows]
    return {"classes": len({label for label, _ in used}), "prompts": len(used), "digest": digest_of(used)}


_MEASURES: Mapping[str, Callable[[_Work, _Model], dict[str, scoring.Scores]]] = {
    "clip-text": _Work._clip,
    "long-clip": _Work._clip,
    "clip": _Work._clip,
    "clipcap": _Work._captions,
    "llava": _Work._llava,
    "linear-probe": _Work._probe,
    "features": _Work._features,
}


def _tensor(vectors: Float[np.ndarray, "rows dim"]) -> Any:
    import torch

    return torch.from_numpy(np.array(vectors, dtype=np.float32))
