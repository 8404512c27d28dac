"""Image bytes to pixels: decoding, preprocessing, batches read ahead, and the folders that generation writes."""

from __future__ import annotations

import hashlib
import io
import json
import math
import struct
import zlib
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageOps

from gmail_cli.components.captions import Encoded, inside
from gmail_cli.errors import InputError

MAX_PIXELS = 2**26
"""Images with more pixels (67 million) are refused before they are decoded."""
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
READ_AHEAD = 2
"""Batches that are decoded while one is in use."""

Interpolation = Literal["bicubic", "bilinear"]
Resize = Literal["shortest", "squash"]

# What Pillow's readers raise on bytes that are not the image they claim to be. A warning is raised as an error
# where the process asks for that.
_UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    IndexError,
    KeyError,
    OverflowError,
    MemoryError,
    NotImplementedError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Warning,
)


def decode(data: bytes, *, name: str = "image") -> Image.Image:
    """Decode an image as 8-bit RGB, upright.

    EXIF orientation is applied, transparency laid over white, 16-bit grey scaled to 8 bits, the first frame of
    an animation taken, and grey, palette and CMYK converted.

    Args:
        data: The encoded image; where it lies is told too if it says so (``Encoded``).
        name: What an error calls it.

    Raises:
        InputError: The bytes are no image, are cut short, or hold more than ``MAX_PIXELS``.
    """
    name = f"{name}, {data.origin}" if isinstance(data, Encoded) else name
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise InputError(
                    f"{name} has {image.width} x {image.height} pixels; at most {MAX_PIXELS} are read",
                    hint="Scale it down.",
                )
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _rgb(image)
    except _UNREADABLE as error:
        what = f"{len(data)} bytes" if data else "no bytes"
        raise InputError(f"cannot decode {name} ({what}): {error}", hint="Replace the file or leave it out.") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("32-bit values outside 0..65535")
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range")
    if image.has_transparency_data:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return image.convert("RGB")


@dataclass(frozen=True)
class Preprocess:
    """From an encoded image to what an image tower reads: open_clip's evaluation transform, on one thread.

    ``shortest`` scales the short side to ``size`` (the long side rounded down) and crops the middle; ``squash``
    scales both sides. Interpolation is Pillow's, antialiased. Images are decoded by ``decode`` first.

    Attributes:
        size: Side of the result in pixels.
        mean: Subtracted from each channel (red, green, blue; of 0..1).
        std: Each channel is divided by it.
        interpolation: ``bicubic`` or ``bilinear``.
        resize: ``shortest`` or ``squash``.
        scale_to: The short side before the middle is cropped; None for ``size``.
        crop: Where the middle of an odd remainder begins: ``round`` as open_clip, ``floor`` as transformers.
    """

    size: int
    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD
    interpolation: Interpolation = "bicubic"
    resize: Resize = "shortest"
    scale_to: int | None = None
    crop: Literal["round", "floor"] = "round"

    @classmethod
    def from_open_clip(cls, config: Mapping[str, Any]) -> Preprocess:
        """Read an open_clip ``preprocess_cfg``; keys that are missing or None have open_clip's defaults.

        Raises:
            InputError: A key has a value that is not supported; names it.
        """
        given = {key: value for key, value in config.items() if value is not None}
        size = given.get("size", 224)
        if isinstance(size, (list, tuple)):
            size = size[0] if len(set(size)) == 1 else size
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise InputError(f"preprocess_cfg: size is {size!r}; only squares, a positive integer, are supported")
        interpolation = given.get("interpolation", "bicubic")
        resize = given.get("resize_mode", "shortest")
        for key, value, allowed in (
            ("interpolation", interpolation, get_args(Interpolation)),
            ("resize_mode", resize, get_args(Resize)),
            ("mode", given.get("mode", "RGB"), ("RGB",)),
        ):
            if value not in allowed:
                raise InputError(f"preprocess_cfg: {key} is {value!r}; supported are {', '.join(allowed)}")
        mean = _channels("mean", given.get("mean", OPENAI_MEAN))
        std = _channels("std", given.get("std", OPENAI_STD))
        if min(std) <= 0:
            raise InputError(f"preprocess_cfg: std is {list(std)}; it must be positive")
        return cls(size, mean, std, interpolation, resize)

    @property
    def digest(self) -> str:
        """SHA-256 of the settings: tables are comparable when theirs are equal."""
        unset = {"scale_to": None, "crop": "round"}
        settings = {name: value for name, value in asdict(self).items() if (name, value) not in unset.items()}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def __call__(self, data: bytes, *, name: str = "image") -> Float32[np.ndarray, "3 size size"]:
        """Decode, scale, crop and normalise one image.

        Raises:
            InputError: The image cannot be decoded; see ``decode``.
        """
        channels = self.pixels(data, name=name).astype(np.float32)
        channels /= np.float32(255)
        channels -= np.array(self.mean, dtype=np.float32)[:, None, None]
        channels /= np.array(self.std, dtype=np.float32)[:, None, None]
        return channels

    def pixels(self, data: bytes, *, name: str = "image") -> UInt8[np.ndarray, "3 size size"]:
        """Decode, scale and crop one image: all but the normalisation.

        Raises:
            InputError: The image cannot be decoded; see ``decode``.
        """
        pixels = np.asarray(self._scale(decode(data, name=name)), dtype=np.uint8)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def _scale(self, image: Image.Image) -> Image.Image:
        method = Image.Resampling[self.interpolation.upper()]
        width, height = image.size
        if self.resize == "squash":
            return image.resize((self.size, self.size), method)
        short = min(width, height)
        to = self.scale_to or self.size
        width, height = to * width // short, to * height // short
        image = image.resize((width, height), method)
        start = round if self.crop == "round" else math.floor
        left, top = start((width - self.size) / 2), start((height - self.size) / 2)
        return image.crop((left, top, left + self.size, top + self.size))


def _channels(key: str, value: Any) -> tuple[float, float, float]:
    values = value if isinstance(value, (list, tuple)) else [value] * 3
    if len(values) != 3 or not all(isinstance(v, (int, float)) for v in values):
        raise InputError(f"preprocess_cfg: {key} is {value!r}; it must be three numbers")
    red, green, blue = map(float, values)
    return red, green, blue


def batches(
    image_bytes: Callable[[int], bytes],
    parts: Sequence[range],
    *,
    preprocess: Preprocess,
    batch_size: int,
    workers: int,
) -> Generator[UInt8[np.ndarray, "batch 3 size size"], None, None]:
    """Read, decode, scale and crop images in order, ``READ_AHEAD`` batches ahead of their use.

    Memory does not grow with the number of images. Every batch but the last of a part has ``batch_size`` images, so
    a part's batches do not depend on the parts before it.

    Args:
        image_bytes: The encoded bytes of image i, such as ``Dataset.image_bytes``; called from several threads.
        parts: Numbers of the images.
        preprocess: What to do with each; normalisation is left to the reader.
        batch_size: Images in a batch.
        workers: Threads that decode.

    Raises:
        InputError: An image cannot be read or decoded; names its row.
    """
    workers = max(1, workers)
    slices = min(workers, batch_size)

    def fill(out: UInt8[np.ndarray, "batch 3 size size"], rows: range, part: int) -> None:
        for place in range(part, len(rows), slices):
            out[place] = preprocess.pixels(image_bytes(rows[place]), name=f"image {rows[place]}")

    with ThreadPoolExecutor(workers) as pool:
        ahead: deque[tuple[UInt8[np.ndarray, "batch 3 size size"], list[Future[None]]]] = deque()
        cuts = (part[start : start + batch_size] for part in parts for start in range(0, len(part), batch_size))
        try:
            while True:
                while len(ahead) <= READ_AHEAD and (rows := next(cuts, None)) is not None:
                    out = np.empty((len(rows), 3, preprocess.size, preprocess.size), dtype=np.uint8)
                    ahead.append((out, [pool.submit(fill, out, rows, part) for part in range(slices)]))
                if not ahead:
                    return
                out, filling = ahead.popleft()
                for each in filling:
                    each.result()
                yield out
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True, slots=True)
class GeneratedImage:
    """One record of a generate artifact.

    Attributes:
        key: Unique in the artifact.
        caption_id: Id of the caption it was drawn from.
        caption: Its text.
        owner: Id of the real image that the caption describes.
        label: Class of that image, where there is one.
        k: Which of the images of this caption, from 0.
        seed: Seed of its generator; None for images made elsewhere.
        sha256: Of the file's bytes.
        path: The file, relative to the artifact.
        width: In pixels.
        height: In pixels.
    """

    key: str
    caption_id: str
    caption: str
    owner: str
    label: str | None
    k: int
    seed: int | None
    sha256: str
    path: str
    width: int
    height: int


_FIELD_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("key", "caption_id", "caption", "owner", "sha256", "path"), (str,)),
    **dict.fromkeys(("k", "width", "height"), (int,)),
    "label": (str, type(None)),
    "seed": (int, type(None)),
}


@dataclass(frozen=True)
class GeneratedSet:
    """The images of a generate artifact, in the order of its ``records.jsonl``."""

    folder: Path
    rows: tuple[GeneratedImage, ...]

    @classmethod
    def load(cls, folder: Path) -> GeneratedSet:
        """Read ``records.jsonl`` in the folder of an artifact.

        Raises:
            InputError: The file is missing, a record lacks a field, repeats a key or names a file outside
                ``images/``.
        """
        records = folder / "records.jsonl"
        try:
            lines = records.read_bytes().splitlines()
        except OSError as error:
            raise InputError(
                f"cannot read {records}: {error.strerror or error}", hint="Name the folder of a generate artifact."
            ) from error
        rows: dict[str, GeneratedImage] = {}
        for line, data in enumerate(lines, start=1):
            row = _generated_image(data, f"{records}:{line}", folder)
            if row.key in rows:
                raise InputError(f"{records}:{line}: key {row.key!r} is there twice")
            rows[row.key] = row
        return cls(folder, tuple(rows.values()))

    def __len__(self) -> int:
        """Number of images."""
        return len(self.rows)

    def image_bytes(self, i: int) -> bytes:
        """Return the encoded bytes of image ``i`` as stored.

        Raises:
            InputError: The file is missing or is not the one that was recorded.
        """
        row = self.rows[i]
        path = self.folder / row.path
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}") from error
        if hashlib.sha256(data).hexdigest() != row.sha256:
            raise InputError(f"{path} is not the image that records.jsonl names", hint="Generate it again.")
        return Encoded(data, origin=str(path))


def _generated_image(data: bytes, where: str, folder: Path) -> GeneratedImage:
    try:
        record = json.loads(data)
    except ValueError as error:
        raise InputError(f"{where}: not JSON: {error}") from error
    if not isinstance(record, dict):
        raise InputError(f"{where}: not an object")
    values: dict[str, Any] = {name: record.get(name) for name in _FIELD_TYPES}
    for name, types in _FIELD_TYPES.items():
        if not isinstance(values[name], types) or isinstance(values[name], bool):
            raise InputError(f"{where}: {name} is {values[name]!r}")
    if inside(folder, values["path"]).relative_to(folder).parts[0] != "images":
        raise InputError(f"{where}: {values['path']!r} is not in images/")
    return GeneratedImage(**values)
