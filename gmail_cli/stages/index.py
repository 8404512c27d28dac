"""``gmail index``: FAISS indexes over embedding tables, and searching them with words.

An index artifact stands on its own: beside each ``<table>.faiss`` lie the rows it was built from, and ``index.json``
says which CLIP has the text tower that belongs to the vectors and where the images are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from gmail_cli.artifacts import Artifact, StageKey, Workspace
from gmail_cli.components import report
from gmail_cli.components import search as vectors
from gmail_cli.components.search import Hits, VectorIndex
from gmail_cli.components.tables import Table
from gmail_cli.errors import InputError, UsageError
from gmail_cli.profile import Profile, settings
from gmail_cli.stages import sources

VERSION = 1
INDEX = "index.json"
TEST_IMAGES = "test-images"
MEASURED_QUERIES = 1000
"""Most queries the recall of an index is measured with."""
THUMBNAIL = 160
"""Longest side of an image on the page of hits, pixels."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        query: The words searched for.
        hits: Best first: the row of each hit (id, owner, text, label, ... as embedded) and its ``score``.
        index: The artifact searched.
    """

    query: str
    hits: list[dict[str, Any]]
    index: Artifact


def plan_key(profile: Profile, *, embeddings: str) -> StageKey:
    """What `run` would make, for the digest of an embed artifact."""
    return StageKey(
        stage="index",
        version=VERSION,
        settings=settings(profile.index),
        inputs={"embeddings": embeddings},
        seed=profile.seed,
    )


def run(profile: Profile, workspace: Workspace, *, embeddings: Artifact, progress: Progress | None = None) -> Artifact:
    """Index every image table of an embed artifact (and the text tables, if asked).

    Tables of trained cells (``<table>@<cell>``) belong to other towers than `gmail search` asks, and are left out; to
    search with a trained model, embed with it as ``model.clip``.

    Args:
        profile: Sections used: ``index``; and ``seed``.
        workspace: Where the artifact goes.
        embeddings: What ``gmail embed`` made.
        progress: Called with (tables done, tables in all).

    Returns:
        The artifact: ``<table>.faiss`` and ``<table>.rows.jsonl`` for each table, and ``index.json`` with kind,
        count, dim, recall@10 against exact search, the encoder and the queries the recall was measured with.

    Raises:
        InputError: There is no table to index, or its vectors are not of unit length.
    """
    with workspace.open(plan_key(profile, embeddings=embeddings.digest)) as slot:
        if slot.done:
            return slot.artifact
        tables = sources.load_tables(embeddings)
        own = [table for table in tables if "@" not in table.header.name]
        wanted = [table for table in own if table.header.modality == "image" or profile.index.texts]
        if not wanted:
            hint = "Embed images, or index the texts with --set index.texts=true."
            raise InputError(f"{embeddings.path} holds no image table to index", hint=hint)
        entries: dict[str, Any] = {}
        for done, table in enumerate(wanted):
            if progress:
                progress(done, len(wanted))
            queries, origin = _queries(table, tables)
            index, recall = vectors.build(
                table.vectors,
                kind=profile.index.kind,
                queries=queries,
                recall_target=profile.index.recall_target,
                seed=profile.seed,
                name=table.header.name,
            )
            name = table.header.name
            slot.write_bytes(f"{name}.faiss", index.dump())
            slot.write_jsonl(f"{name}.rows.jsonl", table.rows)
            recorded = ("modality", "flow", "encoder", "encoder_digest", "space")
            entries[name] = {key: getattr(table.header, key) for key in recorded} | {
                "kind": index.kind,
                "count": index.count,
                "dim": index.dim,
                "effort": index.effort,
                "recall_at_10": recall,
                "recall_queries": origin,
            }
        if progress:
            progress(len(wanted), len(wanted))
        origins = embeddings.summary["origins"]
        slot.write_json(INDEX, {"tables": entries, "model": origins["model"], "source": origins["test"]})
        kinds = {name: f"{entry['kind']}, {entry['count']} vectors" for name, entry in entries.items()}
        return slot.commit(summary={"tables": kinds})


def search_vectors(
    artifact: Artifact, queries: Float[np.ndarray, "queries dim"], *, k: int, table: str | None = None
) -> Hits:
    """The ``k`` nearest rows of each query in one index of the artifact.

    Args:
        artifact: What ``run`` made.
        queries: Unit vectors from the encoder that ``index.json`` names.
        k: How many.
        table: Which index; the test images when None.

    Raises:
        InputError: The index is damaged, or the queries do not fit it.
        UsageError: The artifact has no index of that name.
    """
    return _load(artifact, _table_name(artifact.read_json(INDEX), table)).search(queries, k=k)


def search(artifact: Artifact, query: str, *, k: int, table: str | None = None) -> Found:
    """The ``k`` rows nearest to a text, through the text tower that belongs to the index.

    Raises:
        InputError: Not an index, or it is damaged, or its CLIP is no longer what it was.
        UsageError: The query is empty, or the artifact has no index of that name.
    """
    from gmail_cli.components.encoders import load_clip

    if artifact.stage != "index":
        hint = "Give a folder made by `gmail index`, such as runs/tiny/index/latest."
        raise InputError(f"{artifact.path} was made by `gmail {artifact.stage}`", hint=hint)
    if not query.strip():
        raise UsageError(f"the query {query!r} is empty", hint='Say what to look for: "a red car on snow".')
    about = artifact.read_json(INDEX)
    name = _table_name(about, table)
    clip = load_clip(about["model"]["clip"], revision=about["model"]["revision"])
    space = about["tables"][name]["space"]
    if clip.digest != space:
        hint = "Restore that model, or embed and index again."
        raise InputError(
            f"{name} was embedded with a CLIP of digest {space[:12]}, {clip.name} is {clip.digest[:12]}", hint=hint
        )
    found = _load(artifact, name).search(clip.encode_texts([query]).numpy(), k=k)
    rows = artifact.read_jsonl(f"{name}.rows.jsonl")
    pairs = zip(found.ids[0].tolist(), found.scores[0].tolist(), strict=True)
    return Found(query, [{**rows[row], "score": score} for row, score in pairs if row >= 0], artifact)


def search_page(found: Found) -> str:
    """The hits as an HTML page with thumbnails, read from where ``index.json`` says the images are."""
    dataset = sources.read(found.index.read_json(INDEX)["source"])
    rows = {image.id: row for row, image in enumerate(dataset.images)} if dataset.has_images else {}
    thumbnails = [
        report.thumbnail(dataset.image_bytes(rows[hit["id"]]), side=THUMBNAIL) if hit["id"] in rows else None
        for hit in found.hits
    ]
    hits = [(hit["id"], str(hit.get("text") or hit.get("label") or ""), hit["score"]) for hit in found.hits]
    return report.search_page(found.query, hits, thumbnails)


def _queries(table: Table, tables: list[Table]) -> tuple[Float[np.ndarray, "queries dim"], str]:
    """Vectors to measure recall with, and the name of their table: texts of the same space where there are any."""
    texts = [
        each
        for each in tables
        if each.header.modality == "text" and each.header.space == table.header.space and len(each.vectors)
    ]
    origin = texts[0] if texts else table
    rows = np.unique(np.linspace(0, len(origin.vectors) - 1, MEASURED_QUERIES).astype(np.int64))
    return np.asarray(origin.vectors[rows], dtype=np.float32), origin.header.name


def _table_name(about: Mapping[str, Any], table: str | None) -> str:
    names = list(about["tables"])
    if table is None:
        return TEST_IMAGES if TEST_IMAGES in names else names[0]
    if table not in names:
        raise UsageError(f"the index has no table {table!r}", hint=f"It has: {', '.join(names)}.")
    return table


def _load(artifact: Artifact, table: str) -> VectorIndex:
    path = artifact.file(f"{table}.faiss")
    index = vectors.load(path.read_bytes(), name=str(path))
    expected = artifact.read_json(INDEX)["tables"][table]
    if (index.count, index.dim) != (expected["count"], expected["dim"]):
        raise InputError(
            f"{path} holds {index.count} vectors of {index.dim} dimensions, {INDEX} says "
            f"{expected['count']} of {expected['dim']}",
            hint="Delete the artifact and run `gmail index` again.",
        )
    return index
