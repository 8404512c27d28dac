"""Images and captions packed together: WebDataset tars and Parquet shards."""

from __future__ import annotations

import itertools
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gmail_cli.components.captions.formats import (
    CAPTION_FIELDS,
    ID_FIELDS,
    LABEL_FIELDS,
    PATH_FIELDS,
    BadRecordError,
    Report,
    Request,
    Row,
    first,
    identifier,
    image_file,
    json_object,
    label_of,
    lowered,
    texts_of,
)
from gmail_cli.components.captions.sources import (
    IMAGE_SUFFIXES,
    ImageSource,
    ParquetBytes,
    RowGroups,
    TarBytes,
    inside,
)
from gmail_cli.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq


# --- tar ----------------------------------------------------------------------------------------------------


def webdataset(path: Path, request: Request, report: Report) -> Iterator[Row]:
    """One WebDataset shard: neighbouring members that share a key, their name up to its first dot.

    ``.json`` holds captions, ids and labels as a line of JSON Lines does, ``.txt`` a caption, ``.cls`` a
    label, and an image suffix the image. Nothing is unpacked.
    """
    try:
        size = path.stat().st_size
        with tarfile.open(path, "r:") as archive:
            files = (member for member in archive if not member.isdir())
            for key, members in itertools.groupby(files, key=lambda member: _key_and_suffix(member.name)[0]):
                where = f"{path.name}: {key}"
                try:
                    row = _sample(key, list(members), archive, size, path, where, request)
                except BadRecordError as bad:
                    report(where, str(bad))
                    continue
                yield row
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
    size: int,
    path: Path,
    where: str,
    request: Request,
) -> Row:
    fields: dict[str, Any] = {}
    source: TarBytes | None = None
    for member in members:
        if not member.isreg():
            raise BadRecordError(f"{member.name} is a link or a device, not a file")
        try:
            inside(path.parent, member.name)
        except InputError as error:
            raise BadRecordError(error.message) from error
        if member.offset_data + member.size > size:
            raise BadRecordError(f"the tar ends inside {member.name}")
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
            else:
                fields["caption" if suffix == ".txt" else "label"] = _utf8(data, member.name)
    if source is None and request.need_images:
        raise BadRecordError("no image")
    owner = first(fields, ID_FIELDS)
    has_texts = source is None or first(fields, CAPTION_FIELDS) is not None
    texts = texts_of(fields, request.kind) if has_texts else ()
    return Row(
        where,
        identifier(key if owner is None else owner, "image id"),
        texts,
        label_of(fields),
        source,
        complete=True,
    )


def _utf8(data: bytes, name: str) -> str:
    try:
        return data.decode().strip()
    except UnicodeDecodeError as error:
        raise BadRecordError(f"{name} is not UTF-8 text") from error


# --- Parquet ------------------------------------------------------------------------------------------------


def parquet(path: Path, request: Request, report: Report, groups: RowGroups) -> Iterator[Row]:
    """One Parquet shard with a caption column, an image column, or both.

    An image is a struct of ``bytes`` and ``path`` (as Hugging Face datasets write it), bytes, or the path of
    a file beside the shard. Integer labels are replaced by the class names in the file's metadata.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            yield from _table(file, path, request, report, groups)
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"cannot read {path}: {error}", hint="It must be a complete Parquet file."
        ) from error


def _table(
    file: pq.ParquetFile, path: Path, request: Request, report: Report, groups: RowGroups
) -> Iterator[Row]:
    import pyarrow as pa

    schema = file.schema_arrow
    names = {name.lower(): name for name in reversed(schema.names)}
    picture = first(names, ("image", "img", *PATH_FIELDS))
    wanted = [first(names, fields) for fields in (CAPTION_FIELDS, ID_FIELDS, LABEL_FIELDS, ("caption_id",))]
    columns = [name for name in wanted if name is not None]
    if wanted[0] is None and picture is None:
        raise InputError(
            f"{path} has neither a caption nor an image column; its columns are {', '.join(schema.names)}",
            hint="Name one column caption, text or image.",
        )
    stored: str | None = None  # the column that holds bytes
    if picture is not None:
        kind = schema.field(picture).type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            stored = f"{picture}.bytes"
            columns += [f"{picture}.path"] if kind.get_field_index("path") >= 0 else []
        elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            stored = picture
        else:
            columns.append(picture)
    class_names = _class_names(schema, first(names, LABEL_FIELDS))

    row = 0
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        nulls = _nulls(file, group, stored) if stored else set()
        records: Iterator[dict[str, Any]] = (
            record
            for batch in file.iter_batches(batch_size=8192, row_groups=[group], columns=columns)
            for record in batch.to_pylist()
        )
        for n, record in enumerate(records if columns else ({} for _ in range(count))):
            where = f"{path.name}: row {row}"
            row += 1
            try:
                fields = lowered(record)
                name = fields.pop(picture.lower(), None) if picture else None
                if isinstance(name, dict):
                    name = name.get("path")
                source: ImageSource | None = None
                if stored and n not in nulls:
                    source = ParquetBytes(path, group, n, stored, groups)
                elif name:
                    source = image_file(
                        request.images or path.parent, identifier(name, "image path"), request
                    )
                elif picture:
                    raise BadRecordError("no image")
                elif request.need_images:
                    raise BadRecordError("no image column")
                owner = first(fields, ID_FIELDS)
                if owner is None:
                    owner = name if name and stored is None else f"{path.stem}-{row - 1:06d}"
                label = label_of(fields)
                if label is not None and class_names:
                    if not label.isdecimal() or int(label) >= len(class_names):
                        raise BadRecordError(f"label {label} is not one of {len(class_names)} classes")
                    label = class_names[int(label)]
                texts = texts_of(fields, request.kind) if wanted[0] is not None else ()
                found = Row(where, identifier(owner, "image id"), texts, label, source)
            except BadRecordError as bad:
                report(where, str(bad))
                continue
            yield found


def _nulls(file: pq.ParquetFile, group: int, column: str) -> set[int]:
    """Rows of a row group without image bytes; reads the images only when the statistics do not say."""
    import numpy as np

    chunks = file.metadata.row_group(group)
    for n in range(chunks.num_columns):
        chunk = chunks.column(n)
        statistics = chunk.statistics if chunk.path_in_schema == column else None
        if statistics is not None and statistics.has_null_count and statistics.null_count == 0:
            return set()
    cells = file.read_row_group(group, columns=[column]).column(0)
    if "." in column:
        cells = cells.combine_chunks().field(0) if cells.num_chunks else cells
    return set(np.flatnonzero(cells.is_null().to_numpy(zero_copy_only=False)).tolist())


def _class_names(schema: pa.Schema, label: str | None) -> list[str]:
    """Class names that Hugging Face datasets keep in the schema's metadata for an integer label column."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return [str(name) for name in features[label]["names"]]
    except (KeyError, TypeError, ValueError):
        return []
