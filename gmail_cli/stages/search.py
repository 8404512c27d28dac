"""``gmail search`` and ``gmail serve``: what lies nearest to words or to an image in an index."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float

from gmail_cli.artifacts import Artifact
from gmail_cli.components import report
from gmail_cli.components.search import Hits, Rows, VectorIndex
from gmail_cli.errors import InputError, UsageError
from gmail_cli.stages import sources

if TYPE_CHECKING:
    from gmail_cli.components.captions import Dataset
    from gmail_cli.components.encoders import Clip

THUMBNAIL = 160
"""Longest side of an image on the page of hits, pixels."""

Flow = Literal["real", "generated"]


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        query: The words searched for, or the name of the image.
        table: The table searched.
        hits: Best first: what is known of each hit (id, owner, text, label, ... as embedded), its ``row`` in the table
            and its ``score``.
    """

    query: str
    table: str
    hits: list[dict[str, Any]]


def said(hit: Mapping[str, Any]) -> str:
    """What a hit says of itself in one line: its text, its first caption, its label, or nothing."""
    captions = hit.get("captions") or [""]
    return str(hit.get("text") or captions[0] or hit.get("label") or "")


class Searcher:
    """An index artifact, open for queries; what it needs is loaded when it is first asked for, once.

    Args:
        artifact: What ``gmail index`` made.
        aligned: The align artifact whose f_g embeds generated images; by default the one in the index's run that its
            embeddings were made with.
        device: Device of the towers.
    """

    def __init__(self, artifact: Artifact, *, aligned: Artifact | None = None, device: str = "auto") -> None:
        sources.require_index(artifact)
        self.artifact = artifact
        self._given = aligned
        self._device = device
        self._lock = threading.RLock()
        self._indexes: dict[str, VectorIndex] = {}
        self._rows: dict[str, Rows] = {}
        self._clips: dict[str, Clip] = {}
        self._images: list[tuple[Dataset, dict[str, int]]] | None = None

    @functools.cached_property
    def about(self) -> Mapping[str, Any]:
        """What the artifact's ``index.json`` says."""
        return dict(self.artifact.read_json(sources.INDEX))

    @property
    def tables(self) -> dict[str, dict[str, Any]]:
        """What ``index.json`` says of each table."""
        return dict(self.about["tables"])

    def table(self, name: str | None) -> str:
        """The table meant by ``name``: the test images, or the first, when None.

        Raises:
            UsageError: There is no such table.
        """
        return sources.table_name(self.about, name)

    def text(self, query: str, *, k: int, table: str | None = None) -> Found:
        """The ``k`` rows nearest to a text, through the text tower that belongs to the index.

        Raises:
            InputError: The index is damaged, or its CLIP is no longer what it was.
            UsageError: The query is empty, or there is no such table.
        """
        if not query.strip():
            raise UsageError(f"the query {query!r} is empty", hint='Say what to look for: "a red car on snow".')
        name = self.table(table)
        with self._lock:
            vectors = self._original(self.tables[name]["space"], name).encode_texts([query]).cpu().numpy()
            return self._found(query, name, vectors, k)

    def image(
        self, data: bytes, *, k: int, table: str | None = None, flow: Flow = "real", name: str = "the image"
    ) -> Found:
        """The ``k`` rows nearest to an encoded image: a photograph through the tower the index's images went through
        (f_r, unless told otherwise when they were embedded), a generated one through f_g.

        Raises:
            InputError: The bytes are no image, the index is damaged, a model is missing or no longer what it was.
            UsageError: There is no such table.
        """
        import torch

        place = self.table(table)
        entry = self.tables[place]
        with self._lock:
            if flow == "generated" or (entry["modality"] == "image" and entry["encoder_digest"] != entry["space"]):
                clip = self._aligned(entry, place)
            else:
                clip = self._original(entry["space"], place)
            pixels = torch.from_numpy(np.asarray(clip.preprocess(data, name=name)))[None]
            return self._found(name, place, clip.encode_images(pixels).cpu().numpy(), k)

    def vectors(self, queries: Float[np.ndarray, "queries dim"], *, k: int, table: str | None = None) -> Hits:
        """The ``k`` nearest rows of each query, a unit vector from the encoder that ``index.json`` names.

        Raises:
            InputError: The index is damaged, or the queries do not fit it.
            UsageError: There is no such table.
        """
        return self._index(self.table(table)).search(queries, k=k)

    def thumbnail(self, row: int, *, table: str | None = None, side: int = THUMBNAIL) -> bytes | None:
        """A small JPEG of the image of a row, read from where ``index.json`` says the images are; None where there is
        none.

        Raises:
            InputError: The images are no longer there.
            UsageError: There is no such table or row.
        """
        name = self.table(table)
        with self._lock:
            rows = self._table_rows(name)
            if not 0 <= row < len(rows):
                raise UsageError(f"{name} has no row {row}", hint=f"It has {len(rows)}.")
            wanted = rows[row]
            key = str(wanted["id"] if self.tables[name]["modality"] == "image" else wanted.get("owner", ""))
            for dataset, places in self._datasets():
                if key in places:
                    return report.thumbnail(dataset.image_bytes(places[key]), side=side, name=key)
        return None

    def page(self, found: Found) -> str:
        """The hits as an HTML page with thumbnails."""
        thumbnails = [self.thumbnail(hit["row"], table=found.table) for hit in found.hits]
        hits = [(hit["id"], said(hit), hit["score"]) for hit in found.hits]
        return report.search_page(found.query, hits, thumbnails)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _found(self, query: str, name: str, vectors: np.ndarray, k: int) -> Found:
        hits = self._index(name).search(vectors, k=k)
        rows = self._table_rows(name)
        pairs = zip(hits.ids[0].tolist(), hits.scores[0].tolist(), strict=True)
        return Found(query, name, [{**rows[row], "row": row, "score": score} for row, score in pairs if row >= 0])

    def _index(self, name: str) -> VectorIndex:
        with self._lock:
            if name not in self._indexes:
                self._indexes[name] = sources.open_index(self.artifact, name).on_gpus()
            return self._indexes[name]

    def _table_rows(self, name: str) -> Rows:
        if name not in self._rows:
            rows = Rows(self.artifact.file(f"{name}.rows.jsonl"))
            count = self.tables[name]["count"]
            if len(rows) != count:
                hint = "Delete the artifact and run `gmail index` again."
                raise InputError(f"{name}.rows.jsonl has {len(rows)} rows for {count} vectors", hint=hint)
            self._rows[name] = rows
        return self._rows[name]

    def _datasets(self) -> list[tuple[Dataset, dict[str, int]]]:
        """The sets of images, the last added first, with the row of each id."""
        if self._images is None:
            read = [sources.read(source) for source in reversed(self.about["sources"])]
            self._images = [
                (dataset, {image.id: row for row, image in enumerate(dataset.images)} if dataset.has_images else {})
                for dataset in read
            ]
        return self._images

    def _original(self, space: str, table: str) -> Clip:
        model = self.about["model"]
        clip = self._clip(model["clip"], revision=model["revision"])
        if clip.digest != space:
            hint = "Restore that model, or embed and index again."
            raise InputError(
                f"{table} was embedded with a CLIP of digest {space[:12]}, {clip.name} is {clip.digest[:12]}", hint=hint
            )
        return clip

    def _aligned(self, entry: dict[str, Any], table: str) -> Clip:
        artifact, digest = self._given, self.about["aligned"]
        if artifact is None:
            path = self.artifact.path.parents[1] / "align" / str(digest)[:12]
            if digest is None or not path.is_dir():
                hint = "Name the align artifact with --aligned."
                raise InputError(f"f_g for {table} is not in the index's run", hint=hint)
            artifact = Artifact.load(path)
        if artifact.stage != "align":
            hint = "Give a folder made by `gmail align`."
            raise InputError(f"--aligned {artifact.path} was made by `gmail {artifact.stage}`", hint=hint)
        started = artifact.manifest["key"]["models"]["clip"]
        if started != entry["space"]:
            raise InputError(
                f"{artifact.path} tuned a CLIP of digest {started[:12]}, {table} lives in the space of "
                f"{entry['space'][:12]}",
                hint="Name the align artifact of that CLIP with --aligned.",
            )
        return self._clip(str(Path(artifact.folder("clip"))), revision="")

    def _clip(self, ref: str, *, revision: str) -> Clip:
        from gmail_cli.components.clip_files import load_clip
        from gmail_cli.components.encoders import pick_device

        if ref not in self._clips:
            self._clips[ref] = load_clip(ref, revision=revision, device=pick_device(self._device))
        return self._clips[ref]
