"""Folders and files outside the layout, written for others to read: whole or absent."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath

from gmail_cli.artifacts import disk
from gmail_cli.errors import GmailError, SetupError, UsageError

_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "az"}
"""fsspec's names of stores without folders; asked for one, they would make a bucket of a misspelt name."""
EXPORTED = "images.parquet"
"""The last file of an export."""
UNFINISHED = "images.parquet.unfinished"
"""Lies at a URL while an export goes on."""


def export_folder(target: Path, writer: Callable[[Path], object]) -> None:
    """Write a folder of the user's through ``writer(empty temporary folder)``; whole or absent.

    What a process that was killed left beside it is removed.

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
        for left in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
            with _held(left) as mine:
                if mine:
                    shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir(parents=True)
        with _held(temporary):
            writer(temporary)
            for file in disk.scan(temporary):
                disk.fsync(temporary / file)
            if target.exists():
                target.rmdir()
            temporary.rename(target)
    except OSError as error:
        hint = "Name a folder on a disk that has room and can be written."
        raise SetupError(f"cannot write {target}: {error.strerror or error}", hint=hint) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Lock a folder, if nobody has; the kernel frees it when its holder dies."""
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        yield False
    else:
        yield True
    finally:
        os.close(descriptor)


def export_files(target: str, files: Iterable[tuple[str, Callable[[Path], object]]]) -> None:
    """Write files of the user's one after another, the last of which says that all are there.

    A folder appears whole (:func:`export_folder`). At an fsspec URL each file is put where it belongs when it is
    complete, and nothing is renamed there. A file `UNFINISHED` lies there meanwhile: an export that was cut short has
    it, and what it wrote is written anew.

    Args:
        target: A folder that does not exist yet or is empty, or a URL such as ``s3://bucket/folder``.
        files: Name and writer of each, taken one at a time.

    Raises:
        UsageError: The folder holds something; at the URL there is a complete export or something else; a URL without
            its slashes.
        SetupError: It cannot be written.
    """
    if "://" not in target:
        store, _, rest = target.partition(":")
        if rest and store in _OBJECT_STORES:
            raise UsageError(f"{target!r} is no address", hint=f"Write {store}://{rest.lstrip('/')}.")

        def writer(folder: Path) -> None:
            for name, write in files:
                write(folder / name)

        export_folder(Path(target), writer)
        return
    import fsspec

    with _reached(target), tempfile.TemporaryDirectory() as local:
        system, root = fsspec.core.url_to_fs(target)
        unfinished = f"{root}/{UNFINISHED}"
        if system.exists(f"{root}/{EXPORTED}"):
            if system.exists(unfinished):
                system.rm_file(unfinished)
            raise UsageError(f"{target} is there already", hint="Name a new folder.")
        there = system.find(root, maxdepth=1)
        if there and not system.exists(unfinished):
            named = ", ".join(sorted(PurePosixPath(each).name for each in there)[:3])
            raise UsageError(f"{target} holds something else: {named}", hint="Name a new folder.")
        if not _OBJECT_STORES & set([system.protocol] if isinstance(system.protocol, str) else system.protocol):
            system.makedirs(root, exist_ok=True)
        system.pipe_file(unfinished, b"")
        for left in there:  # as many tars may not be written this time
            if left.endswith(".tar"):
                system.rm_file(left)
        for name, write in files:
            path = Path(local, name)
            try:
                write(path)
            except OSError as error:
                hint = "Make room there, or name another folder by TMPDIR."
                raise SetupError(f"cannot write {path}: {error.strerror or error}", hint=hint) from error
            system.put_file(str(path), f"{root}/{name}")
            path.unlink()
        system.rm_file(unfinished)


@contextlib.contextmanager
def _reached(target: str) -> Iterator[None]:
    """Name the address for whatever goes wrong there: each kind of store has errors of its own."""
    try:
        yield
    except GmailError:
        raise
    except (ImportError, ValueError) as error:
        raise SetupError(f"cannot open {target}: {error}", hint="Install the package of its protocol.") from error
    except Exception as error:
        hint = "Check the address and the rights to write there."
        raise SetupError(f"cannot write {target}: {error}", hint=hint) from error
