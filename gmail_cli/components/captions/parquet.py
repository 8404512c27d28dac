"""Parquet shards, with images in their cells or in files beside them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gmail_cli.components.captions.formats import (
    CAPTION_FIELDS,
    ID_FIELDS,
    LABEL_FIELDS,
    LONG_FIELDS,
    PATH_FIELDS,
    BadRecordError,
    Report,
    Request,
    Row,
    first,
    identifier,
    image_file,
    label_of,
    lowered,
    texts_of,
)
from gmail_cli.components.captions.remote import Location, Remote
from gmail_cli.components.captions.sources import Encoded, ImageSource
from gmail_cli.errors import InputError

ROW_GROUP_BUDGET = 256 * 2**20


@dataclass(eq=False)
class RowGroups:
    """Image columns of Parquet row groups, the most recently used ones kept in memory.

    At most ``budget`` bytes are kept, and always the last row group, whatever its size.
    """

    budget: int = ROW_GROUP_BUDGET
    _kept: OrderedDict[tuple[Location, int, str], pa.ChunkedArray] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def column(self, path: Location, group: int, name: str) -> pa.ChunkedArray:
        """Return column ``name`` of one row group (``image.bytes`` names a field of a struct)."""
        key = (path, group, name)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            try:
                with _opened(path) as file:
                    column = file.read_row_group(group, columns=[name]).column(0)
            except (OSError, pa.ArrowException) as error:
                raise InputError(f"cannot read images from {path}: {error}") from error
            self._kept[key] = column
            while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > self.budget:
                self._kept.popitem(last=False)
            return column


@dataclass(frozen=True, slots=True)
class ParquetBytes:
    """One cell of a Parquet image column."""

    path: Location
    group: int
    row: int
    column: str
    groups: RowGroups = field(compare=False, repr=False)

    def read(self) -> bytes:
        cell = self.groups.column(self.path, self.group, self.column)[self.row].as_py()
        data = next(iter(cell.values())) if isinstance(cell, dict) else cell
        if not isinstance(data, bytes):
            raise InputError(f"{self.path}: row {self.row} of row group {self.group} holds no image bytes")
        return Encoded(data, origin=f"row {self.row} of row group {self.group} in {self.path}")

    def identity(self) -> str:
        return hashlib.sha256(self.read()).hexdigest()


def parquet(path: Location, request: Request, report: Report, *, groups: RowGroups) -> Iterator[Row]:
    """One Parquet shard with a caption column, an image column, or both.

    An image is a struct of ``bytes`` and ``path`` (as Hugging Face datasets write it), bytes, or the path of
    a file beside the shard. Integer labels are replaced by the class names in the file's metadata.
    """
    try:
        with _opened(path) as file:
            yield from _table(file, path, request, report, groups)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"cannot read {path}: {error}", hint="It must be a complete Parquet file.") from error


@contextlib.contextmanager
def _opened(path: Location) -> Iterator[pq.ParquetFile]:
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(path.open("rb")) if isinstance(path, Remote) else path
        yield stack.enter_context(pq.ParquetFile(source))


@dataclass(frozen=True)
class _Columns:
    """Which columns of a shard hold what.

    Attributes:
        light: The columns to read while listing the records: all but the image bytes.
        image: The image column, in lower case.
        stored: The column or struct field with image bytes, where the shard holds them.
        class_names: Names of integer labels, where the metadata gives them.
    """

    light: list[str]
    image: str | None
    stored: str | None
    class_names: list[str]


def _columns(schema: pa.Schema, path: Location) -> _Columns:
    names = {name.lower(): name for name in reversed(schema.names)}
    used = (CAPTION_FIELDS, LONG_FIELDS, ID_FIELDS, LABEL_FIELDS)
    caption, long, owner, label = (first(names, fields) for fields in used)
    image = first(names, ("image", "img", *PATH_FIELDS))
    if caption is None and long is None and image is None:
        raise InputError(
            f"{path} has neither a caption nor an image column; its columns are {', '.join(schema.names)}",
            hint="Name one column caption, text or image.",
        )
    wanted = (caption, long, owner, label, names.get("caption_id"), names.get("k"))
    light = [name for name in wanted if name is not None]
    stored: str | None = None
    if image is not None:
        kind = schema.field(image).type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            stored = f"{image}.bytes"
            light += [f"{image}.path"] if kind.get_field_index("path") >= 0 else []
        elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            stored = image
        else:
            light.append(image)
    return _Columns(light, image and image.lower(), stored, _class_names(schema, label))


def _table(file: pq.ParquetFile, path: Location, request: Request, report: Report, groups: RowGroups) -> Iterator[Row]:
    columns = _columns(file.schema_arrow, path)
    number = 0
    for group in range(file.num_row_groups):
        nulls = _nulls(file, group, columns.stored) if columns.stored else set()
        for n, record in enumerate(_records(file, group, columns.light)):
            where = f"{path.name}: row {number}"
            source = None
            if columns.stored and n not in nulls:
                source = ParquetBytes(path, group, n, columns.stored, groups)
            try:
                row = _row(record, source, columns, where, f"{path.stem}-{number:06d}", path, request)
            except BadRecordError as bad:
                report(where, str(bad))
            else:
                yield row
            number += 1


def _records(file: pq.ParquetFile, group: int, columns: list[str]) -> Iterator[dict[str, Any]]:
    if not columns:
        yield from ({} for _ in range(file.metadata.row_group(group).num_rows))
        return
    for batch in file.iter_batches(batch_size=8192, row_groups=[group], columns=columns):
        yield from batch.to_pylist()


def _row(
    record: dict[str, Any],
    source: ImageSource | None,
    columns: _Columns,
    where: str,
    unnamed: str,
    path: Location,
    request: Request,
) -> Row:
    fields = lowered(record)
    name = fields.pop(columns.image, None) if columns.image else None
    if isinstance(name, dict):
        name = name.get("path")
    if source is None and name:
        source = image_file(name, path.parent, request)
    elif source is None and (columns.image or request.need_images):
        raise BadRecordError("no image")
    owner = first(fields, ID_FIELDS)
    if owner is None:
        owner = name if name and columns.stored is None else unnamed
    label = label_of(fields)
    if label is not None and columns.class_names:
        if not label.isdecimal() or int(label) >= len(columns.class_names):
            raise BadRecordError(f"label {label} is not one of {len(columns.class_names)} classes")
        label = columns.class_names[int(label)]
    return Row(where, identifier(owner, "image id"), texts_of(fields, source, request.kind), label, source)


def _nulls(file: pq.ParquetFile, group: int, column: str) -> set[int]:
    """Rows of a row group without image bytes; reads the images only when the statistics do not say."""
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
