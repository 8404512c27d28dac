"""Caption metrics: tokens against the original tokeniser, scores by hand and against pycocoevalcap."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmail_cli.components.metrics.captioning import bleu, by_image, meteor, score_captions
from gmail_cli.components.metrics.intervals import Bootstrap, bootstrap_sums
from gmail_cli.components.metrics.ptb import tokenise
from gmail_cli.errors import InputError, UsageError

PUNCTUATION = [
    "''",
    "'",
    "``",
    "`",
    "-LRB-",
    "-RRB-",
    "-LCB-",
    "-RCB-",
    ".",
    "?",
    "!",
    ",",
    ":",
    "-",
    "--",
    "...",
    ";",
]


@pytest.fixture(scope="session")
def original() -> Path:
    """The folder of pycocoevalcap, where Java can run its programs; CI must have both."""
    package = find_spec("pycocoevalcap")
    if package is None or not package.submodule_search_locations or shutil.which("java") is None:
        message = "pycocoevalcap or Java is not installed"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return Path(package.submodule_search_locations[0])


@pytest.fixture(scope="session")
def coco(shared_data: Path) -> dict[str, list[str]]:
    captions: dict[str, list[str]] = {}
    for row in json.loads((shared_data / "coco" / "captions_val2017.json").read_text())["annotations"]:
        captions.setdefault(str(row["image_id"]), []).append(row["caption"])
    return captions


def java_tokens(folder: Path, captions: list[str]) -> list[str]:
    command = ["java", "-Dfile.encoding=UTF-8", "-cp", folder / "tokenizer" / "stanford-corenlp-3.4.1.jar"]
    command += ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    text = "\n".join(caption.replace("\n", " ") for caption in captions)
    done = subprocess.run(command, input=text.encode(), capture_output=True, check=True)
    lines = done.stdout.decode().split("\n")
    return [" ".join(w for w in line.rstrip().split(" ") if w not in PUNCTUATION) for line in lines]


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("A man's T-shirt, in St. Paul.", "a man 's t-shirt in st. paul"),
        ("They can't; DON'T, it isn't won't", "they ca n't do n't it is n't wo n't"),
        ("I'm you're he'll they've she'd", "i 'm you 're he 'll they 've she 'd"),
        ("the boys' toys and 'bye' \"hello\" “you” it’s", "the boys toys and bye hello you it 's"),
        ("a (small) dog [big] {huge}", "a -lrb- small -rrb- dog -lsb- big -rsb- -lcb- huge -rcb-"),
        ("1/2 3/4 and/or a/b/c/d 10/29/2011", "1/2 3/4 and/or a/b/c / d 10/29/2011"),
        ("1 1/2 cups ½ 1½", "1\u00a01/2 cups 1/2 1 1/2"),
        ("12:43pm 5 p.m. 1,000.50 10,000. -5 .5 5.", "12:43 pm 5 p.m. 1,000.50 10,000 -5 .5 5"),
        ("$5 US$ 5 £5 €5 5¢ 50% #1 #tag @me", "$ 5 us$ 5 # 5 $ 5 5 cents 50 % # 1 #tag @me"),
        ("www.foo.com foo.com street.A cat!dog", "www.foo.com foo.com street.a cat!dog"),
        ("U.S. and T.V. U.S.-based e.g. etc. so.", "u.s. and t.v. u.s.-based e.g. etc. so"),
        ("no. 1 is no. good, Fig. 5", "no. 1 is no good fig. 5"),
        ("wait...what -- a - b a-b-c a--b semi- … –", "wait what a b a-b-c a b semi"),
        (
            "rock'n'roll o'clock O'Brien d'oeuvre ma'am y'all",
            "rock 'n' roll o'clock o'brien d'oeuvre ma'am y' all",
        ),
        (
            "'em '90s 90's 'tis C'mon gonna cannot wanna-be",
            "'em '90s 90 's 't is c'mon gon na can not wanna-be",
        ),
        ("vitamin C. The J. Doe is here.", "vitamin c the j. doe is here"),
        ("R&B a&b C++ a_b __ ** = == <3 :) café 永利", "r&b a & b c++ a_b __ ** = = = < 3 :-rrb- café 永利"),
        ("Wow!!! what?! ok? yes!", "wow !!! what ?! ok yes"),
        ("  two\tspaces\u00a0here \n", "two spaces here"),
        ("", ""),
    ],
)
def test_tokens_of_the_original(caption: str, tokens: str) -> None:
    assert tokenise(caption) == tokens


def test_golden_tokens_are_the_originals(original: Path) -> None:
    marks = next(m for m in test_tokens_of_the_original.pytestmark if m.name == "parametrize")  # type: ignore[attr-defined]
    golden = [(caption, tokens) for caption, tokens in marks.args[1] if tokens]
    assert java_tokens(original, [caption.rstrip("\n") for caption, _ in golden]) == [t for _, t in golden]


def test_tokens_of_all_coco_and_flickr_captions(original: Path, shared_data: Path) -> None:
    """65,000 real captions in the order of their files, not one token different."""
    captions = [
        row["caption"]
        for name in (
            "coco/captions_val2017.json",
            "flickr8k/captions_train.json",
            "flickr8k/captions_dev.json",
        )
        for row in json.loads((shared_data / name).read_text())["annotations"]
    ]
    theirs = java_tokens(original, captions)
    wrong = [(c, a, b) for c, a in zip(captions, theirs, strict=True) if a != (b := tokenise(c))]
    assert len(captions) > 60_000
    assert wrong == []


def test_scores_equal_pycocoevalcap(original: Path, coco: dict[str, list[str]]) -> None:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    ids = list(coco)[:300]
    references = {i: coco[i][1:] for i in ids}
    hypotheses = {i: coco[i][0] for i in ids[:250]} | dict.fromkeys(ids[250:], coco[ids[0]][0])
    hypotheses[ids[0]], hypotheses[ids[1]] = "", "zebra"
    found = score_captions(references, hypotheses, metrics=("bleu", "rouge_l", "cider"))
    truths = {i: [tokenise(text) for text in texts] for i, texts in references.items()}
    captions = {i: [tokenise(text)] for i, text in hypotheses.items()}
    scores, _ = Bleu(4).compute_score(truths, captions, verbose=0)
    assert [found.corpus[f"bleu_{n}"] for n in range(1, 5)] == pytest.approx(scores, abs=1e-9)
    for name, peer in (("rouge_l", Rouge()), ("cider", Cider())):
        score, each = peer.compute_score(truths, captions)
        assert found.corpus[name] == pytest.approx(score, abs=1e-9)
        np.testing.assert_allclose(found.per_image[name], each, atol=1e-9)
    assert found.ids == tuple(ids)


def test_meteor_equals_pycocoevalcap(original: Path) -> None:
    """Values that pycocoevalcap 1.2 itself gives for these captions."""
    references = {
        "a": ["A dog runs across the green lawn.", "The dog is running on grass."],
        "b": ["Two people sit on a bench."],
        "c": ["A red bus, parked near a café."],
    }
    hypotheses = {
        "a": "A dog running over grass",
        "b": "A cat sleeps on a bench",
        "c": "A red bus parked near a café",
    }
    found = score_captions(references, hypotheses, metrics=("meteor",))
    assert found.absent == {}
    assert found.corpus == {"meteor": pytest.approx(0.4165038910329121, abs=1e-12)}
    expected = [0.30379746835443044, 0.25162867133197164, 1.0]
    np.testing.assert_allclose(found.per_image["meteor"], expected, atol=1e-12)
    assert found.meteor_counts is not None
    drawn = found.meteor_counts[[0, 0, 2, 1, 1, 1]].sum(axis=0, keepdims=True)
    assert meteor(drawn)[0] == pytest.approx(0.3479174864805867, abs=1e-12)  # its score of a, a, c, b, b, b


def test_meteor_worked_by_hand() -> None:
    # 4 words of 5 and of 6 match exactly in 2 chunks: 3 content words, 1 function word; 2 of 5 and 3 of 6 are function
    # words. P = (0.75 x 3 + 0.25) / (0.75 x 3 + 0.25 x 2), R = 2.5 / (0.75 x 3 + 0.25 x 3).
    counts = np.zeros((2, 23))
    counts[0, :8], counts[0, 20:] = [5, 6, 2, 3, 3, 3, 1, 1], [2, 4, 4]
    counts[1, :4] = [3, 4, 1, 1]  # nothing matches
    precision, recall = 2.5 / 2.75, 2.5 / 3
    mean = 1 / (0.15 / precision + 0.85 / recall)
    np.testing.assert_allclose(meteor(counts), [mean * (1 - 0.6 * 0.5**0.2), 0])


def test_without_java_meteor_is_absent_and_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = score_captions({"a": ["a cat"]}, {"a": "a cat"})
    assert "meteor" not in found.corpus
    assert "meteor" not in found.per_image
    assert "no 'java' is on the PATH" in found.absent["meteor"]
    assert found.corpus["bleu_1"] == pytest.approx(1)


def test_a_broken_java_is_absent_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, original: Path) -> None:
    broken = tmp_path / "java"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = score_captions({"a": ["a cat"]}, {"a": "a cat"}, metrics=("meteor",))
    assert found.corpus == {}
    assert "stopped after 0 of 1 captions" in found.absent["meteor"]


def test_bleu_worked_by_hand() -> None:
    # Unigrams the, cat, the, cat: at most one "the" and two "cat" match; length 5 is closest.
    found = score_captions({"x": ["The cat, a cat here.", "A cat!"]}, {"x": "the cat the cat"}, metrics=("bleu",))
    np.testing.assert_array_equal(found.bleu_counts, [[4, 5, 3, 4, 1, 3, 0, 2, 0, 1]])
    penalty = math.exp(1 - 5 / 4)
    assert found.corpus["bleu_1"] == pytest.approx(3 / 4 * penalty)
    assert found.corpus["bleu_2"] == pytest.approx((3 / 4 * 1 / 3) ** 0.5 * penalty)
    assert found.corpus["bleu_3"] == pytest.approx(0, abs=1e-4)


def test_bleu_4_of_a_corpus_can_exceed_bleu_1() -> None:
    # "a" finds nothing, "a a a a" everything: 4 of 5 unigrams, 3 of 3 bigrams, 2 of 2, 1 of 1; 5 words against 4.
    found = score_captions({"x": [""], "y": ["a a a a"]}, {"x": "a", "y": "a a a a"}, metrics=("bleu",))
    assert found.corpus["bleu_1"] == pytest.approx(4 / 5)
    assert found.corpus["bleu_4"] == pytest.approx((4 / 5) ** (1 / 4))


def test_rouge_l_worked_by_hand() -> None:
    # Longest common subsequences: "a dog ran" (3 of 4, 3 of 5) and "a ran" (2 of 4, 2 of 2).
    found = score_captions({"x": ["a big dog quickly ran", "a ran"]}, {"x": "a dog has ran"}, metrics=("rouge_l",))
    precision, recall = 3 / 4, 1.0
    expected = (1 + 1.44) * precision * recall / (recall + 1.44 * precision)
    assert found.corpus["rouge_l"] == pytest.approx(expected)


def test_cider_equals_its_definition() -> None:
    references = {"a": ["a red dog runs", "the dog runs fast"], "b": ["a cat sits"], "c": ["a dog and a cat"]}
    hypotheses = {"a": "a dog runs fast", "b": "a cat sits", "c": "fish"}

    def grams(text: str, n: int) -> Counter[tuple[str, ...]]:
        words = text.split()
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    expected = {}
    for image, caption in hypotheses.items():
        total = 0.0
        for n in range(1, 5):
            df = Counter(g for texts in references.values() for g in {g for t in texts for g in grams(t, n)})

            def vector(text: str, n: int = n, df: Counter = df) -> dict:  # type: ignore[type-arg]
                return {g: c * math.log(3 / max(1, df[g])) for g, c in grams(text, n).items()}

            for text in references[image]:
                own, theirs = vector(caption), vector(text)
                dot = sum(min(own[g], theirs.get(g, 0)) * theirs.get(g, 0) for g in own)
                norm = math.sqrt(sum(v * v for v in own.values()) * sum(v * v for v in theirs.values()))
                gap = sum(grams(caption, 2).values()) - sum(grams(text, 2).values())
                total += (dot / norm if norm else 0) * math.exp(-(gap**2) / 72) / len(references[image])
        expected[image] = 10 * total / 4
    found = score_captions(references, hypotheses, metrics=("cider",))
    np.testing.assert_allclose(found.per_image["cider"], list(expected.values()))
    assert expected["b"] == pytest.approx(10 * 3 / 4)  # three words have no 4-grams
    assert expected["c"] == 0


def test_one_image_has_no_document_frequencies() -> None:
    assert score_captions({"a": ["a cat"]}, {"a": "a cat"}, metrics=("cider",)).corpus == {"cider": 0}


def test_corpus_bleu_can_be_resampled() -> None:
    references = {str(i): [f"a dog number {i} runs in the park", "two dogs run"] for i in range(8)}
    hypotheses = {str(i): f"a dog number {i % 3} runs in a park" for i in range(8)}
    found = score_captions(references, hypotheses, metrics=("bleu",))
    assert found.bleu_counts is not None
    interval = bootstrap_sums(
        found.bleu_counts, statistic=lambda sums: bleu(sums)[:, 3], bootstrap=Bootstrap(draws=200)
    )
    assert interval.value == pytest.approx(found.corpus["bleu_4"])
    assert interval.low < interval.value < interval.high


words = st.lists(st.sampled_from(["a", "the", "dog", "cat", "runs", "sits", "red", "on", "mat"]), max_size=8).map(
    " ".join
)


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(st.sampled_from("abcdef"), st.tuples(words, st.lists(words, min_size=1, max_size=3)), min_size=1)
)
def test_scores_are_in_range_and_ignore_order(images: dict[str, tuple[str, list[str]]]) -> None:
    references = {image: list(texts) for image, (_, texts) in images.items()}
    hypotheses = {image: caption for image, (caption, _) in images.items()}
    kept = json.dumps([references, hypotheses])
    metrics = ("bleu", "rouge_l", "cider")
    found = score_captions(references, hypotheses, metrics=metrics)
    assert json.dumps([references, hypotheses]) == kept
    for name, score in found.corpus.items():
        assert 0 <= score <= (10 + 1e-9 if name == "cider" else 1 + 1e-9)
    turned = {image: texts[::-1] for image, texts in reversed(references.items())}
    again = score_captions(turned, hypotheses, metrics=metrics)
    assert again.corpus == pytest.approx(found.corpus)
    copied = score_captions(references, {image: texts[0] for image, texts in references.items()}, metrics=metrics)
    assert copied.corpus["rouge_l"] == pytest.approx(1)
    assert copied.corpus["cider"] >= found.corpus["cider"] - 10


def test_ids_that_do_not_fit_are_named() -> None:
    references = {str(i): ["a cat"] for i in range(9)}
    hypotheses = dict.fromkeys(references, "a cat")
    with pytest.raises(InputError, match=r"7 images have references but no caption: '2', '3', '4', '5', '6', \.\.\."):
        score_captions(references, {"0": "a cat", "1": "a cat"})
    with pytest.raises(InputError, match="1 images have a caption but no references: 'x'"):
        score_captions(references, hypotheses | {"x": "a cat"})
    with pytest.raises(InputError, match="no list of references: '3', '4'"):
        score_captions(references | {"3": [], "4": "a cat"}, hypotheses)  # type: ignore[dict-item]
    with pytest.raises(InputError, match="no reference captions"):
        score_captions({}, {})
    with pytest.raises(UsageError, match="unknown caption metric 'spice'"):
        score_captions(references, hypotheses, metrics=("spice",))
    with pytest.raises(InputError, match="1 captions are for images that have one already: 'a'"):
        by_image([("a", "x"), ("b", "y"), ("a", "z")])
    assert by_image([("a", "x"), ("b", "y")]) == {"a": "x", "b": "y"}
