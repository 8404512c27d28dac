"""ECCV Caption and CxC: the numbers of the package eccv_caption, from the annotations that it carries."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest

from gmail_cli.components import exchange, measure
from gmail_cli.components.tables import Header, Table

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that it does without ujson
    import eccv_caption

DATA = Path(eccv_caption.__file__).parent / "data"


def load(name: str) -> dict[int, list[int]]:
    return {int(key): [int(each) for each in value] for key, value in json.loads((DATA / name).read_text()).items()}


def table(name: str, ids: list[int], vectors: np.ndarray, rows: list[dict[str, str]] | None = None) -> Table:
    header = Header(
        name=name,
        modality="image" if rows is None else "text",
        flow="real" if rows is None else "text",
        encoder="e",
        encoder_digest="0" * 64,
        space="0" * 64,
        preprocess="p",
        dim=vectors.shape[1],
        dtype="float32",
        count=len(vectors),
        normalised=True,
    )
    return Table(vectors=vectors, rows=rows or [{"id": str(each)} for each in ids], header=header)


def test_the_numbers_are_those_of_eccv_caption() -> None:
    """Over the 5,000 images and 25,000 captions of COCO's Karpathy test split that the annotations are of."""
    images_of = load("original_caption_to_image.json")
    captions = np.load(DATA / "coco_test_ids.npy").tolist()
    images = list(dict.fromkeys(images_of[caption][0] for caption in captions))
    place = {image: row for row, image in enumerate(images)}
    owners = np.array([place[images_of[caption][0]] for caption in captions])
    rng = np.random.default_rng(0)
    seen = rng.normal(size=(len(images), 12)).astype(np.float32)
    said = seen[owners] + 0.7 * rng.normal(size=(len(captions), 12)).astype(np.float32)
    seen, said = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (seen, said))

    judge = eccv_caption.Metrics()
    captions_of_image, images_of_caption = {}, {}
    ids = {"captions": np.array(captions), "images": np.array(images)}
    scores = said @ seen.T
    for rows, answers, names, candidates in (
        (scores, images_of_caption, captions, ids["images"]),
        (scores.T, captions_of_image, images, ids["captions"]),
    ):
        for name, row in zip(names, rows, strict=True):
            top = np.argpartition(-row, 150)[:150]  # the longest list has fewer right answers
            answers[name] = candidates[top[np.argsort(-row[top], kind="stable")]].tolist()
    lists = {"i2t": captions_of_image, "t2i": images_of_caption}
    ways = {"t2i": "text_to_image", "i2t": "image_to_text"}

    texts = [
        {"id": str(each), "owner": str(images_of[each][0]), "text": str(each), "kind": "short"} for each in captions
    ]
    for name in ("eccv", "cxc"):
        found = measure.retrieval(
            table("test-images", images, seen),
            texts=table("test-texts", captions, said, texts),
            ks=(1, 5, 10),
            extra_positives=[
                exchange.read_extra_positives(DATA / f"{name}_{way}.json")
                for way in ("caption_to_image", "image_to_caption")
            ],
        )
        means = {metric: score.value for metric, score in found.scores.items()}
        for k in (1, 5, 10):
            recall = (judge.eccv_recalls if name == "eccv" else judge.cxc_recalls)(lists, "all", K=k)
            for short, long in ways.items():
                assert means[f"{long}_extended_recall_at_{k}"] == pytest.approx(recall[short], abs=1e-9)
        if name == "eccv":
            expected = judge.eccv_metrics(lists, "all")
            for theirs, ours in (("eccv_map_at_r", "map_at_r"), ("eccv_rprecision", "r_precision")):
                for short, long in ways.items():
                    assert means[f"{long}_extended_{ours}"] == pytest.approx(expected[theirs][short], abs=1e-9)
        plain = judge.coco_5k_recalls(lists, "all", K=5)
        assert {way: means[f"{long}_recall_at_5"] for way, long in ways.items()} == pytest.approx(plain, abs=1e-9)
