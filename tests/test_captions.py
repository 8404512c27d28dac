"""Every caption format: what is read, and how each bad record is reported."""

from __future__ import annotations

import contextlib
import io
import json
import re
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_captions import (
    CASES,
    karpathy_json,
    png,
    write_images,
    write_lines,
    write_tar,
)

from gmail_cli.components.captions import Dataset, Part, check_disjoint, read
from gmail_cli.components.captions.parquet import RowGroups
from gmail_cli.components.scenes import CLASS_NAMES, COLOURS
from gmail_cli.errors import InputError, UsageError


def texts(dataset: Dataset) -> list[tuple[str, str]]:
    return [(caption.owner, caption.text) for caption in dataset.captions]


# --- real files ---------------------------------------------------------------------------------------------


def test_coco_captions_keep_their_owners(shared_data: Path) -> None:
    dataset = read(shared_data / "coco" / "captions_val2017.json")
    assert (len(dataset), len(dataset.captions), dataset.has_images) == (5000, 25014, False)
    rows = dataset.owner_rows()
    assert np.bincount(rows).min() == 5
    assert np.bincount(rows).max() > 5  # so that i // 5 is wrong
    assert all(dataset.images[row].id == c.owner for row, c in zip(rows, dataset.captions, strict=True))
    assert dataset.captions_of("397133")[0].text == "A man is in a kitchen making pizzas."
    with pytest.raises(InputError, match="carries no image for '397133'"):
        dataset.image_bytes(0)
    with pytest.raises(InputError, match="has no image 'x'"):
        dataset.captions_of("x")


def test_coco_json_and_tar_shards_agree(shared_data: Path) -> None:
    folder = shared_data / "flickr8k"
    from_json = read(folder / "captions_train.json", limit=300)
    from_tar = read(folder / "train-{00000..00001}.tar", limit=300)
    assert from_json.images == from_tar.images
    assert texts(from_json) == texts(from_tar)
    assert from_tar.image_bytes(299)[:2] == b"\xff\xd8"
    assert len(read(f"{folder}/train-0000[01].tar")) == 2000


def test_coco_images_are_found_and_fingerprinted(shared_data: Path) -> None:
    folder = shared_data / "flickr8k"
    dataset = read(folder / "captions_dev.json", images=folder / "dev", limit=20)
    assert dataset.has_images
    assert Image.open(io.BytesIO(dataset.image_bytes(7))).size == (192, 192)
    other = read(folder / "captions_dev.json", images=folder / "dev", limit=19)
    assert dataset.fingerprint != other.fingerprint
    assert dataset.fingerprint != read(folder / "captions_dev.json", limit=20).fingerprint


def test_conceptual_captions_without_a_header(tmp_path: Path) -> None:
    """CC3M's file has the caption first, CC12M's the address; the first line is a record, quotation marks are text."""
    said = ['a "red" ball', "a tree , by the sea"]
    addresses = ["http://example.org/a.jpg", "https://example.org/b.jpg"]
    pairs = [*zip(said, addresses, strict=True)]
    (tmp_path / "cc3m.tsv").write_text("".join(f"{text}\t{url}\n" for text, url in pairs))
    (tmp_path / "cc12m.tsv").write_text("".join(f"{url}\t{text}\n" for text, url in pairs))
    for name in ("cc3m.tsv", "cc12m.tsv"):
        dataset = read(tmp_path / name)
        assert [caption.text for caption in dataset.captions] == said
        assert len({image.id for image in dataset.images}) == 2
        assert not dataset.has_images
    (tmp_path / "cut.tsv").write_text(f"{said[0]}\t{addresses[0]}\n{said[1]}\n")
    with pytest.raises(InputError, match=r"cut.tsv:2: 1 fields where"):
        read(tmp_path / "cut.tsv")
    (tmp_path / "words.tsv").write_text("a ball\ta tree\n")
    with pytest.raises(InputError, match="has neither a caption nor an image column"):
        read(tmp_path / "words.tsv")


def test_what_img2dataset_leaves(tmp_path: Path) -> None:
    """Tars, and beside each a Parquet file of all that was asked for, also what could not be fetched."""
    for shard in range(2):
        members: dict[str, bytes] = {}
        records = []
        for number in range(3):
            key, ok = f"{shard:05d}{number:04d}", number < 2
            url, text = f"http://example.org/{key}", f"a ball {key}"
            record = {"url": url, "caption": text, "key": key, "status": "success" if ok else "failed_to_download"}
            record |= {"error_message": None, "width": 4, "height": 4, "exif": "{}", "sha256": "0" * 64}
            records.append(record)
            if ok:
                members |= {f"{key}.jpg": png(number), f"{key}.json": json.dumps(record).encode()}
                members[f"{key}.txt"] = text.encode()
        write_tar(tmp_path / f"{shard:05d}.tar", members)
        pq.write_table(pa.Table.from_pylist(records), tmp_path / f"{shard:05d}.parquet")
        (tmp_path / f"{shard:05d}_stats.json").write_text("{}")
    dataset = read(tmp_path, need_images=True)
    assert texts(dataset) == [(key, f"a ball {key}") for key in ("000000000", "000000001", "000010000", "000010001")]
    assert dataset.image_bytes(3) == png(1)


def test_parquet_images_and_labels(shared_data: Path) -> None:
    dataset = read(shared_data / "cifake" / "generated-00001-of-00002.parquet", limit=500, need_images=True)
    assert (len(dataset), len(dataset.class_names), dataset.images[0].label) == (500, 10, "deer")
    assert dataset.captions[0].text == "a photo of a deer"
    assert Image.open(io.BytesIO(dataset.image_bytes(499))).size == (32, 32)


def test_prompts_and_long_captions(shared_data: Path) -> None:
    prompts = read(shared_data / "prompts" / "PartiPrompts.tsv")
    assert len(prompts) == len({image.id for image in prompts.images}) == 1632
    assert any(caption.text.count('"') == 2 for caption in prompts.captions)
    for name, count in (("DCI_Test.jsonl", 112), ("DOCCI_Test.jsonl", 100)):
        dataset = read(shared_data / "long" / name, kind="long")
        assert len(dataset.captions_of_kind("long")) == count
        assert dataset.captions_of_kind("short") == []
        assert len(dataset.captions[0].text.split()) > 77


# --- each format, with all that can be wrong with a record --------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_bad_records_are_named_or_left_out(tmp_path: Path, name: str) -> None:
    make, arguments, good, bad = CASES[name]
    source = make(tmp_path)
    dataset = read(source, on_bad="skip", **arguments)
    assert texts(dataset) == good
    assert len(dataset.skipped) == len(bad)
    for message, start in zip(dataset.skipped, bad, strict=True):
        assert message.startswith(start)
    if name != "text":
        assert [dataset.image_bytes(i) for i in range(2)] == [png(0), png(int(name != "parquet") and 1)]
    with pytest.raises(InputError) as caught:
        read(source, **arguments)
    assert caught.value.message.startswith(f"{len(bad)} bad records in ")
    assert bad[0] in caught.value.message
    assert read(source, on_bad="skip", format=name, **arguments).fingerprint == dataset.fingerprint  # type: ignore[arg-type]


def upload(folder: Path, scheme: str) -> str:
    """The URL of a copy of a local folder."""
    if scheme == "memory":
        url = f"memory://{folder.name}"
        system, path = fsspec.core.url_to_fs(url)
        for file in folder.rglob("*"):
            if file.is_file():
                system.pipe_file(f"{path}/{file.relative_to(folder).as_posix()}", file.read_bytes())
        return url
    return f"file://{folder}"


@pytest.mark.parametrize("scheme", ["memory", "file"])
@pytest.mark.parametrize("name", CASES)
def test_a_url_reads_as_the_local_file(tmp_path: Path, name: str, scheme: str) -> None:
    make, arguments, _, _ = CASES[name]
    source = make(tmp_path)
    local = read(source, on_bad="skip", **arguments)
    root = upload(tmp_path, scheme)
    url = f"{root}/{source.relative_to(tmp_path).as_posix()}".removesuffix("/.")
    remote = read(url, on_bad="skip", **arguments)
    assert (remote.images, remote.captions) == (local.images, local.captions)
    assert remote.fingerprint == local.fingerprint
    assert [each.replace(root, str(tmp_path)) for each in remote.skipped] == list(local.skipped)


def test_folders_and_patterns_of_urls_read_as_local_ones(tmp_path: Path) -> None:
    (tmp_path / "classes").mkdir()
    for folder in ("a-b", "a", "c"):
        write_images(tmp_path / "classes" / folder, "1.png", "0.png")
    for number in range(3):
        write_tar(tmp_path / f"shard-{number:02d}.tar", {f"{number}.png": png(number), f"{number}.txt": b"text"})
    url = upload(tmp_path, "memory")
    for below in ("classes", "", "shard-*.tar", "shard-{00..01}.tar"):
        local, remote = read(f"{tmp_path}/{below}"), read(f"{url}/{below}")
        assert remote.fingerprint == local.fingerprint, below
        assert [image.id for image in remote.images] == [image.id for image in local.images]
    images = tmp_path / "captions.csv"
    images.write_text("image,caption\n0.png,one\n")
    found = read(images, images=f"{url}/classes/a")
    assert found.image_bytes(0) == (tmp_path / "classes" / "a" / "0.png").read_bytes()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://nothing/here.jsonl", "memory://nothing/here.jsonl does not exist"),
        ("bucket://captions.jsonl", "cannot open bucket://captions.jsonl"),
        ("memory://nothing/*.tar", "matches no file"),
    ],
)
def test_urls_that_name_nothing_are_input_errors(url: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        read(url)


def test_images_are_found_by_class_folder(tmp_path: Path) -> None:
    dataset = read(write_images(tmp_path, "dog/1.png", "cat/x/1.png", "2.PNG"))
    assert [(image.id, image.label) for image in dataset.images] == [
        ("2.PNG", None),
        ("cat/x/1.png", "cat"),
        ("dog/1.png", "dog"),
    ]
    assert (dataset.class_names, dataset.captions, dataset.image_bytes(2)) == (("cat", "dog"), (), png(0))


def test_folders_of_shards_and_parts_of_a_file(tmp_path: Path) -> None:
    for shard in range(3):
        write_tar(tmp_path / f"s-{shard:02d}.tar", {f"{shard}{n}.png": png(n) for n in range(4)})
    whole = read(tmp_path)
    assert [image.id for image in whole.images] == [f"{s}{n}" for s in range(3) for n in range(4)]
    assert whole.fingerprint == read(f"{tmp_path}/s-{{00..02}}.tar").fingerprint
    assert [image.id for image in read(tmp_path, limit=6).images] == [image.id for image in whole.images[:6]]


def test_limit_takes_whole_images_even_where_their_captions_are_scattered(tmp_path: Path) -> None:
    rows = [{"image_id": key, "caption": f"{key} {n}"} for n in range(3) for key in "abc"]
    dataset = read(write_lines(tmp_path / "c.jsonl", rows), limit=2)
    assert texts(dataset) == [(key, f"{key} {n}") for key in "ab" for n in range(3)]
    assert [caption.id for caption in dataset.captions] == ["a#0", "a#1", "a#2", "b#0", "b#1", "b#2"]


def test_karpathy_splits_combine_and_unknown_ones_are_named(tmp_path: Path) -> None:
    path = karpathy_json(tmp_path)
    assert texts(read(path, split="train")) == [("3", "three")]
    assert len(read(path, split="train+test", on_bad="skip")) == 4
    with pytest.raises(InputError, match=r"no split 'restval'(.|\n)*test \(5\), train \(1\)"):
        read(path, split="train+restval")


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b'{"images": [', "c.json", "is not JSON"),
        (b"[]", "c.json", "no usable record"),
        (b"[1]", "c.json", r"\[0\]: is 1, not an object"),
        (b"{}", "c.json", "has no list 'images'"),
        (b'{"images": [], "annotations": [{"id": 1, "bbox": []}]}', "c.json", "holds no captions"),
        (b"a,b\n1,2\n", "c.csv", "columns are a, b"),
        (b"", "c.csv", r"columns are \(none\)"),
        (b"caption\n\xff\n", "c.csv", "not UTF-8"),
        (b"", "c.txt", "empty caption"),
        (b"caption\n", "c.csv", "no usable record"),
        (b"PAR1", "c.parquet", "cannot read"),
        (b"\x1f\x8b\x08 gzip", "c.tar", "cannot read the tar"),
        (b"x", "c.bin", "cannot tell the format"),
        (b"x", "c.jpg", "single image"),
    ],
)
def test_unreadable_files_are_input_errors(tmp_path: Path, content: bytes, name: str, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read(tmp_path / name)


def test_a_tar_cut_short_is_an_input_error(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", {"a.png": png(0), "b.png": png(1)}).read_bytes()
    for size in (700, 1024, 1400, 1600):  # inside a member, between two, inside a header, inside the last member
        (tmp_path / "cut.tar").write_bytes(whole[:size])
        with pytest.raises(InputError, match="cannot read the tar"):
            read(tmp_path / "cut.tar", on_bad="skip")


@pytest.mark.parametrize(
    ("source", "arguments", "error"),
    [
        ("absent.json", {}, InputError),
        ("absent-*.tar", {}, InputError),
        ("scenes:train", {}, UsageError),
        ("scenes:dev", {"limit": 1}, UsageError),
        ("scenes:train", {"limit": 1, "kind": "long"}, UsageError),
        ("scenes:train", {"limit": 1, "format": "coco"}, UsageError),
        ("lines.txt", {"format": "scenes", "limit": 1}, UsageError),
        ("lines.txt", {"limit": 0}, UsageError),
        ("lines.txt", {"holdout": ("test", 1.0, 0)}, UsageError),
        ("lines.txt", {"split": "test"}, UsageError),
        ("lines.txt", {"images": "absent"}, InputError),
        ("lines.txt", {"need_images": True}, InputError),
    ],
)
def test_arguments_that_cannot_work(
    tmp_path: Path, source: str, arguments: dict[str, Any], error: type[Exception]
) -> None:
    (tmp_path / "lines.txt").write_text("a dog\n")
    with pytest.raises(error):
        read(source if source.startswith("scenes:") else str(tmp_path / source), **arguments)


# --- datasets -----------------------------------------------------------------------------------------------


def test_scenes_bring_captions_labels_and_images() -> None:
    dataset = read("scenes:test", limit=5, scene_seed=3, scene_size=32)
    assert [image.id for image in dataset.images] == [f"test-{n:06d}" for n in range(5)]
    assert dataset.class_names == tuple(CLASS_NAMES)
    assert all(image.label in CLASS_NAMES for image in dataset.images)
    assert dataset.owner_rows("short").tolist() == [n for n in range(5) for _ in range(5)]
    assert dataset.owner_rows("long").tolist() == list(range(5))
    assert Image.open(io.BytesIO(dataset.image_bytes(4))).size == (32, 32)
    prints = {
        read("scenes:test", limit=5, scene_seed=seed, scene_size=size).fingerprint
        for seed, size in ((3, 32), (4, 32), (3, 64))
    }
    assert dataset.fingerprint in prints
    assert len(prints) == 3


@settings(max_examples=40, deadline=None)
@given(
    keys=st.lists(st.text(string.ascii_letters + string.digits, min_size=1), unique=True, min_size=1, max_size=40),
    fraction=st.floats(0.05, 0.95),
    seed=st.integers(0, 5),
)
def test_holdout_parts_are_a_stable_partition(
    tmp_path_factory: pytest.TempPathFactory, keys: list[str], fraction: float, seed: int
) -> None:
    path = tmp_path_factory.mktemp("holdout") / "c.jsonl"

    def part(name: Part, order: list[str]) -> set[str]:
        write_lines(path, [{"image_id": key, "caption": "x"} for key in order])
        with contextlib.suppress(InputError):  # an empty part
            dataset = read(path, holdout=(name, fraction, seed))
            found = {image.id for image in dataset.images}
            assert [image.id for image in dataset.images] == [key for key in order if key in found]
            return found
        return set()

    train, test = part("train", keys), part("test", keys)
    assert (train, test) == (part("train", keys[::-1]), part("test", keys[::-1]))
    assert train | test == set(keys)
    assert not train & test


def test_holdout_keeps_about_its_fraction(shared_data: Path) -> None:
    test = read(shared_data / "flickr8k" / "captions_dev.json", holdout=("test", 0.2, 0))
    other = read(shared_data / "flickr8k" / "captions_dev.json", holdout=("test", 0.2, 1))
    assert 150 < len(test) < 250
    assert test.images != other.images


caption_lists = st.lists(
    st.lists(st.text(min_size=1).filter(lambda text: text.strip()), min_size=1, max_size=3), min_size=1, max_size=5
)


@settings(max_examples=40, deadline=None)
@given(captions=caption_lists)
def test_formats_agree_on_the_same_captions(
    tmp_path_factory: pytest.TempPathFactory, captions: list[list[str]]
) -> None:
    folder = tmp_path_factory.mktemp("formats")
    records = [{"image_id": str(n), "captions": group} for n, group in enumerate(captions)]
    write_lines(folder / "c.jsonl", records)
    pq.write_table(pa.Table.from_pylist(records), folder / "c.parquet")
    write_tar(folder / "c.tar", {f"{r['image_id']}.json": json.dumps(r).encode() for r in records})
    pairs = [(r["image_id"], text) for r in records for text in r["captions"]]
    annotations = [{"id": f"{n}", "image_id": key, "caption": text} for n, (key, text) in enumerate(pairs)]
    images = [{"id": r["image_id"], "file_name": "x.png"} for r in records]
    (folder / "c.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    expected = [(key, text.strip()) for key, text in pairs]
    prints = set()
    for suffix in ("json", "jsonl", "parquet", "tar"):
        dataset = read(folder / f"c.{suffix}")
        assert texts(dataset) == expected
        if suffix != "json":  # COCO captions have ids of their own
            prints.add(dataset.fingerprint)
    assert len(prints) == 1


def test_fingerprints_follow_content_not_names(tmp_path: Path) -> None:
    rows = [{"image_id": "1", "image": "a.png", "caption": "one", "label": "dog"}]

    def fingerprint(name: str, shade: int, **changes: str) -> str:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "a.png").write_bytes(png(shade))
        return read(write_lines(folder / "c.jsonl", [rows[0] | changes])).fingerprint

    first = fingerprint("one", 0)
    assert first == fingerprint("two", 0)
    changed = [{"caption": "two"}, {"label": "cat"}, {"image_id": "2"}]
    others = {fingerprint(f"x{n}", 0, **change) for n, change in enumerate(changed)} | {fingerprint("y", 1)}
    assert len(others | {first}) == 5


def test_shared_images_and_captions_are_a_leak(tmp_path: Path) -> None:
    def dataset(name: str, *records: dict[str, str]) -> Dataset:
        folder = write_images(tmp_path / name, "0.png", "1.png", "2.png")
        return read(write_lines(folder / "c.jsonl", list(records)))

    train = dataset("train", {"image": "0.png", "text": "a dog"}, {"image": "1.png", "text": "a cat"})
    other_name = dataset("test", {"image_id": "new", "image": "1.png", "text": "ein Hund"})
    with pytest.raises(InputError, match=r"1 image of the test set .* first 'new'"):
        check_disjoint(train, other_name)
    same_caption = dataset("other", {"image": "2.png", "text": "A dog"})
    check_disjoint(train, same_caption)
    with pytest.raises(InputError, match="1 caption of the test set"):
        check_disjoint(train, same_caption, captions=True)
    texts_only = dataset("texts", {"image_id": "1.png", "text": "a cat"}, {"image_id": "0.png", "text": "a bird"})
    with pytest.raises(InputError, match=r"1 image .* first '1.png'"):
        check_disjoint(train, texts_only)


def test_row_groups_stay_within_their_budget(tmp_path: Path) -> None:
    blobs = [bytes([n]) * 1000 for n in range(40)]
    pq.write_table(pa.table({"image": blobs}), tmp_path / "x.parquet", row_group_size=4)
    groups = RowGroups(budget=10_000)
    for n in (0, 9, 3, 3, 7, 0, 5):
        column = groups.column(tmp_path / "x.parquet", n, "image")
        assert column[1].as_py() == blobs[4 * n + 1]
        assert sum(kept.nbytes for kept in groups._kept.values()) <= 10_000


def test_reading_captions_imports_no_torch() -> None:
    code = "import sys; from gmail_cli.components import captions; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_attributes_are_read_where_the_data_carry_them(tmp_path: Path) -> None:
    record = {"image_id": 1, "caption": "a car", "attributes": {"weather": "rain", "year": 2020, "boxes": [1]}}
    other = {"image_id": 2, "caption": "a bus", "attributes": ["no object"]}
    lines = write_lines(tmp_path / "captions.jsonl", [record, other])
    first, second = read(lines).images
    assert dict(first.attributes) == {"weather": "rain", "year": "2020"}
    assert second.attributes == ()
    scene = dict(read("scenes:test", limit=1).images[0].attributes)
    assert scene["colour"] in COLOURS
    assert "class" not in scene
