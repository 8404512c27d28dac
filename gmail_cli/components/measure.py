"""One model measured on embedding tables: retrieval, zero-shot classification, probes, captions, the modality gap.

Each function returns metric name -> :class:`~gmail_cli.components.scores.Scores`, and what the report wants to show
beside the numbers. Test images must have passed through the encoder of real images (paper, Algorithm 1, step 4).
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from gmail_cli.components.metrics import classification, fidelity, gap
from gmail_cli.components.metrics.captioning import METRICS, CaptionScores, score_captions
from gmail_cli.components.metrics.classification import Classification
from gmail_cli.components.metrics.clipscore import clip_score, reference_clip_score
from gmail_cli.components.metrics.retrieval import Ranks, RetrievalRanks, judged_ranks, retrieval_ranks_in_folds
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
    extra_positives: Sequence[Mapping[str, Sequence[str]]] = (),
) -> Retrieval:
    """Rank texts for images and images for texts, short and long captions apart.

    Args:
        images: Real test images.
        texts: Their captions; each row names its image as ``owner`` and may have a ``kind``.
        ks: The k of recall@k.
        true_recall: Also the share of all right answers among the first k.
        folds: Blocks of consecutive images that are searched each for itself; every query counts once.
        extra_positives: Id of a text -> ids of all images that it describes, and id of an image -> ids of all texts
            that describe it, as ECCV Caption and CxC publish them: see :func:`extended`.

    Raises:
        InputError: The tables do not live in one space, or a text belongs to no image of the table; and as `extended`.
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
        ranks = retrieval_ranks_in_folds(
            images.vectors,
            texts=texts.vectors[rows],
            owners=owners[rows],
            folds=folds,
            all_positives=true_recall,
        )
        found.ranks[kind], found.rows[kind] = ranks, rows
        prefix = "" if kind == "short" else "long_"
        scores = ranked(ranks, ks=ks, true_recall=true_recall)
        found.scores.update({f"{prefix}{name}": score for name, score in scores.items()})
    if extra_positives:
        rows = found.rows.get("short", found.rows.get("long", np.arange(0)))
        captions = {texts.rows[row]["id"]: at for at, row in enumerate(rows.tolist())}
        for direction, answers in zip(DIRECTIONS, extra_positives, strict=False):
            forth = direction == DIRECTIONS[0]
            asked, searched = (captions, places) if forth else (places, captions)
            own = list(enumerate(owners[rows].tolist()))
            pairs, missing = _judged(
                answers,
                direction=direction,
                asked=asked,
                searched=searched,
                own=own if forth else [(image, text) for text, image in own],
            )
            more = extended(
                direction,
                images.vectors,
                texts=texts.vectors[rows],
                owners=owners[rows],
                pairs=pairs,
                missing=missing,
                ks=ks,
            )
            found.scores.update(more)
    return found


def ranked(
    ranks: RetrievalRanks,
    *,
    ks: Sequence[int],
    true_recall: bool = False,
) -> dict[str, Scores]:
    """Recalls, on request true recalls, and mean reciprocal rank of both directions.

    Args:
        ranks: With all positives ranked when ``true_recall``.
        ks: The k of recall@k.
        true_recall: Also the share of all right answers among the first k.
    """
    scores: dict[str, Scores] = {}
    for direction in DIRECTIONS:
        one: Ranks = getattr(ranks, direction)
        mean = partial(Scores.mean, groups=one.image)
        for k in ks:
            scores[f"{direction}_recall_at_{k}"] = mean(one.hits(k))
        if true_recall:
            for k in ks:
                scores[f"{direction}_true_recall_at_{k}"] = mean(one.true_recall(k))
        scores[f"{direction}_mean_reciprocal_rank"] = mean(one.reciprocal_rank())
    return scores


def extended(
    direction: str,
    images: Float[np.ndarray, "images dim"],
    *,
    texts: Float[np.ndarray, "texts dim"],
    owners: Int[np.ndarray, " texts"],
    pairs: Int[np.ndarray, "pairs 2"],
    missing: Int[np.ndarray, " queries"] | None = None,
    ks: Sequence[int],
) -> dict[str, Scores]:
    """Recalls, mAP@R and R-precision over the queries that were judged anew, by exactly the answers judged right.

    The same numbers as the package ``eccv_caption`` (Chun et al. 2022) gives for ECCV Caption and for CxC.

    Args:
        direction: One of ``DIRECTIONS``.
        images: Unit rows.
        texts: Unit rows.
        owners: The row of the image each text belongs to.
        pairs: (query row, candidate row): every right answer of the queries named.
        missing: For every query, named or not, how many right answers are not among the candidates; they count in R
            and are never found.
        ks: The k of recall@k.
    """
    rows, place = np.unique(pairs[:, 0], return_inverse=True)
    forth = direction == DIRECTIONS[0]
    asked, searched = (texts, images) if forth else (images, texts)
    ranks = judged_ranks(
        np.asarray(asked[rows], dtype=np.float32),
        candidates=np.asarray(searched, dtype=np.float32),
        pairs=np.stack([place.reshape(-1), pairs[:, 1]], axis=1),
        images=owners[rows] if forth else rows,
    )
    if missing is not None:
        ranks = replace(ranks, positives=ranks.positives + missing[rows])
    values = {f"recall_at_{k}": ranks.hits(k) for k in ks}
    values |= {"map_at_r": ranks.average_precision_at_r(), "r_precision": ranks.r_precision()}
    return {f"{direction}_extended_{name}": Scores.mean(each, groups=ranks.image) for name, each in values.items()}


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


def _judged(
    answers: Mapping[str, Sequence[str]],
    *,
    direction: str,
    asked: Mapping[str, int],
    searched: Mapping[str, int],
    own: Collection[tuple[int, int]],
) -> tuple[Int[np.ndarray, "pairs 2"], Int[np.ndarray, " queries"]]:
    """(query row, candidate row) of every right answer, and how many of each query's answers are no candidates.

    Args:
        answers: Id of a query -> ids of its right answers.
        direction: For messages.
        asked: Id -> row of the queries.
        searched: Id -> row of the candidates.
        own: (query row, candidate row) of the pairs that the test set itself names.
    """
    texts, images = ("captions", "images") if direction == DIRECTIONS[0] else ("images", "captions")
    hint = (
        "Use the annotations of this test set: first those from captions to images, then those from images to captions."
    )
    named = [query for query in answers if query in asked]
    if not named:
        raise InputError(
            f"none of the {len(answers)} {texts} with extra positives is among the {len(asked)} here", hint=hint
        )
    pairs = [(asked[query], searched[each]) for query in named for each in set(answers[query]) if each in searched]
    unknown = [(query, each) for query in named for each in set(answers[query]) if each not in searched]
    if 100 * len(unknown) > len(pairs):
        query, each = unknown[0]
        raise InputError(
            f"extra positives: {len(unknown)} right answers are not among the {images} here, "
            f"first {each!r} of {query!r}",
            hint=hint,
        )
    with_own = {query for query, each in set(pairs).intersection(own)}
    if 2 * len(with_own) < len(named):
        raise InputError(
            f"extra positives: the lists of {len(named) - len(with_own)} of {len(named)} {texts} are without their own "
            f"{images}",
            hint="A list names every right answer of its query, as those of ECCV Caption and CxC do.",
        )
    missing = np.bincount([asked[query] for query, _ in unknown], minlength=len(asked)).astype(np.int64)
    return np.array(sorted(pairs), dtype=np.int64), missing


def _labels(images: Table, numbers: Mapping[str, int], *, of: str) -> Int[np.ndarray, " images"]:
    wrong = next((row for row in images.rows if str(row.get("label")) not in numbers), None)
    if wrong is not None:
        raise InputError(
            f"table {images.header.name!r}: image {wrong['id']!r} has label {wrong.get('label')!r}, "
            f"which is no class of {of}",
            hint=f"Its classes are: {', '.join(list(numbers)[:10])}.",
        )
    return np.array([numbers[str(row["label"])] for row in images.rows], dtype=np.int64)
