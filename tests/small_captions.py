"""A small file of every caption format, with bad records among the good ones, and what reading it says."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, shade, shade)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes], *, link: str = "") -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        if link:
            info = tarfile.TarInfo(link)
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(info)
    return path


def write_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_images(folder: Path, *names: str) -> Path:
    for shade, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(shade))
    return folder


def coco_json(folder: Path) -> Path:
    write_images(folder, "a.png", "b.png", "c.png")
    images: list[Any] = [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}]
    images += [{"id": 1, "file_name": "c.png"}, {"file_name": "c.png"}, {"id": 3, "file_name": "../a.png"}]
    images += [{"id": 4, "file_name": "absent.png"}, "x"]
    captions: list[Any] = [{"id": 10, "image_id": 2, "caption": " two "}, {"id": 11, "image_id": 1, "caption": "one"}]
    captions += [{"id": 12, "image_id": 2, "caption": "zwei"}, {"id": 13, "image_id": 9, "caption": "lost"}]
    captions += [{"id": 14, "image_id": 1, "caption": " "}, {"id": 10, "image_id": 1, "caption": "again"}]
    captions += [{"id": 15, "caption": "whose?"}]
    path = folder / "captions.json"
    path.write_text(json.dumps({"images": images, "annotations": captions}))
    return path


def karpathy_json(folder: Path) -> Path:
    write_images(folder, "val2014/a.png", "b.png")

    def image(key: int, split: str, name: str, *captions: str, path: str = "") -> dict[str, Any]:
        sentences = [{"raw": text, "sentid": key * 10 + n} for n, text in enumerate(captions)]
        return {"cocoid": key, "split": split, "filename": name, "filepath": path, "sentences": sentences}

    images = [image(1, "test", "a.png", "one", path="val2014"), image(2, "test", "b.png", "two", "zwei")]
    images += [image(3, "train", "absent.png", "three"), image(4, "test", "absent.png", "four")]
    images += [image(5, "test", "b.png", ""), {"cocoid": 6, "split": "test", "filename": "b.png"}]
    path = folder / "dataset_coco.json"
    path.write_text(json.dumps({"images": images, "dataset": "coco"}))
    return path


def csv_file(folder: Path) -> Path:
    write_images(folder, "a.png", "b.png")
    path = folder / "captions.csv"
    path.write_text(
        'Image,Image_ID,Caption\na.png,1,"one, ""uno"""\nb.png,2,"two\nlines"\nb.png,2,zwei\n'
        "b.png,1,other image\n/etc/passwd,3,three\nb.png,4,\nshort\nabsent.png,5,five\n"
    )
    return path


def jsonl_file(folder: Path) -> Path:
    write_images(folder, "a.png", "b.png")
    records: list[Any] = [{"image": "a.png", "caption": "one"}, {"image": "b.png", "captions": ["two", "zwei"]}]
    records += [
        {"image": "b.png", "captions": []},
        {"image": "b.png", "text": 3},
        [1],
        {"image": "../b.png", "text": "x"},
    ]
    records += [{"image": ["a.png"], "text": "x"}, {"image_id": True, "image": "a.png", "text": "x"}]
    records += [{"image": "a.png", "text": "mine", "caption_id": "b.png#1"}]
    path = write_lines(folder / "captions.jsonl", records)
    path.write_bytes(path.read_bytes() + b"\n{torn\n\xff\n")
    return path


def tar_file(folder: Path) -> Path:
    members = {"a.png": png(0), "a.txt": b"one", "s/b.png": png(1), "s/b.json": b'{"captions": ["two", "zwei"]}'}
    members |= {"c.png": png(2), "c.json": b"{", "../d.png": png(3), "e.png": png(4), "e.jpg": png(4)}
    members |= {"f.txt": b"no image", "a.jpeg": png(5), "a.cls": b"1", "g.png": png(6), "g.txt": b"\xff"}
    members |= {"h.png": png(7), "h.txt": b" "}
    return write_tar(folder / "shard.tar", members, link="l.png")


def parquet_file(folder: Path) -> Path:
    def cell(shade: int | None, path: str | None = None) -> dict[str, Any]:
        return {"bytes": None if shade is None else png(shade), "path": path}

    write_images(folder, "b.png")
    rows = [("1", "one", cell(0), 1), ("2", "two", cell(None, "b.png"), 0), ("3", "three", cell(None), 0)]
    rows += [("4", None, cell(4), 0), ("5", "five", cell(None, "absent.png"), 0), ("1", "again", cell(6), 0)]
    rows += [("6", "six", cell(None, "../b.png"), 0), ("7", "seven", cell(7), 2), ("8", " ", cell(8), 0)]
    columns = dict(zip(("image_id", "text", "image", "label"), map(list, zip(*rows, strict=True)), strict=True))
    names = json.dumps({"info": {"features": {"label": {"names": ["cat", "dog"]}}}})
    table = pa.table(columns).replace_schema_metadata({"huggingface": names})
    pq.write_table(table, folder / "shard.parquet", row_group_size=2)
    return folder / "shard.parquet"


def image_folder(folder: Path) -> Path:
    write_images(folder, "a.png", "b.png")
    records = [{"file_name": "a.png", "text": "one"}, {"file_name": "b.png", "text": "two"}]
    records += [{"file_name": "absent.png", "text": "x"}, {"text": "no image"}, {"file_name": "b.png", "text": ""}]
    write_lines(folder / "metadata.jsonl", records)
    return folder


def text_file(folder: Path) -> Path:
    path = folder / "captions.txt"
    path.write_text("one\n\ntwo\r\n  \nthree")
    return path


CASES: dict[str, tuple[Callable[[Path], Path], dict[str, Any], list[tuple[str, str]], list[str]]] = {
    "coco": (
        coco_json,
        {"need_images": True},
        [("1", "one"), ("2", "two"), ("2", "zwei")],
        [
            "captions.json: images[2] (id 1): duplicate id 1",
            "captions.json: images[3]: id is None, not a text or an integer",
            "captions.json: images[6]: is 'x', not an object",
            "captions.json: annotations[3] (id 13): image_id 9 is not among the images",
            "captions.json: annotations[4] (id 14): empty caption",
            "captions.json: annotations[5] (id 10): duplicate id 10",
            "captions.json: annotations[6] (id 15): no image_id",
            "captions.json: images[4] (id 3): the path '../a.png' leaves the folder",
            "captions.json: images[5] (id 4): image file",
        ],
    ),
    "karpathy": (
        karpathy_json,
        {"need_images": True, "split": "test"},
        [("1", "one"), ("2", "two"), ("2", "zwei")],
        [
            "dataset_coco.json: images[3] (id 4): image file",
            "dataset_coco.json: images[4] (id 5): empty caption",
            "dataset_coco.json: images[5] (id 6): no list of sentences",
        ],
    ),
    "table": (
        csv_file,
        {"need_images": True},
        [("1", 'one, "uno"'), ("2", "two\nlines"), ("2", "zwei")],
        [
            "captions.csv:6: duplicate image id 1",
            "captions.csv:7: the path '/etc/passwd' leaves the folder",
            "captions.csv:8: empty caption",
            "captions.csv:9: 1 fields where the header has 3",
            "captions.csv:10: image file",
        ],
    ),
    "jsonl": (
        jsonl_file,
        {},
        [("a.png", "one"), ("b.png", "two"), ("b.png", "zwei")],
        [
            "captions.jsonl:3: empty caption",
            "captions.jsonl:4: caption is 3, not a text",
            "captions.jsonl:5: is [1], not an object",
            "captions.jsonl:6: the path '../b.png' leaves the folder",
            "captions.jsonl:7: image file is ['a.png'], not a text or an integer",
            "captions.jsonl:8: image id is True, not a text or an integer",
            "captions.jsonl:9: duplicate caption id b.png#1",
            "captions.jsonl:11: not JSON",
            "captions.jsonl:12: not JSON",
        ],
    ),
    "webdataset": (
        tar_file,
        {"need_images": True},
        [("a", "one"), ("s/b", "two"), ("s/b", "zwei")],
        [
            "shard.tar: c: not JSON",
            "shard.tar: ../d: the path '../d.png' leaves the folder",
            "shard.tar: e: two images, e.png and e.jpg",
            "shard.tar: f: no image",
            "shard.tar: a: duplicate image id a",
            "shard.tar: g: g.txt is not UTF-8 text",
            "shard.tar: h: empty caption",
            "shard.tar: l: l.png is not a plain file",
        ],
    ),
    "parquet": (
        parquet_file,
        {"need_images": True},
        [("1", "one"), ("2", "two")],
        [
            "shard.parquet: row 2: no image",
            "shard.parquet: row 3: empty caption",
            "shard.parquet: row 4: image file",
            "shard.parquet: row 5: duplicate image id 1",
            "shard.parquet: row 6: the path '../b.png' leaves the folder",
            "shard.parquet: row 7: label 2 is not one of 2 classes",
            "shard.parquet: row 8: empty caption",
        ],
    ),
    "folder": (
        image_folder,
        {},
        [("a.png", "one"), ("b.png", "two")],
        ["metadata.jsonl:3: image file", "metadata.jsonl:4: no image", "metadata.jsonl:5: empty caption"],
    ),
    "text": (
        text_file,
        {},
        [("000001", "one"), ("000003", "two"), ("000005", "three")],
        ["captions.txt:2: empty caption", "captions.txt:4: empty caption"],
    ),
}
