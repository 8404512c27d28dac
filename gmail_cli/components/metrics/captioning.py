"""Caption metrics as the COCO evaluation defines them: BLEU, METEOR, ROUGE-L, CIDEr.

Captions are tokenised first (:mod:`gmail_cli.components.metrics.ptb`). "CIDEr" is the field's CIDEr, that is
CIDEr-D (Vedantam et al. 2015: clipped counts, a Gaussian length penalty of sigma 6), on its 0-10 scale, with
document frequencies from the references evaluated. So scores of different image sets, or of shards, must not
be averaged, and a single image scores 0.

Everything but METEOR is computed here. METEOR 1.5 is a Java program that ``pycocoevalcap`` carries; without
that package or without Java the metric is absent and the reason is given.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO

import numpy as np
from jaxtyping import Float

from gmail_cli.components.metrics.ptb import tokenise
from gmail_cli.errors import InputError, SetupError, UsageError

METRICS = ("bleu", "meteor", "rouge_l", "cider")
_ORDERS = 4
_SIGMA = 6.0
_BETA = 1.2
_ALPHA, _BETA_METEOR, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_MODULES = (1.0, 0.6, 0.8, 0.6)

NGrams = tuple[Counter[tuple[str, ...]], ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class CaptionScores:
    """Scores of one set of captions.

    Attributes:
        corpus: ``bleu_1`` .. ``bleu_4``, ``meteor``, ``rouge_l`` (fractions) and ``cider`` (0-10).
        per_image: ``meteor``, ``rouge_l``, ``cider`` of each image; the last two average to the corpus score.
        bleu_counts: Per image: caption length, length of the closest reference, then for n = 1..4 matching
            and all n-grams. :func:`bleu` of any sum of rows is the BLEU of those images: for bootstrapping.
        meteor_counts: Per image what METEOR's program counts; :func:`meteor` of any sum of rows likewise.
        ids: The image of each row of the above, in the order of the references.
        absent: Why a metric that was asked for is not there.
    """

    corpus: dict[str, float]
    per_image: dict[str, Float[np.ndarray, " images"]]
    bleu_counts: Float[np.ndarray, "images 10"] | None
    meteor_counts: Float[np.ndarray, "images 23"] | None
    ids: tuple[str, ...]
    absent: dict[str, str]


def score_captions(
    references: Mapping[str, Sequence[str]],
    hypotheses: Mapping[str, str],
    *,
    metrics: Sequence[str] = METRICS,
) -> CaptionScores:
    """Score one caption per image against its references.

    Args:
        references: Untokenised references of each image id, at least one each.
        hypotheses: The untokenised caption of each image id, for the same ids.
        metrics: Some of ``bleu``, ``meteor``, ``rouge_l``, ``cider``.

    Raises:
        InputError: If ids are missing on either side, or an image has no reference.
        UsageError: For an unknown metric.
    """
    _check(references, hypotheses, metrics)
    ids = tuple(references)
    captions = [tokenise(hypotheses[image]) for image in ids]
    truths = [[tokenise(text) for text in references[image]] for image in ids]

    corpus: dict[str, float] = {}
    per_image: dict[str, Float[np.ndarray, " images"]] = {}
    absent: dict[str, str] = {}
    counts: Float[np.ndarray, "images 10"] | None = None
    meteor_counts: Float[np.ndarray, "images 23"] | None = None
    if "bleu" in metrics or "cider" in metrics:
        caption_grams = [_ngrams(text) for text in captions]
        truth_grams = [[_ngrams(text) for text in texts] for texts in truths]
    if "bleu" in metrics:
        counts = np.array([_bleu_counts(*pair) for pair in zip(caption_grams, truth_grams, strict=True)])
        scores = bleu(counts.sum(axis=0, keepdims=True))[0]
        corpus |= {f"bleu_{n}": float(score) for n, score in enumerate(scores, start=1)}
    if "meteor" in metrics:
        try:
            meteor_counts = _meteor_counts(captions, truths)
        except SetupError as error:
            absent["meteor"] = str(error)
        else:
            per_image["meteor"] = meteor(meteor_counts)
            corpus["meteor"] = float(meteor(meteor_counts.sum(axis=0, keepdims=True))[0])
    if "rouge_l" in metrics:
        per_image["rouge_l"] = np.array([_rouge_l(*pair) for pair in zip(captions, truths, strict=True)])
        corpus["rouge_l"] = float(per_image["rouge_l"].mean())
    if "cider" in metrics:
        per_image["cider"] = _cider(caption_grams, truth_grams)
        corpus["cider"] = float(per_image["cider"].mean())
    return CaptionScores(
        corpus=corpus, per_image=per_image, bleu_counts=counts, meteor_counts=meteor_counts, ids=ids, absent=absent
    )


def by_image(captions: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The one caption of each image, from (image id, caption) rows such as a COCO results file holds.

    Raises:
        InputError: If an image has more than one caption.
    """
    found: dict[str, str] = {}
    twice = []
    for image, caption in captions:
        if image in found:
            twice.append(image)
        found[image] = caption
    if twice:
        raise InputError(
            f"{len(twice)} captions are for images that have one already: {_some(twice)}",
            hint="Keep one caption per image.",
        )
    return found


def bleu(counts: Float[np.ndarray, "rows 10"]) -> Float[np.ndarray, "rows 4"]:
    """BLEU-1 to BLEU-4 of summed counts (see :attr:`CaptionScores.bleu_counts`), one row each.

    The geometric mean of n-gram precisions times ``exp(1 - reference / caption length)`` for short captions
    (Papineni et al. 2002); the constants that keep 0 / 0 defined are the COCO evaluation's.
    """
    length, reference = counts[:, 0], counts[:, 1]
    precisions = (counts[:, 2::2] + 1e-15) / (counts[:, 3::2] + 1e-9)
    means = np.cumprod(precisions, axis=1) ** (1 / np.arange(1, _ORDERS + 1))
    ratio = (length + 1e-15) / (reference + 1e-9)
    penalty = np.exp(np.minimum(0.0, 1 - 1 / ratio))
    return means * penalty[:, None]


def meteor(counts: Float[np.ndarray, "rows 23"]) -> Float[np.ndarray, " rows"]:
    """METEOR 1.5 of summed counts (see :attr:`CaptionScores.meteor_counts`), one row each.

    The harmonic mean of weighted precision and recall, less a penalty for fragmentation, with the program's parameters
    for English (Denkowski and Lavie 2014, section 2 and table 1).

    Args:
        counts: Words of caption and reference, function words of both; for exact, stem, synonym and paraphrase matches
            the content words of both and function words of both; chunks, words matched of both.
    """
    caption, reference, caption_function, reference_function = counts[:, :4].T
    matches = counts[:, 4:20].reshape(len(counts), len(_MODULES), 4) * np.array(_MODULES)[:, None]
    content, other = matches[:, :, :2].sum(axis=1), matches[:, :, 2:].sum(axis=1)
    matched = _DELTA * content + (1 - _DELTA) * other
    lengths = np.stack(
        [
            _DELTA * (caption - caption_function) + (1 - _DELTA) * caption_function,
            _DELTA * (reference - reference_function) + (1 - _DELTA) * reference_function,
        ],
        axis=1,
    )
    precision, recall = np.divide(matched, lengths, out=np.zeros_like(matched), where=lengths > 0).T
    found = (precision > 0) & (recall > 0)
    safe_precision, safe_recall = np.where(found, precision, 1), np.where(found, recall, 1)
    mean = np.where(found, 1 / ((1 - _ALPHA) / safe_precision + _ALPHA / safe_recall), 0)
    words = counts[:, 21:].mean(axis=1)
    fragmentation = np.divide(counts[:, 20], words, out=np.zeros(len(counts)), where=words > 0)
    return mean * (1 - _GAMMA * fragmentation**_BETA_METEOR)


def _ngrams(text: str) -> NGrams:
    words = text.split()
    return tuple(Counter(zip(*(words[i:] for i in range(n)), strict=False)) for n in range(1, _ORDERS + 1))


def _bleu_counts(caption: NGrams, truths: Sequence[NGrams]) -> list[float]:
    length = caption[0].total()
    closest = min((abs(truth[0].total() - length), truth[0].total()) for truth in truths)[1]
    row = [length, closest]
    for order in range(_ORDERS):
        matching = 0
        for gram, count in caption[order].items():
            matching += min(count, max(truth[order].get(gram, 0) for truth in truths))
        row += [matching, max(0, length - order)]
    return [float(value) for value in row]


def _rouge_l(caption: str, truths: Sequence[str]) -> float:
    """F-measure (beta 1.2) of the best precision and the best recall of the longest common subsequence."""
    words = caption.split(" ")
    places: dict[str, int] = {}
    for place, word in enumerate(words):
        places[word] = places.get(word, 0) | 1 << place
    precision = recall = 0.0
    for truth in truths:
        others = truth.split(" ")
        common = _common(places, len(words), others)
        precision = max(precision, common / len(words))
        recall = max(recall, common / len(others))
    if not precision or not recall:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _common(places: Mapping[str, int], length: int, others: Sequence[str]) -> int:
    """Length of the longest common subsequence, one machine word operation per word (Hyyro 2004).

    ``places`` maps each word of the first text to the bits of its places.
    """
    full = (1 << length) - 1
    row = full
    for word in others:
        match = row & places.get(word, 0)
        row = (row + match | row - match) & full
    return length - row.bit_count()


def _cider(captions: Sequence[NGrams], truths: Sequence[Sequence[NGrams]]) -> Float[np.ndarray, " images"]:
    log_images = math.log(len(captions))
    seen: list[Counter[tuple[str, ...]]] = [Counter() for _ in range(_ORDERS)]
    for texts in truths:
        for order in range(_ORDERS):
            seen[order].update(set().union(*(text[order] for text in texts)))
    idf = [{gram: log_images - math.log(count) for gram, count in counter.items()} for counter in seen]

    scores = np.empty(len(captions))
    for row, (caption, texts) in enumerate(zip(captions, truths, strict=True)):
        total = 0.0
        for order in range(_ORDERS):
            weights = idf[order]
            own = {gram: count * weights.get(gram, log_images) for gram, count in caption[order].items()}
            own_square = sum(value * value for value in own.values())
            for text in texts:
                theirs = text[order]
                dot = 0.0
                for gram, value in own.items():
                    count = theirs.get(gram)
                    if count:
                        other = count * weights[gram]
                        dot += min(value, other) * other
                if dot:
                    square = 0.0
                    for gram, count in theirs.items():
                        square += (count * weights[gram]) ** 2
                    # Lengths are counted in bigrams, as the COCO evaluation does.
                    delta = caption[1].total() - text[1].total()
                    total += dot / math.sqrt(own_square * square) * math.exp(-(delta**2) / (2 * _SIGMA**2))
        scores[row] = 10 * total / (_ORDERS * len(texts))
    return scores


def _meteor_counts(captions: Sequence[str], truths: Sequence[Sequence[str]]) -> Float[np.ndarray, "images 23"]:
    """What METEOR 1.5's Java program counts of each caption and its best reference, by its line protocol.

    A caption that equals its reference counts no chunk, as where the program adds captions up.

    Raises:
        SetupError: If Java or the program is missing, or it fails.
    """
    java, package = shutil.which("java"), find_spec("pycocoevalcap")
    if java is None:
        raise SetupError("METEOR needs Java, and no 'java' is on the PATH", hint="Install a Java runtime.")
    if package is None or not package.submodule_search_locations:
        raise SetupError("METEOR needs the program that pycocoevalcap carries", hint="Run: pip install pycocoevalcap")
    program = Path(package.submodule_search_locations[0]) / "meteor" / "meteor-1.5.jar"
    command = [
        java,
        "-Dfile.encoding=UTF-8",
        "-Xmx2G",
        "-jar",
        str(program),
        "-",
        "-",
        "-stdio",
        "-l",
        "en",
        "-norm",
    ]
    lines = [
        " ||| ".join(("SCORE", *texts, caption.replace("|||", "").replace("  ", " ")))
        for caption, texts in zip(captions, truths, strict=True)
    ]
    with subprocess.Popen(
        command,
        cwd=program.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        feed = threading.Thread(target=_write, args=(process.stdin, lines), daemon=True)
        feed.start()
        answers = [process.stdout.readline().strip() for _ in lines]
        feed.join()
        _write(process.stdin, [], close=True)
        process.kill()
    try:
        counts = np.array([[float(number) for number in answer.split()] for answer in answers]).reshape(
            len(answers), 23
        )
    except ValueError:
        raise SetupError(
            f"METEOR ({program}) stopped after {sum(map(bool, answers))} of {len(answers)} captions",
            hint="Run that program by hand to see its message, or leave meteor out.",
        ) from None
    whole = (counts[:, 21] == counts[:, 0]) & (counts[:, 22] == counts[:, 1]) & (counts[:, 20] == 1)
    counts[whole, 20] = 0
    return counts


def _write(stream: IO[str], lines: Sequence[str], *, close: bool = False) -> None:
    with contextlib.suppress(BrokenPipeError):  # the program ended; whoever reads from it finds out
        for line in lines:
            stream.write(line + "\n")
        stream.flush()
    if close:
        with contextlib.suppress(BrokenPipeError):
            stream.close()


def _check(references: Mapping[str, Sequence[str]], hypotheses: Mapping[str, str], metrics: Sequence[str]) -> None:
    unknown = [name for name in metrics if name not in METRICS]
    if unknown:
        raise UsageError(f"unknown caption metric {unknown[0]!r}", hint=f"Choose from {', '.join(METRICS)}.")
    if not references:
        raise InputError("there are no reference captions", hint="Check the split and the caption file.")
    missing = [image for image in references if image not in hypotheses]
    extra = [image for image in hypotheses if image not in references]
    for ids, what in (
        (missing, "have references but no caption"),
        (extra, "have a caption but no references"),
    ):
        if ids:
            raise InputError(f"{len(ids)} images {what}: {_some(ids)}", hint="Score exactly one set of images.")
    empty = [image for image, texts in references.items() if isinstance(texts, str) or not texts]
    if empty:
        raise InputError(
            f"{len(empty)} images have no list of references: {_some(empty)}",
            hint="Give each image a list of at least one caption.",
        )


def _some(ids: Sequence[str]) -> str:
    return ", ".join(map(repr, ids[:5])) + (", ..." if len(ids) > 5 else "")
