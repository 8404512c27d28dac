"""WebDataset tars: images and captions read in place."""

from __future__ import annotations

import itertools
import tarfile
from collections.abc import Iterator
from typing import Any

from gmail_cli.components.captions.formats import (
    CAPTION_FIELDS,
    ID_FIELDS,
    LONG_FIELDS,
    BadRecordError,
    Report,
    Request,
    Row,
    attributes_of,
    first,
    identifier,
    json_object,
    label_of,
    lowered,
    texts_of,
)
from gmail_cli.components.captions.remote import Location
from gmail_cli.components.captions.sources import IMAGE_SUFFIXES, TarBytes, inside
from gmail_cli.errors import InputError


def webdataset(path: Location, request: Request, report: Report) -> Iterator[Row]:
    """One WebDataset shard: neighbouring members that share a key, their name up to its first dot.

    ``.json`` holds captions, ids and labels as a line of JSON Lines does, ``.txt`` a caption a line (CLIP_benchmark)
    where that has none, ``.cls`` a label, and an image suffix the image. Nothing is unpacked.
    """
    try:
        with path.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            files = (member for member in archive if not member.isdir())
            for key, members in itertools.groupby(files, key=lambda member: _key_and_suffix(member.name)[0]):
                where = f"{path.name}: {key}"
                try:
                    row = _sample(key, list(members), archive, path, where, request)
                except BadRecordError as bad:
                    report(where, str(bad))
                    continue
                yield row
            stream.seek(archive.offset)
            if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("it ends without its end mark")
    except (tarfile.TarError, OSError) as error:
        raise InputError(
            f"cannot read the tar {path}: {error}", hint="It must be a complete, uncompressed tar."
        ) from error


def _key_and_suffix(name: str) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    return folder + slash + stem, (dot + suffix).lower()


def _sample(
    key: str,
    members: list[tarfile.TarInfo],
    archive: tarfile.TarFile,
    path: Location,
    where: str,
    request: Request,
) -> Row:
    fields: dict[str, Any] = {}
    lines: dict[str, list[str]] = {}
    source: TarBytes | None = None
    for member in members:
        if not member.isreg() or member.issparse():
            raise BadRecordError(f"{member.name} is not a plain file")
        try:
            inside(path.parent, member.name)
        except InputError as error:
            raise BadRecordError(error.message) from error
        suffix = _key_and_suffix(member.name)[1]
        if suffix in IMAGE_SUFFIXES:
            if source is not None:
                raise BadRecordError(f"two images, {source.name} and {member.name}")
            source = TarBytes(path, member.name, member.offset_data, member.size)
        elif suffix in (".json", ".txt", ".cls"):
            file = archive.extractfile(member)
            assert file is not None
            data = file.read()
            if suffix == ".json":
                fields |= lowered(json_object(data))
            elif suffix == ".txt":
                lines["captions"] = [line for line in _utf8(data, member.name).splitlines() if line.strip()]
            else:
                fields["label"] = _utf8(data, member.name)
    if not any(name in fields for name in (*CAPTION_FIELDS, *LONG_FIELDS)):
        fields |= lines
    if source is None and request.need_images:
        raise BadRecordError("no image")
    owner = first(fields, ID_FIELDS)
    return Row(
        where,
        identifier(key if owner is None else owner, "image id"),
        texts_of(fields, source, request.kind),
        label_of(fields),
        source,
        complete=True,
        attributes=attributes_of(fields),
    )


def _utf8(data: bytes, name: str) -> str:
    try:
        return data.decode().strip()
    except UnicodeDecodeError as error:
        raise BadRecordError(f"{name} is not UTF-8 text") from error
