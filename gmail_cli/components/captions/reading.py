"""``read``: any supported source to a ``Dataset``."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from gmail_cli.components.captions import formats, webdataset
from gmail_cli.components.captions.formats import Report, Request, Row
from gmail_cli.components.captions.records import Caption, Dataset, Image, Kind
from gmail_cli.components.captions.remote import Location, Remote, locate
from gmail_cli.components.captions.sources import IMAGE_SUFFIXES, ImageSource
from gmail_cli.errors import InputError, UsageError

Format = Literal[
    "auto", "coco", "karpathy", "table", "jsonl", "parquet", "webdataset", "text", "token", "folder", "scenes"
]
Part = Literal["train", "test"]

SUFFIXES: dict[str, Format] = {
    ".csv": "table",
    ".tsv": "table",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonlines": "jsonl",
    ".parquet": "parquet",
    ".tar": "webdataset",
    ".txt": "text",
    ".token": "token",
}
READERS: dict[str, Callable[[Location, Request, Report], Iterator[Row]]] = {
    "coco": formats.coco,
    "karpathy": formats.karpathy,
    "table": formats.table,
    "jsonl": formats.json_lines,
    "text": formats.plain_text,
    "token": formats.token_lines,
    "folder": formats.folder,
    "webdataset": webdataset.webdataset,
}
SHOWN = 5
"""How many bad records an error names."""


def read(
    source: str | Path,
    *,
    images: str | Path | None = None,
    format: Format = "auto",  # noqa: A002
    split: str | None = None,
    limit: int | None = None,
    holdout: tuple[Part, float, int] | None = None,
    on_bad: Literal["fail", "skip"] = "fail",
    need_images: bool = False,
    kind: Kind = "short",
    scene_seed: int = 0,
    scene_size: int = 64,
) -> Dataset:
    """Read captions and images.

    Args:
        source: A file, a folder, a glob or brace pattern of shards (``train-{00000..00005}.tar``), each on disk or as
            an fsspec URL (``s3://bucket/train-00000.tar``), or ``scenes:train``, ``scenes:val``, ``scenes:test`` (the
            built-in world; needs ``limit``).
        images: Folder of the image files that ``source`` names; every file must then be there. None takes
            those that lie beside ``source``.
        format: ``auto`` goes by suffix and content; ``table`` is CSV or TSV with a header, or
            Conceptual Captions' TSV without one.
        split: ``train``, ``val``, ``test``, ``restval`` or several joined by ``+``, for Karpathy's JSON; for records in
            JSON, by their field ``split``.
        limit: Keep the first so many images, with all their captions.
        holdout: (part, fraction, seed). ``test`` keeps about ``fraction`` of the images, chosen by a hash
            of seed and image id, ``train`` the others: two disjoint halves of one source, whatever its order.
        on_bad: ``fail`` raises when any record is bad; ``skip`` leaves bad records out and lists them in
            ``Dataset.skipped``.
        need_images: An image without bytes is a bad record.
        kind: What the captions of a file are; scenes know theirs.
        scene_seed: Seed of the scenes.
        scene_size: Side of the rendered scenes, in pixels.

    Raises:
        InputError: The source is missing, unreadable or empty, or records are bad and ``on_bad`` is ``fail``.
        UsageError: Arguments that do not fit each other.
    """
    source = str(source)
    scenes = source.startswith("scenes:")
    folder = None if images is None else locate(images)
    _check_arguments(source, scenes=scenes, name=format, limit=limit, holdout=holdout)
    if scenes and (folder is not None or split is not None or kind != "short"):
        raise UsageError(f"{source} goes with neither images, split nor kind", hint="Leave them out.")
    if folder is not None and not folder.is_dir():
        raise InputError(f"the image folder {folder} does not exist")
    request = Request(folder, split, kind, need_images, scene_seed, scene_size)

    bad: list[str] = []

    def report(where: str, problem: str) -> None:
        bad.append(f"{where}: {problem}")

    if scenes:
        rows = formats.scene_rows(formats.scene_split(source), request)
    else:
        rows = _rows(_paths(source, format), format, request, report)
    with _uncollected():
        dataset = _assemble(rows, source, report, limit=limit, holdout=holdout)
    if bad and on_bad == "fail":
        more = f"\n  ... and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise InputError(
            f"{len(bad)} bad record{'s' * (len(bad) > 1)} in {source}:\n  " + "\n  ".join(bad[:SHOWN]) + more,
            hint="Repair them, or leave them out with --on-bad skip.",
        )
    if not dataset.images:
        hint = "Name a file of captions, or a folder of images or of .parquet or .tar shards."
        raise InputError(f"no usable record in {source}" + "".join(f"\n  {line}" for line in bad[:SHOWN]), hint=hint)
    if need_images and not dataset.has_images:
        raise InputError(f"{source} carries no images", hint="Name the folder that holds the image files.")
    return replace(dataset, class_names=_scene_classes() if scenes else dataset.class_names, skipped=tuple(bad))


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Without Python's search for cycles: records are in none, and over a million of them it takes half of the time."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def _scene_classes() -> tuple[str, ...]:
    from gmail_cli.components.scenes import CLASS_NAMES

    return tuple(CLASS_NAMES)


def _check_arguments(
    source: str, *, scenes: bool, name: Format, limit: int | None, holdout: tuple[Part, float, int] | None
) -> None:
    if not source.strip():
        hint = "Name a captions file, a folder, shards, or scenes:train (the built-in world)."
        raise UsageError(f"the captions' path {source!r} is empty", hint=hint)
    if name != "auto" and (name == "scenes") != scenes:
        raise UsageError(f"{source} is not of format {name!r}", hint="Leave the format to auto.")
    if limit is not None and limit < 1:
        raise UsageError(f"limit is {limit}; it must be at least 1")
    if holdout is not None and not 0 < holdout[1] < 1:
        raise UsageError(f"holdout is {holdout[1]}; it must be a fraction between 0 and 1")
    if scenes and limit is None:
        raise UsageError(f"{source} has no end", hint="Say how many images to draw with limit.")


def _paths(source: str, kind: Format) -> list[Location]:
    """The files that a path, a ``{00..05}`` pattern, a glob or a folder of shards names, in order."""
    paths: list[Location] = []
    for name in _expand(source):
        path = locate(name)
        if path.exists():
            paths.append(path)
        elif any(mark in name for mark in "*?["):
            paths += _matching(path)
        else:
            raise InputError(f"{name} does not exist", hint="Check the path; scenes:train is the built-in world.")
    if not paths:
        raise InputError(f"{source} matches no file")
    if len(paths) == 1 and paths[0].is_dir() and kind in ("auto", "parquet", "webdataset"):
        parquet, tars = (_children(paths[0], suffix) for suffix in (".parquet", ".tar"))
        # Beside its tars img2dataset leaves Parquet files of what it fetched, without the images.
        shards = {"parquet": parquet, "webdataset": tars}.get(kind, tars or parquet)
        if not shards and kind != "auto":
            raise InputError(f"{source} holds no {kind} files")
        return shards or paths
    return paths


def _matching(pattern: Location) -> list[Location]:
    if isinstance(pattern, Remote):
        return [*sorted(pattern.glob())]
    return [*sorted(Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor))))]


def _children(folder: Location, suffix: str) -> list[Location]:
    if isinstance(folder, Remote):
        return [*sorted(folder.children(suffix))]
    return [*sorted(folder.glob(f"*{suffix}"))]


def _expand(pattern: str) -> Iterator[str]:
    """``a-{08..11}.tar`` to ``a-08.tar`` ... ``a-11.tar``."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        yield pattern
        return
    low, high = match.groups()
    for number in range(int(low), int(high) + 1):
        yield from _expand(f"{pattern[: match.start()]}{number:0{len(low)}d}{pattern[match.end() :]}")


def _sniff(path: Location) -> Format:
    if path.is_dir():
        return "folder"
    suffix = path.suffix.lower()
    if suffix == ".txt" and formats.begins_with_tokens(path):
        return "token"
    if suffix in SUFFIXES:
        return SUFFIXES[suffix]
    if suffix == ".json":
        data = formats.read_json(path)
        if isinstance(data, dict):
            return "coco" if "annotations" in data else "karpathy"
        return "jsonl"
    if suffix in IMAGE_SUFFIXES:
        raise InputError(f"{path} is a single image", hint="Name the folder it is in.")
    raise InputError(
        f"cannot tell the format of {path}",
        hint="Name it with format: " + ", ".join(get_args(Format)[1:]) + ".",
    )


def _rows(paths: list[Location], kind: Format, request: Request, report: Report) -> Iterator[Row]:
    if kind == "auto":
        kind = _sniff(paths[0])
    if request.split is not None and kind not in ("karpathy", "jsonl"):
        raise UsageError(
            f"split={request.split!r} does not apply to {kind} files",
            hint="Karpathy's JSON, JSON Lines and JSON lists have splits.",
        )
    reader: Callable[[Location, Request, Report], Iterator[Row]]
    if kind == "parquet":
        from gmail_cli.components.captions.parquet import RowGroups, parquet

        reader = partial(parquet, groups=RowGroups())
    else:
        reader = READERS[kind]
    for path in paths:
        yield from reader(path, request, report)


def _assemble(
    rows: Iterator[Row],
    name: str,
    report: Report,
    *,
    limit: int | None,
    holdout: tuple[Part, float, int] | None,
) -> Dataset:
    """Join the rows of one image, keep what ``holdout`` and ``limit`` ask for, and check ids.

    Rows of one image id join when they name the same image file or none; otherwise the later is a duplicate.
    """
    images: dict[str, Image] = {}
    sources: dict[str, ImageSource | None] = {}
    captions: dict[str, list[Caption]] = {}
    caption_ids: set[str] = set()
    labels: set[str] = set()
    dropped: dict[str, ImageSource | None] = {}
    for row in rows:
        if row.label is not None:
            labels.add(row.label)
        known = sources if row.id in sources else dropped
        if row.id in known:
            if known[row.id] != row.source or not row.texts:
                report(row.where, f"duplicate image id {row.id}")
                continue
        else:
            full = limit is not None and len(images) == limit
            kept = not full and (holdout is None or _part(row.id, holdout[1], holdout[2]) == holdout[0])
            known = sources if kept else dropped
            known[row.id] = row.source
            if kept:
                images[row.id] = Image(row.id, row.label, row.attributes)
                captions[row.id] = []
        if known is dropped:
            continue
        for text in row.texts:
            key = text.id if text.id is not None else f"{row.id}#{len(captions[row.id])}"
            if key in caption_ids:
                report(row.where, f"duplicate caption id {key}")
                continue
            caption_ids.add(key)
            captions[row.id].append(Caption(key, text.text, row.id, text.kind))
        if row.complete and len(images) == limit:
            break
    return Dataset(
        name,
        tuple(images.values()),
        tuple(itertools.chain.from_iterable(captions.values())),
        tuple(sorted(labels)),
        tuple(sources.values()),
    )


def _part(image_id: str, fraction: float, seed: int) -> Part:
    number = int.from_bytes(hashlib.sha256(f"{seed}:{image_id}".encode()).digest()[:8], "big")
    return "test" if number < fraction * 2**64 else "train"


def check_disjoint(train: Dataset, test: Dataset, *, captions: bool = False) -> None:
    """Refuse a training set that holds images of the test set (or, with ``captions``, captions of it).

    Images are compared by content where both sets carry them. Otherwise an image counts as shared when its
    id and one of its captions are in both sets.

    Args:
        train: The set to learn from, or the captions that images were generated from.
        test: The set to evaluate on.
        captions: Also refuse equal captions, whichever image they describe. Captions made from class names
            are shared by right.

    Raises:
        InputError: Something is shared; names how much and the first of it.
    """
    if train.has_images and test.has_images:
        seen = set(train.image_identities)
        pairs = zip(test.images, test.image_identities, strict=True)
        shared = [image.id for image, identity in pairs if identity in seen]
    else:
        known = {(caption.owner, caption.text) for caption in train.captions}
        shared = list(dict.fromkeys(c.owner for c in test.captions if (c.owner, c.text) in known))
    what = "image"
    if not shared and captions:
        texts = {caption.text.casefold() for caption in train.captions}
        what, shared = "caption", [c.id for c in test.captions if c.text.casefold() in texts]
    if shared:
        raise InputError(
            f"{len(shared)} {what}{'s' * (len(shared) > 1)} of the test set {test.name} are also in the "
            f"training set {train.name}, first {shared[0]!r}",
            hint="Use disjoint sets, or one set twice with holdout train and test.",
        )
