"""One generator per caption format: a file in, ``Row`` objects out, bad records reported with their place."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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

CAPTION_FIELDS = ("captions", "caption", "text", "prompt", "iiw", "description")
LONG_FIELDS = ("long_captions", "long_caption")
ID_FIELDS = ("image_id", "key")
PATH_FIELDS = ("file_name", "filename", "image", "image_path", "image_file", "filepath", "path", "image/key")
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
    texts = {*CAPTION_FIELDS, *LONG_FIELDS}
    return {name: value for name, value in named.items() if name in texts or value not in (None, "")}


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
    """The captions of a record, then its long ones; only one with an image may be without any."""
    short, long = (any(name in fields for name in names) for names in (CAPTION_FIELDS, LONG_FIELDS))
    found: tuple[Text, ...] = ()
    if short or not (long or source is not None):
        found = _texts(fields, CAPTION_FIELDS, kind)
    return found + (_texts(fields, LONG_FIELDS, "long") if long else ())


def _texts(fields: Mapping[str, Any], names: Sequence[str], kind: Kind) -> tuple[Text, ...]:
    value = first(fields, names)
    values = value if isinstance(value, list) else [value]
    if not values:
        raise BadRecordError("empty caption")
    ids: list[str | None] = [None] * len(values)
    one = len(values) == 1 and names is CAPTION_FIELDS
    if one and "caption_id" in fields and "k" not in fields:  # k: one of several drawn from that caption
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
    """A row from the fields of a CSV, TSV or JSON record; image paths are relative to the file."""
    fields = lowered(fields)
    if "conversations" in fields and not any(name in fields for name in CAPTION_FIELDS):
        fields["caption"] = first_answer(fields["conversations"])
    name = first(fields, PATH_FIELDS)
    # ImageInWords names images without a suffix.
    bare = isinstance(name, str) and PurePosixPath(name).suffix.lower() not in IMAGE_SUFFIXES
    source = None if name is None else image_file((name, f"{name}.jpg") if bare else name, beside, request)
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


def first_answer(turns: object) -> str:
    """What the assistant says first in one of LLaVA's conversations, in one line, as Long-CLIP reads ShareGPT4V."""
    for turn in turns if isinstance(turns, list) else ():
        if isinstance(turn, dict) and turn.get("from") == "gpt":
            return caption_text(turn.get("value")).replace("\n", " ")
    raise BadRecordError("conversations hold no answer from 'gpt'")


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
    _require_splits(path, wanted, splits)
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
    if not set(header) & {*CAPTION_FIELDS, *LONG_FIELDS, *PATH_FIELDS}:
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
    """JSON Lines, or a JSON list of the same records: captions (or LLaVA's conversations), image, id, label.

    ``split`` selects by the field of that name, as DOCCI has it.
    """
    wanted = None if request.split is None else set(request.split.split("+"))
    splits: Counter[str] = Counter()
    for line, where, data in _json_records(path):
        try:
            fields = json_object(data) if isinstance(data, bytes) else _checked_object(data)
            if wanted is not None:
                splits[str(fields.get("split"))] += 1
                if str(fields.get("split")) not in wanted:
                    continue
            row = record_row(fields, where, line, path.parent, request)
        except BadRecordError as bad:
            report(where, str(bad))
            continue
        yield row
    if wanted is not None:
        _require_splits(path, wanted, splits)


def _json_records(path: Location) -> Iterator[tuple[int, str, Any]]:
    """(number from 1, place, bytes of a line or an element of the list) of each record."""
    if path.suffix.lower() == ".json":
        data = read_json(path)
        if not isinstance(data, list):
            raise InputError(f"{path} holds no list of records", hint="If it is of another format, name that.")
        yield from ((n + 1, f"{path.name}: [{n}]", record) for n, record in enumerate(data))
        return
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    with file:
        yield from ((n, f"{path.name}:{n}", line) for n, line in enumerate(file, start=1) if line.strip())


def _require_splits(path: Location, wanted: set[str], splits: Counter[str]) -> None:
    if unknown := wanted - set(splits):
        raise InputError(
            f"{path} has no split {sorted(unknown)[0]!r}",
            hint="It has " + ", ".join(f"{name} ({count})" for name, count in splits.items()) + ".",
        )


def json_object(data: bytes) -> dict[str, Any]:
    """The bytes as one JSON object."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadRecordError(f"not JSON: {error}") from error
    return _checked_object(fields)


def _checked_object(fields: object) -> dict[str, Any]:
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


TOKEN_LINE = re.compile(r"(?P<image>[^\t#]+)#\d+\t(?P<caption>.*)")


def begins_with_tokens(path: Location) -> bool:
    """Whether a text file is one for `token_lines`, as ``Flickr8k.token.txt`` is; reads its first line."""
    try:
        with path.open("rb") as file:
            line = file.readline().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError):  # told by who reads it
        return False
    return TOKEN_LINE.fullmatch(line.rstrip("\r\n")) is not None


def token_lines(path: Location, request: Request, report: Report) -> Iterator[Row]:
    """The annotation files of Flickr8k and Flickr30k: an image, ``#`` and a number, a tab, a caption."""
    for line, text in enumerate(read_text(path).splitlines(), start=1):
        where = f"{path.name}:{line}"
        try:
            match = TOKEN_LINE.fullmatch(text)
            if match is None:
                raise BadRecordError("not `image#number<tab>caption`")
            name = match["image"].strip()
            source = image_file(name, path.parent, request)
            row = Row(where, name, (Text(caption_text(match["caption"]), kind=request.kind),), source=source)
        except BadRecordError as bad:
            report(where, str(bad))
            continue
        yield row


def folder(path: Location, request: Request, report: Report) -> Iterator[Row]:
    """Image files, described by ``metadata.csv`` or ``metadata.jsonl``, by a text file each, or by their subfolders.

    Text files lie in ``caption`` and have the names of the images in ``image``, a caption a line (Urban-1k). Without
    any of these the id of an image is its path in the folder and its label the first subfolder. The folder of a
    generate artifact is described by its ``records.jsonl``, and one of JSON files without images by those (DCI).
    """
    with_images = replace(request, images=request.images or path, need_images=True)
    for name, reader in (("metadata.jsonl", json_lines), ("metadata.csv", table)):
        if (path / name).is_file():
            yield from reader(path / name, with_images, report)
            return
    if (path / "records.jsonl").is_file():
        yield from json_lines(path / "records.jsonl", replace(with_images, images=path), report)
        return
    if (path / "image").is_dir() and (path / "caption").is_dir():
        yield from _captioned(path / "image", path / "caption", request, report)
        return
    images = _files(path, IMAGE_SUFFIXES)
    if not images:
        yield from _annotations(_files(path, {".json"}), request, report)
    for file in images:
        relative = PurePosixPath(file.relative_to(path))  # type: ignore[arg-type]
        label = relative.parts[0] if len(relative.parts) > 1 else None
        yield Row(str(relative), relative.as_posix(), (), label, FileBytes(file))


def _captioned(images: Location, texts: Location, request: Request, report: Report) -> Iterator[Row]:
    """Images, each with a text file of the same name in another folder."""
    for file in _files(images, IMAGE_SUFFIXES):
        name = PurePosixPath(file.relative_to(images))  # type: ignore[arg-type]
        try:
            lines = [line for line in read_text(texts / f"{name.with_suffix('.txt')}").splitlines() if line.strip()]
            captions = tuple(Text(line.strip(), kind=request.kind) for line in lines)
            if not captions:
                raise BadRecordError("empty caption")
        except (InputError, BadRecordError) as bad:
            report(f"image/{name}", str(bad))
            continue
        yield Row(f"image/{name}", name.as_posix(), captions, source=FileBytes(file), complete=True)


def _annotations(files: Sequence[Location], request: Request, report: Report) -> Iterator[Row]:
    """One JSON object a file, as Densely Captioned Images has them: image, ``short_caption`` and ``extra_caption``.

    The long caption is both, joined (LoTLIP); the short one is left out where ``kind`` is long.
    """
    for number, file in enumerate(files, start=1):
        try:
            fields = json_object(file.read_bytes())
            short, extra = fields.get("short_caption"), fields.get("extra_caption")
            if short is not None:
                both = f"{caption_text(short)} {caption_text(extra)}" if extra else caption_text(short)
                fields |= {"caption": both} if request.kind == "long" else {"caption": short, "long_caption": both}
            row = record_row(fields, file.name, number, file.parent, request)
        except BadRecordError as bad:
            report(file.name, str(bad))
            continue
        yield row


def _files(folder: Location, suffixes: Collection[str]) -> Sequence[Location]:
    """Every file of some suffix below a folder, in order."""
    if isinstance(folder, Remote):
        return sorted(file for file in folder.files() if file.suffix.lower() in suffixes)
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in suffixes and file.is_file())


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
