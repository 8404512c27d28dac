"""What several stages read: the sets that a profile names, the tables of an embed artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from gmail_cli.artifacts import Artifact
from gmail_cli.components import captions
from gmail_cli.components.captions import Dataset
from gmail_cli.components.tables import Table
from gmail_cli.profile import Profile, settings

SPLIT_SEED = 0
"""Of ``data.holdout``. What is held out belongs to the data: were it to move with ``seed``, an f_r trained under one
seed would be tested on its own training images under another."""


def source(profile: Profile, *, part: Literal["train", "test"]) -> dict[str, Any]:
    """Arguments of :func:`gmail_cli.components.captions.read` for the training or test set, JSON-able."""
    data = profile.data
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
    }


def read(source: dict[str, Any]) -> Dataset:
    """Read the set that :func:`source` described."""
    holdout = tuple(source["holdout"]) if source["holdout"] else None
    return captions.read(**{**source, "holdout": holdout})


def origins(profile: Profile) -> dict[str, Any]:
    """What an embed artifact says of itself: where its sets lie, the model, the protocol. Index and eval read it, so
    that they describe what was embedded whatever profile they are called with."""
    data = profile.data
    return {
        "train": source(profile, part="train"),
        "test": source(profile, part="test"),
        "model": settings(profile.model),
        "protocol": data.protocol or f"{Path(data.test).name}/unversioned",
    }


def load_tables(embeddings: Artifact) -> list[Table]:
    """Every table of an embed artifact, by name."""
    folders = sorted(name.removesuffix("/table.json") for name in embeddings.files if name.endswith("/table.json"))
    return [Table.load(embeddings.folder(folder)) for folder in folders]
