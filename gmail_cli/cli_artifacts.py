"""``gmail artifacts``: list, show, export, verify and delete artifacts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gmail_cli.cli_common import (
    JsonOption,
    ProfileOption,
    RunOption,
    SetOption,
    WorkspaceOption,
    count,
    describe,
    say,
    shown,
)
from gmail_cli.errors import InputError, UsageError
from gmail_cli.progress import Progress

if TYPE_CHECKING:
    from gmail_cli.artifacts import Workspace

app = typer.Typer(help="List, show, verify and clean up artifacts.", no_args_is_help=True, rich_markup_mode=None)


@app.command(name="list")
def artifacts_list(
    run: RunOption = None, workspace: WorkspaceOption = Path("runs"), as_json: JsonOption = False
) -> None:
    """List complete artifacts of one run, or of all."""
    found = [(space.run, artifact) for space in _workspaces(workspace, run) for artifact in space.artifacts()]
    if as_json:
        typer.echo(json.dumps([{"run": name, **describe(artifact)} for name, artifact in found]))
        return
    for name, artifact in found:
        seconds, made = artifact.manifest["seconds"], artifact.manifest["created"]
        typer.echo(f"{name}\t{artifact.stage}\t{artifact.digest[:12]}\t{made}\t{seconds:.1f} s\t{shown(artifact.path)}")


@app.command(name="show")
def artifacts_show(path: Annotated[Path, typer.Argument(metavar="ARTIFACT")]) -> None:
    """Print an artifact's manifest."""
    from gmail_cli.artifacts import Artifact

    typer.echo(json.dumps(Artifact.load(path, any_version=True).manifest, indent=1, ensure_ascii=False))


@app.command(name="export")
def artifacts_export(
    path: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Generate or embed artifact.")],
    folder: Annotated[
        str, typer.Argument(metavar="FOLDER", help="New or empty folder; for images also a URL such as s3://bucket/a.")
    ],
    shard_images: Annotated[int, typer.Option(parser=count, metavar="N", help="Images in one tar.")] = 10_000,
) -> None:
    """Write images as WebDataset tars and a Parquet table, or embeddings in clip-retrieval's folder layout."""
    from gmail_cli.artifacts import Artifact
    from gmail_cli.stages import embed
    from gmail_cli.stages.generate import exporting

    artifact = Artifact.load(path)
    if artifact.stage == "generate":
        with Progress() as progress:
            exporting.export(artifact, folder, shard_images=shard_images, progress=progress.task("export"))
        typer.echo(folder)
        return
    left_out = embed.export(artifact, Path(folder))
    if left_out:
        say(f"{left_out} captions left out: the layout has one text per image, the first")
    typer.echo(shown(Path(folder)))


@app.command(name="verify")
def artifacts_verify(
    paths: Annotated[list[Path] | None, typer.Argument(metavar="ARTIFACT")] = None,
    regenerate: Annotated[
        int | None,
        typer.Option(parser=count, metavar="N", help="Also draw N random images of a generate artifact again."),
    ] = None,
    profile: ProfileOption = None,
    overrides: SetOption = None,
    run: RunOption = None,
    workspace: WorkspaceOption = Path("runs"),
) -> None:
    """Check every byte against the manifests (all artifacts of the run, or of all runs, when none is named).

    --regenerate draws as the artifact says; where its pipeline moved, say --set generate.model=FOLDER.
    """
    from gmail_cli.artifacts import Artifact

    found = [Artifact.load(path, any_version=True) for path in paths] if paths else []
    if not paths:
        found = [artifact for space in _workspaces(workspace, run) for artifact in space.artifacts()]
    problems = [(artifact, problem) for artifact in found for problem in artifact.verify()]
    if regenerate is not None:
        from gmail_cli import profile as profiles
        from gmail_cli.stages.generate import checking

        drawn = [each for each in found if each.stage == "generate"]
        if not drawn:
            raise UsageError(
                "--regenerate: there is no generate artifact", hint="Name one, such as runs/tiny/generate/latest."
            )
        chosen = profiles.load(profile, overrides=overrides or [])
        with Progress() as progress:
            for artifact in drawn:
                found_now = checking.regenerate(
                    chosen, artifact, count=regenerate, progress=progress.task("regenerate")
                )
                problems += [(artifact, problem) for problem in found_now]
    for artifact, problem in problems:
        typer.echo(f"{shown(artifact.path)}: {problem}")
    if problems:
        hint = "Delete the damaged folder and run its stage again."
        raise InputError(f"{len(problems)} problem(s) in {len({a.path for a, _ in problems})} artifact(s)", hint=hint)
    again = f"; {regenerate} image(s) drawn again, equal" if regenerate else ""
    say(f"{len(found)} artifact(s), every byte as written{again}")


@app.command(name="gc")
def artifacts_gc(
    run: RunOption = None,
    workspace: WorkspaceOption = Path("runs"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would go.")] = False,
) -> None:
    """Delete interrupted folders and artifacts that no stage's latest artifact needs."""
    found = [
        path
        for space in _workspaces(workspace, run)
        for path in (space.garbage() if dry_run else space.collect_garbage())
    ]
    for path in found:
        typer.echo(shown(path))
    say(f"{len(found)} folder(s) {'would be deleted' if dry_run else 'deleted'}")


def _workspaces(root: Path, run: str | None) -> Iterator[Workspace]:
    from gmail_cli.artifacts import Workspace

    if run is not None:
        if not (root / run).is_dir():
            there = ", ".join(sorted(path.name for path in root.glob("*") if path.is_dir())) or "none"
            raise InputError(f"no run {run!r} in {root}", hint=f"Runs there: {there}.")
        yield Workspace(root, run)
        return
    if not root.is_dir():
        raise InputError(f"no folder {root}", hint="Give the folder of runs with --workspace.")
    for path in sorted(root.iterdir()):
        if path.is_dir() and not path.name.startswith("."):
            yield Workspace(root, path.name)
