"""Embedding tables: unit vectors, what each row is, and what made them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import numpy as np
from jaxtyping import Float

from gmail_cli.errors import InputError

Modality = Literal["image", "text"]
Flow = Literal["real", "generated", "text"]
DType = Literal["float32", "float16"]
NORM_TOLERANCE = 1e-3
CHECKED_ROWS = 65536
"""Rows whose norms are computed at once."""


@dataclass(frozen=True)
class Header:
    """What a table holds and what made it.

    Attributes:
        name: Name of the set, such as ``test-images``.
        modality: ``image`` or ``text``.
        flow: ``real`` (f_r), ``generated`` (f_g) or ``text``.
        dim: Components of a vector.
        dtype: ``float32`` or ``float16``.
        count: Number of rows.
        normalised: Always true: rows are unit vectors.
        encoder: Name of the encoder.
        encoder_digest: Digest of its weights.
        space: Digest of the joint space. The towers of one CLIP, f_g and a text tower trained against f_g share
            the space of the f_r they start from.
        preprocess: Digest of the image preprocessing, or of the tokeniser for texts.
    """

    name: str
    modality: Modality
    flow: Flow
    dim: int
    dtype: DType
    count: int
    normalised: bool
    encoder: str
    encoder_digest: str
    space: str
    preprocess: str


@dataclass(frozen=True, eq=False)
class Table:
    """A set of embeddings.

    Attributes:
        vectors: Unit rows.
        rows: For each vector its ``id`` (unique) and what else is known of it: owner, text, kind, label, k.
        header: What made them.
    """

    vectors: Float[np.ndarray, "count dim"]
    rows: Sequence[Mapping[str, Any]]
    header: Header

    @classmethod
    def build(
        cls,
        vectors: Float[np.ndarray, "count dim"],
        *,
        rows: Sequence[Mapping[str, Any]],
        name: str,
        modality: Modality,
        flow: Flow,
        encoder: str,
        encoder_digest: str,
        space: str,
        preprocess: str,
        dtype: DType = "float32",
    ) -> Table:
        """Scale vectors to unit length in float32, then store them as ``dtype``.

        Raises:
            InputError: As ``check``; also for a vector of length zero.
        """
        if np.ndim(vectors) != 2:
            raise InputError(f"table {name!r}: vectors have shape {np.shape(vectors)}, not (count, dim)")
        unit = unit_rows(vectors, rows=rows, name=name, dtype=dtype)
        count, dim = unit.shape
        header = Header(name, modality, flow, dim, dtype, count, True, encoder, encoder_digest, space, preprocess)
        table = cls(unit, rows, header)
        table.check()
        return table

    @classmethod
    def load(cls, folder: Path) -> Table:
        """Read and check the table in a folder; the vectors are mapped, not copied into memory.

        Raises:
            InputError: A file is missing or unreadable, or they do not fit one another.
        """
        try:
            header = _header(json.loads((folder / "table.json").read_bytes()), folder / "table.json")
            with (folder / "rows.jsonl").open("rb") as lines:
                rows = [json.loads(line) for line in lines]
            vectors = np.load(folder / "vectors.npy", mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(
                f"cannot read the embedding table {folder}: {error}", hint="Run gmail embed again."
            ) from error
        table = cls(vectors, rows, header)
        table.check()
        return table

    def check(self) -> None:
        """Check vectors, rows and header against one another.

        Raises:
            InputError: Names the table, and the first row that is wrong with how many there are.
        """
        header, name = self.header, self.header.name
        if (header.modality == "text") != (header.flow == "text"):
            raise InputError(f"table {name!r}: modality {header.modality!r} does not go with flow {header.flow!r}")
        if not header.normalised:
            raise InputError(f"table {name!r} is not normalised")
        if self.vectors.shape != (header.count, header.dim) or str(self.vectors.dtype) != header.dtype:
            raise InputError(
                f"table {name!r}: vectors are {self.vectors.shape} {self.vectors.dtype}, "
                f"the header says {(header.count, header.dim)} {header.dtype}"
            )
        if len(self.rows) != header.count:
            raise InputError(f"table {name!r}: {len(self.rows)} rows for {header.count} vectors")
        seen: set[str] = set()
        for number, row in enumerate(self.rows):
            key = row.get("id") if isinstance(row, Mapping) else None
            if not isinstance(key, str) or not key:
                raise InputError(f"table {name!r}: row {number} has no id")
            if key in seen:
                raise InputError(f"table {name!r}: id {key!r} is there twice")
            seen.add(key)
        norms = [
            np.linalg.norm(self.vectors[start : start + CHECKED_ROWS].astype(np.float32), axis=1)
            for start in range(0, header.count, CHECKED_ROWS)
        ]
        lengths = np.concatenate(norms) if norms else np.zeros(0, dtype=np.float32)
        _refuse(~np.isfinite(lengths), self.rows, name, "is not finite")
        _refuse(np.abs(lengths - 1) > NORM_TOLERANCE, self.rows, name, "is not of unit length")

    @property
    def ids(self) -> list[str]:
        """Id of each row."""
        return [row["id"] for row in self.rows]

    def files(self) -> dict[str, Any]:
        """The content of each file of the table's folder: an array, a list of rows, and the header as a mapping."""
        return {"vectors.npy": self.vectors, "rows.jsonl": list(self.rows), "table.json": asdict(self.header)}


def unit_rows(
    vectors: Float[np.ndarray, "count dim"],
    *,
    rows: Sequence[Mapping[str, Any]],
    name: str,
    dtype: DType,
    first: int = 0,
) -> Float[np.ndarray, "count dim"]:
    """Scale vectors to unit length in float32, then cast them: what a table stores.

    Args:
        vectors: Some rows of a table, or all.
        rows: What is known of each; an error names the id.
        name: The table.
        dtype: Of the result.
        first: Number in the table of the first vector.

    Raises:
        InputError: A vector is of length zero or not finite.
    """
    exact = np.asarray(vectors, dtype=np.float32)
    norms = np.linalg.norm(exact, axis=1, keepdims=True)
    _refuse(~np.isfinite(norms[:, 0]) | (norms[:, 0] == 0), rows, name, "is zero or not finite", first=first)
    return (exact / norms).astype(dtype)


def require_same_space(a: Table, b: Table) -> None:
    """Refuse to compare vectors that do not live in one space.

    Raises:
        InputError: Names both tables and what differs.
    """
    first, second = a.header, b.header
    for what, left, right in (("dim", first.dim, second.dim), ("space", first.space, second.space)):
        if left != right:
            raise InputError(
                f"tables {first.name!r} ({first.encoder}) and {second.name!r} ({second.encoder}) differ in {what}: "
                f"{left} and {right}",
                hint="Embed both with the same encoder.",
            )
    if first.modality == second.modality == "image" and first.preprocess != second.preprocess:
        raise InputError(f"tables {first.name!r} and {second.name!r} were preprocessed differently")


def _refuse(
    wrong: np.ndarray[Any, np.dtype[np.bool_]],
    rows: Sequence[Mapping[str, Any]],
    name: str,
    what: str,
    *,
    first: int = 0,
) -> None:
    places = np.flatnonzero(wrong)
    if places.size:
        row = int(places[0])
        key = rows[row].get("id") if row < len(rows) else None
        raise InputError(f"table {name!r}: vector {first + row} (id {key!r}) {what}; {places.size} such vectors")


def _header(data: Any, path: Path) -> Header:
    types = get_type_hints(Header)
    if not isinstance(data, dict) or set(data) != set(types):
        wrong = sorted(set(data) ^ set(types)) if isinstance(data, dict) else []
        raise InputError(f"{path} is no table header; missing or unknown: {', '.join(wrong) or 'all'}")
    for key, value in data.items():
        allowed = get_args(types[key])
        if value not in allowed if allowed else type(value) is not types[key]:
            raise InputError(f"{path}: {key} is {value!r}", hint="Run gmail embed again.")
    return Header(**data)
