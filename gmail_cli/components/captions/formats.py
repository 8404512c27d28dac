"""One generator per caption format: a file in, ``Row`` objects out, bad records reported with their place."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from gmail_cli.components.captions.records import Attributes, Kind
from gmail_cli.components.captions.remote import Location, Remote
from gmail_cli.components.captions.sources import (
    IMAGE_SUFFIXES,
    FileBytes,
    ImageSource,
    SceneBytes,
    inside,
)
from gmail_cli.errors import InputError, UsageError

CAPTION_FIELDS = ("captions", "caption", "text", "prompt", "iiw")
ID_FIELDS = ("image_id", "key")
PATH_FIELDS = ("file_name", "filename", "image", "image_path", "filepath", "path")
LABEL_FIELDS = ("label", "class", "class_name")


@dataclass(frozen=True, slots=True)
class Text:
    """A caption as found; ``id`` None asks for one made from its image's id."""

    text: str
    id: str | None = None
    kind: Kind = "short"


@dataclass(frozen=True, slots=True)
class Row:
    """One record as found: an image (or the part of one that a line holds) and its captions.

    ``complete``: no later row adds to this image, so reading may stop here.
    """

    where: str
    id: str
    texts: tuple[Text, ...]
    label: str | None = None
    source: ImageSource | None = None
    complete: bool = False
    attributes: Attributes = ()


@dataclass(frozen=True, slots=True)
class Request:
    """What ``read`` was asked for, as far as a format needs to know."""

    images: Location | None = None
    split: str | None = None
    kind: Kind = "short"
    need_images: bool = False
    scene_seed: int = 0
    scene_size: int = 64


Report = Callable[[str, str], None]
"""Called with the place of a bad record and what is wrong with it."""


class BadRecordError(Exception):
    """One record cannot be used; the message says why. Never leaves this package."""


# --- fields of a record -------------------------------------------------------------------------------------


def lowered(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The record with lower-case field names, without its empty fields; an empty caption stays, to be reported."""
    named = {name.strip().lower(): value for name, value in fields.items()}
    return {name: value for name, value in named.items() if name in CAPTION_FIELDS or value not in (None, "")}


def identifier(value: object, name: str) -> str:
    """An id as text: a non-empty string or an integer."""
    if isinstance(value, bool) or not isinstance(value, (str, int)) or not str(value).strip():
        raise BadRecordError(f"{name} is {value!r}, not a text or an integer")
    return str(value).strip()


def caption_text(value: object) -> str:
    """A caption without surrounding white space."""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise BadRecordError("empty caption")
    if not isinstance(value, str):
        raise BadRecordError(f"caption is {value!r}, not a text")
    return value.strip()


def first(fields: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The first of the named fields that is there, else None."""
    return next((fields[name] for name in names if name in fields), None)


def texts_of(fields: Mapping[str, Any], source: ImageSource | None, kind: Kind) -> tuple[Text, ...]:
    """The captions of a record; only one with an image may be without a caption field."""
    if source is not None and not any(name in fields for name in CAPTION_FIELDS):
        return ()
    value = first(fields, CAPTION_FIELDS)
    values = value if isinstance(value, list) else [value]
    if not values:
        raise BadRecordError("empty caption")
    ids: list[str | None] = [None] * len(values)
    if len(values) == 1 and "caption_id" in fields and "k" not in fields:  # k: one of several drawn from that caption
        ids = [identifier(fields["caption_id"], "caption_id")]
    return tuple(Text(caption_text(text), key, kind) for text, key in zip(values, ids, strict=True))


def label_of(fields: Mapping[str, Any]) -> str | None:
    """The class of a record, where it names one."""
    value = first(fields, LABEL_FIELDS)
    return None if value is None else identifier(value, "label")


def attributes_of(fields: Mapping[str, Any]) -> Attributes:
    """Further labels of a record: the texts and integers of ``attributes``, where that is an object."""
    value = fields.get("attributes")
    named = value.items() if isinstance(value, dict) else ()
    return tuple((name, str(each)) for name, each in named if isinstance(each, (str, int)))


def image_file(name: object, beside: Location, request: Request) -> FileBytes | None:
    """The file of an image in the folder asked for, else in ``beside``.

    A tuple of names is tried in turn. None where the file is missing and nobody asked for images.
    """
    names = name if isinstance(name, tuple) else (name,)
    for candidate in names:
        try:
            path = inside(request.images or beside, identifier(candidate, "image file"))
        except InputError as error:
            raise BadRecordError(error.message) from error
        if path.is_file():
            return FileBytes(path)
    if request.images is not None or request.need_images:
        raise BadRecordError(f"image file {path} not found")
    return None


def record_row(fields: Mapping[str, Any], where: str, line: int, beside: Location, request: Request) -> Row:
    """A row from the fields of a CSV, TSV or JSON Lines record; image paths are relative to the file."""
    fields = lowered(fields)
    name = first(fields, PATH_FIELDS)
    source = None if name is None else image_file(name, beside, request)
    if name is None and request.need_images:
        raise BadRecordError("no image")
    owner = first(fields, ID_FIELDS)
    if owner is None:
        owner = name if name is not None else fields.get("id", f"{line:06d}")
    return Row(
        where,
        identifier(owner, "image id"),
        texts_of(fields, source, request.kind),
        label_of(fields),
        source,
        attributes=attributes_of(fields),
    )


# --- whole files --------------------------------------------------------------------------------------------


def read_text(path: Location) -> str:
    """The file as UTF-8 text, without a byte-order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start})", hint="Convert the file to UTF-8.") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error


def read_json(path: Location) -> Any:
    """The file as JSON."""
    try:
        return json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}", hint="Copy or download the file again.") from error


def json_list(data: Any, key: str, path: Location) -> list[Any]:
    """``data[key]``, which must be a list."""
    value = data.get(key) if isinstance(data, dict) else None
    if not isinstance(value, list):
        raise InputError(f"{path} has no list {key!r}", hint="If it is of another format, name that.")
    return value


def checked_ids(
    records: list[Any], name: str, path: Location, report: Report
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The records of a JSON list that are objects with an id of their own, as (where, id, record)."""
    seen: set[str] = set()
    for n, record in enumerate(records):
        where = f"{path.name}: {name}[{n}]"
        try:
            if not isinstance(record, dict):
                raise BadRecordError(f"is {record!r:.80}, not an object")
            key = identifier(record.get("id"), "id")
            where += f" (id {key})"
            if key in seen:
                raise BadRecordError(f"duplicate id {key}")
        except BadRecordError as bad:
            report(where, str(bad))
            continue
        seen.add(key)
        yield where, key, record


def coco(path: Location, request: Request, report: Report) -> Iterator[Row]:
    """COCO captions JSON: ``images`` (id, file_name) and ``annotations`` (id, image_id, caption)."""
    data = read_json(path)
    annotations = json_list(data, "annotations", path)
    if annotations and not any(isinstance(a, dict) and "caption" in a for a in annotations):
        raise InputError(f"{path} holds no captions", hint="Use the captions_*.json file of the same set.")
    images: dict[str, dict[str, Any]] = {}
    places: dict[str, str] = {}
    for where, key, record in checked_ids(json_list(data, "images", path), "images", path, report):
        images[key] = {**record, "id": key}
        places[key] = where
    good = []
    for where, key, record in checked_ids(annotations, "annotations", path, report):
        owner = str(record.get("image_id"))
        caption = record.get("caption")
        if "image_id" not in record:
            report(where, "no image_id")
        elif owner not in places:
            report(where, f"image_id {owner} is not among the images")
        elif not isinstance(caption, str) or not caption.strip():
            report(where, "empty caption")
        else:
            good.append({"id": key, "image_id": owner, "caption": caption.strip()})

    from pycocotools.coco import COCO

    index = COCO()
    index.dataset = {"images": list(images.values()), "annotations": good}
    with contextlib.redirect_stdout(io.StringIO()):
        index.createIndex()
    for key, image in index.imgs.items():
        try:
            source = image_file(image.get("file_name"), path.parent, request)
        except BadRecordError as bad:
            report(places[key], str(bad))
            continue
        texts = tuple(Text(a["caption"], a["id"], request.kind) for a in index.imgToAnns.get(key, ()))
        yield Row(places[key], key, texts, source=source, complete=True)


def karpathy(path: Location, request: Request, report: Report) -> Iterator[Row]:
    """Karpathy's ``dataset_*.json``: images with split, sentences and file name.

    ``split`` selects ``train``, ``val``, ``test``, ``restval`` or several joined by ``+``; None takes all.
    """
    images = json_list(read_json(path), "images", path)
    splits = Counter(str(image.get("split")) for image in images if isinstance(image, dict))
    wanted = set(splits) if request.split is None else set(request.split.split("+"))
    if unknown := wanted - set(splits):
        raise InputError(
            f"{path} has no split {sorted(unknown)[0]!r}",
            hint="It has " + ", ".join(f"{name} ({count})" for name, count in splits.items()) + ".",
        )
    for n, image in enumerate(images):
        where = f"{path.name}: images[{n}]"
        try:
            if not isinstance(image, dict):
                raise BadRecordError(f"is {image!r:.80}, not an object")
            if str(image.get("split")) not in wanted:
                continue
            key = identifier(first(image, ("cocoid", "imgid")), "cocoid")
            where += f" (id {key})"
            sentences = image.get("sentences")
            if not isinstance(sentences, list) or not all(isinstance(s, dict) for s in sentences):
                raise BadRecordError("no list of sentences")
            texts = tuple(
                Text(
                    caption_text(s.get("raw")),
                    identifier(s["sentid"], "sentid") if "sentid" in s else None,
                    request.kind,
                )
                for s in sentences
            )
            name = image.get("filename")
            names = (f"{image['filepath']}/{name}", name) if image.get("filepath") else name  # filepath: val2014
            source = image_file(names, path.parent, request)
        except BadRecordError as bad:
            report(where, str(bad))
            continue
        yield Row(where, key, texts, source=source, complete=True)


def table(path: Location, request: Request, report: Report) -> Iterator[Row]:
    """CSV or TSV with a header: a caption or image column, and id and label columns where there are any.

    Tabs in the header make it TSV, where quotation marks are part of the text. Conceptual Captions have no header: two
    columns, of which one holds the image's address.
    """
    text = read_text(path)
    tabs = "\t" in text.partition("\n")[0]
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter="\t" if tabs else ",",
        quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
    )
    header = [name.strip().lower() for name in next(reader, [])]
    addresses = [value.startswith(("http://", "https://")) for value in header]
    if tabs and sorted(addresses) == [False, True]:
        header = ["url" if address else "caption" for address in addresses]
        reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE)
    if not set(header) & {*CAPTION_FIELDS, *PATH_FIELDS}:
        raise InputError(
            f"{path} has neither a caption nor an image column; its columns are {', '.join(header) or '(none)'}",
            hint="Name one column caption, text, prompt or image.",
        )
    while True:
        where = f"{path.name}:{reader.line_num + 1}"
        try:
            values = next(reader)
            if not values:
                continue
            if len(values) != len(header):
                raise BadRecordError(f"{len(values)} fields where the header has {len(header)}")
            row = record_row(dict(zip(header, values, strict=True)), where, reader.line_num, path.parent, request)
        except StopIteration:
            return
        except (csv.Error, BadRecordError) as bad:
            report(where, str(bad))
            continue
        yield row


def json_lines(path: Location, request: Request, report: Report) -> Iterator[Row]:
    """JSON Lines: one object a line with caption, captions, text or IIW, and image, id and label fields."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    with file:
        for line, data in enumerate(file, start=1):
            if not data.strip():
                continue
            where = f"{path.name}:{line}"
            try:
                row = record_row(json_object(data), where, line, path.parent, request)
            except BadRecordError as bad:
                report(where, str(bad))
                continue
            yield row


def json_object(data: bytes) -> dict[str, Any]:
    """The bytes as one JSON object."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadRecordError(f"not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise BadRecordError(f"is {fields!r:.80}, not an object")
    return fields


def plain_text(path: Location, request: Request, report: Report) -> Iterator[Row]:
    """One caption a line; its id is the line number."""
    for line, text in enumerate(read_text(path).removesuffix("\n").split("\n"), start=1):
        where = f"{path.name}:{line}"
        try:
            row = Row(where, f"{line:06d}", (Text(caption_text(text), kind=request.kind),))
        except BadRecordError as bad:
            report(where, str(bad))
            continue
        yield row


def folder(path: Location, request: Request, report: Report) -> Iterator[Row]:
    """Image files, described by ``metadata.csv`` or ``metadata.jsonl`` or by the subfolders they lie in.

    Without metadata the id of an image is its path in the folder and its label the first subfolder. The folder of a
    generate artifact is described by its ``records.jsonl``.
    """
    with_images = replace(request, images=request.images or path, need_images=True)
    for name, reader in (("metadata.jsonl", json_lines), ("metadata.csv", table)):
        if (path / name).is_file():
            yield from reader(path / name, with_images, report)
            return
    if (path / "records.jsonl").is_file():
        yield from json_lines(path / "records.jsonl", replace(with_images, images=path), report)
        return
    for file in _image_files(path):
        relative = PurePosixPath(file.relative_to(path))  # type: ignore[arg-type]
        label = relative.parts[0] if len(relative.parts) > 1 else None
        yield Row(str(relative), relative.as_posix(), (), label, FileBytes(file))


def _image_files(folder: Location) -> Sequence[Location]:
    if isinstance(folder, Remote):
        return sorted(file for file in folder.files() if file.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())


def scene_rows(split: str, request: Request) -> Iterator[Row]:
    """The built-in world, without end: five short captions and a long one per scene."""
    from gmail_cli.components import scenes

    for index in itertools.count():
        scene = scenes.sample_scene(split, index, seed=request.scene_seed)
        key = f"{split}-{index:06d}"
        texts = (
            *(Text(text) for text in scenes.captions(scene)),
            Text(scenes.long_caption(scene), kind="long"),
        )
        source = SceneBytes(split, index, request.scene_seed, request.scene_size)
        facts = scenes.attributes(scene)
        label = facts.pop("class")
        yield Row(f"scene {key}", key, texts, label, source, complete=True, attributes=tuple(facts.items()))


def scene_split(source: str) -> str:
    """The split that ``scenes:<split>`` names."""
    split = source.partition(":")[2]
    if split not in ("train", "val", "test"):
        raise UsageError(f"no scenes {split!r}", hint="Use scenes:train, scenes:val or scenes:test.")
    return split
