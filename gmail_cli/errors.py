"""Errors a user can act on: what is wrong, with which value, what was allowed, and one thing to do.

Exit codes: 0 done, 1 a bug, 2 bad usage or profile, 3 missing or corrupt input, 4 environment,
5 a regression found by ``gmail eval --baseline``, 130 interrupted.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator


class GmailError(Exception):
    """An error to show to the user without a traceback.

    Args:
        message: What is wrong, naming the key, file or artifact and its value.
        hint: One thing to do about it; may be empty.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class UsageError(GmailError):
    """A flag, profile key or combination of them that cannot work (exit 2)."""

    exit_code = 2


class InputError(GmailError):
    """A file, record or artifact that is missing, corrupt or does not fit the others (exit 3)."""

    exit_code = 3


class SetupError(GmailError):
    """A package, device, disk or hub that this machine lacks (exit 4)."""

    exit_code = 4


class RegressionError(GmailError):
    """A metric that fell below its baseline by more than its tolerance (exit 5)."""

    exit_code = 5


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it came from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def import_failure(error: BaseException) -> SetupError | None:
    """What to tell of an error that began in the import of a library, whatever was made of it on the way.

    Returns:
        None where it did not, or where the module is our own: that is a bug.
    """
    chain = list(causes(error))
    frames = [frame for each in chain for frame, _ in traceback.walk_tb(each.__traceback__)]
    running = [str(frame.f_globals.get("__name__")) for frame in frames if frame.f_code.co_name == "<module>"]
    root = chain[-1]
    missing = str(root.name) if isinstance(root, ImportError) and root.name else ""
    name = missing if isinstance(root, ModuleNotFoundError) else ([missing or "__main__", *running][-1])
    if {"__main__", "gmail_cli"} & {each.split(".")[0] for each in (name, missing)}:
        return None
    said = ": ".join(filter(None, (type(root).__name__, str(root).strip().partition("\n")[0])))
    hint = "Let the process take more memory (see `ulimit -v`), or install that package again."
    if isinstance(root, ModuleNotFoundError):
        hint = "Install the package that it is part of."
    return SetupError(f"{name} cannot be imported: {said}", hint=hint)
