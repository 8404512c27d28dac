"""Write the reference pages from the code: ``python docs/reference/build.py``. A test holds them up to date."""

from __future__ import annotations

import types
import typing
from pathlib import Path

import typer
from pydantic_core import PydanticUndefined
from typer.testing import CliRunner

from gmail_cli import profile as profiles
from gmail_cli.cli import app
from gmail_cli.profile.generation import Generate, Generator, Rewrite
from gmail_cli.profile.schema import SECTIONS, Profile
from gmail_cli.profile.values import Section

HERE = Path(__file__).parent


def profile_page() -> str:
    """Every profile key with its type, default and docstring."""
    lines = [
        "# Profile reference",
        "",
        "Generated from the field docstrings in `gmail_cli/profile/`; `gmail profile schema` prints the same as JSON",
        "schema. Order of precedence: default < profile file < `--set section.key=value`. `[runtime]` never changes a",
        "result and is left out of digests.",
        "",
        *_section(Profile, "Top level"),
    ]
    for name in SECTIONS:
        section = Profile.model_fields[name].annotation
        assert section is not None
        lines += _section(section, f"`[{name}]`")
        if section is Generate:
            lines += _section(Generator, "`[[generate.mix]]`")
            lines += _section(Rewrite, "`[generate.rewrite]`")
    return "\n".join(lines).rstrip() + "\n"


def _section(section: type[Section], title: str) -> list[str]:
    rows = [
        f"| `{key}` | {_type(field.annotation, field.metadata)} | `{_default(field.default)}` "
        f"| {_cell(field.description)} |"
        for key, field in section.model_fields.items()
        if key not in SECTIONS or section is not Profile
    ]
    head = ["| key | type | default | |", "|---|---|---|---|"]
    return [f"## {title}", "", (section.__doc__ or "").strip().split("\n\n")[0], "", *(head + rows if rows else []), ""]


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


def _default(value: object) -> str:
    if value is None or value is PydanticUndefined or isinstance(value, Section):
        return ""
    return profiles.toml(value)


def _type(annotation: object, metadata: typing.Sequence[object] = ()) -> str:
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        text = " \\| ".join(f"`{choice}`" for choice in typing.get_args(annotation))
    elif origin is typing.Annotated:
        first, *rest = typing.get_args(annotation)
        return _type(first, rest)
    elif origin is tuple:
        text = f"list of {_type(typing.get_args(annotation)[0])}"
    elif origin in (typing.Union, types.UnionType):
        text = " or ".join(_type(part) for part in typing.get_args(annotation) if part is not types.NoneType)
    else:
        text = getattr(annotation, "__name__", str(annotation))
    bounds = [
        f"{sign} {getattr(item, name)}"
        for item in metadata
        for name, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
        if getattr(item, name, None) is not None
    ]
    return f"{text} {', '.join(bounds)}".strip()


def cli_page() -> str:
    """The help of every command."""
    runner = CliRunner()
    command = typer.main.get_command(app)
    names: list[tuple[str, ...]] = [()]
    for name, child in command.commands.items():  # type: ignore[attr-defined]
        names.append((name,))
        names += [(name, inner) for inner in getattr(child, "commands", {})]
    lines = ["# Command reference", "", "Generated from `gmail ... --help`.", ""]
    for path in names:
        shown = runner.invoke(app, [*path, "--help"], prog_name="gmail", terminal_width=100, color=False)
        assert shown.exit_code == 0, shown.output
        lines += [f"## `{' '.join(('gmail', *path))}`", "", "```text", shown.output.strip(), "```", ""]
    return "\n".join(lines).rstrip() + "\n"


PAGES = {"profile.md": profile_page, "cli.md": cli_page}


if __name__ == "__main__":
    for name, page in PAGES.items():
        (HERE / name).write_text(page(), encoding="utf-8")
