"""Digests of values, files and folders."""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gmail_cli.errors import InputError

_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def canonical_json(value: Any) -> str:
    """JSON text that is the same for equal values: sorted keys, no spaces, no NaN."""
    return _CANONICAL.encode(value)


def digest_of(value: Any) -> str:
    """SHA-256 (64 hex digits) of :func:`canonical_json`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def digest_of_list(items: Iterable[str]) -> str:
    """:func:`digest_of` a list whose items come as their canonical JSON, one or several (with commas) at a time."""
    digest = hashlib.sha256(b"[")
    for row, item in enumerate(items):
        digest.update((f",{item}" if row else item).encode())
    digest.update(b"]")
    return digest.hexdigest()


def digest_of_each(values: Iterable[Any]) -> str:
    """SHA-256 (64 hex digits) over the :func:`canonical_json` of many values, a line each, taken one at a time."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(canonical_json(value).encode() + b"\n")
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 (64 hex digits) of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if sys.version_info >= (3, 11) else _sha256(stream)


def _sha256(stream: Any) -> str:
    digest = hashlib.sha256()
    for block in iter(lambda: stream.read(1 << 20), b""):
        digest.update(block)
    return digest.hexdigest()


def folder_digest(folder: Path, *, suffixes: tuple[str, ...] = ()) -> str:
    """SHA-256 over the names and bytes of a folder's files; identifies local model weights.

    Args:
        folder: A model folder.
        suffixes: Count only files with these endings; all files when empty.

    Raises:
        InputError: The folder does not exist or holds no such file.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder", hint="Give the folder that holds the model's files.")
    return _folder_digest(str(folder.resolve()), suffixes, _folder_stamp(folder))


def _folder_stamp(folder: Path) -> tuple[tuple[str, int, int], ...]:
    stats = ((path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file())
    return tuple((path.relative_to(folder).as_posix(), stat.st_size, stat.st_mtime_ns) for path, stat in stats)


@functools.lru_cache(maxsize=64)
def _folder_digest(folder: str, suffixes: tuple[str, ...], stamp: tuple[tuple[str, int, int], ...]) -> str:
    names = [name for name, _, _ in stamp if not suffixes or name.endswith(suffixes)]
    if not names:
        raise InputError(f"{folder} holds no model files", hint="Give the folder that holds the model's files.")
    return digest_of({name: file_sha256(Path(folder, name)) for name in names})
