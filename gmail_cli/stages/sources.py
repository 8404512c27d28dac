"""What several stages read: the sets and language models that a profile names, the tables of an embed artifact."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from gmail_cli.artifacts import Artifact, folder_digest
from gmail_cli.components import captions, prompts, protocols
from gmail_cli.components.captions import Dataset
from gmail_cli.components.search import VectorIndex
from gmail_cli.components.tables import Table
from gmail_cli.errors import InputError, UsageError
from gmail_cli.profile import settings
from gmail_cli.profile.schema import Profile

INDEX = "index.json"
TEST_IMAGES = "test-images"

SPLIT_SEED = 0
"""Of ``data.holdout``. What is held out belongs to the data: were it to move with ``seed``, an f_r trained under one
seed would be tested on its own training images under another."""


def source(profile: Profile, *, part: Literal["train", "test"]) -> dict[str, Any]:
    """Arguments of :func:`read` for the training or test set, JSON-able.

    Raises:
        UsageError: ``data.protocol`` names a version that there is not, or is limited to fewer images than it demands.
    """
    data = profile.data
    protocol = protocols.find(data.protocol)
    if protocol is not None and 0 < data.test_limit < protocol.images:
        raise UsageError(
            f"data.test_limit is {data.test_limit}, and protocol {protocol.label} is of {protocol.images:,} images",
            hint='Leave the limit out, or the protocol: --set data.protocol="".',
        )
    more: dict[str, Any] = {}
    if getattr(data, f"{part}_kind") != "short":
        more["kind"] = getattr(data, f"{part}_kind")
    if part == "test" and protocol is not None:
        more["protocol"] = protocol.label
        if isinstance(protocol, protocols.Protocol):
            more["kind"] = protocol.kind
    if part == "test" and data.class_names:
        more["class_names"] = data.class_names
    return {
        "source": getattr(data, part),
        "images": getattr(data, f"{part}_images") or None,
        "format": data.format,
        "split": getattr(data, f"{part}_split") or None,
        "limit": getattr(data, f"{part}_limit") or None,
        "holdout": [part, data.holdout, SPLIT_SEED] if data.holdout else None,
        "on_bad": data.on_bad,
        "scene_seed": data.scene_seed,
        "scene_size": data.scene_size,
        **more,
    }


def read(source: dict[str, Any]) -> Dataset:
    """Read the set that :func:`source` described; a test set gets its class names and is cut to its protocol.

    Raises:
        InputError, UsageError: As :func:`gmail_cli.components.captions.read`; also when it is not the protocol's set.
    """
    holdout = tuple(source["holdout"]) if source["holdout"] else None
    protocol = protocols.find(source.get("protocol", ""))
    given = {name: value for name, value in source.items() if name not in ("protocol", "class_names")}
    dataset = captions.read(**{**given, "holdout": holdout})
    if source.get("class_names"):
        dataset = prompts.name_classes(dataset, source["class_names"])
    return protocol.apply(dataset) if protocol is not None else dataset


def read_partners(profile: Profile) -> Dataset:
    """The training set with its images: the real partners of generated ones.

    Raises:
        InputError, UsageError: As :func:`read`; also when the set has no images.
    """
    return read({**source(profile, part="train"), "need_images": True})


def origins(profile: Profile) -> dict[str, Any]:
    """What an embed artifact says of itself: where its sets lie, the model, the protocol. Index and eval read it, so
    that they describe what was embedded whatever profile they are called with."""
    data = profile.data
    protocol = protocols.find(data.protocol)
    return {
        "train": source(profile, part="train"),
        "test": source(profile, part="test"),
        "model": settings(profile.model),
        "protocol": protocol.label if protocol else data.protocol or f"{Path(data.test).name}/unversioned",
    }


def load_tables(embeddings: Artifact) -> list[Table]:
    """Every table of an embed artifact, by name."""
    folders = sorted(name.removesuffix("/table.json") for name in embeddings.files if name.endswith("/table.json"))
    return [Table.load(embeddings.folder(folder)) for folder in folders]


def require_clip_of(aligned: Artifact, profile: Profile) -> None:
    """Refuse an f_g that was tuned from another model than ``model.clip``: its embeddings lie in another space.

    Raises:
        InputError: Names both.
    """
    from gmail_cli.components.clip_files import model_digest

    digest = model_digest(profile.model.clip, revision=profile.model.revision, seed=profile.seed)
    tuned = aligned.manifest["key"]["models"]["clip"]
    if tuned != digest:
        raise InputError(
            f"{aligned.path} was aligned from another model (digest {tuned[:12]}) than model.clip = "
            f"{profile.model.clip!r} ({digest[:12]})",
            hint="Run `gmail align` with this model.clip, or name an artifact that was made from it with --aligned.",
        )


def tell_of_random_weights(profile: Profile, tell: Callable[[str], None]) -> None:
    """Say that ``model.clip`` names an architecture alone, where it does."""
    from gmail_cli.components.clip_files import has_random_weights

    name = profile.model.clip
    if has_random_weights(name):
        tell(
            f"model.clip = {name!r} is an architecture without weights, so they are random: for trained ones name "
            "ARCH/pretrained-tag, such as ViT-B-16/openai, or a folder"
        )


def require_index(artifact: Artifact) -> None:
    """Refuse an artifact of another stage.

    Raises:
        InputError: Names the stage that made it.
    """
    if artifact.stage != "index":
        hint = "Give a folder made by `gmail index`, such as runs/tiny/index/latest."
        raise InputError(f"{artifact.path} was made by `gmail {artifact.stage}`", hint=hint)


def table_name(about: Mapping[str, Any], table: str | None) -> str:
    """The table meant by ``table``: the test images, or the first, when None.

    Raises:
        UsageError: The index has no table of that name.
    """
    names = list(about["tables"])
    if table is None:
        return TEST_IMAGES if TEST_IMAGES in names else names[0]
    if table not in names:
        raise UsageError(f"the index has no table {table!r}", hint=f"It has: {', '.join(names)}.")
    return table


def open_index(artifact: Artifact, table: str, *, resident: bool = False) -> VectorIndex:
    """One index of an artifact, mapped from its file or (``resident``) read into memory.

    Raises:
        InputError: A file was cut short, or holds other vectors than ``index.json`` says.
    """
    from gmail_cli.components import search

    expected = artifact.read_json(INDEX)["tables"][table]
    names = [f"{table}.faiss", *([f"{table}.lists"] if expected["storage"] == "disk" else [])]
    for name in names:
        size, whole = artifact.file(name).stat().st_size, artifact.files[name]["size"]
        if size != whole:
            hint = "Delete the artifact and run `gmail index` again."
            raise InputError(f"{artifact.path / name} has {size} bytes, the manifest says {whole}", hint=hint)
    path = artifact.file(names[0])
    index = search.load(path, resident=resident, lists=expected["storage"] == "disk")
    if (index.count, index.dim) != (expected["count"], expected["dim"]):
        raise InputError(
            f"{path} holds {index.count} vectors of {index.dim} dimensions, {INDEX} says "
            f"{expected['count']} of {expected['dim']}",
            hint="Delete the artifact and run `gmail index` again.",
        )
    return index


def require_part(number: int, parts: int) -> None:
    """Refuse a part of a job array that does not exist.

    Raises:
        UsageError: ``number`` is not one of 1 to ``parts``.
    """
    if not 1 <= number <= parts:
        raise UsageError(f"part {number} of {parts} does not exist", hint="Count the parts from 1: 1/4, 2/4, 3/4, 4/4.")


def lm_digest(ref: str, *, revision: str, key: str, revision_key: str) -> str:
    """What identifies a language model: its content, or its revision on a hub.

    Args:
        ref: ``tiny`` (shipped), a folder in transformers format, or a hub id.
        revision: Commit of a hub model.
        key: The profile key that names it, for messages.
        revision_key: The one that names its revision.

    Raises:
        UsageError: A hub id without revision.
    """
    from gmail_cli.components.heads import SHIPPED_LMS

    folder = SHIPPED_LMS.get(ref, Path(ref))
    if folder.is_dir():
        return folder_digest(folder)
    if not revision:
        raise UsageError(
            f"{key} = {ref!r} is no folder, and a hub id needs {revision_key}",
            hint=f"Set {revision_key} to a commit of the model's repository.",
        )
    return f"{ref}@{revision}"
