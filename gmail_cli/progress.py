"""How far a long computation is, on stderr."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import typer


class Progress:
    """Progress bars on stderr: live on a terminal, a line every ten seconds elsewhere."""

    def __enter__(self) -> Progress:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._console = Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            with contextlib.suppress(Exception):
                self._bars.stop()

    def task(self, description: str) -> Callable[[int, int], None]:
        """A callback (done, total) that moves one bar."""
        import time

        if self._console.is_terminal:
            task = self._bars.add_task(description, total=None)
            return lambda done, total: self._bars.update(task, completed=done, total=total)
        last = time.monotonic()

        def line(done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last >= 10:
                last = time.monotonic()
                typer.echo(f"{description}: {done}/{total}", err=True)

        return line
