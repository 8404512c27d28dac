"""What the rows of an index are, read one at a time from a JSON Lines file that may be large."""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any

import numpy as np

from gmail_cli.errors import InputError


class Rows:
    """The objects of a JSON Lines file by number; the file is mapped, only their places are held in memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as stream:
            size = stream.seek(0, 2)
            self._bytes = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        ends = np.flatnonzero(np.frombuffer(self._bytes, dtype=np.uint8) == ord("\n"))
        self._starts = np.concatenate([[0], ends + 1])

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Row ``row``, counted from 0.

        Raises:
            InputError: The line is no JSON object.
        """
        line = self._bytes[int(self._starts[row]) : int(self._starts[row + 1])]
        try:
            return dict(json.loads(line))
        except (ValueError, TypeError) as error:
            hint = "`gmail artifacts verify` tells which files changed; run `gmail index` again."
            raise InputError(f"{self._path}: line {row + 1} is no JSON object", hint=hint) from error
