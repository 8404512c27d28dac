"""``gmail index``: FAISS indexes over embedding tables; adding rows, removing rows, building anew.

An index artifact stands on its own: beside each ``<table>.faiss`` lie the rows it was built from, and ``index.json``
says how it was chosen, which CLIP has the text tower that belongs to the vectors, and where the images are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from gmail_cli.artifacts import Artifact, Slot, StageKey, Workspace, digest_of
from gmail_cli.components import search as vectors
from gmail_cli.components.search import Limits, VectorIndex
from gmail_cli.components.tables import Table
from gmail_cli.errors import InputError, UsageError
from gmail_cli.profile import settings
from gmail_cli.profile.schema import Profile
from gmail_cli.stages import sources
from gmail_cli.stages.sources import INDEX

MEASURED_QUERIES = 1000
"""Most queries the recall of an index is measured with."""

_RECORDED = ("modality", "flow", "encoder", "encoder_digest", "space", "preprocess")

Progress = Callable[[int, int], None]


def plan_key(profile: Profile, *, embeddings: str) -> StageKey:
    """What `run` would make, for the digest of an embed artifact."""
    return StageKey(
        stage="index",
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
        progress: Called with (steps done, steps in all), table by table.

    Returns:
        The artifact: ``<table>.faiss`` (and ``<table>.lists`` with ``storage = "disk"``), ``<table>.rows.jsonl``, and
        ``index.json`` with kind, count, dim, recall@10 against exact search, the candidates, the encoder and the
        queries the recall was measured with.

    Raises:
        InputError: There is no table to index, or its vectors are not of unit length.
        UsageError: No index keeps to the limits.
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
        for table in wanted:
            name, queries = table.header.name, _queries(table, tables)
            entry = {key: getattr(table.header, key) for key in _RECORDED} | {"embeddings": [embeddings.digest]}
            rows = _with_captions(table, tables)
            entries[name] = _write(slot, profile, name, entry, table.vectors, rows, queries, progress)
        origins = embeddings.summary["origins"]
        about = {
            "model": origins["model"],
            "sources": [origins["test"]],
            "aligned": embeddings.manifest["key"]["inputs"].get("aligned"),
        }
        return _commit(slot, about, entries)


def update(
    profile: Profile,
    workspace: Workspace,
    *,
    index: Artifact,
    add: Artifact | None = None,
    remove: Path | None = None,
    rebuild: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """A new index artifact from an older one, with rows added, removed, or everything built anew.

    Ids stay what they are. Cells and codes stay as they were trained, unless ``rebuild`` chooses and trains again by
    the profile from the embeddings, which must still be in some run of the workspace, or of that of the index. Recall
    is measured where they are.

    Args:
        profile: Section used with ``rebuild``: ``index``; and ``seed``.
        workspace: Where the artifact goes.
        index: What ``run`` or ``update`` made.
        add: An embed artifact of the same encoder; its tables of the same names are added.
        remove: A file with an id on each line; each must be in some table.
        rebuild: Choose and build again.
        progress: Called with (steps done, steps in all), table by table.

    Raises:
        InputError: Ids that are not there or there twice, vectors of another space, embeddings that are gone.
        UsageError: Nothing to do, or a table would be left empty.
    """
    sources.require_index(index)
    about = index.read_json(INDEX)
    if add is None and remove is None and not rebuild:
        raise UsageError("nothing to change in the index", hint="Give --add, --remove or --rebuild.")
    if add is not None and add.stage != "embed":
        raise InputError(f"--add {add.path} was made by `gmail {add.stage}`", hint="Give what `gmail embed` made.")
    gone = _read_ids(remove) if remove is not None else []
    key = StageKey(
        stage="index",
        settings={"remove": digest_of(sorted(gone)), "rebuild": settings(profile.index) if rebuild else None},
        inputs={"index": index.digest, **({"embeddings": add.digest} if add else {})},
        seed=profile.seed,
    )
    with workspace.open(key) as slot:
        if slot.done:
            return slot.artifact
        new_tables = sources.load_tables(add) if add else []
        added = {table.header.name: table for table in new_tables}
        if add is not None and not added.keys() & about["tables"].keys():
            raise InputError(f"{add.path} holds none of the index's tables: {', '.join(about['tables'])}")
        rows = {name: index.read_jsonl(f"{name}.rows.jsonl") for name in about["tables"]}
        _check_ids(rows, gone, added)
        spaces = [workspace, Workspace(index.path.parents[2])]
        entries = {}
        for name, old in about["tables"].items():
            new = added.get(name)
            keep = ~np.isin([row["id"] for row in rows[name]], gone)
            if new is not None:
                _require_fit(name, old, new)
            if not keep.any() and new is None:
                raise UsageError(f"--remove takes every row of {name}", hint="Keep one, or build another index.")
            live = [row for row, stays in zip(rows[name], keep, strict=True) if stays]
            live += _with_captions(new, new_tables) if new is not None else []
            parts = [*old["embeddings"], *([add.digest] if add and new is not None else [])]
            entry = {**{key: old[key] for key in _RECORDED}, "embeddings": parts}
            origin = _gather(parts, name, live, spaces, add)
            if rebuild:
                if origin is None:
                    raise InputError(
                        f"embeddings that {name} was built from are in no run below {workspace.root}: "
                        + ", ".join(digest[:12] for digest in parts if _find(digest, spaces) is None),
                        hint="Run `gmail embed` as before, or index other embeddings with --embeddings.",
                    )
                entries[name] = _write(slot, profile, name, entry, origin[0], live, origin[1], progress)
            else:
                entries[name] = _edit(slot, index, name, entry, old, keep, new, live, origin)
        both = [*about["sources"], *([add.summary["origins"]["test"]] if add else [])]
        kept = [source for place, source in enumerate(both) if source not in both[:place]]
        return _commit(slot, {**about, "sources": kept}, entries)


def candidates(artifact: Artifact) -> dict[str, str]:
    """For each table of an index artifact the candidates, as lines of text, where there was more than one to weigh."""
    tables = artifact.read_json(INDEX)["tables"]
    return {
        name: vectors.candidates_table([vectors.Candidate(**each) for each in entry["candidates"]])
        for name, entry in tables.items()
        if sum(each["verdict"] != "not tried" for each in entry["candidates"]) > 1
    }


def _limits(profile: Profile) -> Limits:
    index = profile.index
    return Limits(
        recall=index.recall_target,
        memory=index.max_memory * vectors.MIB or float("inf"),
        latency=index.max_latency or float("inf"),
    )


def _write(
    slot: Slot,
    profile: Profile,
    name: str,
    entry: dict[str, Any],
    rows_of: Float[np.ndarray, "count dim"],
    rows: Sequence[Any],
    queries: tuple[Float[np.ndarray, "queries dim"], str],
    progress: Progress | None,
) -> dict[str, Any]:
    """Choose, build and write the index of one table; found again when an earlier run got so far."""
    finished = f"{name}.entry.json"
    if slot.has(finished):
        return slot.read_jsonl(finished)[0]
    made: list[vectors.Made] = []

    def build(lists: Path | None) -> None:
        made.append(
            vectors.build(
                rows_of,
                queries=queries[0],
                kind=profile.index.kind,
                limits=_limits(profile),
                seed=profile.seed,
                lists=None if lists is None else vectors.Shards(slot.scratch(f"{name}.shards"), lists),
                name=name,
                progress=progress,
            )
        )

    on_disk = profile.index.storage == "disk"
    if on_disk:
        slot.write_with(f"{name}.lists", build)
    else:
        build(None)
    index = made[0].index
    slot.write_with(f"{name}.faiss", lambda path: index.write(path, lists=f"{name}.lists" if on_disk else ""))
    slot.write_jsonl(f"{name}.rows.jsonl", rows)
    entry |= _described(index, made[0].recall, queries[1]) | {
        "storage": profile.index.storage,
        "spec": made[0].chosen.spec,
        "memory": made[0].chosen.memory,
        "latency": made[0].chosen.latency,
        "candidates": [asdict(each) for each in made[0].candidates],
    }
    slot.write_jsonl(finished, [entry])
    return entry


def _edit(
    slot: Slot,
    old_index: Artifact,
    name: str,
    entry: dict[str, Any],
    old: dict[str, Any],
    keep: np.ndarray,
    new: Table | None,
    live: list[Any],
    origin: tuple[np.ndarray, tuple[np.ndarray, str]] | None,
) -> dict[str, Any]:
    added = new.vectors if new is not None else np.empty((0, old["dim"]), dtype=np.float32)
    on_disk, lists = old["storage"] == "disk", f"{name}.lists"
    if on_disk:
        edited: list[VectorIndex] = []

        def edit(path: Path) -> None:
            shards = vectors.Shards(slot.scratch(f"{name}.shards"), path)
            edited.append(
                vectors.edit_on_disk(lambda: sources.open_index(old_index, name), keep=keep, add=added, shards=shards)
            )

        slot.write_with(lists, edit)
        index, memory = edited[0], old["memory"]  # of the cells alone
    else:
        index = vectors.edit(sources.open_index(old_index, name, resident=True), keep=keep, add=added)
        memory = vectors.predicted_bytes(index.kind, count=index.count, dim=index.dim, spec=old["spec"])
    recall, queries = None, old["recall_queries"]
    if origin is not None:
        recall, queries = vectors.measure_recall(index, origin[0], origin[1][0]), origin[1][1]
    slot.write_with(f"{name}.faiss", lambda path: index.write(path, lists=lists if on_disk else ""))
    slot.write_jsonl(f"{name}.rows.jsonl", live)
    return (
        entry
        | _described(index, recall, queries)
        | {
            "storage": old["storage"],
            "spec": old["spec"],
            "memory": memory,
            "latency": None,
            "candidates": [],
        }
    )


def _described(index: VectorIndex, recall: float | None, queries: str) -> dict[str, Any]:
    return {
        "kind": index.kind,
        "count": index.count,
        "dim": index.dim,
        "effort": index.effort,
        "recall_at_10": recall,
        "recall_queries": queries,
    }


def _commit(slot: Slot, about: dict[str, Any], entries: dict[str, Any]) -> Artifact:
    slot.write_json(INDEX, {**about, "tables": entries})
    for name in entries:
        if slot.has(f"{name}.entry.json"):
            slot.remove(f"{name}.entry.json")
    summary: dict[str, Any] = {
        "tables": {name: f"{entry['kind']}, {entry['count']} vectors" for name, entry in entries.items()}
    }
    unknown = [name for name, entry in entries.items() if entry["recall_at_10"] is None]
    if unknown:
        summary["note"] = f"recall of {', '.join(unknown)} not measured: the embeddings it came from are gone"
    return slot.commit(summary=summary)


# -- changing an index ----------------------------------------------------------------------------------------------


def _read_ids(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read --remove {path}: {error}", hint="Give a text file, one id a line.") from error
    ids = [line for line in lines if line.strip()]
    if not ids:
        raise InputError(f"--remove {path} holds no ids", hint="Give a text file, one id a line.")
    return ids


def _check_ids(rows: dict[str, list[Any]], gone: list[str], added: dict[str, Table]) -> None:
    there = {name: {row["id"] for row in of_table} for name, of_table in rows.items()}
    if unknown := [each for each in gone if not any(each in ids for ids in there.values())]:
        raise InputError(f"--remove names {len(unknown)} id(s) that the index lacks, the first is {unknown[0]!r}")
    for name, table in added.items():
        twice = [each for each in table.ids if each in there.get(name, ()) and each not in set(gone)]
        if twice:
            raise InputError(
                f"{name} has {len(twice)} of the ids to add already, the first is {twice[0]!r}",
                hint="Name them in --remove to replace them.",
            )


def _require_fit(name: str, old: dict[str, Any], new: Table) -> None:
    for key in ("dim", *(each for each in _RECORDED if each != "encoder")):
        there = getattr(new.header, key)
        if there != old[key]:
            raise InputError(
                f"{name} to add differs in {key}: {there}, the index has {old[key]}",
                hint="Embed what you add with the encoder and preprocessing of the index.",
            )


def _gather(
    parts: list[str], name: str, live: list[Any], spaces: list[Workspace], add: Artifact | None
) -> tuple[np.ndarray, tuple[np.ndarray, str]] | None:
    """The vectors of the live rows and queries for them, from their embed artifacts; None if one is gone."""
    tables: list[Table] = []
    asked: tuple[np.ndarray, str] | None = None
    for digest in parts:
        artifact = add if add is not None and add.digest == digest else _find(digest, spaces)
        if artifact is None:
            return None
        of_part = sources.load_tables(artifact)
        tables.append(next(table for table in of_part if table.header.name == name))
        if asked is None or asked[1] == name:
            asked = _queries(tables[-1], of_part)
    rows_of = {key: (part, row) for part, table in enumerate(tables) for row, key in enumerate(table.ids)}
    found = np.empty((len(live), tables[0].header.dim), dtype=np.float32)
    where = np.array([rows_of[row["id"]] for row in live])
    for part, table in enumerate(tables):
        mine = np.flatnonzero(where[:, 0] == part)
        found[mine] = table.vectors[where[mine, 1]]
    assert asked is not None
    return found, asked


def _find(digest: str, spaces: list[Workspace]) -> Artifact | None:
    """An embed artifact in any run of the workspaces."""
    found = (space.get("embed", digest, any_run=True) for space in spaces)
    return next((artifact for artifact in found if artifact is not None), None)


def _with_captions(table: Table, tables: list[Table]) -> list[dict[str, Any]]:
    """The rows of a table; to those of images their ``captions``, where a table of texts names them as owners."""
    captions: dict[str, list[str]] = {}
    if table.header.modality == "image":
        for each in tables:
            if each.header.modality == "text" and "@" not in each.header.name:
                for row in each.rows:
                    if "owner" in row:
                        captions.setdefault(row["owner"], []).append(row["text"])
    return [{**row, **({"captions": captions[row["id"]]} if row["id"] in captions else {})} for row in table.rows]


def _queries(table: Table, tables: list[Table]) -> tuple[Float[np.ndarray, "queries dim"], str]:
    """Vectors to measure recall with, and the name of their table: texts of the same space where there are any."""
    texts = [
        each
        for each in tables
        if each.header.modality == "text"
        and each.header.space == table.header.space
        and each.header.name != table.header.name
        and len(each.vectors)
    ]
    origin = texts[0] if texts else table
    rows = np.unique(np.linspace(0, len(origin.vectors) - 1, MEASURED_QUERIES).astype(np.int64))
    return np.asarray(origin.vectors[rows], dtype=np.float32), origin.header.name
