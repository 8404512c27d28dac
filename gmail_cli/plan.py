"""What has to run: stages in order, their inputs, what is complete, and which keys changed a digest."""

from __future__ import annotations

import dataclasses
import importlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from gmail_cli.artifacts import Artifact, StageKey, Workspace
from gmail_cli.errors import InputError, SetupError
from gmail_cli.profile.schema import Profile
from gmail_cli.stages import features, sources
from gmail_cli.stages.features import Features

#: Stage -> the inputs it reads, by name. The first is required.
INPUTS: Mapping[str, tuple[str, ...]] = {
    "generate": (),
    "align": ("generated",),
    "train": ("generated", "aligned"),
    "embed": ("generated", "aligned", "train"),
    "index": ("embeddings",),
    "eval": ("embeddings", "train", "aligned", "generated", "index"),
}
#: Input name -> the stage that makes it.
MAKER: Mapping[str, str] = {
    "generated": "generate",
    "aligned": "align",
    "train": "train",
    "embeddings": "embed",
    "index": "index",
}
SHARED = ("align", "train")
"""Stages whose training all processes of ``torchrun`` share; the others are the first one's."""
READ_FEATURES = ("align", "train")
"""Stages that read what frozen towers make of images (:mod:`gmail_cli.stages.features`)."""
TRAINING = ("align", "train")
"""Stages with loss curves."""
_REQUIRED = {"align": "generated", "index": "embeddings", "eval": "embeddings"}
_MODULES = {"eval": "evaluate"}

Progress = Callable[[str], Callable[[int, int], None]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One stage of a plan.

    Attributes:
        stage: The stage's name.
        key: What it would make.
        state: ``complete`` (reused), ``resume`` (interrupted before) or ``run``.
        changed: Keys in which it differs from the stage's latest artifact: ``settings.steps: 100 -> 200``.
        path: Its folder, when complete.
        features: What it reads of frozen towers, and whether that is there; known once its inputs are.
        cells: What `train` would train, by name, and the artifact's folder where a cell is taken from an earlier one.
    """

    stage: str
    key: StageKey
    state: Literal["complete", "resume", "run"]
    changed: tuple[str, ...]
    path: Path | None
    features: tuple[tuple[Features, bool], ...] = ()
    cells: tuple[tuple[str, Path | None], ...] = ()


def module(stage: str) -> Any:
    """The module of a stage: ``run`` and ``plan_key``."""
    return importlib.import_module(f"gmail_cli.stages.{_MODULES.get(stage, stage)}")


def find_inputs(
    stage: str, workspace: Workspace, *, given: Mapping[str, Artifact], optional_only: bool = False
) -> dict[str, Artifact]:
    """The artifacts a single stage reads: those given, those they were made from, else the run's latest.

    Training on a given generate artifact takes the run's latest align artifact where that was made from it.

    Args:
        stage: The stage to run.
        workspace: Where to look.
        given: Input name -> artifact named by the user.
        optional_only: The stage has another source (files), so nothing is required and nothing is guessed.

    Raises:
        InputError: A required input is neither given nor there, or another version of its stage made one.
    """
    wrong = {name: artifact for name, artifact in given.items() if artifact.stage != MAKER[name]}
    for name, artifact in wrong.items():
        hint = f"Give a folder made by `gmail {MAKER[name]}`."
        raise InputError(f"--{name} {artifact.path} was made by `gmail {artifact.stage}`", hint=hint)
    found = dict(given)
    if given:
        by_digest = {artifact.digest: artifact for artifact in workspace.artifacts()}
        for origin in given.values():
            for ancestor in _ancestors(origin, by_digest):
                for name in INPUTS[stage]:
                    if MAKER[name] == ancestor.stage and name not in found:
                        ancestor.require_version()
                        found[name] = ancestor
        aligned = workspace.latest("align") if stage == "train" and "aligned" not in found else None
        if aligned and {*aligned.manifest["key"]["inputs"].values()} & {each.digest for each in given.values()}:
            found["aligned"] = aligned
    elif not optional_only:
        for name in INPUTS[stage]:
            latest = workspace.latest(MAKER[name])
            if latest is not None:
                found[name] = latest
    required = _REQUIRED.get(stage)
    if required and required not in found and not optional_only:
        maker = MAKER[required]
        hint = f"Run `gmail {maker}` first, or name one with --{required} (or --run RUN)."
        a = "an" if maker[0] in "ae" else "a"
        raise InputError(f"{stage} needs {a} {maker} artifact and {workspace.folder(maker)} has none", hint=hint)
    return {name: found[name] for name in INPUTS[stage] if name in found}


def _ancestors(artifact: Artifact, by_digest: Mapping[str, Artifact]) -> Iterator[Artifact]:
    for digest in artifact.manifest["key"]["inputs"].values():
        parent = by_digest.get(digest)
        if parent is not None:
            yield parent
            yield from _ancestors(parent, by_digest)


def steps(
    profile: Profile, workspace: Workspace, *, stages: Sequence[str], given: Mapping[str, Artifact] | None = None
) -> list[Step]:
    """The plan for some stages in order, each reading what the ones before it will make.

    Args:
        profile: The experiment.
        workspace: Where results are.
        stages: Names of stages, in order.
        given: Inputs that are there already.
    """
    there = dict(given or {})
    digests = {name: artifact.digest for name, artifact in there.items()}
    plan = []
    for stage in stages:
        wanted = {name: digests[name] for name in INPUTS[stage] if name in digests}
        key: StageKey = module(stage).plan_key(profile, **wanted)
        step = _step(stage, key, workspace)
        if stage in READ_FEATURES and step.state != "complete" and set(wanted) <= set(there):
            read = module(stage).features(profile, **{name: there[name] for name in wanted})
            found = tuple((each, features.find(each, workspace) is not None) for each in read)
            step = dataclasses.replace(step, features=found)
        if stage == "train" and step.state != "complete":
            cells = module(stage).reusable(profile, workspace, **wanted)
            step = dataclasses.replace(step, cells=tuple((name, each and each.path) for name, each in cells.items()))
        plan.append(step)
        for name, maker in MAKER.items():
            if maker == stage:
                digests[name] = key.digest
                if step.path is not None:
                    there[name] = Artifact.load(step.path)
                else:
                    there.pop(name, None)
    return plan


def _step(stage: str, key: StageKey, workspace: Workspace) -> Step:
    complete = workspace.find(key)
    if complete is not None:
        return Step(stage=stage, key=key, state="complete", changed=(), path=complete.path)
    latest = workspace.latest(stage, any_version=True)
    changed = tuple(_differences(latest.manifest["key"], key.to_json())) if latest else ()
    state: Literal["resume", "run"] = "resume" if workspace.is_partial(key) else "run"
    return Step(stage=stage, key=key, state=state, changed=changed, path=None)


def _differences(old: Any, new: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new}):
            yield from _differences(old.get(name), new.get(name), f"{prefix}.{name}" if prefix else name)
    elif old != new:
        yield f"{prefix}: {_short(old)} -> {_short(new)}"


def _short(value: Any) -> str:
    text = value[:12] if isinstance(value, str) and len(value) == 64 else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def execute(
    profile: Profile,
    workspace: Workspace,
    *,
    stages: Sequence[str],
    progress: Progress,
    given: Mapping[str, Artifact] | None = None,
    on_done: Callable[[Artifact, bool], None] | None = None,
    track: Callable[..., None] | None = None,
) -> dict[str, Artifact]:
    """Run stages in order, reusing what is complete.

    Args:
        profile: The experiment.
        workspace: Where results go.
        stages: Names of stages, in order.
        progress: Given a stage's name, makes its progress callback.
        given: Inputs that are there already, by name.
        on_done: Called with each artifact and whether it was reused.
        track: Called with the name and the loss curve so far of whatever is trained.

    Returns:
        Stage -> artifact.
    """
    inputs = dict(given or {})
    made: dict[str, Artifact] = {}
    tell = workspace.tell
    for stage in stages:
        wanted = {name: inputs[name] for name in INPUTS[stage] if name in inputs}
        key: StageKey = module(stage).plan_key(profile, **{name: each.digest for name, each in wanted.items()})
        reused = workspace.find(key) is not None
        if tell and not reused and "clip" in key.models:
            sources.tell_of_random_weights(profile, tell)
            tell = None  # once
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            artifact = _together(
                profile, workspace, stage=stage, key=key, progress=progress, inputs=wanted, track=track
            )
        else:
            artifact = module(stage).run(
                profile, workspace, progress=progress(stage), **_tracked(stage, track), **wanted
            )
        made[stage] = artifact
        for name, maker in MAKER.items():
            if maker == stage:
                inputs[name] = artifact
        if on_done:
            on_done(artifact, reused)
    return made


def _tracked(stage: str, track: Callable[..., None] | None) -> dict[str, Any]:
    return {"track": track} if track is not None and stage in TRAINING else {}


def _together(
    profile: Profile,
    workspace: Workspace,
    *,
    stage: str,
    key: StageKey,
    progress: Progress,
    inputs: Mapping[str, Artifact],
    track: Callable[..., None] | None,
) -> Artifact:
    """One stage under torchrun: rank 0 makes the artifact; in ``SHARED`` stages the others work on it too.

    What they would write goes to a folder that is thrown away.
    """
    from gmail_cli.components import parallel

    done, first = workspace.find(key) is not None, parallel.ranks().rank == 0
    parallel.barrier()
    if first:
        module(stage).run(profile, workspace, progress=progress(stage), **_tracked(stage, track), **inputs)
    elif stage in SHARED and not done:
        with tempfile.TemporaryDirectory() as folder:
            module(stage).run(profile, Workspace(Path(folder), workspace.run, features=workspace), **inputs)
    parallel.barrier()
    artifact = workspace.find(key)
    if artifact is None:
        hint = "All processes need one file system."
        raise SetupError(f"{stage} was made by the first process, and this one does not see it", hint=hint)
    return artifact
