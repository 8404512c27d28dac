"""``gmail profile``: list, show, check and describe profiles."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from gmail_cli import shipped
from gmail_cli.cli_common import JsonOption, ProfileArgument, SetOption, complete_profile

app = typer.Typer(help="List, show, check and describe profiles.", no_args_is_help=True, rich_markup_mode=None)


@app.command(name="list")
def profile_list(as_json: JsonOption = False) -> None:
    """List shipped profiles."""
    from gmail_cli import profile as profiles

    rows = [{"name": name, "summary": profiles.load(path).summary} for name, path in shipped.profiles().items()]
    if as_json:
        typer.echo(json.dumps(rows))
        return
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        typer.echo(f"{row['name']:{width}}  {row['summary']}")


@app.command(name="show")
def profile_show(
    profile: ProfileArgument = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print the resolved profile as TOML; loading that text gives an equal profile."""
    from gmail_cli import profile as profiles

    loaded = profiles.load(profile, overrides=set_ or [], named_by="PROFILE")
    typer.echo(loaded.model_dump_json() if as_json else profiles.dump(loaded), nl=as_json)


@app.command(name="check")
def profile_check(
    profile: Annotated[
        list[str], typer.Argument(metavar="PROFILE", help="Names or paths.", autocompletion=complete_profile)
    ],
) -> None:
    """Check profiles: keys, types, ranges."""
    from gmail_cli import profile as profiles

    for ref in profile:
        loaded = profiles.load(ref, named_by="PROFILE")
        typer.echo(f"{ref}: ok ({', '.join(loaded.stages)})")


@app.command(name="schema")
def profile_schema() -> None:
    """Print the JSON schema of profiles, for editors."""
    from gmail_cli import profile as profiles

    typer.echo(json.dumps(profiles.schema(), indent=1))
