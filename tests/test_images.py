"""Decoding, preprocessing, batches and generated-image folders."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gmail_cli.components.captions import read
from gmail_cli.components.images import GeneratedSet, Preprocess, batches, decode
from gmail_cli.errors import InputError


def noise(width: int, height: int, *, mode: str = "RGB", seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK", "LA", "RGBA"])
def test_every_mode_decodes_to_rgb(mode: str) -> None:
    image = noise(9, 5, mode=mode)
    result = decode(encoded(image, "TIFF" if mode == "CMYK" else "PNG"))
    assert (result.mode, result.size) == ("RGB", (9, 5))
    if mode in ("RGB", "L", "1"):
        assert result.tobytes() == image.convert("RGB").tobytes()


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    grey = Image.fromarray(np.array([[0, 257, 65535, 128 * 257]], dtype=np.uint16))
    assert np.asarray(decode(encoded(grey)))[0, :, 0].tolist() == [0, 1, 255, 128]


def test_transparency_is_laid_over_white() -> None:
    image = Image.new("RGBA", (1, 2), (255, 0, 0, 0))
    image.putpixel((0, 1), (10, 20, 30, 255))
    assert np.asarray(decode(encoded(image)))[:, 0].tolist() == [[255, 255, 255], [10, 20, 30]]


def test_exif_orientation_is_applied() -> None:
    image = noise(6, 4)
    exif = Image.Exif()
    exif[0x0112] = 6
    result = decode(encoded(image, "PNG", exif=exif))
    assert np.array_equal(np.asarray(result), np.rot90(np.asarray(image), -1))


@pytest.mark.parametrize("data", [b"", b"not an image", encoded(noise(32, 32), "JPEG")[:400]])
def test_what_is_no_image_is_named(data: bytes) -> None:
    with pytest.raises(InputError, match="cannot decode photo-7"):
        decode(data, name="photo-7")


def test_where_a_bad_image_lies_is_told(tmp_path: Path) -> None:
    good, bad = encoded(noise(8, 8)), b"no image"
    (tmp_path / "loose").mkdir()
    for name, data in {"a.png": good, "b.png": bad}.items():
        (tmp_path / "loose" / name).write_bytes(data)
    with tarfile.open(tmp_path / "some.tar", "w") as tar:
        for name in ("a.png", "b.png"):
            tar.add(tmp_path / "loose" / name, name)
    record = {
        "caption_id": "1",
        "caption": "a",
        "owner": "1",
        "label": None,
        "k": 0,
        "seed": 0,
        "width": 8,
        "height": 8,
    }
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "b.png").write_bytes(bad)
    record |= {"key": "x", "path": "images/b.png", "sha256": hashlib.sha256(bad).hexdigest()}
    (tmp_path / "records.jsonl").write_text(json.dumps(record))
    sets = {
        f"image 1, {tmp_path / 'loose' / 'b.png'}": read(tmp_path / "loose").image_bytes,
        f"image 1, b.png in {tmp_path / 'some.tar'}": read(tmp_path / "some.tar").image_bytes,
        f"image 0, {tmp_path / 'images' / 'b.png'}": GeneratedSet.load(tmp_path).image_bytes,
    }
    for named, image_bytes in sets.items():
        found = batches(image_bytes, [range(int(named[6]) + 1)], preprocess=Preprocess(8), batch_size=4, workers=1)
        with pytest.raises(InputError, match=f"cannot decode {re.escape(named)} \\(8 bytes\\)"):
            list(found)


def test_decompression_bombs_are_refused_before_decoding() -> None:
    bomb = encoded(Image.new("1", (9_000, 8_000)))
    assert len(bomb) < 100_000
    with pytest.raises(InputError, match="pixels; at most"):
        decode(bomb)


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]),
    place=st.floats(0, 1, exclude_max=True),
    value=st.integers(0, 255),
    keep=st.floats(0, 1),
)
def test_damaged_bytes_give_an_image_or_an_input_error(kind: str, place: float, value: int, keep: float) -> None:
    data = bytearray(encoded(noise(12, 12), kind))
    data[int(place * len(data))] = value
    with contextlib.suppress(InputError):
        assert decode(bytes(data[: int(keep * len(data)) + 1])).mode == "RGB"


@pytest.mark.parametrize("size", [(97, 64), (64, 97), (33, 33), (500, 331), (20, 300)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
def test_preprocess_equals_open_clip(size: tuple[int, int], interpolation: str, resize_mode: str) -> None:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    config = {"size": 48, "interpolation": interpolation, "resize_mode": resize_mode}
    image = noise(*size, seed=3)
    expected = image_transform_v2(PreprocessCfg(**config), is_train=False)(image).numpy()
    ours = Preprocess.from_open_clip(config)(encoded(image))
    assert ours.dtype == np.float32
    assert np.abs(ours - expected).max() < 1e-6


def test_preprocess_digest_and_refusals() -> None:
    plain = Preprocess.from_open_clip({"size": (64, 64), "mean": None})
    assert plain == Preprocess(64)
    assert len({plain.digest, Preprocess(65).digest, Preprocess(64, resize="squash").digest}) == 3
    for config in (
        {"size": (64, 32)},
        {"size": 0},
        {"resize_mode": "longest"},
        {"interpolation": "nearest"},
        {"std": (1, 1)},
        {"std": 0},
    ):
        with pytest.raises(InputError, match=next(iter(config)).split("_")[0]):
            Preprocess.from_open_clip(config)


def test_batches_keep_order_and_read_ahead_only_a_little(shared_data: Path) -> None:
    dataset = read(shared_data / "flickr8k" / "captions_dev.json", images=shared_data / "flickr8k" / "dev", limit=37)
    preprocess = Preprocess(16)
    started = set()
    lock = threading.Lock()

    def image_bytes(i: int) -> bytes:
        with lock:
            started.add(i)
        return dataset.image_bytes(i)

    stream = batches(image_bytes, [range(22), range(22, 37)], preprocess=preprocess, batch_size=5, workers=3)
    found = [next(stream)]
    assert len(started) <= 5 * 4
    found += stream
    assert [len(batch) for batch in found] == [5] * 4 + [2] + [5] * 3
    expected = np.stack([preprocess.pixels(dataset.image_bytes(i)) for i in range(37)])
    assert np.array_equal(np.concatenate(found), expected)


def test_batches_name_the_row_that_fails_and_stop() -> None:
    good, before = encoded(noise(8, 8)), threading.active_count()
    stream = batches(lambda i: b"?" if i == 5 else good, [range(9)], preprocess=Preprocess(8), batch_size=2, workers=2)
    with pytest.raises(InputError, match="image 5"):
        list(stream)
    assert threading.active_count() == before


def generated(folder: Path, **changes: object) -> Path:
    (folder / "images" / "000").mkdir(parents=True)
    data = encoded(noise(8, 8))
    (folder / "images" / "000" / "a-0.png").write_bytes(data)
    record = {
        "key": "a-0",
        "caption_id": "a",
        "caption": "a dog",
        "owner": "7",
        "label": None,
        "k": 0,
        "seed": 12,
        "sha256": hashlib.sha256(data).hexdigest(),
        "path": "images/000/a-0.png",
        "width": 8,
        "height": 8,
        "generator": "tiny",
    } | changes
    (folder / "records.jsonl").write_text(json.dumps(record) + "\n")
    return folder


def test_generated_images_are_read_and_verified(tmp_path: Path) -> None:
    images = GeneratedSet.load(generated(tmp_path))
    assert (len(images), images.rows[0].owner, images.rows[0].seed) == (1, "7", 12)
    assert decode(images.image_bytes(0)).size == (8, 8)
    file = tmp_path / "images" / "000" / "a-0.png"
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(InputError, match=r"a-0\.png is not the image"):
        images.image_bytes(0)
    file.unlink()
    with pytest.raises(InputError, match="cannot read"):
        images.image_bytes(0)


@pytest.mark.parametrize(
    "changes", [{"path": "../secret"}, {"path": "/etc/passwd"}, {"path": "records.jsonl"}, {"k": "0"}, {"key": None}]
)
def test_bad_generated_records_are_named(tmp_path: Path, changes: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"records.jsonl:1|leaves the folder"):
        GeneratedSet.load(generated(tmp_path, **changes))


def test_repeated_keys_and_missing_records_are_refused(tmp_path: Path) -> None:
    folder = generated(tmp_path)
    records = folder / "records.jsonl"
    records.write_text(records.read_text() * 2)
    with pytest.raises(InputError, match=r"records.jsonl:2: key 'a-0' is there twice"):
        GeneratedSet.load(folder)
    records.unlink()
    with pytest.raises(InputError, match="cannot read"):
        GeneratedSet.load(folder)
