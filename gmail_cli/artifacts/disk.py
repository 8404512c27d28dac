"""Writing that survives a crash: temporary name, flush, rename; locks that die with their holder; journals."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from gmail_cli.artifacts.digests import canonical_json
from gmail_cli.errors import SetupError

_TROUBLE = {
    5: "the disk failed",  # EIO
    27: "the file would be larger than this system allows",  # EFBIG
    28: "the disk is full",  # ENOSPC
    30: "the disk is read-only",  # EROFS
    122: "the disk quota is used up",  # EDQUOT
}


class Lock:
    """An advisory lock on a file, held alone or ``shared``; the kernel frees it when its holder dies."""

    def __init__(self, path: Path, tell: Callable[[str], None] | None, *, shared: bool = False) -> None:
        self._path = path
        self._tell = tell
        self._shared = shared
        self._descriptor: int | None = None

    def try_acquire(self) -> bool:
        import fcntl

        self._path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if self._shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return False
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        self._descriptor = descriptor
        return True

    def acquire(self) -> None:
        told = False
        while not self.try_acquire():
            if not told and self._tell:
                holder = self._path.read_text(encoding="utf-8").strip() or "another process"
                self._tell(f"process {holder} is making {self._path.name}; waiting for it")
            told = True
            time.sleep(0.2)

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def scan(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        if path.is_file():
            yield path.relative_to(folder).as_posix()


def relative(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    escapes = not name or path.is_absolute() or ".." in path.parts
    assert not escapes, f"{name!r} leaves its folder"
    return path


def safe(name: str) -> str:
    return name.replace("/", "+")


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, writer: Callable[[Path], object]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        writer(temporary)
        fsync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write(path: Path, writer: Callable[[Path], object]) -> None:
    try:
        write_atomic(path, writer)
    except OSError as error:
        explain(error, path)
        raise


def explain(error: OSError, path: Path) -> None:
    if error.errno in _TROUBLE:
        hint = "Put that right and run the same command again: finished files are kept."
        raise SetupError(f"{_TROUBLE[error.errno]}: could not write {path}", hint=hint) from error


def write_text(path: Path, text: str) -> None:
    write_atomic(path, lambda temporary: temporary.write_bytes(text.encode()))


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("ab") as stream:
        stream.write("".join(canonical_json(row) + "\n" for row in rows).encode())
        stream.flush()
        os.fsync(stream.fileno())


def read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) != len(content):
        os.truncate(path, len(whole))
    return [json.loads(line) for line in whole.splitlines() if line]


def point_latest(home: Path, name: str) -> None:
    temporary = home / f".latest.{os.getpid()}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(name)
    temporary.replace(home / "latest")


def remove_empty_folders(folder: Path) -> None:
    for path in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        with contextlib.suppress(OSError):
            path.rmdir()
