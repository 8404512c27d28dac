"""One model measured on embedding tables: retrieval, zero-shot classification, probes, captions, the modality gap.

Each function returns metric name -> :class:`~gmail_cli.components.scores.Scores`, and what the report wants to show
beside the numbers. Test images must have passed through the encoder of real images (paper, Algorithm 1, step 4).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from gmail_cli.components.metrics import classification, fidelity, gap
from gmail_cli.components.metrics.captioning import METRICS, CaptionScores, score_captions
from gmail_cli.components.metrics.classification import Classification
from gmail_cli.components.metrics.clipscore import clip_score, reference_clip_score
from gmail_cli.components.metrics.retrieval import Ranks, RetrievalRanks, retrieval_ranks_in_folds
from gmail_cli.components.questions import QuestionSet
from gmail_cli.components.scores import OF_CORPUS, Scores
from gmail_cli.components.tables import Table, require_same_space
from gmail_cli.errors import InputError, SetupError

ENOUGH_HELD_OUT = 50
DIRECTIONS = ("text_to_image", "image_to_text")


@dataclass(frozen=True)
class Retrieval:
    """Scores of both directions, and the ranks they come from.

    Attributes:
        scores: ``text_to_image_recall_at_1`` and so on; ``long_`` before those of long captions.
        ranks: ``short`` and ``long`` captions, where there are such.
        rows: For each kind, the rows of the text table that were its queries.
    """

    scores: dict[str, Scores]
    ranks: dict[str, RetrievalRanks] = field(default_factory=dict)
    rows: dict[str, Int[np.ndarray, " texts"]] = field(default_factory=dict)


def retrieval(
    images: Table,
    *,
    texts: Table,
    ks: Sequence[int],
    true_recall: bool = False,
    folds: int = 1,
    extra_positives: Mapping[str, Sequence[str]] | None = None,
) -> Retrieval:
    """Rank texts for images and images for texts, short and long captions apart.

    Args:
        images: Real test images.
        texts: Their captions; each row names its image as ``owner`` and may have a ``kind``.
        ks: The k of recall@k.
        true_recall: Also the share of all right answers among the first k.
        folds: Blocks of consecutive images that are searched each for itself; every query counts once.
        extra_positives: Id of a text -> ids of images that it also describes; those of texts that are not here are
            left aside. Adds mAP@R and R-precision.

    Raises:
        InputError: The tables do not live in one space, a text belongs to no image of the table, an extra image is not
            in it, or the extra pairs name no text of it.
    """
    require_same_space(images, texts)
    places = {name: row for row, name in enumerate(images.ids)}
    owners = np.array([_place(row, places, texts.header.name) for row in texts.rows], dtype=np.int64)
    kinds = np.array([row.get("kind") or "short" for row in texts.rows])
    found = Retrieval({})
    for kind in ("short", "long"):
        rows = np.flatnonzero(kinds == kind)
        if not len(rows):
            continue
        extra = None if extra_positives is None else _pairs(extra_positives, texts, rows=rows, places=places)
        ranks = retrieval_ranks_in_folds(
            images.vectors,
            texts=texts.vectors[rows],
            owners=owners[rows],
            folds=folds,
            extra_positives=extra,
            all_positives=true_recall or extra is not None,
        )
        found.ranks[kind], found.rows[kind] = ranks, rows
        prefix = "" if kind == "short" else "long_"
        scores = ranked(ranks, ks=ks, true_recall=true_recall, extra_positives=extra)
        found.scores.update({f"{prefix}{name}": score for name, score in scores.items()})
    if extra_positives is not None and not any("map_at_r" in name for name in found.scores):
        raise InputError(
            f"none of the {len(extra_positives)} captions with extra positives is among the {len(texts.rows)} here",
            hint="Use the annotations of this test set; the key is a caption's id.",
        )
    return found


def ranked(
    ranks: RetrievalRanks,
    *,
    ks: Sequence[int],
    true_recall: bool = False,
    extra_positives: Int[np.ndarray, "pairs 2"] | None = None,
) -> dict[str, Scores]:
    """Recalls, on request true recalls and precisions at R, and mean reciprocal rank of both directions.

    Args:
        ranks: With all positives ranked when ``true_recall`` or with ``extra_positives``.
        ks: The k of recall@k.
        true_recall: Also the share of all right answers among the first k.
        extra_positives: The (text row, image row) pairs ``ranks`` were told of; adds mAP@R and R-precision over the
            texts and images that they name, as ECCV Caption (2022) reports.
    """
    scores: dict[str, Scores] = {}
    for column, direction in enumerate(DIRECTIONS):
        one: Ranks = getattr(ranks, direction)
        mean = partial(Scores.mean, groups=one.image)
        for k in ks:
            scores[f"{direction}_recall_at_{k}"] = mean(one.hits(k))
        if true_recall:
            for k in ks:
                scores[f"{direction}_true_recall_at_{k}"] = mean(one.true_recall(k))
        if extra_positives is not None:
            named = np.isin(one.query, extra_positives[:, column])
            for name, values in (("map_at_r", one.average_precision_at_r()), ("r_precision", one.r_precision())):
                scores[f"{direction}_{name}"] = Scores.mean(values[named], groups=one.image[named])
        scores[f"{direction}_mean_reciprocal_rank"] = mean(one.reciprocal_rank())
    return scores


def names_classes(texts: Table) -> bool:
    """Whether captions name classes rather than images: fewer different short ones than half the images they own.

    No caption can then find *its* image, and retrieval says nothing.
    """
    short = [row for row in texts.rows if (row.get("kind") or "short") == "short"]
    return 2 * len({row["text"] for row in short}) < len({row["owner"] for row in short})


def zero_shot(images: Table, *, prompts: Table) -> tuple[dict[str, Scores], Classification]:
    """Classify test images by their cosine with averaged prompts of each class (CLIP, 2021).

    Args:
        images: Real test images, each row with its ``label``.
        prompts: Texts, each row with the ``label`` of the class it names.

    Raises:
        InputError: The tables do not live in one space, or an image has no label or one without a prompt.
    """
    require_same_space(images, prompts)
    names = list(dict.fromkeys(str(row["label"]) for row in prompts.rows))
    numbers = {name: number for number, name in enumerate(names)}
    classes = classification.class_embeddings(
        np.asarray(prompts.vectors, dtype=np.float32),
        class_rows=np.array([numbers[str(row["label"])] for row in prompts.rows]),
        classes=len(names),
    )
    labels = _labels(images, numbers, of=prompts.header.name)
    found = classification.zero_shot(np.asarray(images.vectors, dtype=np.float32), class_vectors=classes, labels=labels)
    return classified(found, prefix="zero_shot_"), found


def probe(images: Table, *, scores: Float[np.ndarray, "images classes"], class_names: Sequence[str]) -> Classification:
    """How a probe's class scores fit the labels of the test images.

    Raises:
        InputError: An image has no label, or one that the probe was not trained on.
    """
    numbers = {name: number for number, name in enumerate(class_names)}
    return classification.classify(scores, labels=_labels(images, numbers, of="the probe"))


def features(
    train: Float[np.ndarray, "train dim"],
    *,
    labels: Int[np.ndarray, " train"],
    test: Float[np.ndarray, "test dim"],
    test_labels: Int[np.ndarray, " test"],
    neighbours: int,
    strength: float,
) -> tuple[dict[str, Scores], dict[str, Classification]]:
    """Classify test features by their nearest training features, the nearest class mean and a linear probe.

    Args:
        train: Unit rows.
        labels: Class of each, from 0, none left out.
        test: Unit rows, by the same encoder.
        test_labels: Class of each.
        neighbours: Votes of k-NN, by cosine.
        strength: C of the probe (:func:`gmail_cli.components.metrics.classification.linear_probe`).

    Returns:
        The scores of all three, and what each did: ``nearest_neighbour``, ``nearest_mean``, ``linear_probe``.

    Raises:
        InputError: The shapes do not fit, or there are fewer training rows than neighbours.
    """
    classes = int(labels.max()) + 1
    means = classification.centroids(train, labels=labels, classes=classes)
    weights = classification.linear_probe(train, labels=labels, classes=classes, strength=strength)
    by = {
        "nearest_neighbour": classification.neighbour_scores(
            test, references=train, labels=labels, classes=classes, k=neighbours
        ),
        "nearest_mean": classification.centroid_scores(test, centroids=means),
        "linear_probe": classification.probe_scores(test, weights=weights),
    }
    found = {name: classification.classify(each, labels=test_labels) for name, each in by.items()}
    scores: dict[str, Scores] = {}
    for name, each in found.items():
        scores |= classified(each, prefix=f"{name}_")
    return scores, found


def table_features(
    train: Table, *, test: Table, neighbours: int, strength: float
) -> tuple[dict[str, Scores], dict[str, Classification]]:
    """:func:`features` of two tables of labelled images.

    Raises:
        InputError: They went through different encoders, an image has no label or one that no training image has.
    """
    if train.header.encoder_digest != test.header.encoder_digest:
        raise InputError(
            f"tables {train.header.name!r} and {test.header.name!r} were made by different encoders",
            hint="Run gmail embed again.",
        )
    numbers = {name: number for number, name in enumerate(sorted({str(row.get("label")) for row in train.rows}))}
    return features(
        np.asarray(train.vectors, dtype=np.float32),
        labels=_labels(train, numbers, of=train.header.name),
        test=np.asarray(test.vectors, dtype=np.float32),
        test_labels=_labels(test, numbers, of=train.header.name),
        neighbours=neighbours,
        strength=strength,
    )


def clip_scores(
    images: Float[np.ndarray, "images dim"],
    *,
    captions: Float[np.ndarray, "images dim"],
    references: Float[np.ndarray, "references dim"] | None = None,
    owners: Int[np.ndarray, " references"] | None = None,
) -> dict[str, Scores]:
    """CLIPScore of one caption for each image, and RefCLIPScore where there are references.

    Args:
        images: Unit rows.
        captions: Unit rows, by the same CLIP.
        references: Unit rows.
        owners: For each reference the row of its image.

    Raises:
        InputError: They do not fit each other.
    """
    found = clip_score(images, captions=captions)
    rows = np.arange(len(found))
    scores = {"clip_score": Scores.mean(found, groups=rows)}
    if references is not None and owners is not None:
        both = reference_clip_score(found, captions=captions, references=references, owners=owners)
        scores["ref_clip_score"] = Scores.mean(both, groups=rows)
    return scores


def classified(found: Classification, *, prefix: str) -> dict[str, Scores]:
    """Top-1, top-5 (above five classes) and mean-per-class accuracy."""
    images = np.arange(len(found.labels))
    scores = {f"{prefix}top_1_accuracy": Scores.mean(found.correct(1), groups=images)}
    if len(found.confusion) > 5:
        scores[f"{prefix}top_5_accuracy"] = Scores.mean(found.correct(5), groups=images)
    scores[f"{prefix}mean_per_class_accuracy"] = Scores.per_class(
        found.correct(1), labels=found.labels, classes=len(found.confusion), groups=images
    )
    return scores


def captions(
    references: Mapping[str, Sequence[str]], *, predictions: Mapping[str, str], meteor: Literal["auto", "on", "off"]
) -> tuple[dict[str, Scores], CaptionScores]:
    """BLEU-1 to 4, METEOR, ROUGE-L and CIDEr (see :func:`~gmail_cli.components.metrics.captioning.score_captions`).

    Raises:
        InputError: Images and captions do not fit.
        SetupError: ``meteor`` is ``on`` and this machine cannot compute it.
    """
    wanted = [name for name in METRICS if name != "meteor" or meteor != "off"]
    found = score_captions(references, predictions, metrics=wanted)
    if meteor == "on" and "meteor" in found.absent:
        raise SetupError(f"eval.meteor = 'on': {found.absent['meteor']}", hint="Set it to auto or off.")
    images = np.arange(len(found.ids))
    scores = {}
    for name, statistic in OF_CORPUS.items():
        counts = found.meteor_counts if name == "meteor" else found.bleu_counts
        if counts is not None:
            scores[name] = Scores(columns=counts, groups=images, statistic=statistic, queries=len(images))
    for name in ("rouge_l", "cider"):
        scores[name] = Scores.mean(found.per_image[name], groups=images)
    return scores, found


def answers(asked: QuestionSet, *, responses: Mapping[str, str]) -> dict[str, Scores]:
    """Accuracy on all questions and on each group of them, and the share of responses that name an answer.

    Args:
        asked: The questions, which the bootstrap draws.
        responses: What a model wrote, by the question's id.
    """
    marks = [asked.mark(question, responses[question.id]) for question in asked.questions]
    right, named = np.array(marks, dtype=np.float64).T
    everyone = np.arange(len(right))
    scores = {"accuracy": Scores.mean(right, groups=everyone)}
    for name in dict.fromkeys(group for question in asked.questions for group in question.groups):
        of = np.flatnonzero([name in question.groups for question in asked.questions])
        scores[f"{name}_accuracy"] = Scores.mean(right[of], groups=of)
    return {**scores, "answered_share": Scores.mean(named, groups=everyone)}


def modality_gap(real: Table, *, generated: Table) -> dict[str, Scores]:
    """How far generated images lie from the real images of their captions (paper, Table 14).

    And how good a set they are, as :func:`generated_set` says.

    Args:
        real: Real images through f_r.
        generated: Generated images, row by row the partners of ``real``. Where at least ``ENOUGH_HELD_OUT`` rows are
            ``held_out`` of alignment, only those count: f_g has been trained on the others.

    Raises:
        InputError: The tables are not partners, or do not live in one space.
    """
    require_same_space(real, generated)
    if len(real.vectors) != len(generated.vectors):
        raise InputError(
            f"tables {real.header.name!r} and {generated.header.name!r} have {len(real.vectors)} and "
            f"{len(generated.vectors)} rows; they must be partners row by row",
            hint="Run gmail embed again.",
        )
    rows = gap_rows(generated)
    a = np.asarray(real.vectors[rows], dtype=np.float32)
    b = np.asarray(generated.vectors[rows], dtype=np.float32)
    count = len(a)
    owners = np.unique([str(real.rows[row]["id"]) for row in rows], return_inverse=True)[1]
    whole = partial(Scores.whole, queries=count)
    scores = {"paired_cosine": Scores.mean(gap.paired_cosine(a, generated=b), groups=owners)}
    if count > 1:
        scores["unpaired_cosine"] = whole(gap.unpaired_cosine(a, generated=b))
    scores["centroid_cosine"] = whole(gap.centroid_cosine(a, generated=b))
    scores["centroid_distance"] = whole(gap.centroid_distance(a, generated=b))
    if count > 1:
        scores["covariance_distance"] = whole(gap.covariance_distance(a, generated=b))
        scores["frechet_distance"] = whole(gap.frechet_distance(a, generated=b).distance)
        with contextlib.suppress(InputError):  # a collapsed encoder gives it no scale
            scores["maximum_mean_discrepancy"] = whole(gap.maximum_mean_discrepancy(a, generated=b))
    if len(np.unique(owners)) >= 10:
        linear = gap.linear_separability(a, generated=b, real_groups=owners, generated_groups=owners)
        near = gap.neighbour_separability(a, generated=b, real_groups=owners, generated_groups=owners)
        scores |= {"linear_separability": whole(linear), "neighbour_separability": whole(near)}
    return scores | generated_set(a, generated=b)


def generated_set(real: Float[np.ndarray, "r dim"], *, generated: Float[np.ndarray, "g dim"]) -> dict[str, Scores]:
    """How good generated images are as a set: precision, recall, density, coverage, and the Vendi scores of both sets.

    Nothing where there are too few for neighbours.

    Args:
        real: Unit rows.
        generated: Unit rows, in the same space.
    """
    if min(len(real), len(generated)) <= fidelity.NEIGHBOURS:
        return {}
    found = fidelity.manifold_metrics(real, generated=generated)
    values = {
        "precision": found.precision,
        "recall": found.recall,
        "density": found.density,
        "coverage": found.coverage,
        "vendi_score": fidelity.vendi_score(generated),
        "real_vendi_score": fidelity.vendi_score(real),
    }
    return {name: Scores.whole(value, queries=len(generated)) for name, value in values.items()}


def gap_rows(generated: Table) -> Int[np.ndarray, " rows"]:
    """The rows a gap is measured on: those held out of alignment if they are enough, else all."""
    held = np.flatnonzero([bool(row.get("held_out")) for row in generated.rows])
    return held if len(held) >= ENOUGH_HELD_OUT else np.arange(len(generated.rows))


def _place(row: Mapping[str, object], places: Mapping[str, int], table: str) -> int:
    owner = row.get("owner")
    if owner not in places:
        raise InputError(
            f"table {table!r}: text {row['id']!r} belongs to image {owner!r}, which is not among the test images",
            hint="Embed images and texts of one set together.",
        )
    return places[str(owner)]


def _pairs(
    extra: Mapping[str, Sequence[str]], texts: Table, *, rows: Int[np.ndarray, " texts"], places: Mapping[str, int]
) -> Int[np.ndarray, "pairs 2"] | None:
    """(row among ``rows``, row of the image) of each extra right answer; None where none is among these texts."""
    found = []
    for at, row in enumerate(rows.tolist()):
        for image in extra.get(texts.rows[row]["id"], ()):
            if image not in places:
                raise InputError(
                    f"extra positives: text {texts.rows[row]['id']!r} has image {image!r}, which is not among the "
                    "test images",
                    hint="Use the annotations of this test set.",
                )
            found.append((at, places[image]))
    return np.array(found, dtype=np.int64) if found else None


def _labels(images: Table, numbers: Mapping[str, int], *, of: str) -> Int[np.ndarray, " images"]:
    wrong = next((row for row in images.rows if str(row.get("label")) not in numbers), None)
    if wrong is not None:
        raise InputError(
            f"table {images.header.name!r}: image {wrong['id']!r} has label {wrong.get('label')!r}, "
            f"which is no class of {of}",
            hint=f"Its classes are: {', '.join(list(numbers)[:10])}.",
        )
    return np.array([numbers[str(row["label"])] for row in images.rows], dtype=np.int64)
