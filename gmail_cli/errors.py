"""Errors a user can act on: what is wrong, with which value, what was allowed, and one thing to do.

Exit codes: 0 done, 1 a bug, 2 bad usage or profile, 3 missing or corrupt input, 4 environment,
5 a regression found by ``gmail eval --baseline``, 130 interrupted.
"""

from __future__ import annotations


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
