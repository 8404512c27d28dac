"""Files of other programs: COCO references and results, features in ``.npy``, clip-retrieval's folders.

Faults are named, not repaired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from gmail_cli.components.captions.formats import BadRecordError, checked_ids, identifier, read_json
from gmail_cli.components.metrics.captioning import by_image
from gmail_cli.components.tables import Table
from gmail_cli.errors import InputError

_BLOCK_ROWS = 4096  # checked at once
_SHOWN = 5


def write_clip_retrieval(folder: Path, *, images: Table | None, texts: Table | None) -> int:
    """Write tables as clip-retrieval's inference does, for its index, its server and its readers.

    ``img_emb/img_emb_0.npy``, ``text_emb/text_emb_0.npy`` and ``metadata/metadata_0.parquet`` (``image_path``,
    ``caption``) belong together row by row. A row is an image with its first caption; the text vectors are left out
    where some image has no caption. Without images a row is a text.

    Args:
        folder: An existing, empty folder.
        images: Images; ``image_path`` holds their ids.
        texts: Their captions, each with its ``owner``.

    Returns:
        Captions left out.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    assert images is not None or texts is not None, "nothing to write"
    columns: dict[str, list[str | None]] = {}
    chosen = list(range(len(texts.rows))) if texts else []
    if images is not None:
        _write_rows(folder / "img_emb" / "img_emb_0.npy", images, range(len(images.rows)))
        columns["image_path"] = list(images.ids)
        first: dict[str, int] = {}
        for row, about in enumerate(texts.rows if texts else ()):
            first.setdefault(str(about.get("owner")), row)
        found = [first.get(name) for name in images.ids]
        columns["caption"] = [None if row is None or texts is None else texts.rows[row]["text"] for row in found]
        chosen = [row for row in found if row is not None]
    elif texts is not None:
        columns["caption"] = [row["text"] for row in texts.rows]
    if texts is not None and len(chosen) == len(columns["caption"]):
        _write_rows(folder / "text_emb" / "text_emb_0.npy", texts, chosen)
    else:
        chosen = []
    (folder / "metadata").mkdir()
    pq.write_table(pa.table(columns), folder / "metadata" / "metadata_0.parquet")
    return (len(texts.rows) if texts else 0) - len(chosen)


def _write_rows(path: Path, table: Table, rows: Sequence[int]) -> None:
    path.parent.mkdir()
    stored = np.lib.format.open_memmap(path, mode="w+", dtype=table.vectors.dtype, shape=(len(rows), table.header.dim))
    for start in range(0, len(rows), _BLOCK_ROWS):
        block = rows[start : start + _BLOCK_ROWS]
        stored[start : start + len(block)] = table.vectors[np.asarray(block)]
    stored.flush()


def read_references(path: Path) -> dict[str, list[str]]:
    """The reference captions of each image of a COCO captions file, in its order; an empty list where it has none.

    Of ``images`` only the ``id`` is needed, of ``annotations`` the ``image_id`` and ``caption``.

    Raises:
        InputError: The file cannot be read, is not COCO captions, or holds a bad or duplicate record.
    """
    data = read_json(path)
    hint = "References are one JSON object with 'images' (id) and 'annotations' (image_id, caption), as COCO's are."
    if not isinstance(data, dict) or not all(isinstance(data.get(key), list) for key in ("images", "annotations")):
        raise InputError(f"{path} is not a COCO captions file: it has no lists 'images' and 'annotations'", hint=hint)
    bad: list[str] = []

    def report(where: str, problem: str) -> None:
        bad.append(f"{where}: {problem}")

    references: dict[str, list[str]] = {key: [] for _, key, _ in checked_ids(data["images"], "images", path, report)}
    seen: set[object] = set()
    for n, record in enumerate(data["annotations"]):
        problem = _problem(record)
        if problem is None and str(record["image_id"]).strip() not in references:
            problem = f"image_id {record['image_id']} is not among the images"
        elif problem is None and not record["caption"].strip():
            problem = f"empty caption of image {record['image_id']}"
        elif problem is None and str(record.get("id", f"#{n}")) in seen:
            problem = f"duplicate id {record['id']}"
        if problem is not None:
            report(f"{path.name}: annotations[{n}]", problem)
            continue
        seen.add(str(record.get("id", f"#{n}")))
        references[str(record["image_id"]).strip()].append(record["caption"])
    _refuse(bad, path, hint)
    return references


def read_results(path: Path, *, references: Mapping[str, object]) -> dict[str, str]:
    """The caption of each image from a COCO results file: a JSON list of ``image_id`` and ``caption``.

    Args:
        references: The images to be scored, by id.

    Raises:
        InputError: The file is no such list, or it does not hold exactly one caption for each of those images.
    """
    records = read_json(path)
    hint = 'Results are a JSON list such as [{"image_id": 42, "caption": "a red car"}].'
    if not isinstance(records, list):
        raise InputError(f"{path} holds no list of results", hint=hint)
    _refuse([f"[{n}]: {why}" for n, record in enumerate(records) if (why := _problem(record))], path, hint)
    try:
        found = by_image((str(record["image_id"]).strip(), record["caption"]) for record in records)
    except InputError as error:
        raise InputError(f"{path}: {error.message}", hint=error.hint) from error
    missing = [image for image in references if image not in found]
    extra = [image for image in found if image not in references]
    for ids, what in ((extra, "are not among the references"), (missing, "of the references have no caption")):
        if ids:
            named = ", ".join(ids[:_SHOWN]) + (", ..." if len(ids) > _SHOWN else "")
            raise InputError(
                f"{path}: {len(ids)} images {what}: {named}",
                hint="Results and references must be of the same images; none is left out in silence.",
            )
    return found


def read_extra_positives(path: Path) -> dict[str, list[str]]:
    """All right answers of some queries: a JSON object from a caption's id to ids of images, or the other way round.

    Raises:
        InputError: The file cannot be read or is something else.
    """
    data = read_json(path)
    hint = 'Write one JSON object such as {"391895": [42, 73]}: id of a caption -> ids of images, or the reverse.'
    if not isinstance(data, dict) or not data:
        raise InputError(f"{path} holds no object of extra right answers", hint=hint)
    wrong = [
        f"{caption!r}: is {images!r:.80}, not a list of ids"
        for caption, images in data.items()
        if not isinstance(images, list)
        or any(isinstance(id_, bool) or not isinstance(id_, str | int) for id_ in images)
    ]
    _refuse(wrong, path, hint)
    return {caption.strip(): [str(image).strip() for image in images] for caption, images in data.items()}


def read_features(path: Path) -> Float[np.ndarray, "rows dim"]:
    """Features from a ``.npy`` file, in fp32 (fp64 where the file has that).

    Raises:
        InputError: Not a ``.npy`` file of floats [rows, dimensions], or a value is not finite or beyond fp32.
    """
    array = read_array(path)
    if array.ndim != 2 or array.dtype.kind != "f" or not array.size:
        raise InputError(
            f"{path} holds an array of shape {array.shape} and type {array.dtype}; expected floats "
            "[rows, dimensions], neither of them 0",
            hint="Save one embedding per row as float32.",
        )
    features = np.ascontiguousarray(array, dtype=np.float32 if array.dtype.itemsize <= 4 else np.float64)
    for start in range(0, len(features), _BLOCK_ROWS):
        with np.errstate(over="ignore"):
            finite = np.isfinite(features[start : start + _BLOCK_ROWS].astype(np.float32, copy=False))
        wrong = np.flatnonzero(~finite.all(axis=1))
        if len(wrong):
            row, column = int(wrong[0]), int(np.argmin(finite[wrong[0]]))
            raise InputError(
                f"{path}: row {start + row} holds {features[start + row, column]} (column {column}); "
                "every value must be finite in float32",
                hint="Compute the embeddings again, in float32.",
            )
    return features


def read_array(path: Path) -> np.ndarray[Any, np.dtype[Any]]:
    """Any array without objects from a ``.npy`` file; pickles are never loaded.

    Raises:
        InputError: The file is missing, empty, cut short, of another format, or needs pickle.
    """
    try:
        with path.open("rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputError(
            f"cannot read {path} as a .npy array: {why}",
            hint="Write it with numpy.save(path, array); arrays of objects and .npz archives are not read.",
        ) from error


def unit_rows(features: Float[np.ndarray, "rows dim"], *, name: str) -> Float[np.ndarray, "rows dim"]:
    """The rows at length one, in fp32.

    Args:
        name: Of the file, for the error.

    Raises:
        InputError: A row has length zero.
    """
    unit = np.empty(features.shape, np.float32)
    for start in range(0, len(features), _BLOCK_ROWS):
        block = features[start : start + _BLOCK_ROWS].astype(np.float64)
        lengths = np.linalg.norm(block, axis=1, keepdims=True)
        if (lengths < 1e-12).any():
            raise InputError(
                f"{name}: row {start + int(np.argmin(lengths))} has length zero, so it has no cosine with anything",
                hint="Check the encoder's output.",
            )
        unit[start : start + len(block)] = block / lengths
    return unit


def norm_range(features: Float[np.ndarray, "rows dim"]) -> tuple[float, float]:
    """The smallest and the largest length of a row, to six digits."""
    norms = [
        np.linalg.norm(features[start : start + _BLOCK_ROWS].astype(np.float64), axis=1)
        for start in range(0, len(features), _BLOCK_ROWS)
    ]
    lengths = np.concatenate(norms)
    return float(f"{lengths.min():.6g}"), float(f"{lengths.max():.6g}")


def _refuse(bad: Sequence[str], path: Path, hint: str) -> None:
    if bad:
        shown = "".join(f"\n  {line}" for line in bad[:_SHOWN])
        more = f"\n  ... and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise InputError(f"{len(bad)} bad records in {path}:{shown}{more}", hint=hint)


def _problem(record: object) -> str | None:
    """What keeps a record from being a caption of an image."""
    if not isinstance(record, dict):
        return f"is {record!r:.80}, not an object"
    try:
        image = identifier(record.get("image_id"), "image_id")
    except BadRecordError as bad:
        return str(bad)
    caption = record.get("caption")
    return None if isinstance(caption, str) else f"the caption of image {image} is {caption!r:.80}, not a text"
