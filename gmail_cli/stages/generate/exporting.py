"""Generated images as WebDataset shards and a Parquet table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from gmail_cli.artifacts import EXPORTED, Artifact, export_files
from gmail_cli.stages.generate.drawing import Progress
from gmail_cli.stages.generate.planning import RECORDS, Record, drawn_by


def export(artifact: Artifact, target: str, *, shard_images: int = 10_000, progress: Progress | None = None) -> None:
    """Write images as WebDataset shards (``00000.tar``, ...) and a table of them all (``images.parquet``, last).

    Args:
        artifact: What `run` made.
        target: A folder that is new or empty, or an fsspec URL.
        shard_images: Images in one tar.
        progress: Called with (images written, images in all).

    Raises:
        InputError: An image is not as recorded.
        UsageError: There is something at ``target``.
    """
    from gmail_cli.components import shards
    from gmail_cli.components.images import GeneratedSet

    images = GeneratedSet.load(artifact.path)
    records = artifact.read_jsonl(RECORDS)
    key = artifact.manifest["key"]
    parts = drawn_by(key["settings"], key["models"])
    tables: list[Any] = []

    def about(record: Record) -> Record:
        _, models = parts[record["generator"]]
        return {"model": models.get("generator"), "settings": artifact.digest}

    def write(path: Path, rows: range) -> None:
        samples = ((row, records[row] | about(records[row]), images.image_bytes(row)) for row in rows)
        tables.append(shards.table(shards.write_shard(path, samples, name=path.name)))
        if progress:
            progress(rows.stop, len(records))

    def write_table(path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.concat_tables(tables), path)

    def files() -> Iterator[tuple[str, Callable[[Path], object]]]:
        for number, first in enumerate(range(0, len(records), shard_images)):
            rows = range(first, min(first + shard_images, len(records)))
            yield f"{number:05d}.tar", partial(write, rows=rows)
        yield EXPORTED, write_table

    export_files(target, files())
