"""Files of object stores and other fsspec file systems, with the few methods of ``Path`` that reading needs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Concatenate, ParamSpec, TypeAlias, TypeVar

from gmail_cli.errors import GmailError, InputError, SetupError

_Result = TypeVar("_Result")
_Given = ParamSpec("_Given")


def _reached(
    method: Callable[Concatenate[Remote, _Given], _Result],
) -> Callable[Concatenate[Remote, _Given], _Result]:
    """Name the address for what goes wrong there: stores have errors of their own beside those of files."""

    @functools.wraps(method)
    def called(self: Remote, /, *given: _Given.args, **named: _Given.kwargs) -> _Result:
        try:
            return method(self, *given, **named)
        except (GmailError, OSError):
            raise
        except Exception as error:
            hint = "Check the address, the network and what you are allowed to read there."
            raise SetupError(f"cannot read {self.url}: {error}", hint=hint) from error

    return called


@functools.total_ordering
@dataclass(frozen=True, slots=True)
class Remote:
    """A file or folder named by an fsspec URL, such as ``s3://bucket/folder`` or ``memory://file``."""

    url: str

    @property
    def _where(self) -> tuple[Any, str]:
        """The file system (fsspec keeps one of each kind) and the path in it."""
        import fsspec

        try:
            system, path = fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            raise SetupError(f"{self.url} needs a package: {error}", hint="Install it with pip.") from error
        except ValueError as error:
            hint = "Known are: " + ", ".join(sorted(fsspec.available_protocols())) + "."
            raise InputError(f"cannot open {self.url}: {error}", hint=hint) from error
        return system, path

    @property
    def _parts(self) -> PurePosixPath:
        return PurePosixPath(self.url.partition("://")[2])

    def __str__(self) -> str:
        return self.url

    def __lt__(self, other: Remote) -> bool:
        return self._parts < other._parts

    def __truediv__(self, name: str | PurePosixPath) -> Remote:
        return Remote(f"{self.url.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        """The last part."""
        return self._parts.name

    @property
    def stem(self) -> str:
        """The last part without its suffix."""
        return self._parts.stem

    @property
    def suffix(self) -> str:
        """The suffix, with its dot."""
        return self._parts.suffix

    @property
    def parent(self) -> Remote:
        """The folder it is in."""
        return Remote(self.url.rstrip("/").rpartition("/")[0])

    def relative_to(self, folder: Remote) -> PurePosixPath:
        """The path below ``folder``."""
        return PurePosixPath(self._where[1]).relative_to(folder._where[1])

    @_reached
    def exists(self) -> bool:
        """Whether there is such a file or folder."""
        system, path = self._where
        return bool(system.exists(path))

    @_reached
    def is_file(self) -> bool:
        """Whether it is a file."""
        system, path = self._where
        return bool(system.isfile(path))

    @_reached
    def is_dir(self) -> bool:
        """Whether it is a folder."""
        system, path = self._where
        return bool(system.isdir(path))

    @_reached
    def open(self, mode: str = "rb") -> Any:
        """A stream of its bytes."""
        system, path = self._where
        return system.open(path, mode)

    @_reached
    def read_bytes(self) -> bytes:
        """Its bytes."""
        system, path = self._where
        return bytes(system.cat_file(path))

    @_reached
    def read_range(self, start: int, stop: int) -> bytes:
        """Some of its bytes."""
        system, path = self._where
        return bytes(system.cat_file(path, start=start, end=stop))

    def read_text(self, encoding: str) -> str:
        """Its text."""
        return self.read_bytes().decode(encoding)

    @_reached
    def glob(self) -> list[Remote]:
        """The files and folders that it names as a pattern."""
        system, path = self._where
        return [Remote(system.unstrip_protocol(each)) for each in system.glob(path)]

    @_reached
    def children(self, suffix: str) -> list[Remote]:
        """What lies in the folder and ends in ``suffix``."""
        system, path = self._where
        found = system.ls(path, detail=False)
        return [Remote(system.unstrip_protocol(each)) for each in found if each.endswith(suffix)]

    @_reached
    def files(self) -> list[Remote]:
        """Every file below."""
        system, path = self._where
        return [Remote(system.unstrip_protocol(each)) for each in system.find(path)]


Location: TypeAlias = Path | Remote


def locate(name: str | Path) -> Location:
    """What a path or an fsspec URL names."""
    text = str(name)
    return Remote(text) if "://" in text else Path(text).expanduser()
