"""How the commands of the stages run one, several or all of them, and what they print of it.

A :class:`Context` holds what those commands are given, and loads their profile.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from gmail_cli import shipped
from gmail_cli.cli_common import describe, result, say, shown
from gmail_cli.errors import InputError, UsageError
from gmail_cli.progress import Progress

if TYPE_CHECKING:
    from gmail_cli.artifacts import Artifact, Workspace
    from gmail_cli.profile.schema import Profile


OPTIONS: Mapping[str, str] = {
    "data.train": "--captions",
    "data.train_images": "--images",
    "data.test": "--captions",
    "data.test_images": "--images",
    "data.test_limit": "--limit",
    "data.on_bad": "--on-bad",
    "generate.per_caption": "--per-caption",
    "generate.limit": "--limit",
    "generate.source": "--import",
    "generate.import_path": "--import",
    "generate.min_clip_score": "--min-clip-score",
    "generate.keep_best": "--keep-best",
    "train.tasks": "--task",
    "train.arms": "--arm",
    "embed.flow": "--flow",
}
"""What sets a key of the profile beside ``--set``, for messages."""


class Context:
    """The options every stage shares."""

    def __init__(
        self,
        profile: str | None,
        overrides: list[str] | None,
        run: str | None,
        workspace: Path,
        as_json: bool,
        dry_run: bool,
        flags: Mapping[str, Any],
        *,
        named_by: str = "--profile",
    ) -> None:
        from gmail_cli import profile as profiles

        self.ref = profile
        self.named_by = named_by
        whole: dict[str, Any] = {}
        for part in ("train", "test"):
            if flags.get(f"data.{part}") is not None:  # another set: the profile's limits were not meant for it
                whole |= {f"data.{part}_split": "", "data.holdout": 0.0, "data.protocol": ""}
                if not flags[f"data.{part}"].startswith("scenes:"):
                    whole |= {f"data.{part}_limit": 0, "generate.captions_per_image": 0}
        flags = {**whole, **{key: value for key, value in flags.items() if value is not None}}
        self.options = {key: OPTIONS.get(key, "") for key in flags}
        self.overrides = [f"{key}={profiles.toml(value)}" for key, value in flags.items()]
        self.overrides += overrides or []
        self.flags = dict(flags)
        self.run = run
        self.root = workspace
        self.as_json = as_json
        self.dry_run = dry_run

    def load(self) -> tuple[Profile, Workspace]:
        """The profile with its overrides, and the workspace of the run."""
        from gmail_cli import profile as profiles
        from gmail_cli.artifacts import Workspace

        path = profiles.locate(self.ref, named_by=self.named_by)
        loaded = profiles.load(path, overrides=self.overrides, options=self.options)
        fallen_back = self.ref is None and path == shipped.profiles().get(profiles.DEFAULT_PROFILE)
        if fallen_back and loaded.generate.model == "tiny":
            say(
                "profile tiny: it draws only its own small world of scenes; for photographs use "
                "--profile coco-sd21-vitb16"
            )
        if loaded.runtime.threads:
            os.environ["OMP_NUM_THREADS"] = str(loaded.runtime.threads)
        return loaded, Workspace(self.root, self.run or loaded.name, tell=say)

    def print_plan(self, steps: list[Any], **more: Any) -> None:
        """Print what is complete and what would run; ``more`` goes into the JSON object."""
        if self.as_json:
            rows = [
                {
                    "stage": step.stage,
                    "state": step.state,
                    "digest": step.key.digest,
                    "path": str(step.path) if step.path else None,
                    "changed": list(step.changed),
                    "features": [{"digest": each.key.digest, "there": there} for each, there in step.features],
                    "cells": [{"name": name, "reused": str(path) if path else None} for name, path in step.cells],
                }
                for step in steps
            ]
            typer.echo(json.dumps({"plan": rows, **more}))
            return
        words = {"complete": "complete, reused", "resume": "interrupted, resumes", "run": "would run"}
        for step in steps:
            typer.echo(f"{step.stage:9} {step.key.digest[:12]}  {words[step.state]}")
            for change in step.changed:
                typer.echo(f"          changed {change}")
            for each, there in step.features:
                typer.echo(f"          {'reuses' if there else 'computes'} {each}")
            for name, path in step.cells:
                typer.echo(f"          reuses {name} of train/{path.name}" if path else f"          trains {name}")


def _inputs(
    name: str, context: Context, profile: Profile, space: Workspace, inputs: Mapping[str, Path | None]
) -> dict[str, Artifact]:
    from gmail_cli import plan
    from gmail_cli.artifacts import Artifact

    given = {key: Artifact.load(path) for key, path in inputs.items() if path is not None}
    named = name == "embed" and not given and context.flags.get("data.test") is not None
    alone = named and profile.embed.flow == "real"  # f_g is the run's latest
    return plan.find_inputs(name, space, given=given, optional_only=alone)


def estimate(context: Context, batches: int) -> None:
    """What generating would make and cost."""
    from gmail_cli import plan
    from gmail_cli.stages.generate import checking

    profile, space = context.load()
    steps = plan.steps(profile, space, stages=["generate"])
    told = checking.estimate(profile, space, batches=batches)
    context.print_plan(steps, estimate=told)
    if context.as_json:
        return
    prompts = f", {told['prompts']:,} prompts to write" if "prompts" in told else ""
    there = f", {told['reused']:,} of them there already" if told["reused"] else ""
    typer.echo(f"          {told['images']:,} images of {told['captions']:,} captions{there}{prompts}")
    if batches and prompts:
        typer.echo(f"          {told['seconds_per_prompt']:.3g} s a prompt")
    if batches:
        typer.echo(
            f"          {told['seconds_per_image']:.3g} s an image, {told['seconds'] / 3600:.3g} h in all here; "
            f"{told['bytes_per_image'] / 1e3:.3g} kB an image, {told['bytes'] / 1e9:.3g} GB in all"
        )
    for name, size in told.get("batch_size", {}).items():
        table = f"batch_size = {size} for {name!r} in generate.mix" if profile.generate.mix else ""
        typer.echo(f"          the batch does not fit the memory; use {table or f'--set generate.batch_size={size}'}")


def _run_part(
    name: str, context: Context, part: tuple[int, int], profile: Profile, space: Workspace, found: dict[str, Artifact]
) -> Artifact | None:
    """One process of a job array."""
    from gmail_cli import plan
    from gmail_cli.artifacts import Waiting

    with Progress() as progress:
        made = plan.module(name).run_part(profile, space, part=part, progress=progress.task(name), **found)
    if not isinstance(made, Waiting):
        artifact: Artifact = made
        _announce(artifact, reused=False)
        typer.echo(json.dumps(describe(artifact)) if context.as_json else shown(artifact.path))
        return artifact
    say(f"{name}: part {part[0]} of {part[1]} done; {made.done} of {made.shards} shards are there")
    if context.as_json:
        about = {"stage": name, "path": None, "digest": made.key.digest, "done": made.done, "shards": made.shards}
        typer.echo(json.dumps(about))
    return None


def run_together(context: Context, processes: int, shard: str | None) -> None:
    """`gmail generate` as several processes, each with a part of the images (or of the part that ``shard`` names)."""
    from gmail_cli.processes import together

    context.load()  # what is wrong with the profile is said once
    number, parts = _part(shard or "1/1")
    words = _without(sys.argv[1:], "--processes", "--shard")
    each = [
        [*words, "--shard", f"{(number - 1) * processes + own}/{parts * processes}"] for own in range(1, processes + 1)
    ]
    with Progress() as progress:
        together(each, tell=say, progress=progress.task("generate"))
    run_stage("generate", context, part=shard)


def _without(words: list[str], *options: str) -> list[str]:
    """Arguments without some options and their values."""
    kept: list[str] = []
    after = False
    for word in words:
        if not after and not word.startswith(tuple(f"{option}=" for option in options)) and word not in options:
            kept.append(word)
        after = word in options
    return kept


def _part(text: str) -> tuple[int, int]:
    number, slash, parts = text.partition("/")
    if not (slash and number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise UsageError(f"--shard {text!r} is not I/N", hint="Count from 1: --shard 1/4 to --shard 4/4.")
    return int(number), int(parts)


def run_stage(name: str, context: Context, *, part: str | None = None, **inputs: Path | None) -> Artifact | None:
    """Run one stage, or one part (I/N) of it; None where there is no artifact yet, or only the plan is printed."""
    from gmail_cli import plan

    shard = None if part is None else _part(part)
    profile, space = context.load()
    found = _inputs(name, context, profile, space, inputs)
    if context.dry_run:
        context.print_plan(plan.steps(profile, space, stages=[name], given=found))
        return None
    if shard is not None:
        return _run_part(name, context, shard, profile, space, found)
    with Progress() as progress, _trackers(profile, space) as track:
        made = plan.execute(
            profile, space, stages=[name], progress=progress.task, given=found, on_done=_announce, track=track
        )
    artifact = made[name]
    result(json.dumps(describe(artifact)) if context.as_json else shown(artifact.path))
    return artifact


def run_all(context: Context) -> None:
    """Run the profile's stages, or print their plan."""
    from gmail_cli import plan

    profile, space = context.load()
    if context.dry_run:
        context.print_plan(plan.steps(profile, space, stages=profile.stages))
        return
    with Progress() as progress, _trackers(profile, space) as track:
        made = plan.execute(
            profile, space, stages=profile.stages, progress=progress.task, on_done=_announce, track=track
        )
    if context.as_json:
        result(json.dumps({stage: describe(artifact) for stage, artifact in made.items()}, indent=1))
        return
    last = made[profile.stages[-1]]
    report = last.path / "report.html"
    if report.is_file():
        say(f"report: {shown(report)}")
    result(shown(last.path))


@contextlib.contextmanager
def _trackers(profile: Profile, space: Workspace) -> Iterator[Any]:
    """What receives loss curves: None without trackers, and in all but the first process of torchrun."""
    names = profile.runtime.trackers
    if not names or os.environ.get("RANK", "0") != "0":
        yield None
        return
    from gmail_cli.trackers import Trackers

    folder = space.root / space.run / ".trackers"
    with Trackers(names, run=space.run, folder=folder, settings=profile.model_dump(mode="json")) as track:
        yield track


def change_index(context: Context, from_: Path | None, add: Path | None, remove: Path | None, rebuild: bool) -> None:
    """`gmail index --add, --remove, --rebuild`: a new index from an older one."""
    from gmail_cli.artifacts import Artifact
    from gmail_cli.stages import index as stage

    profile, space = context.load()
    old = Artifact.load(from_) if from_ else space.latest("index")
    if old is None:
        hint = "Run `gmail index` first, or name one with --from."
        raise InputError(f"{space.folder('index')} has no index to change", hint=hint)
    added = None if add is None else Artifact.load(add)
    with Progress() as progress:
        artifact = stage.update(
            profile,
            space,
            index=old,
            add=added,
            remove=remove,
            rebuild=rebuild,
            progress=progress.task("index"),
        )
    _announce(artifact, False)
    typer.echo(json.dumps(describe(artifact)) if context.as_json else shown(artifact.path))


def _announce(artifact: Artifact, reused: bool) -> None:
    seconds = artifact.manifest["seconds"]
    how = "complete already, reused" if reused else f"done in {seconds:.1f} s"
    say(f"{artifact.stage}: {how}: {shown(artifact.path)}")
    for key in ("verdict", "note"):
        if artifact.summary.get(key):
            say(f"  {artifact.summary[key]}")
    if artifact.stage == "generate" and "report.html" in artifact.files:
        say(f"  report: {shown(artifact.path / 'report.html')}")
    if artifact.stage == "index":
        from gmail_cli.stages import index as stage

        for name, lines in stage.candidates(artifact).items():
            say(f"candidates for {name}:\n{lines}")
