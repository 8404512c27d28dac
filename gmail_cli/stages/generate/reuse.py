"""Images that were drawn before: what a larger or smaller set has in common with finished ones is not drawn again.

An image is a function of generator, settings, seed, caption and k, so a set with more or fewer images of each caption,
or with other captions too, holds the very files of the other.
"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gmail_cli.artifacts import Artifact, StageKey, Workspace, file_sha256
from gmail_cli.errors import InputError
from gmail_cli.stages.generate.planning import RECORDS, Planned, Record

if TYPE_CHECKING:
    from jaxtyping import Int64
    from torch import Tensor

_KEY = re.compile(rb'[{,]"key":"([^"]*)"')
"""An image's key in its record; within a caption quotes are escaped."""


@dataclass(frozen=True)
class Found:
    """An image that is there: its record in a finished artifact, whose folder is ``home``."""

    record: Record
    home: Path

    @property
    def file(self) -> Path:
        """The image."""
        return self.home / self.record["path"]

    def is_whole(self) -> bool:
        """Whether the image has the bytes of its record."""
        try:
            return self.file.stat().st_size == self.record["bytes"] and file_sha256(self.file) == self.record["sha256"]
        except OSError:
            return False


class Earlier:
    """Finished artifacts that hold images of a set, and where in them.

    Args:
        places: What :func:`look` returned; it may be kept, and read again at once.
    """

    def __init__(self, places: Mapping[str, Int64[Tensor, "2 images"]]) -> None:
        self._places = {Path(home): table.numpy() for home, table in places.items()}

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self._places)

    @property
    def homes(self) -> list[Path]:
        """Folders of the artifacts."""
        return list(self._places)

    def find(self, planned: Iterable[Planned]) -> dict[int, Found]:
        """Place -> image, of those of a plan that are there; whether they are whole is not looked at."""
        found: dict[int, Found] = {}
        wanted = [(place, each, _hash(each.key.encode())) for place, each in enumerate(planned)]
        for home, table in self._places.items():
            try:
                stream = (home / RECORDS).open("rb")
            except OSError:  # deleted meanwhile
                continue
            with stream:
                for place, each, hashed in wanted:
                    row = int(table[0].searchsorted(hashed))
                    if place in found or row == table.shape[1] or table[0, row] != hashed:
                        continue
                    stream.seek(int(table[1, row]))
                    try:
                        record = json.loads(stream.readline())
                    except ValueError:  # made anew meanwhile
                        continue
                    inside = record["path"].startswith("images/") and ".." not in record["path"]
                    if inside and all(record[name] == getattr(each, name) for name in _SAME):
                        found[place] = Found(record, home)
        return found


_SAME = ("key", "caption_id", "caption", "owner", "label", "k")


def look(workspace: Workspace, key: StageKey, *, device: str) -> dict[str, Int64[Tensor, "2 images"]]:
    """The finished artifacts of every run whose images were drawn as those of a key are, for :class:`Earlier`.

    Args:
        workspace: With the runs.
        key: Of the set that is to be drawn.
        device: ``cpu`` or ``cuda``: bytes are those of one kind of device.

    Returns:
        Folder of an artifact -> int64 tensor [2, images]: hashes of its images' keys, ascending, and where in its
        records each begins.
    """
    wanted = _alike(key.to_json())
    places = {}
    for path in workspace.root.glob("*/generate/*"):
        if path.name == "latest" or not (path / RECORDS).is_file():
            continue
        try:
            made = Artifact.load(path, any_version=True).manifest  # one at a time: it lists every image
        except InputError:
            continue
        if _alike(made["key"]) == wanted and str(made["device"]).split(":")[0] == device:
            places[str(path.resolve())] = _places(path / RECORDS)
    return places


def _places(records: Path) -> Int64[Tensor, "2 images"]:
    import torch

    hashes, starts, at = array("q"), array("q"), 0
    with records.open("rb") as stream:
        for line in stream:
            named = _KEY.search(line)
            if named:
                hashes.append(_hash(named[1]))
                starts.append(at)
            at += len(line)
    table = torch.stack([torch.frombuffer(each, dtype=torch.int64) for each in (hashes, starts)])
    return table[:, table[0].argsort()].contiguous()


def _alike(key: Mapping[str, Any]) -> Record:
    """A key without what says which captions are drawn, and how often."""
    settings = {name: value for name, value in key["settings"].items() if name != "per_caption"}
    inputs = {name: value for name, value in key["inputs"].items() if name != "captions"}
    return {**key, "settings": settings, "inputs": inputs}


def _hash(key: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big", signed=True)
