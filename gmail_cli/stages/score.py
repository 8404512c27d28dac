"""``gmail score``: score what others made, from their files alone; no profile, no artifact, nothing written.

Each function reads files, measures, and returns a :class:`Scored`: the numbers beside what is needed to compare them
with others. Intervals are percentile intervals of a bootstrap by image.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from gmail_cli.components import exchange, gate, measure, protocols
from gmail_cli.components import questions as question_sets
from gmail_cli.components.metrics import gap as gaps
from gmail_cli.components.metrics.clipscore import PROMPT
from gmail_cli.components.metrics.fidelity import kernel_distance, manifold_metrics, vendi_score
from gmail_cli.components.metrics.gap import evenly_spaced, frechet_distance
from gmail_cli.components.metrics.intervals import Bootstrap
from gmail_cli.components.metrics.retrieval import (
    KS,
    check_owners,
    check_pairs,
    retrieval_ranks,
    retrieval_ranks_in_folds,
)
from gmail_cli.components.scores import Scores
from gmail_cli.errors import InputError, UsageError

SCHEMA = "gmail.score/1"
CONFIDENCE = 0.95
RESAMPLES = 1000
COMPARED_ROWS = 10_000
"""Rows of each set at most behind measures whose cost grows with the square of the rows."""
FEWEST_FOR_SEPARABILITY = 10

SPICE = (
    "SPICE needs the Stanford CoreNLP models, which pycocoevalcap downloads when it first runs; they are not part of "
    "this package"
)

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What one ``gmail score`` command found.

    Attributes:
        protocol: Name and version of what was measured and how.
        n: Counts of what was scored.
        metrics: Full name -> fraction, or distance; CIDEr on its 0-10 scale.
        intervals: Full name -> (low, high), where an interval by image is defined.
        settings: What else the numbers depend on.
        left_out: Metric -> why it is not there.
        notes: What to know when comparing the numbers.
    """

    protocol: str
    n: dict[str, int]
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """The same as JSON values."""
        bootstrap = {"confidence": CONFIDENCE, "resamples": RESAMPLES, "unit": "image"} if self.intervals else {}
        return {
            "schema": SCHEMA,
            "protocol": self.protocol,
            "n": self.n,
            "metrics": self.metrics,
            "intervals": {name: list(bounds) for name, bounds in self.intervals.items()},
            "bootstrap": bootstrap,
            "settings": self.settings,
            "left_out": self.left_out,
            "notes": list(self.notes),
        }


def read_baseline(file: Path) -> dict[str, Any]:
    """What an earlier command printed with ``--json``.

    Raises:
        InputError: It cannot be read, or is something else.
    """
    return gate.read(file, schema=SCHEMA, hint="Give what the same gmail score command printed with --json.")


def comparable_metrics(found: Scored, *, baseline: Mapping[str, Any], file: Path) -> dict[str, float]:
    """The metrics found, to hold against a baseline.

    Args:
        found: The result to judge.
        baseline: What ``read_baseline`` read from ``file``.
        file: For the message.

    Raises:
        InputError: The baseline was measured in another way: protocol, counts, or a setting that is a choice.
    """
    now = {**found.document(), **_choices(found.settings)}
    before = {**baseline, **_choices(baseline.get("settings", {}))}
    gate.require_same(now, baseline=before, file=file, keys=("protocol", "n", *_choices(found.settings)))
    return found.metrics


def _choices(settings: Any) -> dict[str, str | int]:
    """Settings that say how something was measured; floats and ranges describe the data, and encoders differ in dim."""
    pairs = settings.items() if isinstance(settings, Mapping) else ()
    return {name: value for name, value in pairs if isinstance(value, str | int) and name != "dim"}


def captions(references: Path, *, results: Path, meteor: Literal["auto", "on", "off"] = "auto") -> Scored:
    """BLEU, METEOR, ROUGE-L and CIDEr of one caption per image, as the COCO evaluation defines them.

    Args:
        references: COCO captions file. Images of it without captions are not scored.
        results: COCO results file with exactly one caption for each other image.
        meteor: ``auto`` takes METEOR where Java can run it.

    Raises:
        InputError: A file is unreadable or bad, or the two are not of the same images.
        SetupError: ``meteor`` is ``on`` and this machine cannot compute it.
    """
    truths = exchange.read_references(references)
    scored = {image: texts for image, texts in truths.items() if texts}
    if not scored:
        raise InputError(f"{references} holds no caption", hint="Use the captions_*.json file of the set.")
    hypotheses = exchange.read_results(results, references=scored)
    scores, found = measure.captions(scored, predictions=hypotheses, meteor=meteor)
    left_out = dict(found.absent)
    if meteor == "off":
        left_out["meteor"] = "not asked for"
    notes = ["cider takes its document frequencies from these references: compare only on the same images"]
    if empty := sum(not text.strip() for text in hypotheses.values()):
        notes.append(f"{empty} images have an empty caption, which scores 0")
    if len(scored) == 1:
        notes.append("cider of a single image is 0 by definition")
    return Scored(
        protocol="score-captions/1",
        n={
            "images": len(scored),
            "references": sum(map(len, scored.values())),
            "images_without_references": len(truths) - len(scored),
        },
        metrics=_values(scores),
        intervals=_intervals(scores),
        settings={"tokens": "Penn Treebank, as pycocoevalcap's", "cider": "CIDEr-D, sigma 6, 0 to 10"},
        left_out={**left_out, "spice": SPICE},
        notes=tuple(notes),
    )


def retrieval(
    images: Path,
    *,
    texts: Path,
    owners: Path,
    extra_positives: Sequence[Path] = (),
    protocol: str | None = None,
    true_recall: bool = False,
    progress: Progress | None = None,
) -> Scored:
    """Text-to-image and image-to-text retrieval by cosine, exact, with ties at their expectation.

    Args:
        images: ``.npy``, one row per image.
        texts: ``.npy``, one row per text.
        owners: ``.npy`` of integers: for each text the row of its image.
        extra_positives: Up to two ``.npy`` of integers [pairs, 2]: all right (text row, image row) pairs of some texts,
            then of some images, as ECCV Caption and CxC have them; adds recalls, mAP@R and R-precision over those.
        protocol: A known protocol that the files must fit, and whose rule is applied.
        true_recall: Also the share of all right answers among the first k.
        progress: Called with (tiles done, tiles in all).

    Raises:
        InputError: A file is unreadable or bad, a row has length zero, or they do not fit each other or the protocol.
        UsageError: There is no such protocol, or there are extra right answers as well.
    """
    image_rows, text_rows = exchange.read_features(images), exchange.read_features(texts)
    _same_dimension(image_rows, text_rows, images, texts)
    lengths = {"images": exchange.norm_range(image_rows), "texts": exchange.norm_range(text_rows)}
    of_image = exchange.read_array(owners)
    if len(extra_positives) > 2:
        raise UsageError(
            f"{len(extra_positives)} files of extra positives", hint="Give one of texts, and one of images."
        )
    rows = {"texts": len(text_rows), "images": len(image_rows)}
    judged = [check_pairs(exchange.read_array(path), name=str(path), **rows) for path in extra_positives]
    if empty := [path for path, pairs in zip(extra_positives, judged, strict=True) if not len(pairs)]:
        raise InputError(f"{empty[0]} holds no pair", hint="Name all right answers of some texts (or images).")
    rule = None if protocol is None else _protocol(protocol)
    image_units = exchange.unit_rows(image_rows, name=str(images))
    text_units = exchange.unit_rows(text_rows, name=str(texts))
    if rule is not None:
        if judged:  # they name rows of files that the protocol's rule may cut
            raise UsageError(f"protocol {rule.label} goes without extra positives", hint="Leave one of them out.")
        check_owners(of_image, texts=len(text_rows), images=len(image_rows))
        ids = [f"row {row}" for row in range(len(image_rows))]
        kept = rule.rows(of_image.tolist(), ids=ids, source=str(owners))
        text_units, of_image = text_units[kept], of_image[kept]
        ranks = retrieval_ranks_in_folds(
            image_units, texts=text_units, owners=of_image, folds=rule.folds, all_positives=true_recall
        )
    else:
        ranks = retrieval_ranks(
            image_units,
            texts=text_units,
            owners=of_image,
            all_positives=true_recall,
            progress=progress,
        )
    scores = measure.ranked(ranks, ks=KS, true_recall=true_recall)
    for direction, pairs in zip(measure.DIRECTIONS, judged, strict=False):
        forth = direction == measure.DIRECTIONS[0]
        scores |= measure.extended(
            direction,
            image_units,
            texts=text_units,
            owners=np.asarray(of_image),
            pairs=pairs if forth else pairs[:, ::-1],
            ks=KS,
        )
    for direction in measure.DIRECTIONS:
        one = getattr(ranks, direction)
        scores[f"{direction}_mean_rank"] = Scores.mean(one.expected_rank(), groups=one.image)
        median = float(np.median(one.expected_rank()))
        scores[f"{direction}_median_rank"] = Scores.whole(median, queries=len(one.query))
    notes = []
    if ranks.images_without_captions:
        notes.append(
            f"{ranks.images_without_captions} images have no text: they are candidates for texts, and no queries"
        )
    return Scored(
        protocol=rule.label if rule else "score-retrieval/1",
        n={
            "images": len(image_rows),
            "texts": len(text_units),
            "image_queries": len(ranks.image_to_text.query),
            "images_without_text": ranks.images_without_captions,
            **{
                f"{'text' if forth else 'image'}_queries_judged": len(np.unique(pairs[:, 0 if forth else 1]))
                for forth, pairs in zip((True, False), judged, strict=False)
            },
        },
        metrics=_values(scores),
        intervals=_intervals(scores),
        settings={
            "similarity": "cosine; rows were normalised in float32",
            "norms_before": {name: list(bounds) for name, bounds in lengths.items()},
            "dim": image_rows.shape[1],
            "hit": "any right answer among the first k",
            "ties": "expectation under random order",
            **({"protocol": rule.about, "folds": rule.folds} if rule else {}),
        },
        notes=tuple(notes),
    )


def questions(path: Path, *, predictions: Path, split: str = "test") -> Scored:
    """Accuracy on ScienceQA or MMMU of what a model wrote.

    Args:
        path: ScienceQA's folder, or MMMU's Parquet files.
        predictions: The model's responses.
        split: Of ScienceQA.

    Raises:
        InputError: A file is unreadable or bad, or the two are not of the same questions.
    """
    asked = question_sets.read_questions(path, split=split)
    given = question_sets.read_responses(predictions, questions=asked)
    scores = measure.answers(asked, responses=given)
    unnamed = len(asked.questions) - round(scores["answered_share"].columns[:, 0].sum())
    sizes = {
        name.removesuffix("_accuracy"): each.queries for name, each in scores.items() if name.endswith("_accuracy")
    }
    rules = {
        "scienceqa": "a letter alone or first, or after 'The answer is'; wrong where none is found",
        "mmmu": "the last option named, by letter or text; where none is found, the chance of a guess",
    }
    return Scored(
        protocol=f"score-{asked.benchmark}/1",
        n={"questions": len(asked.questions), **sizes},
        metrics=_values(scores),
        intervals=_intervals(scores),
        settings={"extraction": rules[asked.benchmark]},
        notes=(f"{unnamed} responses name no option",) if unnamed else (),
    )


def clipscore(images: Path, *, captions: Path, references: Path | None = None, owners: Path | None = None) -> Scored:
    """CLIPScore of captions, and RefCLIPScore with references, from embeddings by one CLIP.

    Args:
        images: ``.npy``, one row per image.
        captions: ``.npy``, the caption of each image.
        references: ``.npy``, reference captions.
        owners: ``.npy`` of integers: for each reference the row of its image.

    Raises:
        InputError: A file is unreadable or bad, a row has length zero, or they do not fit each other.
        UsageError: References without owners, or the reverse.
    """
    if (references is None) != (owners is None):
        raise UsageError("references and owners go together", hint="Give both --references and --owners, or neither.")
    image_rows, caption_rows = exchange.read_features(images), exchange.read_features(captions)
    _same_dimension(image_rows, caption_rows, images, captions)
    pictures = exchange.unit_rows(image_rows, name=str(images))
    texts = exchange.unit_rows(caption_rows, name=str(captions))
    n = {"images": len(pictures)}
    truths = of_image = None
    if references is not None and owners is not None:
        reference_rows = exchange.read_features(references)
        _same_dimension(image_rows, reference_rows, images, references)
        of_image = check_owners(exchange.read_array(owners), texts=len(reference_rows), images=len(pictures))
        truths = exchange.unit_rows(reference_rows, name=str(references))
        n["references"] = len(truths)
    scores = measure.clip_scores(pictures, captions=texts, references=truths, owners=of_image)
    return Scored(
        protocol="score-clipscore/1",
        n=n,
        metrics=_values(scores),
        intervals=_intervals(scores),
        settings={"dim": image_rows.shape[1], "clip_score": "2.5 max(cos, 0)", "ref_clip_score": "harmonic mean"},
        left_out={} if references is not None else {"ref_clip_score": "no references given"},
        notes=(f"published scores use CLIP ViT-B/32 and put {PROMPT!r} before every caption and reference",),
    )


def classification(
    train: Path,
    *,
    train_labels: Path,
    test: Path,
    test_labels: Path,
    neighbours: int = 20,
    strength: float = 1.0,
) -> Scored:
    """Classify test features by their nearest training features, the nearest class mean and a linear probe.

    Args:
        train: ``.npy`` of features, one row per image; rows are normalised.
        train_labels: ``.npy`` of integers from 0, the class of each row.
        test: The same of the test images, by the same encoder.
        test_labels: Their classes; each must be among the training classes.
        neighbours: Votes of k-NN.
        strength: C of the probe.

    Raises:
        InputError: A file is unreadable or bad, or they do not fit each other.
    """
    train_rows, test_rows = exchange.read_features(train), exchange.read_features(test)
    _same_dimension(train_rows, test_rows, train, test)
    known, asked = exchange.read_array(train_labels), exchange.read_array(test_labels)
    if known.dtype.kind not in "iu" or known.ndim != 1 or not len(known) or known.min() < 0:
        raise InputError(f"{train_labels} holds no class numbers from 0", hint="Give one integer per row.")
    names, numbers = np.unique(known, return_inverse=True)
    unknown = np.setdiff1d(asked, names)
    if len(unknown):
        hint = "Every class of the test set must be trained on."
        raise InputError(f"{test_labels} has class {unknown[0]}, which {train_labels} lacks", hint=hint)
    labels = np.searchsorted(names, asked)
    a, b = exchange.unit_rows(train_rows, name=str(train)), exchange.unit_rows(test_rows, name=str(test))
    scores, _ = measure.features(
        a, labels=numbers, test=b, test_labels=labels, neighbours=neighbours, strength=strength
    )
    return Scored(
        protocol="score-classification/1",
        n={"train": len(a), "test": len(b), "classes": len(names)},
        metrics=_values(scores),
        intervals=_intervals(scores),
        settings={
            "dim": a.shape[1],
            "neighbours": neighbours,
            "linear_probe": f"logistic regression, C = {strength:g}, on unit rows",
            "ties": "expectation under random order",
        },
    )


def fidelity(real: Path, *, generated: Path, neighbours: int = 5, progress: Progress | None = None) -> Scored:
    """Frechet and kernel distance, precision, recall, density, coverage and Vendi score of a generated set.

    Args:
        real: ``.npy`` of features of real images.
        generated: ``.npy`` of features of generated images, by the same encoder.
        neighbours: k of precision, recall, density and coverage.

    Raises:
        InputError: A file is unreadable or bad, or the two do not fit each other.
    """
    a, b = _pair(real, generated)
    frechet = frechet_distance(a, generated=b)
    manifolds = manifold_metrics(a, generated=b, k=neighbours, progress=progress)
    kernel = kernel_distance(a, generated=b)
    fewer, dim = min(len(a), len(b)), a.shape[1]
    notes = [
        _frechet_note(a, b),
        "features are used as given; the encoder they come from decides what the distances mean",
    ]
    if fewer <= dim:
        notes.append(f"{fewer} rows in {dim} dimensions: a covariance is singular, and frechet_distance mostly bias")
    return Scored(
        protocol="score-fidelity/1",
        n={"real": len(a), "generated": len(b)},
        metrics={
            "frechet_distance": frechet.distance,
            "kernel_distance": kernel.distance,
            "precision": manifolds.precision,
            "recall": manifolds.recall,
            "density": manifolds.density,
            "coverage": manifolds.coverage,
            "vendi_score": vendi_score(b),
            "real_vendi_score": vendi_score(a),
        },
        settings={
            "dim": dim,
            "neighbours": neighbours,
            "kernel": "(x . y / d + 1)^3, unbiased",
            "kernel_subsets": kernel.subsets,
            "kernel_subset_size": kernel.subset_size,
            "kernel_standard_deviation": kernel.standard_deviation,
            "kernel_seed": 0,
            "vendi": "order 1, cosine; vendi_score is of the generated set",
        },
        notes=tuple(notes),
    )


def gap(real: Path, *, generated: Path) -> Scored:
    """How far generated images lie from real ones in embedding space; row by row where the sets are equally long.

    Raises:
        InputError: A file is unreadable or bad, or the two do not fit each other.
    """
    a, b = _pair(real, generated)
    paired = len(a) == len(b)
    scores: dict[str, Scores] = {}
    left_out: dict[str, str] = {}
    if paired:
        scores["paired_cosine"] = Scores.mean(gaps.paired_cosine(a, generated=b), groups=np.arange(len(a)))
    else:
        left_out["paired_cosine"] = f"{len(a)} real and {len(b)} generated rows are no pairs"
    metrics = {
        "unpaired_cosine": gaps.unpaired_cosine(a, generated=b, paired=paired),
        "centroid_cosine": gaps.centroid_cosine(a, generated=b),
        "centroid_distance": gaps.centroid_distance(a, generated=b),
        "covariance_distance": gaps.covariance_distance(a, generated=b),
        "frechet_distance": frechet_distance(a, generated=b).distance,
    }
    compared = min(len(a), len(b), COMPARED_ROWS)
    x, y = (rows[evenly_spaced(len(rows), limit=compared)] for rows in (a, b))
    try:
        metrics["maximum_mean_discrepancy"] = gaps.maximum_mean_discrepancy(x, generated=y)
    except InputError as error:
        left_out["maximum_mean_discrepancy"] = error.message
    if compared >= FEWEST_FOR_SEPARABILITY:
        metrics["linear_separability"] = gaps.linear_separability(x, generated=y)
        metrics["neighbour_separability"] = gaps.neighbour_separability(x, generated=y)
    else:
        why = f"{compared} rows of each set are fewer than {FEWEST_FOR_SEPARABILITY}"
        left_out |= {"linear_separability": why, "neighbour_separability": why}
    lengths = {"real": exchange.norm_range(a), "generated": exchange.norm_range(b)}
    notes = [
        _frechet_note(a, b),
        "a small gap alone proves nothing, a collapsed encoder has none: read it beside task metrics",
    ]
    if paired:
        notes.append("the files are equally long, so row i of both is taken as one pair; unpaired_cosine leaves it out")
    if any(abs(bound - 1) > 1e-3 for bounds in lengths.values() for bound in bounds):
        notes.append("rows are not all of unit length: the distances and covariances are of the rows as given")
    return Scored(
        protocol="score-gap/1",
        n={"real": len(a), "generated": len(b)},
        metrics={**_values(scores), **metrics},
        intervals=_intervals(scores),
        settings={
            "dim": a.shape[1],
            "rows_are_pairs": paired,
            "norms": {name: list(bounds) for name, bounds in lengths.items()},
            "compared_rows": compared,
            "compared_rows_of": "maximum_mean_discrepancy and separabilities, evenly spaced, of each set",
            "maximum_mean_discrepancy": "Gaussian kernel, median width, squared, unbiased",
            "linear_separability": "balanced accuracy, ridge probe, 5 folds",
            "neighbour_separability": "balanced accuracy, 5 neighbours by cosine",
        },
        left_out=left_out,
        notes=tuple(notes),
    )


def _protocol(name: str) -> protocols.Protocol:
    found = protocols.find(name)
    if not isinstance(found, protocols.Protocol):
        known = [each.name for each in protocols.REGISTRY.values() if isinstance(each, protocols.Protocol)]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(known)}."
        raise UsageError(f"there is no retrieval protocol {name!r}", hint=hint)
    return found


def _values(scores: Mapping[str, Scores]) -> dict[str, float]:
    return {name: score.value for name, score in scores.items()}


def _intervals(scores: Mapping[str, Scores]) -> dict[str, tuple[float, float]]:
    found = {}
    for name, score in scores.items():
        low, high = score.interval(Bootstrap(draws=RESAMPLES, level=CONFIDENCE))
        if low is not None and high is not None:
            found[name] = low, high
    return found


def _frechet_note(a: np.ndarray, b: np.ndarray) -> str:
    fewer, dim = min(len(a), len(b)), a.shape[1]
    return f"frechet_distance has a bias of about d^2 / (2 N), here d = {dim} and N = {fewer}: compare only at equal N"


def _pair(real: Path, generated: Path) -> tuple[Float[np.ndarray, "r dim"], Float[np.ndarray, "g dim"]]:
    a, b = exchange.read_features(real), exchange.read_features(generated)
    _same_dimension(a, b, real, generated)
    return a, b


def _same_dimension(a: np.ndarray, b: np.ndarray, first: Path, second: Path) -> None:
    if a.shape[1] != b.shape[1]:
        raise InputError(
            f"{first} has {a.shape[1]} dimensions, {second} has {b.shape[1]}",
            hint="Embed both with the same encoder.",
        )
