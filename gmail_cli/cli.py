"""The command line: thin commands over :mod:`gmail_cli.plan`; the only module that chooses an exit code.

Results (an artifact's path, or one JSON object with ``--json``) go to stdout, everything else to stderr.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from gmail_cli import __version__, shipped
from gmail_cli.cli_artifacts import app as artifacts_app
from gmail_cli.cli_common import (
    JsonOption,
    ProfileArgument,
    ProfileOption,
    RunOption,
    SetOption,
    WorkspaceOption,
    count,
    describe,
    result,
    say,
    shown,
)
from gmail_cli.cli_compare import app as compare_app
from gmail_cli.cli_gate import AnnotationsOption, BaselineOption, Gate, JunitOption, ToleranceOption
from gmail_cli.cli_profile import app as profile_app
from gmail_cli.cli_score import app as score_app
from gmail_cli.cli_search import Flow
from gmail_cli.cli_search import app as search_app
from gmail_cli.errors import GmailError, InputError, UsageError
from gmail_cli.progress import Progress

if TYPE_CHECKING:
    from gmail_cli.artifacts import Artifact, Workspace
    from gmail_cli.profile.schema import Profile


class _InterruptedError(Exception):
    """Ctrl-C in a command; Typer would end the process without a word."""


class _Commands(typer.core.TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stopped:
            raise _InterruptedError(str(stopped)) from None


app = typer.Typer(
    name="gmail",
    cls=_Commands,
    help="Learn from generated images: align them with real ones (GMAIL), train on them, measure on photographs.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(compare_app)
app.add_typer(search_app)
app.add_typer(score_app, name="score")
app.add_typer(profile_app, name="profile")
app.add_typer(artifacts_app, name="artifacts")


class OnBad(str, Enum):
    """What a bad record does."""

    FAIL = "fail"
    SKIP = "skip"


DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Print what is complete, what would run and why; run nothing.")
]
GeneratedOption = Annotated[
    Path | None, typer.Option("--generated", metavar="ARTIFACT", help="Generate artifact; default: the run's latest.")
]
AlignedOption = Annotated[
    Path | None, typer.Option("--aligned", metavar="ARTIFACT", help="Align artifact; default: the run's latest.")
]
TrainOption = Annotated[
    Path | None, typer.Option("--train", metavar="ARTIFACT", help="Train artifact; default: the run's latest.")
]
CaptionsOption = Annotated[
    str | None,
    typer.Option("--captions", metavar="PATH", help="Captions file, folder, shards or scenes:train (data.train)."),
]
ImagesOption = Annotated[
    str | None, typer.Option("--images", metavar="FOLDER", help="Folder of the images that --captions names.")
]
LimitOption = Annotated[
    int | None,
    typer.Option("--limit", parser=count, metavar="N", help="Use the first N images with all their captions."),
]
FlowOption = Annotated[
    Flow | None,
    typer.Option(
        "--flow", help="Embed the images through f_r, or as generated ones through f_g (embed.flow); default: real."
    ),
]
ShardOption = Annotated[
    str | None,
    typer.Option(
        metavar="I/N", help="Make only part I of N; whoever finds every part done puts them together (for job arrays)."
    ),
]
OnBadOption = Annotated[
    OnBad | None, typer.Option("--on-bad", help="What a bad caption or image record does (data.on_bad).")
]


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"gmail {__version__}")
        raise typer.Exit


@app.command()
def generate(
    captions: CaptionsOption = None,
    per_caption: Annotated[int | None, typer.Option(parser=count, metavar="K", help="Images per caption.")] = None,
    limit: LimitOption = None,
    import_: Annotated[
        str | None,
        typer.Option("--import", metavar="PATH", help="Take images made elsewhere (folder, tar, Parquet) instead."),
    ] = None,
    min_clip_score: Annotated[
        float | None,
        typer.Option(metavar="X", help="Keep images with this CLIPScore to their caption (generate.min_clip_score)."),
    ] = None,
    keep_best: Annotated[
        int | None,
        typer.Option(parser=count, metavar="N", help="Keep the N images of each caption with the highest CLIPScore."),
    ] = None,
    shard: ShardOption = None,
    processes: Annotated[
        int | None,
        typer.Option(
            parser=count,
            metavar="N",
            help="Draw in N processes at once, each on a GPU of its own where there are any.",
        ),
    ] = None,
    warm_up: Annotated[
        int | None,
        typer.Option(parser=count, metavar="N", help="With --dry-run: draw N batches to tell time and disk from."),
    ] = None,
    on_bad: OnBadOption = None,
    profile: ProfileOption = None,
    set_: SetOption = None,
    run: RunOption = None,
    workspace: WorkspaceOption = Path("runs"),
    as_json: JsonOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Make images from captions, byte-stable per (caption, k), resumable per image."""
    flags = {
        "data.train": captions,
        "generate.per_caption": per_caption,
        "generate.limit": limit,
        "generate.import_path": import_,
        "generate.min_clip_score": min_clip_score,
        "generate.keep_best": keep_best,
        "data.on_bad": on_bad,
    }
    if import_ is not None:
        flags["generate.source"] = "import"
    context = _Context(profile, set_, run, workspace, as_json, dry_run, flags)
    if dry_run:
        _estimate(context, warm_up or 0)
    elif warm_up:
        raise UsageError("--warm-up without --dry-run", hint="Add --dry-run: nothing is written then.")
    elif processes and processes > 1:
        _together(context, processes, shard)
    else:
        _stage("generate", context, part=shard)


@app.command()
def align(
    generated: GeneratedOption = None,
    captions: CaptionsOption = None,
    images: ImagesOption = None,
    on_bad: OnBadOption = None,
    profile: ProfileOption = None,
    set_: SetOption = None,
    run: RunOption = None,
    workspace: WorkspaceOption = Path("runs"),
    as_json: JsonOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Tune f_g, a copy of CLIP's image encoder, until f_g(generated) meets f_r(real)."""
    flags = {"data.train": captions, "data.train_images": images, "data.on_bad": on_bad}
    _stage("align", _Context(profile, set_, run, workspace, as_json, dry_run, flags), generated=generated)


@app.command()
def train(
    generated: GeneratedOption = None,
    aligned: AlignedOption = None,
    captions: CaptionsOption = None,
    images: ImagesOption = None,
    task: Annotated[list[str] | None, typer.Option(metavar="TASK", help="Task to train; may be repeated.")] = None,
    arm: Annotated[list[str] | None, typer.Option(metavar="ARM", help="Data arm; may be repeated.")] = None,
    on_bad: OnBadOption = None,
    profile: ProfileOption = None,
    set_: SetOption = None,
    run: RunOption = None,
    workspace: WorkspaceOption = Path("runs"),
    as_json: JsonOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Train captioners, text towers, probes or whole CLIPs on real or generated images, at equal steps."""
    flags: dict[str, Any] = {"data.train": captions, "data.train_images": images, "data.on_bad": on_bad}
    flags |= {"train.tasks": task, "train.arms": arm}
    context = _Context(profile, set_, run, workspace, as_json, dry_run, flags)
    _stage("train", context, generated=generated, aligned=aligned)


@app.command()
def embed(
    captions: Annotated[
        str | None,
        typer.Option(
            "--captions",
            metavar="PATH",
            help="Captions and images to embed, a folder of images, or a generate artifact (data.test).",
        ),
    ] = None,
    images: ImagesOption = None,
    flow: FlowOption = None,
    limit: LimitOption = None,
    shard: ShardOption = None,
    generated: GeneratedOption = None,
    aligned: AlignedOption = None,
    train_: TrainOption = None,
    on_bad: OnBadOption = None,
    profile: ProfileOption = None,
    set_: SetOption = None,
    run: RunOption = None,
    workspace: WorkspaceOption = Path("runs"),
    as_json: JsonOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Embed real images through f_r, generated ones through f_g, and texts; ids stay with vectors."""
    flags = {
        "data.test": captions,
        "data.test_images": images,
        "data.test_limit": limit,
        "data.on_bad": on_bad,
        "embed.flow": flow,
    }
    context = _Context(profile, set_, run, workspace, as_json, dry_run, flags)
    _stage("embed", context, part=shard, generated=generated, aligned=aligned, train=train_)


@app.command()
def index(
    embeddings: Annotated[
        Path | None, typer.Option("--embeddings", metavar="ARTIFACT", help="Embed artifact; default: the run's latest.")
    ] = None,
    from_: Annotated[
        Path | None,
        typer.Option("--from", metavar="INDEX", help="Index artifact to change; default: the run's latest."),
    ] = None,
    add: Annotated[
        Path | None, typer.Option(metavar="EMBEDDINGS", help="Add the rows of this embed artifact to an index.")
    ] = None,
    remove: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Remove the ids in this file, one a line, from an index.")
    ] = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Choose and train a changed index again.")] = False,
    profile: ProfileOption = None,
    set_: SetOption = None,
    run: RunOption = None,
    workspace: WorkspaceOption = Path("runs"),
    as_json: JsonOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Build FAISS indexes over embeddings, for `gmail search` and `gmail serve`; or change one into a new one."""
    context = _Context(profile, set_, run, workspace, as_json, dry_run, {})
    if from_ or add or remove or rebuild:
        if embeddings or dry_run:
            flag = "--embeddings" if embeddings else "--dry-run"
            hint = "Leave it out, or leave out --from, --add, --remove and --rebuild."
            raise UsageError(f"{flag} does not go with changing an index", hint=hint)
        _change_index(context, from_, add, remove, rebuild)
    else:
        _stage("index", context, embeddings=embeddings)


@app.command(name="eval")
def eval_(
    embeddings: Annotated[
        Path | None, typer.Option("--embeddings", metavar="ARTIFACT", help="Embed artifact; default: the run's latest.")
    ] = None,
    train_: TrainOption = None,
    baseline: BaselineOption = None,
    tolerance: ToleranceOption = None,
    junit: JunitOption = None,
    annotations: AnnotationsOption = None,
    profile: ProfileOption = None,
    set_: SetOption = None,
    run: RunOption = None,
    workspace: WorkspaceOption = Path("runs"),
    as_json: JsonOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Measure on real images: retrieval, zero-shot, captions, modality gap; write an HTML report."""
    gate = Gate.of(baseline, tolerance, junit, annotations)
    context = _Context(profile, set_, run, workspace, as_json, dry_run, {})
    if gate is None:
        _stage("eval", context, embeddings=embeddings, train=train_)
        return
    from gmail_cli.stages import evaluate

    before = evaluate.read_baseline(gate.baseline)  # an evaluation takes minutes: find out first
    gate.check(before)
    artifact = _stage("eval", context, embeddings=embeddings, train=train_)
    if artifact is not None:
        now = evaluate.comparable_metrics(artifact, baseline=before, file=gate.baseline)
        hint = "Allow a fall with --tolerance METRIC=POINTS, or find what changed (gmail eval --dry-run)."
        gate.hold(now, baseline=before, suite="gmail.eval", title=f"gmail eval, {before['protocol']}", hint=hint)


@app.command(name="run")
def run_(
    profile: ProfileArgument = None,
    set_: SetOption = None,
    run: RunOption = None,
    workspace: WorkspaceOption = Path("runs"),
    as_json: JsonOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Run every stage a profile lists, in order, reusing what is complete."""
    from gmail_cli import plan

    context = _Context(profile, set_, run, workspace, as_json, dry_run, {}, named_by="PROFILE")
    loaded, space = context.load()
    if dry_run:
        context.print_plan(plan.steps(loaded, space, stages=loaded.stages))
        return
    with Progress() as progress, _trackers(loaded, space) as track:
        made = plan.execute(loaded, space, stages=loaded.stages, progress=progress.task, on_done=_announce, track=track)
    if as_json:
        result(json.dumps({stage: describe(artifact) for stage, artifact in made.items()}, indent=1))
        return
    last = made[loaded.stages[-1]]
    report = last.path / "report.html"
    if report.is_file():
        say(f"report: {shown(report)}")
    result(shown(last.path))


@app.command()
def doctor(as_json: JsonOption = False, workspace: WorkspaceOption = Path("runs")) -> None:
    """Say what this machine has: versions, devices, faiss build, hub cache, disk, and what each profile would need."""
    from gmail_cli import doctor as checks

    report = checks.examine(workspace)
    if as_json:
        typer.echo(json.dumps(report, indent=1))
        return
    for title, lines in report.items():
        typer.echo(title)
        for name, value in lines.items():
            typer.echo(f"  {name:22} {value}")


# -- shared ----------------------------------------------------------------------------------------------------


class _Context:
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
        self.overrides = [f"{key}={profiles.toml(value)}" for key, value in flags.items()]
        self.overrides += overrides or []
        self.flags = dict(flags)
        self.run = run
        self.root = workspace
        self.as_json = as_json
        self.dry_run = dry_run

    def load(self) -> tuple[Profile, Workspace]:
        from gmail_cli import profile as profiles
        from gmail_cli.artifacts import Workspace

        path = profiles.locate(self.ref, named_by=self.named_by)
        loaded = profiles.load(path, overrides=self.overrides)
        if self.ref is None and path == shipped.profiles().get(profiles.DEFAULT_PROFILE):
            say(
                "profile tiny: it draws only its own small world of scenes; for photographs use "
                "--profile coco-sd21-vitb16"
            )
        if loaded.runtime.threads:
            os.environ["OMP_NUM_THREADS"] = str(loaded.runtime.threads)
        return loaded, Workspace(self.root, self.run or loaded.name, tell=say)

    def print_plan(self, steps: list[Any], **more: Any) -> None:
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
    name: str, context: _Context, profile: Profile, space: Workspace, inputs: Mapping[str, Path | None]
) -> dict[str, Artifact]:
    from gmail_cli import plan
    from gmail_cli.artifacts import Artifact

    given = {key: Artifact.load(path) for key, path in inputs.items() if path is not None}
    named = name == "embed" and not given and context.flags.get("data.test") is not None
    alone = named and profile.embed.flow == "real"  # f_g is the run's latest
    return plan.find_inputs(name, space, given=given, optional_only=alone)


def _estimate(context: _Context, batches: int) -> None:
    """What generating would make and cost."""
    from gmail_cli import plan
    from gmail_cli.stages.generate import checking

    profile, space = context.load()
    steps = plan.steps(profile, space, stages=["generate"])
    told = checking.estimate(profile, batches=batches)
    context.print_plan(steps, estimate=told)
    if context.as_json:
        return
    prompts = f", {told['prompts']:,} prompts to write" if "prompts" in told else ""
    typer.echo(f"          {told['images']:,} images of {told['captions']:,} captions{prompts}")
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


def _stage_part(
    name: str, context: _Context, part: tuple[int, int], profile: Profile, space: Workspace, found: dict[str, Artifact]
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


def _together(context: _Context, processes: int, shard: str | None) -> None:
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
    _stage("generate", context, part=shard)


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


def _stage(name: str, context: _Context, *, part: str | None = None, **inputs: Path | None) -> Artifact | None:
    from gmail_cli import plan

    shard = None if part is None else _part(part)
    profile, space = context.load()
    found = _inputs(name, context, profile, space, inputs)
    if context.dry_run:
        context.print_plan(plan.steps(profile, space, stages=[name], given=found))
        return None
    if shard is not None:
        return _stage_part(name, context, shard, profile, space, found)
    with Progress() as progress, _trackers(profile, space) as track:
        made = plan.execute(
            profile, space, stages=[name], progress=progress.task, given=found, on_done=_announce, track=track
        )
    artifact = made[name]
    result(json.dumps(describe(artifact)) if context.as_json else shown(artifact.path))
    return artifact


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


def _change_index(context: _Context, from_: Path | None, add: Path | None, remove: Path | None, rebuild: bool) -> None:
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


def _fail(error: GmailError) -> NoReturn:
    say(f"error: {error.message}")
    if error.hint:
        say(f"hint: {error.hint}")
    raise SystemExit(error.exit_code)


SPIN = "1000"
"""Turns that a thread of OpenMP waits awake for the others before it sleeps. With libgomp's own 300,000 a step of
training beside other busy processes takes three to four times as long (benchmarks/contention.py)."""


def main() -> None:
    """Entry point of the ``gmail`` command."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN)  # read when torch is imported
    try:
        app()
    except GmailError as error:
        _fail(error)
    except (KeyboardInterrupt, _InterruptedError) as stopped:
        there = f": {stopped}" if str(stopped) else ""
        say(f"interrupted{there}; the same command resumes where it stopped")
        raise SystemExit(130) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
