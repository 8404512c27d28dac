"""Protocols: what they demand, what they use, and that no other data bear their name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gmail_cli.components import captions, protocols
from gmail_cli.components.captions import Caption, Dataset, Image
from gmail_cli.components.scores import headlines
from gmail_cli.errors import InputError, UsageError
from gmail_cli.profile import build
from gmail_cli.stages import score, sources


def dataset(counts: list[int], *, kind: captions.Kind = "short") -> Dataset:
    images = tuple(Image(f"i{row}") for row in range(len(counts)))
    texts = tuple(
        Caption(f"c{row}.{n}", "a cat", f"i{row}", kind) for row, count in enumerate(counts) for n in range(count)
    )
    return Dataset("set.json", images, texts, (), (None,) * len(counts))


SMALL = protocols.Protocol(name="small", images=3, captions=2, about="three")


def test_the_first_captions_of_each_image_are_used() -> None:
    used = SMALL.apply(dataset([2, 5, 3]))
    assert [caption.id for caption in used.captions] == ["c0.0", "c0.1", "c1.0", "c1.1", "c2.0", "c2.1"]
    assert used.images == dataset([2, 5, 3]).images


def test_rows_that_are_not_grouped_by_image_are_counted_by_owner() -> None:
    assert SMALL.rows([2, 0, 1, 1, 0, 2, 1, 0], ids="abc", source="f") == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("counts", "kind", "found"),
    [
        ([2, 2], "short", "set.json has 2 images\n"),
        ([2, 1, 0], "short", r"has 3 images, 2 of them with fewer short captions \(first: 1 for 'i1'\)\n"),
        ([2, 2, 2], "long", r"3 of them with fewer short captions \(first: 0 for 'i0'\)\n"),
    ],
)
def test_other_data_do_not_bear_the_name(counts: list[int], kind: captions.Kind, found: str) -> None:
    with pytest.raises(
        InputError, match=f"protocol small/1 is of 3 images with at least 2 short captions each; .*{found}"
    ):
        SMALL.apply(dataset(counts, kind=kind))


PETS = protocols.ClassProtocol(
    name="pets", images=4, classes=2, about="four", metric="mean_per_class_accuracy", version=3
)


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (["cat", "dog", "dog"], "has 3 images, 3 of them labelled, and 2 classes"),
        (["cat", "dog", "dog", None], "has 4 images, 3 of them labelled, and 2 classes"),
        (["cat", "dog", "dog", "bird"], "has 4 images, 4 of them labelled, and 3 classes"),
    ],
)
def test_other_labelled_sets_do_not_bear_the_name(labels: list[str | None], found: str) -> None:
    def labelled(labels: list[str | None]) -> Dataset:
        images = tuple(Image(f"i{row}", label=label) for row, label in enumerate(labels))
        return Dataset("set", images, (), (), (None,) * len(labels))

    whole = labelled(["cat", "dog", "dog", "dog"])
    assert PETS.apply(whole) is whole
    with pytest.raises(InputError, match=f"pets/3 is of 4 labelled images of 2 classes; set {found}"):
        PETS.apply(labelled(labels))


def test_models_are_compared_on_the_accuracy_that_the_field_quotes() -> None:
    assert "zero_shot_top_1_accuracy" in headlines("imagenet-1k/1")
    assert "probe_top_1_accuracy" in headlines("FOLDER/unversioned")
    pets = headlines("oxford-pets/1")
    assert {"zero_shot_mean_per_class_accuracy", "probe_mean_per_class_accuracy"} < {*pets}
    assert not any("top_1" in metric for metric in pets)
    assert len(pets) == len(headlines("imagenet-1k/1"))


def test_labels_are_found_with_or_without_their_version() -> None:
    assert protocols.find("coco-karpathy-5k") is protocols.find("coco-karpathy-5k/1")
    assert protocols.find("") is None
    assert protocols.find("coco-karpathy-5k-mine/3") is None
    for wrong in ("coco-karpathy-5k/2", "coco-karpathy-5k/", "COCO-Karpathy-5k/1", "coco-karpathy-5k/1a"):
        with pytest.raises(UsageError, match="the protocol of that name is 'coco-karpathy-5k/1'"):
            protocols.find(wrong)


def test_karpathy_has_25010_captions_and_25000_are_used(tmp_path: Path) -> None:
    images = [
        {
            "split": "test",
            "cocoid": row,
            "filename": f"{row}.jpg",
            "sentences": [{"raw": f"caption {row} {n}", "sentid": 7 * row + n} for n in range(6 if row < 10 else 5)],
        }
        for row in range(5000)
    ]
    file = tmp_path / "dataset_coco.json"
    file.write_text(json.dumps({"images": images}))
    assert len(captions.read(file, split="test").captions) == 25_010
    for name in ("coco-karpathy-5k", "coco-karpathy-1k-folds"):
        profile = build({"data": {"test": str(file), "test_split": "test", "protocol": name}})
        origins = sources.origins(profile)
        assert origins["protocol"] == f"{name}/1"
        assert len(sources.read(origins["test"]).captions) == 25_000
    other = build({"data": {"test": str(file), "test_split": "test", "protocol": "flickr30k-1k"}})
    with pytest.raises(InputError, match=r"flickr30k-1k/1 is of 1,000 images .* has 5,000 images"):
        sources.read(sources.source(other, part="test"))


def test_long_protocols_read_captions_as_long(tmp_path: Path) -> None:
    file = tmp_path / "captions.jsonl"
    rows = [{"image": f"{row}.jpg", "caption": f"a long story of {row}"} for row in range(1000)]
    file.write_text("\n".join(map(json.dumps, rows)))
    profile = build({"data": {"test": str(file), "protocol": "urban-1k"}})
    found = sources.read(sources.source(profile, part="test"))
    assert {caption.kind for caption in found.captions} == {"long"}


def test_a_limit_below_the_protocol_is_refused_before_anything_is_read() -> None:
    profile = build(
        {"data": {"train": "none.json", "test": "none.json", "test_limit": 50, "protocol": "coco-val2017-5k"}}
    )
    with pytest.raises(UsageError, match=r"data.test_limit is 50, and protocol coco-val2017-5k/1 is of 5,000 images"):
        sources.source(profile, part="train")


def files(folder: Path, *, images: int, texts_each: int) -> dict[str, Path]:
    rng = np.random.default_rng(0)
    of_image = np.repeat(np.arange(images), texts_each)
    vectors = rng.normal(size=(images, 8)).astype(np.float32)
    arrays = {
        "images": vectors,
        "texts": vectors[of_image] + 0.9 * rng.normal(size=(len(of_image), 8)).astype(np.float32),
        "owners": of_image,
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return {name: folder / f"{name}.npy" for name in arrays}


def test_scores_by_protocol(tmp_path: Path) -> None:
    given = files(tmp_path, images=1000, texts_each=6)
    found = score.retrieval(**given, protocol="flickr30k-1k")
    assert (found.protocol, found.n["texts"]) == ("flickr30k-1k/1", 5000)
    owners = np.load(given["owners"])
    first = np.arange(len(owners)) % 6 < 5
    np.save(tmp_path / "owners.npy", owners[first])
    np.save(tmp_path / "texts.npy", np.load(given["texts"])[first])
    assert score.retrieval(**given).metrics == found.metrics
    with pytest.raises(UsageError, match="there is no retrieval protocol 'flickr30k'") as caught:
        score.retrieval(**given, protocol="flickr30k")
    assert "flickr30k-1k" in caught.value.hint
    with pytest.raises(UsageError, match="there is no retrieval protocol 'oxford-pets'"):
        score.retrieval(**given, protocol="oxford-pets")
    with pytest.raises(InputError, match=r"coco-karpathy-5k/1 is of 5,000 images .*owners\.npy has 1,000 images"):
        score.retrieval(**given, protocol="coco-karpathy-5k")


def test_scores_with_extra_right_answers(tmp_path: Path) -> None:
    given = files(tmp_path, images=30, texts_each=2)
    plain = score.retrieval(**given).metrics
    np.save(tmp_path / "extra.npy", np.array([[0, 0], [0, 5], [0, 6], [1, 0], [40, 20], [40, 3], [0, 5]]))
    found = score.retrieval(**given, extra_positives=[tmp_path / "extra.npy"])
    assert found.n["text_queries_judged"] == 3
    names = [*(f"recall_at_{k}" for k in (1, 5, 10)), "map_at_r", "r_precision"]
    assert {*found.metrics} - {*plain} == {f"text_to_image_extended_{name}" for name in names}
    assert {name: found.metrics[name] for name in plain} == plain, "the test set's own answers stay what they are"
    images, texts = (np.load(given[name]) for name in ("images", "texts"))
    cosine = (texts / np.linalg.norm(texts, axis=1)[:, None]) @ (images / np.linalg.norm(images, axis=1)[:, None]).T
    right = {0: {0, 5, 6}, 1: {0}, 40: {20, 3}}
    expected = []
    for text, answers in right.items():
        hits = [image in answers for image in np.argsort(-cosine[text])[: len(answers)]]
        expected.append(sum(sum(hits[: at + 1]) / (at + 1) for at, hit in enumerate(hits) if hit) / len(answers))
    assert found.metrics["text_to_image_extended_map_at_r"] == pytest.approx(np.mean(expected))
    np.save(tmp_path / "more.npy", np.array([[0, 0], [59, 0], [1, 2]]))
    both = score.retrieval(**given, extra_positives=[tmp_path / "extra.npy", tmp_path / "more.npy"])
    first = [
        any(text in texts for text in np.argsort(-cosine.T[image])[:1]) for image, texts in ((0, {0, 59}), (2, {1}))
    ]
    assert both.metrics["image_to_text_extended_recall_at_1"] == pytest.approx(np.mean(first))
    assert (both.n["text_queries_judged"], both.n["image_queries_judged"]) == (3, 2)
    with pytest.raises(UsageError, match="goes without extra positives"):
        score.retrieval(**given, protocol="dci", extra_positives=[tmp_path / "extra.npy"])
    np.save(tmp_path / "wrong.npy", np.array([[0, 30]]))
    with pytest.raises(InputError, match=r"wrong\.npy images\[0\] is 30; rows go from 0 to 29"):
        score.retrieval(**given, extra_positives=[tmp_path / "wrong.npy"])


def test_the_guide_lists_every_protocol_as_it_is() -> None:
    guide = (Path(__file__).parents[1] / "docs/guides/evaluate.md").read_text(encoding="utf-8")
    for each in protocols.REGISTRY.values():
        if isinstance(each, protocols.Protocol):
            rule = f"{each.captions} {each.kind}"
        else:
            rule = f"{each.classes:,} | {each.metric.replace('_', ' ').replace('top 1', 'top-1')}"
        assert f"| `{each.name}` | {each.images:,} | {rule} | {each.about} |" in guide
        assert f"`{each.name}`" in (Path(__file__).parents[1] / "docs/reference/profile.md").read_text(encoding="utf-8")
