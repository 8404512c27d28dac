"""Sets as their authors publish them: long captions (Urban-1k, DOCCI, DCI, ImageInWords, ShareGPT4V), JSON lists, and
CLIP_benchmark's tars for retrieval. The layouts were read off the loaders of Long-CLIP, DCI and ImageInWords."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from gmail_cli.components.captions import Dataset, read
from gmail_cli.errors import InputError


def draw(*paths: Path) -> None:
    for shade, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4, 3), 20 * shade, dtype=np.uint8)).save(path)


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def pairs(dataset: Dataset) -> list[tuple[str, str, str]]:
    assert dataset.has_images
    return [(caption.owner, caption.text, caption.kind) for caption in dataset.captions]


def test_urban_1k_is_two_folders(tmp_path: Path) -> None:
    draw(tmp_path / "image" / "1.jpg", tmp_path / "image" / "10.jpg", tmp_path / "image" / "2.jpg")
    for name, text in (("1", "A wide street.\n"), ("10", "A square.\n\nA fountain. "), ("2", " ")):
        write(tmp_path / "caption" / f"{name}.txt", text)
    dataset = read(tmp_path, kind="long", on_bad="skip", need_images=True)
    expected = [("1.jpg", "A wide street."), ("10.jpg", "A square."), ("10.jpg", "A fountain.")]
    assert pairs(dataset) == [(*each, "long") for each in expected]
    assert [image.label for image in dataset.images] == [None, None]
    assert dataset.skipped == ("image/2.jpg: empty caption",)
    (tmp_path / "caption" / "1.txt").unlink()
    with pytest.raises(InputError, match=r"2 bad records(.|\n)*image/1.jpg: cannot read .*1\.txt"):
        read(tmp_path, kind="long")


def test_docci_has_descriptions_and_splits(tmp_path: Path) -> None:
    draw(tmp_path / "images" / "test_0.jpg", tmp_path / "images" / "train_0.jpg")
    records = [
        {"example_id": f"{split}_0", "split": split, "image_file": f"{split}_0.jpg", "description": f"A {split} view."}
        for split in ("train", "test")
    ]
    path = write(tmp_path / "docci_descriptions.jsonlines", "\n".join(map(json.dumps, records)))
    dataset = read(path, images=tmp_path / "images", split="test", kind="long")
    assert pairs(dataset) == [("test_0.jpg", "A test view.", "long")]
    assert len(read(path, images=tmp_path / "images", split="train+test")) == 2
    with pytest.raises(InputError, match="no split 'qual_dev'") as caught:
        read(path, split="qual_dev")
    assert caught.value.hint == "It has train (1), test (1)."


def test_densely_captioned_images_is_a_file_each(tmp_path: Path) -> None:
    draw(tmp_path / "photos" / "sa_1.jpg", tmp_path / "photos" / "sa_2.jpg")
    for name, extra in (("sa_1", "Behind it\na wall."), ("sa_2", "")):
        about = {"image": f"{name}.jpg", "short_caption": f"A door {name}.", "extra_caption": extra, "mask_data": {}}
        write(tmp_path / "annotations" / f"{name}.json", about)
    photos = tmp_path / "photos"
    long = read(tmp_path / "annotations", images=photos, kind="long")
    assert pairs(long) == [
        ("sa_1.jpg", "A door sa_1. Behind it\na wall.", "long"),
        ("sa_2.jpg", "A door sa_2.", "long"),
    ]
    short = read(tmp_path / "annotations", images=photos)
    assert [text.text for text in short.captions_of_kind("short")] == ["A door sa_1.", "A door sa_2."]
    assert [text.text for text in short.captions_of_kind("long")] == [text for _, text, _ in pairs(long)]
    write(tmp_path / "annotations" / "sa_3.json", {"image": "sa_1.jpg", "short_caption": ""})
    write(tmp_path / "annotations" / "sa_4.json", "[]")
    with pytest.raises(InputError, match=r"2 bad records(.|\n)*sa_3.json: empty caption(.|\n)*sa_4.json: is \[\]"):
        read(tmp_path / "annotations", images=photos)


def test_image_in_words_names_images_without_a_suffix(tmp_path: Path) -> None:
    draw(tmp_path / "aar_test_04600.jpg", tmp_path / "test_00731.jpg", tmp_path / "sa_1.jpg")
    records = [{"image/key": "aar_test_04600", "IIW": "One."}, {"image": "test_00731", "IIW": "Two.", "DOCCI": "2"}]
    records += [{"image": "sa_1.jpg", "ex_id": "3-data.json", "IIW": "Three."}]
    path = write(tmp_path / "data.jsonl", "\n".join(map(json.dumps, records)))
    dataset = read(path, images=tmp_path, kind="long")
    assert [text for _, text, _ in pairs(dataset)] == ["One.", "Two.", "Three."]


def test_share_gpt4v_is_conversations(tmp_path: Path) -> None:
    names = ["sam/images/sa_1.jpg", "coco/train2017/9.jpg"]
    draw(*(tmp_path / name for name in names))
    records = [
        {"id": name, "image": name, "conversations": [{"from": "human", "value": "<image>\nDescribe."}, answer]}
        for name, answer in zip(
            names, [{"from": "gpt", "value": "A hill.\n\nA hut."}, {"from": "gpt", "value": "Food."}], strict=True
        )
    ]
    path = write(tmp_path / "share-captioner.json", records)
    assert pairs(read(path, kind="long", need_images=True)) == [
        (names[0], "A hill.  A hut.", "long"),
        (names[1], "Food.", "long"),
    ]
    assert [image.id for image in read(path, limit=1).images] == names[:1]
    write(path, [*records, {"id": "x", "image": names[0], "conversations": [{"from": "human", "value": "Well?"}]}])
    with pytest.raises(InputError, match=r"share-captioner.json: \[2\]: conversations hold no answer from 'gpt'"):
        read(path)


def test_a_json_list_of_records_is_read_as_lines_are(tmp_path: Path) -> None:
    """As BLIP and ALBEF distribute COCO and Flickr30k."""
    draw(tmp_path / "val2014" / "1.jpg", tmp_path / "val2014" / "2.jpg")
    records = [{"image": "val2014/1.jpg", "caption": ["One.", "Uno."]}, {"image": "val2014/2.jpg", "caption": "Two."}]
    dataset = read(write(tmp_path / "coco_karpathy_test.json", records), need_images=True)
    assert [(owner, text) for owner, text, _ in pairs(dataset)] == [
        ("val2014/1.jpg", "One."),
        ("val2014/1.jpg", "Uno."),
        ("val2014/2.jpg", "Two."),
    ]


@pytest.mark.parametrize("name", ["results_20130124.token", "Flickr8k.token.txt"])
def test_flickrs_own_annotations(tmp_path: Path, name: str) -> None:
    draw(tmp_path / "images" / "10.jpg", tmp_path / "images" / "11.jpg")
    path = write(tmp_path / name, "10.jpg#0\tOne .\n10.jpg#1\tUno .\n11.jpg#0\tTwo # three .\n")
    dataset = read(path, images=tmp_path / "images")
    assert [(owner, text) for owner, text, _ in pairs(dataset)] == [
        ("10.jpg", "One ."),
        ("10.jpg", "Uno ."),
        ("11.jpg", "Two # three ."),
    ]
    assert [caption.id for caption in dataset.captions] == ["10.jpg#0", "10.jpg#1", "11.jpg#0"]
    write(path, "10.jpg#0\tOne .\n12.jpg#0\tGone .\nA caption.\n11.jpg#0\t \n")
    with pytest.raises(
        InputError, match=rf"3 bad records(.|\n)*{name}:2: image file (.|\n)*:3: not `image#(.|\n)*:4: empty"
    ):
        read(path, images=tmp_path / "images")


def test_clip_benchmarks_retrieval_tars_hold_a_caption_a_line(tmp_path: Path) -> None:
    draw(tmp_path / "a.jpg")
    image = (tmp_path / "a.jpg").read_bytes()
    folder = tmp_path / "flickr8k" / "test"
    folder.mkdir(parents=True)
    (folder / "nshards.txt").write_text("1")
    with tarfile.open(folder / "0.tar", "w") as archive:
        members = [("0.jpg", image), ("0.txt", b"One.\nTwo.\n"), ("1.jpg", image)]
        members += [("1.json", b'{"caption": "three\\nlines"}'), ("1.txt", b"three\nlines")]
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    dataset = read(folder, need_images=True)
    assert [(owner, text) for owner, text, _ in pairs(dataset)] == [("0", "One."), ("0", "Two."), ("1", "three\nlines")]


def test_records_may_hold_both_kinds(tmp_path: Path) -> None:
    draw(tmp_path / "a.jpg", tmp_path / "b.jpg")
    records = [{"image": "a.jpg", "caption": ["A.", "B."], "long_caption": "A and B."}]
    records += [{"image": "b.jpg", "long_captions": ["C and D.", "D and E."]}]
    dataset = read(write(tmp_path / "both.jsonl", "\n".join(map(json.dumps, records))))
    expected = [("a.jpg", "A.", "short"), ("a.jpg", "B.", "short"), ("a.jpg", "A and B.", "long")]
    assert pairs(dataset) == [*expected, ("b.jpg", "C and D.", "long"), ("b.jpg", "D and E.", "long")]
    table = pa.table({"image": ["a.jpg", "b.jpg"], "text": ["A.", "B."], "long_caption": ["A and B.", "C."]})
    pq.write_table(table, tmp_path / "both.parquet")
    kinds = read(tmp_path / "both.parquet", need_images=True)
    assert [text.text for text in kinds.captions_of_kind("long")] == ["A and B.", "C."]
    write(tmp_path / "both.jsonl", json.dumps({"image": "a.jpg", "caption": "A.", "long_caption": " "}))
    with pytest.raises(InputError, match=r"both\.jsonl:1: empty caption"):
        read(tmp_path / "both.jsonl")
