"""Where the encoded bytes of an image lie: a file, a tar member, a Parquet row or the renderer of scenes.

A source costs a few words of memory; its bytes are read when asked for, from any thread.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import PurePosixPath, PureWindowsPath
from typing import Protocol, TypeVar, cast, runtime_checkable

from gmail_cli.components.captions.remote import Location, Remote
from gmail_cli.errors import InputError

_Folder = TypeVar("_Folder", bound=Location)
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


class Encoded(bytes):
    """The bytes of an encoded image that know where they lie.

    Attributes:
        origin: The file, the member of a tar or the row of a table, for messages.
    """

    origin: str

    def __new__(cls, data: bytes, *, origin: str) -> Encoded:
        made = super().__new__(cls, data)
        made.origin = origin
        return made


@runtime_checkable
class ImageSource(Protocol):
    """The bytes of one image."""

    def read(self) -> bytes:
        """Return the encoded image; InputError when it cannot be read."""
        ...

    def identity(self) -> str:
        """Return a SHA-256 hex digest that two sources share only when their images are the same."""
        ...


def inside(folder: _Folder, name: str) -> _Folder:
    """Join ``name``, found in a caption file, tar or JSON, to the folder it must stay in.

    Raises:
        InputError: ``name`` is empty, absolute, holds ``..`` or a NUL, or is a Windows path.
    """
    relative = PurePosixPath(name)
    if (
        not name
        or "\0" in name
        or "\\" in name
        or relative.is_absolute()
        or ".." in relative.parts
        or not relative.parts
        or PureWindowsPath(name).drive
    ):
        raise InputError(
            f"the path {name!r} leaves the folder {folder}",
            hint="Use paths relative to the folder, with forward slashes and without '..'.",
        )
    return cast("_Folder", folder / relative)


@dataclass(frozen=True, slots=True)
class FileBytes:
    """An image file of its own."""

    path: Location

    def read(self) -> bytes:
        try:
            return Encoded(self.path.read_bytes(), origin=str(self.path))
        except OSError as error:
            raise InputError(f"cannot read the image {self.path}: {error.strerror or error}") from error

    def identity(self) -> str:
        return hashlib.sha256(self.read()).hexdigest()


@dataclass(frozen=True, slots=True)
class TarBytes:
    """A member of an uncompressed tar, read in place."""

    path: Location
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        try:
            if isinstance(self.path, Remote):
                data = self.path.read_range(self.offset, self.offset + self.size)
            else:
                with self.path.open("rb") as file:
                    file.seek(self.offset)
                    data = file.read(self.size)
        except OSError as error:
            raise InputError(f"cannot read {self.name} in {self.path}: {error.strerror or error}") from error
        if len(data) != self.size:
            raise InputError(f"{self.path} ends inside {self.name}", hint="Copy or download the tar again.")
        return Encoded(data, origin=f"{self.name} in {self.path}")

    def identity(self) -> str:
        return hashlib.sha256(self.read()).hexdigest()


@dataclass(frozen=True, slots=True)
class SceneBytes:
    """A scene of the built-in world, rendered when read."""

    split: str
    index: int
    seed: int
    size: int

    def read(self) -> bytes:
        from gmail_cli.components import scenes

        return scenes.scene_bytes(self.split, self.index, seed=self.seed, size=self.size)

    def identity(self) -> str:
        key = f"scene/{_renderer()}/{self.split}/{self.index}/{self.seed}/{self.size}"
        return hashlib.sha256(key.encode()).hexdigest()


@cache
def _renderer() -> str:
    """SHA-256 of a few scenes: what tells one version of the renderer from another, without rendering them all."""
    from gmail_cli.components import scenes

    return hashlib.sha256(b"".join(scenes.scene_bytes("train", index) for index in range(4))).hexdigest()
