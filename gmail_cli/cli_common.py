"""What commands share: options, and how they speak."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gmail_cli import shipped

if TYPE_CHECKING:
    from gmail_cli.artifacts import Artifact


def complete_profile(incomplete: str) -> list[str]:
    """Names of shipped profiles that begin so."""
    return [name for name in shipped.profiles() if name.startswith(incomplete)]


ProfileOption = Annotated[
    str | None,
    typer.Option(
        "--profile",
        "-p",
        metavar="NAME|PATH",
        help="Profile; default: $GMAIL_PROFILE, ./gmail.toml, tiny.",
        autocompletion=complete_profile,
    ),
]
ProfileArgument = Annotated[
    str | None,
    typer.Argument(metavar="PROFILE", help="Name or path of a profile.", autocompletion=complete_profile),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="SECTION.KEY=VALUE", help="Override a profile key; may be repeated."),
]
RunOption = Annotated[
    str | None, typer.Option("--run", metavar="NAME", help="Run folder; default: the profile's name.")
]
WorkspaceOption = Annotated[
    Path, typer.Option("--workspace", metavar="FOLDER", help="Where runs are kept.", show_default=True)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a path.")]


def count(value: str | int) -> int:
    """The number of an option that counts something (as typed, or its default)."""
    text = str(value)
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"{text!r} is not a whole number of at least 1; leave it out for the default.")
    return int(text)


def describe(artifact: Artifact) -> dict[str, Any]:
    """An artifact as ``--json`` prints it."""
    return {
        "stage": artifact.stage,
        "path": str(artifact.path),
        "digest": artifact.digest,
        "content": artifact.content,
        "summary": dict(artifact.summary),
    }


def shown(path: Path) -> str:
    """A path as the user would type it here."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def say(message: str) -> None:
    """Tell the user, on stderr."""
    if os.environ.get("RANK", "0") == "0":  # torchrun starts several of us
        typer.echo(message, err=True)


def result(text: str) -> None:
    """The one line of standard output."""
    if os.environ.get("RANK", "0") == "0":
        typer.echo(text)
