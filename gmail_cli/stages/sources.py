"""What several stages read: the test set that a profile names, the tables of an embed artifact."""

from __future__ import annotations

from typing import Any

from gmail_cli.artifacts import Artifact
from gmail_cli.components import captions
from gmail_cli.components.captions import Dataset
from gmail_cli.components.tables import Table
from gmail_cli.profile import Profile


def test_source(profile: Profile) -> dict[str, Any]:
    """Arguments of :func:`gmail_cli.components.captions.read` for the test set, JSON-able."""
    data = profile.data
    return {
        "source": data.test,
        "images": data.test_images or None,
        "format": data.format,
        "split": data.test_split or None,
        "limit": data.test_limit or None,
        "holdout": ["test", data.holdout, profile.seed] if data.holdout else None,
        "on_bad": data.on_bad,
        "scene_seed": data.scene_seed,
        "scene_size": data.scene_size,
    }


def read_source(source: dict[str, Any]) -> Dataset:
    """Read what :func:`test_source` described."""
    holdout = tuple(source["holdout"]) if source["holdout"] else None
    return captions.read(**{**source, "holdout": holdout})


def load_tables(embeddings: Artifact) -> list[Table]:
    """Every table of an embed artifact, by name."""
    folders = sorted(name.removesuffix("/table.json") for name in embeddings.files if name.endswith("/table.json"))
    return [Table.load(embeddings.folder(folder)) for folder in folders]
