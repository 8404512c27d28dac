"""The command line: thin commands over :mod:`gmail_cli.plan`; the only module that chooses an exit code.

Results (an artifact's path, or one JSON object with ``--json``) go to stdout, everything else to stderr.
"""

from __future__ import annotations

import json
import os
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from gmail_cli import __version__
from gmail_cli.cli_artifacts import app as artifacts_app
from gmail_cli.cli_common import (
    JsonOption,
    ProfileArgument,
    ProfileOption,
    RunOption,
    SetOption,
    WorkspaceOption,
    count,
    say,
)
from gmail_cli.cli_compare import app as compare_app
from gmail_cli.cli_gate import AnnotationsOption, BaselineOption, Gate, JunitOption, ToleranceOption
from gmail_cli.cli_profile import app as profile_app
from gmail_cli.cli_run import Context, change_index, estimate, run_all, run_stage, run_together
from gmail_cli.cli_score import app as score_app
from gmail_cli.cli_search import Flow
from gmail_cli.cli_search import app as search_app
from gmail_cli.errors import GmailError, UsageError, import_failure


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


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"gmail {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, help="Print the version.", is_eager=True)
    ] = False,
) -> None:
    pass


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
    context = Context(profile, set_, run, workspace, as_json, dry_run, flags)
    if dry_run:
        estimate(context, warm_up or 0)
    elif warm_up:
        raise UsageError("--warm-up without --dry-run", hint="Add --dry-run: nothing is written then.")
    elif processes and processes > 1:
        run_together(context, processes, shard)
    else:
        run_stage("generate", context, part=shard)


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
    run_stage("align", Context(profile, set_, run, workspace, as_json, dry_run, flags), generated=generated)


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
    context = Context(profile, set_, run, workspace, as_json, dry_run, flags)
    run_stage("train", context, generated=generated, aligned=aligned)


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
    context = Context(profile, set_, run, workspace, as_json, dry_run, flags)
    run_stage("embed", context, part=shard, generated=generated, aligned=aligned, train=train_)


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
    context = Context(profile, set_, run, workspace, as_json, dry_run, {})
    if from_ or add or remove or rebuild:
        if embeddings or dry_run:
            flag = "--embeddings" if embeddings else "--dry-run"
            hint = "Leave it out, or leave out --from, --add, --remove and --rebuild."
            raise UsageError(f"{flag} does not go with changing an index", hint=hint)
        change_index(context, from_, add, remove, rebuild)
    else:
        run_stage("index", context, embeddings=embeddings)


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
    context = Context(profile, set_, run, workspace, as_json, dry_run, {})
    if gate is None:
        run_stage("eval", context, embeddings=embeddings, train=train_)
        return
    from gmail_cli.stages import evaluate

    before = evaluate.read_baseline(gate.baseline)  # an evaluation takes minutes: find out first
    gate.check(before)
    artifact = run_stage("eval", context, embeddings=embeddings, train=train_)
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
    run_all(Context(profile, set_, run, workspace, as_json, dry_run, {}, named_by="PROFILE"))


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
    except Exception as error:
        failure = import_failure(error)
        if failure is None:
            raise
        _fail(failure)


if __name__ == "__main__":
    main()
