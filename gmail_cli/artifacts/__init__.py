"""The on-disk layout: content-addressed stage folders, written once, atomically, and resumable until then.

    runs/<run>/<stage>/<digest12>/            complete and immutable: manifest.json + payload
    runs/<run>/<stage>/<digest12>.partial/    in progress or interrupted: payload so far, files.jsonl, scratch/
    runs/<run>/<stage>/latest -> <digest12>   swapped atomically

A stage names what it is about to make with a :class:`StageKey`; the key's digest is the folder's name, so the same
settings over the same inputs are found again instead of being made again. While a stage works it holds a lock; a
second process that wants the same folder waits and then reuses it. Every file goes to a temporary name, is flushed to
disk, renamed, and entered in a journal; the manifest lists the journal, never a folder scan. This is the only module
that writes results.
"""

from __future__ import annotations

from gmail_cli.artifacts.digests import (
    canonical_json,
    digest_of,
    digest_of_each,
    digest_of_list,
    file_sha256,
    folder_digest,
)
from gmail_cli.artifacts.exports import EXPORTED, export_files, export_folder
from gmail_cli.artifacts.records import (
    COMMANDS,
    FEATURES,
    MANIFEST,
    MANIFEST_SCHEMA,
    STAGES,
    VERSIONS,
    Artifact,
    StageKey,
    content_digest,
    package_versions,
)
from gmail_cli.artifacts.slot import Checkpoints, RowLog, Slot, Waiting
from gmail_cli.artifacts.workspace import Workspace

__all__ = [
    "COMMANDS",
    "EXPORTED",
    "FEATURES",
    "MANIFEST",
    "MANIFEST_SCHEMA",
    "STAGES",
    "VERSIONS",
    "Artifact",
    "Checkpoints",
    "RowLog",
    "Slot",
    "StageKey",
    "Waiting",
    "Workspace",
    "canonical_json",
    "content_digest",
    "digest_of",
    "digest_of_each",
    "digest_of_list",
    "export_files",
    "export_folder",
    "file_sha256",
    "folder_digest",
    "package_versions",
]
