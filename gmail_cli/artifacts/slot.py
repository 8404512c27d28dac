"""The folder a stage is making: resumable until it is committed, then immutable."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from gmail_cli.artifacts import disk
from gmail_cli.artifacts.digests import canonical_json, file_sha256
from gmail_cli.artifacts.records import (
    JOURNAL,
    MANIFEST,
    MANIFEST_SCHEMA,
    Artifact,
    StageKey,
    content_digest,
    package_versions,
)
from gmail_cli.errors import InputError, SetupError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import torch

    from gmail_cli.artifacts.workspace import Workspace

_PROGRESS = "progress.json"
_SCRATCH = "scratch"
_OWN_FILES = (MANIFEST, JOURNAL, _PROGRESS)


class Checkpoints:
    """One checkpoint file of named tensors in a slot's scratch folder: whole or absent, never torn."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def exists(self) -> bool:
        """Whether one was saved."""
        return self._path.exists()

    def load(self) -> dict[str, torch.Tensor] | None:
        """The last saved tensors, or None when there are none (or the disk damaged them)."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        if not self._path.exists():
            return None
        try:
            return load(self._path.read_bytes())
        except SafetensorError:
            return None

    def save(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Replace the checkpoint."""
        from safetensors.torch import save

        content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        disk.write(self._path, lambda path: path.write_bytes(content))

    def remove(self) -> None:
        """Forget the checkpoint."""
        self._path.unlink(missing_ok=True)


class RowLog:
    """Rows that one process at a time appends in a slot's scratch folder, until the log is complete."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._growing = path.with_suffix(".growing")

    def is_complete(self) -> bool:
        """Whether all its rows are there."""
        return self._path.exists()

    @contextlib.contextmanager
    def claim(self) -> Iterator[bool]:
        """Hold the log alone; false where another process holds it or it is complete."""
        import fcntl

        with self._growing.open("ab") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
                return
            if self.is_complete():  # it was being completed meanwhile
                self._growing.unlink(missing_ok=True)
                yield False
                return
            yield True

    def read(self) -> list[dict[str, Any]]:
        """Its rows so far; a torn last line is cut off the file first."""
        return disk.read_rows(self._path if self.is_complete() else self._growing)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows and flush them to disk."""
        try:
            disk.append_rows(self._growing, rows)
        except OSError as error:
            disk.explain(error, self._growing)
            raise

    def complete(self) -> None:
        """Say that all rows are there."""
        self._growing.rename(self._path)

    def keep(self, count: int) -> None:
        """Cut it to its first ``count`` rows, to be continued."""
        if self.is_complete():
            self._path.rename(self._growing)
        lines = self._growing.read_bytes().splitlines(keepends=True)  # cut in place: the claim is on this very file
        os.truncate(self._growing, sum(map(len, lines[:count])))


@dataclasses.dataclass(frozen=True)
class Waiting:
    """What one process of a job array leaves when others still have work.

    Attributes:
        key: What is being made.
        done: Shards that are there.
        shards: Shards in all.
    """

    key: StageKey
    done: int
    shards: int


class Slot:
    """The folder a stage is making (``done`` False) or finds complete (``done`` True).

    Processes that share it (``Workspace.open(key, shared=True)``) may only save checkpoints, keep logs and write loose
    files in it.
    """

    def __init__(
        self, workspace: Workspace, key: StageKey, *, tell: Callable[[str], None] | None, shared: bool = False
    ) -> None:
        self.key = key
        self._shared = shared
        self._home = workspace.folder(key.stage)
        self._final = self._home / key.digest[:12]
        self._partial = self._home / f"{key.digest[:12]}.partial"
        lock = workspace.root / workspace.run / ".locks" / f"{key.stage}-{key.digest[:12]}"
        self._lock = disk.Lock(lock, tell, shared=shared)
        self._files: dict[str, dict[str, Any]] = {}
        self._read: set[str] = set()
        self._started = 0.0
        self._elapsed = 0.0
        self._artifact: Artifact | None = None

    def __enter__(self) -> Slot:
        try:
            self._lock.acquire()
        except OSError as error:
            hint = "Choose a folder you can write with --workspace."
            raise SetupError(f"cannot write under {self._home}: {error.strerror}", hint=hint) from error
        try:
            if self._final.is_dir():
                self._artifact = Artifact.load(self._final)
                disk.point_latest(self._home, self._final.name)
                return self
            (self._partial / _SCRATCH).mkdir(parents=True, exist_ok=True)
            self._files = self._read_journal()
            self._elapsed = float(disk.read_json(self._partial / _PROGRESS).get("seconds", 0.0))
            disk.write_text(self._partial / "key.json", canonical_json(self.key.to_json()))
            self._started = time.monotonic()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.done and not self._shared and self._partial.is_dir():
            with contextlib.suppress(OSError):
                self._save_progress()
        self._lock.release()

    @property
    def done(self) -> bool:
        """Whether the artifact is complete."""
        return self._artifact is not None

    @property
    def artifact(self) -> Artifact:
        """The complete artifact."""
        assert self._artifact is not None, "the slot is not complete"
        return self._artifact

    # -- reading what is there so far ------------------------------------------------------------------------

    def has(self, name: str) -> bool:
        """Whether a whole file of that name is there, from this process or an interrupted one."""
        entry = self._files.get(name)
        path = self._partial / name
        return entry is not None and path.is_file() and path.stat().st_size == entry.get("size")

    def has_folder(self, name: str) -> bool:
        """Whether :meth:`write_folder` finished for that name."""
        return (self._partial / _SCRATCH / f"{disk.safe(name)}.complete").exists()

    def path(self, name: str) -> Path:
        """Where a payload file is (or will be) while the stage works."""
        return self._partial / disk.relative(name)

    def scratch(self, name: str) -> Path:
        """A path for working files (caches, checkpoints): kept over restarts, gone at commit, in no manifest."""
        path = self._partial / _SCRATCH / disk.relative(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def checkpoints(self, name: str) -> Checkpoints:
        """The checkpoint file of one training run inside the stage."""
        return Checkpoints(self.scratch(f"{name}.safetensors"))

    def log(self, name: str) -> RowLog:
        """A log of rows that several processes may take turns at: kept over restarts, gone at commit."""
        return RowLog(self.scratch(f"{name}.jsonl"))

    def read_jsonl(self, name: str) -> list[dict[str, Any]]:
        """Rows of a JSON Lines payload file that is there."""
        return disk.read_rows(self.path(name))

    # -- writing -----------------------------------------------------------------------------------------------

    def write_with(self, name: str, writer: Callable[[Path], object]) -> Path:
        """Write a payload file through ``writer(temporary path)``; whole or absent."""
        assert not self._shared, "processes that share a slot write no payload"
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        disk.write(path, writer)
        self._enter(name)
        return path

    def write_bytes(self, name: str, content: bytes) -> Path:
        """Write bytes."""
        return self.write_with(name, lambda path: path.write_bytes(content))

    def write_loose(self, name: str, content: bytes) -> None:
        """Write bytes that are no part of the artifact before :meth:`adopt`; whichever process does, the same bytes."""
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        disk.write(path, lambda temporary: temporary.write_bytes(content))

    def link_loose(self, name: str, source: Path) -> None:
        """:meth:`write_loose` of another artifact's file, without a copy where the file system can."""

        def writer(temporary: Path) -> None:
            temporary.unlink(missing_ok=True)  # it may be a link itself
            try:
                os.link(source, temporary)
            except OSError:
                shutil.copyfile(source, temporary)

        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        disk.write(path, writer)

    def adopt(self, name: str, *, sha256: str, size: int) -> bool:
        """Enter a loose file; false where it is not there with that size.

        It is entered in memory only: whoever resumes adopts again.
        """
        self._files[name] = {"sha256": sha256, "size": size}
        if self.has(name):
            return True
        del self._files[name]
        return False

    def write_text(self, name: str, text: str) -> Path:
        """Write UTF-8 text with Unix line ends."""
        return self.write_bytes(name, text.encode())

    def write_json(self, name: str, value: Any) -> Path:
        """Write indented JSON with sorted keys."""
        return self.write_text(name, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False))

    def write_jsonl(self, name: str, rows: Iterable[Mapping[str, Any]]) -> Path:
        """Write JSON Lines, one canonical object a line; rows are taken one at a time."""

        def writer(path: Path) -> None:
            with path.open("wb") as stream:
                stream.writelines(f"{canonical_json(row)}\n".encode() for row in rows)

        return self.write_with(name, writer)

    def write_npy(self, name: str, array: np.ndarray[Any, Any]) -> Path:
        """Write a ``.npy`` file without pickle."""
        import numpy as np

        def writer(path: Path) -> None:
            with path.open("wb") as stream:
                np.save(stream, array, allow_pickle=False)

        return self.write_with(name, writer)

    def write_npy_blocks(
        self, name: str, blocks: Iterable[np.ndarray[Any, Any]], *, shape: tuple[int, ...], dtype: str
    ) -> Path:
        """Write a ``.npy`` file, the bytes of :meth:`write_npy`, from blocks of its rows taken one at a time."""
        import numpy as np

        def writer(path: Path) -> None:
            kind = np.dtype(dtype)
            header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
            written = 0
            with path.open("wb") as stream:
                np.lib.format.write_array_header_1_0(stream, header)
                for block in blocks:
                    assert block.shape[1:] == shape[1:], "a block of another width"
                    assert block.dtype == kind, "a block of another kind"
                    stream.write(np.ascontiguousarray(block).data)
                    written += len(block)
            assert written == shape[0], f"{written} rows for a shape of {shape}"

        return self.write_with(name, writer)

    def write_safetensors(
        self, name: str, tensors: Mapping[str, torch.Tensor], *, metadata: Mapping[str, str] | None = None
    ) -> Path:
        """Write named tensors."""
        from safetensors.torch import save

        whole = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        return self.write_bytes(name, save(whole, metadata=dict(metadata) if metadata else None))

    def write_parquet(self, name: str, table: pa.Table) -> Path:
        """Write a Parquet table."""
        import pyarrow.parquet as pq

        return self.write_with(name, lambda path: pq.write_table(table, path))

    def write_folder(self, name: str, writer: Callable[[Path], object]) -> Path:
        """Write a folder through ``writer(empty temporary folder)`` (``save_pretrained`` and its like)."""
        target = self.path(name)
        temporary = self.scratch(f"{disk.safe(name)}.folder")
        marker = self.scratch(f"{disk.safe(name)}.complete")
        for stale in (temporary, target):
            if stale.exists():
                shutil.rmtree(stale)
        marker.unlink(missing_ok=True)
        temporary.mkdir(parents=True)
        writer(temporary)
        for file in disk.scan(temporary):
            disk.fsync(temporary / file)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.rename(target)
        for file in sorted(disk.scan(target)):
            self._enter(f"{name}/{file}")
        marker.touch()
        return target

    def link_folder(self, name: str, source: Artifact) -> bool:
        """Take over a payload folder of another artifact, without copies where the file system can.

        Returns:
            False, and nothing is entered, where one of its files is gone or has other bytes than its manifest says.
        """
        entries = {file: entry for file, entry in source.files.items() if file.startswith(f"{name}/")}
        for file, entry in entries.items():
            path = source.path / file
            if not path.is_file() or file_sha256(path) != entry["sha256"]:
                return False
        for file, entry in entries.items():
            self.link_loose(file, source.path / file)
            self._files[file] = dict(entry)
            self._journal({"name": file, **entry})
        return bool(entries)

    def remove(self, name: str) -> None:
        """Drop a payload file."""
        self._files.pop(name, None)
        self.path(name).unlink(missing_ok=True)
        self._journal({"name": name, "removed": True})

    def note_read(self, artifact: Artifact) -> None:
        """Name an artifact that was read without being an input (features), so that it is kept as long as this one."""
        self._read.add(artifact.digest)

    def commit(self, *, summary: Mapping[str, Any], device: str = "cpu") -> Artifact:
        """Write the manifest, rename the folder, point ``latest`` at it.

        Args:
            summary: What a person or the next stage wants to know of the result; JSON-able.
            device: Where it was computed, such as ``cpu`` or ``cuda: NVIDIA H200``.
        """
        assert not self._shared, "processes that share a slot do not commit it"
        files = {name: self._files[name] for name in sorted(self._files)}
        for name in files:
            if not self.has(name):
                hint = "Something else changed the folder: delete it and run again."
                raise InputError(f"{self.path(name)} was written and is gone or changed", hint=hint)
        known = {*files, *_OWN_FILES}
        shutil.rmtree(self._partial / _SCRATCH, ignore_errors=True)
        for name in list(disk.scan(self._partial)):
            if name not in known:
                (self._partial / name).unlink()
        manifest = {
            "schema": MANIFEST_SCHEMA,
            "digest": self.key.digest,
            "key": self.key.to_json(),
            "content": content_digest(files),
            "files": files,
            "read": sorted(self._read),
            "summary": dict(summary),
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds": round(self._seconds(), 3),
            "device": device,
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
            "versions": package_versions(),
        }
        text = json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
        disk.write_text(self._partial / MANIFEST, text)
        for name in (JOURNAL, _PROGRESS):
            (self._partial / name).unlink(missing_ok=True)
        disk.remove_empty_folders(self._partial)
        self._partial.rename(self._final)
        disk.fsync(self._home)
        disk.point_latest(self._home, self._final.name)
        self._artifact = Artifact.load(self._final)
        return self._artifact

    # -- inside ------------------------------------------------------------------------------------------------

    def _enter(self, name: str) -> None:
        path = self._partial / name
        entry = {"sha256": file_sha256(path), "size": path.stat().st_size}
        self._files[name] = entry
        self._journal({"name": name, **entry})

    def _journal(self, row: Mapping[str, Any]) -> None:
        with (self._partial / JOURNAL).open("ab") as stream:
            stream.write(canonical_json(row).encode() + b"\n")

    def _read_journal(self) -> dict[str, dict[str, Any]]:
        files: dict[str, dict[str, Any]] = {}
        for row in disk.read_rows(self._partial / JOURNAL):
            name = row.pop("name")
            if row.get("removed"):
                files.pop(name, None)
            else:
                files[name] = row
        return files

    def _seconds(self) -> float:
        return self._elapsed + time.monotonic() - self._started

    def _save_progress(self) -> None:
        disk.write_text(self._partial / _PROGRESS, json.dumps({"seconds": self._seconds(), "files": len(self._files)}))
