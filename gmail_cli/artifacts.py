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

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import TYPE_CHECKING, Any

from gmail_cli.errors import InputError, SetupError, UsageError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import torch

MANIFEST = "manifest.json"
EXPORTED = "images.parquet"
"""The last file of an export."""
MANIFEST_SCHEMA = "gmail.manifest/1"
FEATURES = "features"
"""Not a command: what frozen towers make of image sets, kept for the stages that read it."""
VERSIONS: Mapping[str, int] = {
    FEATURES: 1,
    "generate": 2,
    "align": 4,
    "train": 3,
    "embed": 2,
    "index": 2,
    "eval": 3,
}
"""The stages in order, each with its own version: raised when the same settings would give other bytes, or bytes that
other stages read in another way."""
STAGES = tuple(VERSIONS)
COMMANDS = tuple(stage for stage in STAGES if stage != FEATURES)
_JOURNAL = "files.jsonl"
_PROGRESS = "progress.json"
_SCRATCH = "scratch"
_OWN_FILES = (MANIFEST, _JOURNAL, _PROGRESS)
_PACKAGES = (
    *("gmail-cli", "torch", "torchvision", "diffusers", "transformers", "open_clip_torch", "peft", "faiss-gpu"),
    *("faiss-cpu", "numpy", "scipy", "safetensors", "pyarrow", "pillow", "pycocotools"),
)


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageKey:
    """All that determines what a stage makes.

    Attributes:
        stage: One of ``STAGES``.
        settings: The validated profile section (and other settings the stage reads), JSON-able.
        inputs: Name -> digest of each artifact or dataset read.
        models: Name -> digest or revision of each model used.
        seed: The run's seed.
        version: Of the stage, from ``VERSIONS``.
    """

    stage: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    models: Mapping[str, str] = dataclasses.field(default_factory=dict)
    seed: int = 0
    version: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "version", VERSIONS[self.stage])

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the key (64 hex digits); its first 12 name the folder."""
        return digest_of(dataclasses.asdict(self))

    def to_json(self) -> dict[str, Any]:
        """The key as it stands in the manifest."""
        return json.loads(canonical_json(dataclasses.asdict(self)))


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A complete stage folder."""

    path: Path
    manifest: Mapping[str, Any]

    @classmethod
    def load(cls, path: Path, *, any_version: bool = False) -> Artifact:
        """Read a complete artifact's manifest.

        Args:
            path: Its folder.
            any_version: Also take what another version of its stage made: to list or delete it, never to read on from.

        Raises:
            InputError: Not an artifact, unfinished, its manifest cannot be read, or another version of its stage made
                it.
        """
        path = Path(path)
        file = path / MANIFEST
        if not file.is_file():
            if path.name.endswith(".partial") or (path / _JOURNAL).exists():
                hint = "Run the command that made it again: it resumes where it stopped."
                raise InputError(f"{path} is unfinished", hint=hint)
            hint = "Give a stage folder such as runs/tiny/align/latest."
            raise InputError(f"{path} is not an artifact: it has no {MANIFEST}", hint=hint)
        try:
            manifest = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{file} cannot be read: {error}", hint="Delete the folder and run again.") from error
        if not isinstance(manifest, dict) or manifest.get("schema") != MANIFEST_SCHEMA:
            raise InputError(f"{file} is not a {MANIFEST_SCHEMA} manifest", hint="Delete the folder and run again.")
        artifact = cls(path.resolve(), manifest)
        if not any_version:
            artifact.require_version()
        return artifact

    @property
    def stage(self) -> str:
        """The stage that made it."""
        return str(self.manifest["key"]["stage"])

    @property
    def digest(self) -> str:
        """The key's digest (64 hex digits)."""
        return str(self.manifest["digest"])

    @property
    def content(self) -> str:
        """SHA-256 over the payload's names and hashes: equal for equal bytes, whenever and however made."""
        return str(self.manifest["content"])

    @property
    def summary(self) -> Mapping[str, Any]:
        """What the stage said of its result."""
        return self.manifest["summary"]

    @property
    def files(self) -> Mapping[str, Mapping[str, Any]]:
        """Name -> {sha256, size} of each payload file."""
        return self.manifest["files"]

    def require_version(self) -> None:
        """Refuse what another version of its stage made: its files may mean something else.

        Raises:
            InputError: Names both versions.
        """
        made, known = self.manifest["key"].get("version"), VERSIONS.get(self.stage)
        if made != known:
            raise InputError(
                f"{self.path} was made by version {made} of `gmail {self.stage}`, and this gmail has version {known}",
                hint=f"Run `gmail {self.stage}` again: it makes a new one beside it.",
            )

    def file(self, name: str) -> Path:
        """The path of a payload file.

        Raises:
            InputError: The manifest does not list it, or it is gone.
        """
        if name not in self.files:
            hint = f"It holds: {', '.join(sorted(self.files)[:8])}."
            raise InputError(f"{self.path} has no file {name!r}", hint=hint)
        path = self.path / name
        if not path.is_file():
            hint = "Run `gmail artifacts verify` on it, delete it and run its stage again."
            raise InputError(f"{path} is missing although the manifest lists it", hint=hint)
        return path

    def folder(self, name: str) -> Path:
        """The path of a payload folder (a model's, say).

        Raises:
            InputError: The manifest lists nothing under it.
        """
        if not any(file.startswith(name + "/") for file in self.files):
            raise InputError(f"{self.path} has no folder {name!r}")
        return self.path / name

    def read_json(self, name: str) -> Any:
        """A JSON payload file's content."""
        return json.loads(self.file(name).read_text(encoding="utf-8"))

    def read_jsonl(self, name: str) -> list[dict[str, Any]]:
        """A JSON Lines payload file's rows."""
        with self.file(name).open(encoding="utf-8") as stream:
            return [json.loads(line) for line in stream if line.strip()]

    def verify(self) -> list[str]:
        """What is wrong with the folder, a sentence each; empty when every byte is as written."""
        problems = []
        for name, entry in sorted(self.files.items()):
            path = self.path / name
            if not path.is_file():
                problems.append(f"{name} is missing")
            elif path.stat().st_size != entry["size"]:
                problems.append(f"{name} has {path.stat().st_size} bytes, the manifest says {entry['size']}")
            elif file_sha256(path) != entry["sha256"]:
                problems.append(f"{name} has other bytes than the manifest says")
        known = {*self.files, MANIFEST}
        problems += [f"{name} is not in the manifest" for name in sorted(_scan(self.path)) if name not in known]
        if content_digest(self.files) != self.content:
            problems.append(f"{MANIFEST} lists other hashes than its content digest says")
        if digest_of(self.manifest["key"]) != self.digest:
            problems.append(f"{MANIFEST} has another key than its digest says")
        return problems


def content_digest(files: Mapping[str, Mapping[str, Any]]) -> str:
    """SHA-256 over the names and hashes of payload files."""
    return digest_of({name: entry["sha256"] for name, entry in files.items()})


def _scan(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        if path.is_file():
            yield path.relative_to(folder).as_posix()


def export_folder(target: Path, writer: Callable[[Path], object]) -> None:
    """Write a folder of the user's through ``writer(empty temporary folder)``; whole or absent.

    Args:
        target: A folder that does not exist yet, or is empty.
        writer: Fills a folder.

    Raises:
        UsageError: The folder holds something.
        SetupError: It cannot be written.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UsageError(f"{target} is there already", hint="Name a new or empty folder.")
        temporary.mkdir(parents=True)
        writer(temporary)
        for file in _scan(temporary):
            _fsync(temporary / file)
        if target.exists():
            target.rmdir()
        temporary.rename(target)
    except OSError as error:
        hint = "Name a folder on a disk that has room and can be written."
        raise SetupError(f"cannot write {target}: {error.strerror or error}", hint=hint) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
        _write(self._path, lambda path: path.write_bytes(content))

    def remove(self) -> None:
        """Forget the checkpoint."""
        self._path.unlink(missing_ok=True)


def export_files(target: str, files: Iterable[tuple[str, Callable[[Path], object]]]) -> None:
    """Write files of the user's one after another, the last of which says that all are there.

    A folder appears whole (:func:`export_folder`). At an fsspec URL each file is put where it belongs when it is
    complete, and nothing is renamed there: an export that was cut short lacks the last file and is written over.

    Args:
        target: A folder that does not exist yet or is empty, or a URL such as ``s3://bucket/folder``.
        files: Name and writer of each, taken one at a time.

    Raises:
        UsageError: The folder holds something; at the URL there is a complete export.
        SetupError: It cannot be written.
    """
    if "://" not in target:

        def writer(folder: Path) -> None:
            for name, write in files:
                write(folder / name)

        export_folder(Path(target), writer)
        return
    import fsspec

    try:
        system, root = fsspec.core.url_to_fs(target)
    except (ImportError, ValueError) as error:
        raise SetupError(f"cannot open {target}: {error}", hint="Install the package of its protocol.") from error
    try:
        with tempfile.TemporaryDirectory() as local:
            if system.exists(f"{root}/{EXPORTED}"):
                raise UsageError(f"{target} is there already", hint="Name a new folder.")
            system.makedirs(root, exist_ok=True)
            for name, write in files:
                path = Path(local, name)
                write(path)
                system.put_file(str(path), f"{root}/{name}")
                path.unlink()
    except OSError as error:
        hint = "Check the address and the rights to write there."
        raise SetupError(f"cannot write {target}: {error}", hint=hint) from error


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
        return _read_journal_rows(self._path if self.is_complete() else self._growing)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows and flush them to disk."""
        try:
            _append_rows(self._growing, rows)
        except OSError as error:
            _explain_full_disk(error, self._growing)
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
        self._lock = _Lock(lock, tell, shared=shared)
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
                _point_latest(self._home, self._final.name)
                return self
            (self._partial / _SCRATCH).mkdir(parents=True, exist_ok=True)
            self._files = self._read_journal()
            self._elapsed = float(_read_json(self._partial / _PROGRESS).get("seconds", 0.0))
            _write_text(self._partial / "key.json", canonical_json(self.key.to_json()))
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
        return (self._partial / _SCRATCH / f"{_safe(name)}.complete").exists()

    def path(self, name: str) -> Path:
        """Where a payload file is (or will be) while the stage works."""
        return self._partial / _relative(name)

    def scratch(self, name: str) -> Path:
        """A path for working files (caches, checkpoints): kept over restarts, gone at commit, in no manifest."""
        path = self._partial / _SCRATCH / _relative(name)
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
        return _read_journal_rows(self.path(name))

    # -- writing -----------------------------------------------------------------------------------------------

    def write_with(self, name: str, writer: Callable[[Path], object]) -> Path:
        """Write a payload file through ``writer(temporary path)``; whole or absent."""
        assert not self._shared, "processes that share a slot write no payload"
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, writer)
        self._enter(name)
        return path

    def write_bytes(self, name: str, content: bytes) -> Path:
        """Write bytes."""
        return self.write_with(name, lambda path: path.write_bytes(content))

    def write_loose(self, name: str, content: bytes) -> None:
        """Write bytes that are no part of the artifact before :meth:`adopt`; whichever process does, the same bytes."""
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, lambda temporary: temporary.write_bytes(content))

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
        _write(path, writer)

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
        temporary = self.scratch(f"{_safe(name)}.folder")
        marker = self.scratch(f"{_safe(name)}.complete")
        for stale in (temporary, target):
            if stale.exists():
                shutil.rmtree(stale)
        marker.unlink(missing_ok=True)
        temporary.mkdir(parents=True)
        writer(temporary)
        for file in _scan(temporary):
            _fsync(temporary / file)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.rename(target)
        for file in sorted(_scan(target)):
            self._enter(f"{name}/{file}")
        marker.touch()
        return target

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
        for name in list(_scan(self._partial)):
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
        _write_text(self._partial / MANIFEST, text)
        for name in (_JOURNAL, _PROGRESS):
            (self._partial / name).unlink(missing_ok=True)
        _remove_empty_folders(self._partial)
        self._partial.rename(self._final)
        _fsync(self._home)
        _point_latest(self._home, self._final.name)
        self._artifact = Artifact.load(self._final)
        return self._artifact

    # -- inside ------------------------------------------------------------------------------------------------

    def _enter(self, name: str) -> None:
        path = self._partial / name
        entry = {"sha256": file_sha256(path), "size": path.stat().st_size}
        self._files[name] = entry
        self._journal({"name": name, **entry})

    def _journal(self, row: Mapping[str, Any]) -> None:
        with (self._partial / _JOURNAL).open("ab") as stream:
            stream.write(canonical_json(row).encode() + b"\n")

    def _read_journal(self) -> dict[str, dict[str, Any]]:
        files: dict[str, dict[str, Any]] = {}
        for row in _read_journal_rows(self._partial / _JOURNAL):
            name = row.pop("name")
            if row.get("removed"):
                files.pop(name, None)
            else:
                files[name] = row
        return files

    def _seconds(self) -> float:
        return self._elapsed + time.monotonic() - self._started

    def _save_progress(self) -> None:
        _write_text(self._partial / _PROGRESS, json.dumps({"seconds": self._seconds(), "files": len(self._files)}))


@dataclasses.dataclass(frozen=True)
class Workspace:
    """The folder all results live under.

    Attributes:
        root: ``runs`` by default.
        run: Name of the run: a folder below ``root``.
        tell: Called with a sentence for whoever waits: another process holds the wanted folder, features are reused.
        features: Where features are kept and looked for, and what is shared of an unfinished stage, when not here (the
            first process's, under ``torchrun``).
    """

    root: Path = Path("runs")
    run: str = "default"
    tell: Callable[[str], None] | None = None
    features: Workspace | None = None

    def __post_init__(self) -> None:
        if not self.run or self.run in {".", ".."} or "/" in self.run or "\\" in self.run or self.run.startswith("."):
            raise UsageError(f"run name {self.run!r} is not a plain folder name", hint="Use letters, digits, - and _.")

    def folder(self, stage: str) -> Path:
        """Where a stage's artifacts lie."""
        return self.root / self.run / stage

    def open(self, key: StageKey, *, shared: bool = False) -> Slot:
        """The slot for a key, to be used as a context manager (it holds the lock).

        Args:
            key: What to make.
            shared: Any number of processes may hold the slot together, each saving other checkpoints. One that opens
                it alone, to merge and commit them, waits until they have gone.
        """
        return Slot(self, key, tell=self.tell, shared=shared)

    def find(self, key: StageKey, *, any_run: bool = False) -> Artifact | None:
        """The complete artifact of a key, if there is one; with ``any_run`` also in the other runs of ``root``."""
        name = Path(key.stage) / key.digest[:12]
        paths = [self.folder(key.stage) / key.digest[:12], *(sorted(self.root.glob(f"*/{name}")) if any_run else ())]
        return next((Artifact.load(path) for path in paths if (path / MANIFEST).is_file()), None)

    def is_partial(self, key: StageKey) -> bool:
        """Whether an interrupted attempt at the key is there to resume."""
        return (self.folder(key.stage) / f"{key.digest[:12]}.partial").is_dir()

    def latest(self, stage: str, *, any_version: bool = False) -> Artifact | None:
        """The artifact a stage completed or reused last; see :meth:`Artifact.load`."""
        path = self.folder(stage) / "latest"
        return Artifact.load(path, any_version=any_version) if (path / MANIFEST).is_file() else None

    def artifacts(self) -> list[Artifact]:
        """Every complete artifact of the run, of whatever version, by stage and time."""
        found = [
            Artifact.load(path, any_version=True)
            for stage in STAGES
            for path in sorted(self.folder(stage).glob("*"))
            if path.name != "latest" and not path.name.endswith(".partial") and (path / MANIFEST).is_file()
        ]
        return sorted(found, key=lambda each: (STAGES.index(each.stage), each.manifest["created"]))

    def garbage(self) -> list[Path]:
        """Folders of the run that nothing needs and no living process writes: unfinished ones, and complete ones that
        neither ``latest`` (of a command) nor an input of something kept refers to, and that nothing kept has read, in
        this run or another of the same root."""
        return list(self._garbage())

    def collect_garbage(self) -> list[Path]:
        """Delete :meth:`garbage`.

        Returns:
            The folders deleted.
        """
        removed = []
        for path in self._garbage():
            shutil.rmtree(path)
            removed.append(path)
        return removed

    def _garbage(self) -> Iterator[Path]:
        """Each folder of :meth:`garbage`, with its lock held while the caller looks at it."""
        runs = [Workspace(self.root, path.name) for path in sorted(self.root.glob("[!.]*")) if path.is_dir()]
        artifacts = {artifact.digest: artifact for run in runs for artifact in run.artifacts()}
        wanted = [
            latest.digest for run in runs for stage in COMMANDS if (latest := run.latest(stage, any_version=True))
        ]
        kept: set[str] = set()
        while wanted:
            digest = wanted.pop()
            if digest in artifacts and digest not in kept:
                kept.add(digest)
                wanted += artifacts[digest].manifest["key"]["inputs"].values()
                wanted += artifacts[digest].manifest.get("read", ())
        unfinished = [path for stage in STAGES for path in sorted(self.folder(stage).glob("*.partial"))]
        for path in unfinished + [artifact.path for artifact in self.artifacts() if artifact.digest not in kept]:
            lock = _Lock(self.root / self.run / ".locks" / f"{path.parent.name}-{path.name[:12]}", None)
            if lock.try_acquire():
                try:
                    yield path
                finally:
                    lock.release()


@functools.lru_cache(maxsize=1)
def package_versions() -> dict[str, str]:
    """Installed versions of the packages that can move a number."""
    from importlib import metadata

    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


class _Lock:
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


_DISK_FULL = (28, 122)  # ENOSPC, EDQUOT


def _relative(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    escapes = not name or path.is_absolute() or ".." in path.parts
    assert not escapes, f"{name!r} leaves its folder"
    return path


def _safe(name: str) -> str:
    return name.replace("/", "+")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_atomic(path: Path, writer: Callable[[Path], object]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        writer(temporary)
        _fsync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _write(path: Path, writer: Callable[[Path], object]) -> None:
    try:
        _write_atomic(path, writer)
    except OSError as error:
        _explain_full_disk(error, path)
        raise


def _explain_full_disk(error: OSError, path: Path) -> None:
    if error.errno in _DISK_FULL:
        hint = "Free some space and run the same command again: finished files are kept."
        raise SetupError(f"the disk is full: could not write {path}", hint=hint) from error


def _write_text(path: Path, text: str) -> None:
    _write_atomic(path, lambda temporary: temporary.write_bytes(text.encode()))


def _append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("ab") as stream:
        stream.write("".join(canonical_json(row) + "\n" for row in rows).encode())
        stream.flush()
        os.fsync(stream.fileno())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _read_journal_rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) != len(content):
        os.truncate(path, len(whole))
    return [json.loads(line) for line in whole.splitlines() if line]


def _point_latest(home: Path, name: str) -> None:
    temporary = home / f".latest.{os.getpid()}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(name)
    temporary.replace(home / "latest")


def _remove_empty_folders(folder: Path) -> None:
    for path in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        with contextlib.suppress(OSError):
            path.rmdir()
