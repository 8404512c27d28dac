"""Generated images as WebDataset shards and one Parquet table, as webdataset, open_clip and HF datasets read them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

Row = dict[str, Any]


def write_shard(path: Path, samples: Iterable[tuple[int, Mapping[str, Any], bytes]], *, name: str) -> list[Row]:
    """Write one tar: of each sample its image, its caption (``.txt``) and its record (``.json``).

    Equal samples make equal bytes: no times, no owners.

    Args:
        path: A new file.
        samples: Number, record and encoded image of each. Members are called by the number (nine digits), since a
            reader takes a name up to its first dot for the key and keys may hold dots.
        name: What the table calls the shard.

    Returns:
        The record of each, with ``shard``, ``sample`` (its number in digits) and ``offset`` (of its image in the tar,
        bytes); ``path`` is left out, and so it is in the tar.
    """
    rows = []
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for number, record, image in samples:
            sample = f"{number:09d}"
            extension = str(record["path"]).rpartition(".")[2]
            about = {key: value for key, value in record.items() if key != "path"}
            offset = _add(archive, f"{sample}.{extension}", image)
            _add(archive, f"{sample}.txt", str(record["caption"]).encode())
            _add(archive, f"{sample}.json", json.dumps(about, sort_keys=True, ensure_ascii=False).encode())
            rows.append({**about, "shard": name, "sample": sample, "offset": offset})
    return rows


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> int:
    """Add a member; where its content begins."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    begins = archive.offset + tarfile.BLOCKSIZE
    archive.addfile(member, io.BytesIO(content))
    return begins


def table(rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Rows of :func:`write_shard` as a table whose types do not depend on the rows."""
    import pyarrow as pa

    text, whole, real = pa.string(), pa.int64(), pa.float64()
    kinds = {
        **dict.fromkeys(("key", "caption_id", "caption", "owner", "label"), text),
        **dict.fromkeys(("k", "seed", "attempt"), whole),
        **dict.fromkeys(("generator", "model", "settings", "sha256", "shard", "sample"), text),
        **dict.fromkeys(("offset", "bytes", "width", "height"), whole),
        "truncated": pa.bool_(),
        "rewritten": text,
        **dict.fromkeys(("clip_score", "twin_similarity", "partner_similarity", "copy_similarity"), real),
        "copy_of": text,
        **dict.fromkeys(("contrast", "detail", "unsafe"), real),
    }
    return pa.Table.from_pylist([dict(row) for row in rows], schema=pa.schema(list(kinds.items())))
