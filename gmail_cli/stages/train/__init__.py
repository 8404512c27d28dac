"""``gmail train``: downstream models on real or generated images, every cell for the same steps and captions.

A cell is one (task, arm, seed). Images are embedded (or decoded) once per arm and kept beside the cells while the
stage works; a finished cell is kept when the stage is started again, an unfinished one resumes from its checkpoint. A
cell that an earlier artifact of the run holds already, of the same settings and inputs of its own (`cell_keys`), is
taken from there: in a sweep over ``align`` only what f_g reaches is trained again.
Under ``torchrun`` all processes share the steps of the tasks that are `Task.shared`; the first one does the rest.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from gmail_cli.artifacts import Artifact, Checkpoints, Slot, StageKey, Workspace, file_sha256, folder_digest
from gmail_cli.errors import InputError, UsageError
from gmail_cli.profile import require_file, settings
from gmail_cli.profile.schema import Profile
from gmail_cli.stages import sources
from gmail_cli.stages.features import Features
from gmail_cli.stages.train.material import Inputs, device_of, features_of, material_of, read
from gmail_cli.stages.train.tasks import (
    SETTINGS_OF_ARMS,
    SETTINGS_OF_CELLS,
    TASKS,
    Cell,
    architecture,
    reads_aligned,
    recipe_of,
    steps_of,
)

if TYPE_CHECKING:
    import torch

    from gmail_cli.components.arms import ViewName
    from gmail_cli.components.loop import Job, Loss

CELLS = "cells.json"
RECORD = "cell.json"
METRICS = "metrics.jsonl"
READ_FEATURES = frozenset({"clip-text", "long-clip", "clipcap", "ifcap", "sitta", "linear-probe"})
"""Tasks that train on embeddings."""
CONTRASTIVE = frozenset({"clip-text", "long-clip", "clip"})
"""Tasks whose loss compares the captions of a batch."""

Progress = Callable[[int, int], None]
Track = Callable[[str, Sequence[Mapping[str, float]]], None]


def cells(profile: Profile) -> list[Cell]:
    """The cells a profile asks for: every task with each of its arms, seeds and projections.

    An arm that a task cannot use is left out for that task (``none`` for a captioner, which does not exist
    untrained; ``generated-aligned`` for tasks that read pixels); so is dual projection for tasks without a head.

    Raises:
        UsageError: A task has none of the arms, an arm none of the tasks, or dual projection nothing to apply to.
    """
    train = profile.train
    found = []
    for name in dict.fromkeys(train.tasks):
        task = TASKS[name]
        usable = [arm for arm in dict.fromkeys(train.arms) if arm in task.arms]
        if not usable:
            raise UsageError(
                f"train.arms = {list(train.arms)}: task {name} can be trained on none of them",
                hint=f"It takes {', '.join(sorted(task.arms))}.",
            )
        projections = {"off": [False], "on": [True], "both": [False, True]}[
            train.dual_projection if task.dual else "off"
        ]
        for arm in usable:
            seeds = dict.fromkeys(train.seeds) if arm != "none" else train.seeds[:1]
            for dual in projections if arm != "none" else [False]:
                found += [Cell(task=name, arm=arm, seed=seed, dual_projection=dual) for seed in seeds]
    unused = [arm for arm in train.arms if arm not in {cell.arm for cell in found}]
    if unused:
        raise UsageError(
            f"train.arms: none of the tasks {list(train.tasks)} can be trained on {unused[0]!r}",
            hint="Leave it out, or add a task that reads embeddings.",
        )
    if train.dual_projection != "off" and not any(cell.dual_projection for cell in found):
        raise UsageError(
            f"train.dual_projection = {train.dual_projection!r} applies to none of the tasks {list(train.tasks)}",
            hint="Add clipcap, llava or linear-probe, or turn it off.",
        )
    contrastive = [cell.task for cell in found if cell.task in CONTRASTIVE and cell.arm != "none"]
    if contrastive and train.batch_size == 1:
        raise UsageError(
            f"train.batch_size = 1: task {contrastive[0]} learns by telling the captions of a batch apart",
            hint="Set it to 2 or more; the more, the better it learns.",
        )
    if train.compile and not any("compile" in TASKS[cell.task].settings for cell in found):
        raise UsageError(
            f"train.compile = true: none of the tasks {list(train.tasks)} is compiled",
            hint=f"Add one of {', '.join(name for name, task in TASKS.items() if 'compile' in task.settings)}, "
            "or set it to false.",
        )
    return found


def plan_key(profile: Profile, *, generated: str | None = None, aligned: str | None = None) -> StageKey:
    """What `run` would make from the artifacts with these digests, without loading a model.

    Raises:
        InputError: An arm lacks the artifact it reads.
        UsageError: See `cells`.
    """
    wanted = cells(profile)
    arms = {cell.arm for cell in wanted}
    train = profile.train
    for needed, given, users in (
        ("generate", generated, arms & {"generated-naive", "generated-aligned", "mixed"}),
        ("align", aligned, {c.arm for c in wanted if reads_aligned(c)}),
    ):
        if users and given is None:
            raise InputError(
                f"train.arms: {sorted(users)[0]} needs the {needed} artifact and there is none",
                hint=f"Run `gmail {needed}` first, or leave the arm out with --set train.arms=...",
            )
    matter = {name for cell in wanted for name in _settings_of(cell, profile)} | {*SETTINGS_OF_CELLS}
    chosen = {name: value for name, value in settings(train).items() if name in matter}
    return _key(profile, wanted, chosen, generated=generated, aligned=aligned)


def cell_keys(profile: Profile, *, generated: str | None = None, aligned: str | None = None) -> dict[str, str]:
    """For each cell, by name, the digest of all that determines its bytes: equal for cells with equal folders.

    Settings of other tasks and arms are left out, and so is the align artifact where the arm does not show it.
    """
    keys = {}
    for cell in cells(profile):
        own = {**_settings_of(cell, profile), **asdict(cell)}
        keys[cell.name] = _key(profile, [cell], own, generated=generated, aligned=aligned).digest
    return keys


def _settings_of(cell: Cell, profile: Profile) -> dict[str, Any]:
    """The settings of ``train`` that matter to a cell."""
    others = {name for task in TASKS.values() for name in task.settings - TASKS[cell.task].settings}
    others |= {name for arm, own in SETTINGS_OF_ARMS.items() for name in own if arm != cell.arm}
    every = settings(profile.train)
    return {name: value for name, value in every.items() if name not in {*others, *SETTINGS_OF_CELLS}}


def reusable(
    profile: Profile, workspace: Workspace, *, generated: str | None = None, aligned: str | None = None
) -> dict[str, Artifact | None]:
    """For each cell, by name, the earlier artifact of the run that it is taken from; None where it is to be trained."""
    earlier = [artifact for artifact in workspace.artifacts() if artifact.stage == "train"]
    return {
        name: next((each for each in earlier if each.summary.get("cell_keys", {}).get(name) == key), None)
        for name, key in cell_keys(profile, generated=generated, aligned=aligned).items()
    }


def _key(
    profile: Profile,
    wanted: Sequence[Cell],
    chosen: dict[str, Any],
    *,
    generated: str | None,
    aligned: str | None,
) -> StageKey:
    """The key of some cells, given those settings that matter to them."""
    train, tasks = profile.train, {cell.task for cell in wanted}
    if not train.shots:
        chosen.pop("shots", None)
    if not train.compile:
        chosen.pop("compile", None)
    inputs = {"data": read(profile).fingerprint}
    if generated:
        inputs["generated"] = generated
    if aligned and any(map(reads_aligned, wanted)):
        inputs["aligned"] = aligned
    models = {}
    if "clip" in tasks and train.architecture:
        chosen["architecture"] = architecture(train.architecture)
    if any(TASKS[task].needs_clip for task in tasks if task != "clip" or not train.architecture):
        from gmail_cli.components.clip_files import model_digest

        models["clip"] = model_digest(profile.model.clip, revision=profile.model.revision, seed=profile.seed)
    if "latent-diffusion" in tasks:
        from gmail_cli.components.generative import autoencoder_folder

        models["autoencoder"] = folder_digest(autoencoder_folder(train.autoencoder))
        del chosen["autoencoder"]
    if tasks & {"clipcap", "ifcap", "sitta", "llava"}:
        models["lm"] = sources.lm_digest(
            train.lm, revision=train.lm_revision, key="train.lm", revision_key="train.lm_revision"
        )
        del chosen["lm"], chosen["lm_revision"]
    if train.conversations and "conversations" in chosen:
        inputs["conversations"] = file_sha256(require_file(train.conversations, key="train.conversations"))
        del chosen["conversations"]
    return StageKey(stage="train", settings=chosen, inputs=inputs, models=models, seed=profile.seed)


def features(profile: Profile, *, generated: Artifact | None = None, aligned: Artifact | None = None) -> list[Features]:
    """What `run` reads of f_r and f_g: their embeddings of the images that the arms of its cells show."""
    import torch

    from gmail_cli.components.arms import SHOWN

    material = material_of(profile, None, None, device=torch.device("cpu"), generated=generated, aligned=aligned)
    views: dict[ViewName, None] = {}
    for cell in cells(profile):
        if cell.task in READ_FEATURES and cell.arm != "none":
            shown = [view for view in SHOWN[cell.arm] if view != "texts"]
            views |= dict.fromkeys((*shown, "real") if cell.dual_projection else shown)
    return [features_of(profile, view, material.identities(view), aligned=aligned) for view in views]


def run(
    profile: Profile,
    workspace: Workspace,
    *,
    generated: Artifact | None = None,
    aligned: Artifact | None = None,
    progress: Progress | None = None,
    track: Track | None = None,
) -> Artifact:
    """Train (or find) every cell a profile asks for.

    Args:
        profile: Sections used: ``train``, ``data``, ``model``, ``runtime``; and ``seed``.
        workspace: Where the artifact goes.
        generated: A generate artifact; needed by the generated arms. When given, every arm trains on the captions
            its images were drawn from.
        aligned: An align artifact (f_g); needed by ``generated-aligned`` and ``mixed``.
        progress: Called with (steps done, steps of all cells).
        track: Called with a cell's name and its loss curve so far.

    Returns:
        The artifact: ``cells.json`` (a row per cell: name, task, arm, seed, dual_projection, folder, image_encoder,
        steps, captions, trained_parameters, final_loss, and the task's own metrics), and a folder per cell.

    Raises:
        InputError: Data or artifacts that are missing or do not fit; a loss that is not finite.
        SetupError: A model or device this machine lacks.
        UsageError: Settings that do not fit each other.
    """
    import torch

    from gmail_cli.components import parallel

    wanted = cells(profile)
    given = {
        "generated": generated.digest if generated else None,
        "aligned": aligned.digest if aligned else None,
    }
    if aligned and any(map(reads_aligned, wanted)):
        sources.require_clip_of(aligned, profile)
    with workspace.open(plan_key(profile, **given)) as slot:
        if slot.done:
            return slot.artifact
        _take_earlier(reusable(profile, workspace, **given), workspace, slot)
        device = device_of(profile)
        material = material_of(profile, workspace, slot, device=device, generated=generated, aligned=aligned)
        inputs = Inputs(profile=profile, material=material, device=device, scratch=slot.scratch)
        total = sum(steps_of(cell, profile) for cell in wanted)
        rows: list[dict[str, Any]] = []
        finished = _finished(wanted, slot)
        for cell in wanted:
            done = sum(row["steps"] for row in rows)
            report = (lambda step, _, done=done: progress(done + step, total)) if progress else None
            if parallel.ranks().rank == 0:
                rows.append(_train(cell, inputs, slot, progress=report, track=track))
            elif TASKS[cell.task].shared and steps_of(cell, profile) and cell not in finished:
                _fit(cell, inputs, slot)
        slot.write_json(CELLS, rows)
        summary = {
            "cells": len(rows),
            "cell_keys": cell_keys(profile, **given),
            "captions": len(inputs.material.pairs),
            "steps": profile.train.steps,
        }
        return slot.commit(
            summary=summary, device=f"cuda: {torch.cuda.get_device_name()}" if device.type == "cuda" else device.type
        )


def _take_earlier(found: Mapping[str, Artifact | None], workspace: Workspace, slot: Slot) -> None:
    """Put the cells that earlier artifacts hold into the slot, as if an interrupted run had finished them."""
    for name, artifact in found.items():
        if artifact is None or slot.has(f"{name}/{RECORD}"):
            continue
        whole = slot.link_folder(name, artifact)
        if workspace.tell:
            said = "reusing" if whole else "training anew, as its files are damaged:"
            workspace.tell(f"{said} {name} of train/{artifact.path.name}")


def _train(cell: Cell, inputs: Inputs, slot: Slot, *, progress: Progress | None, track: Track | None) -> dict[str, Any]:
    """Train one cell, or take it from an interrupted run; returns its row of ``cells.json``."""
    from gmail_cli.components.loop import trained_parameters

    record = f"{cell.name}/{RECORD}"
    if slot.has(record):
        return dict(json.loads(slot.path(record).read_text(encoding="utf-8")))
    job, curve = _fit(cell, inputs, slot, progress=progress, track=track)
    steps = steps_of(cell, inputs.profile)
    slot.write_folder(cell.name, job.export)
    slot.write_jsonl(f"{cell.name}/{METRICS}", curve)
    row = asdict(cell) | {
        "name": cell.name,
        "folder": cell.name,
        "image_encoder": TASKS[cell.task].image_encoder,
        "steps": steps,
        "captions": len(inputs.material.pairs),
        "trained_parameters": trained_parameters(job.module) if cell.arm != "none" else 0,
        "final_loss": curve[-1]["loss"] if curve else None,
        "metrics": job.evaluate() if job.evaluate else {},
    }
    slot.write_json(record, row)
    _checkpoints(cell, slot).remove()
    return row


def _fit(
    cell: Cell, inputs: Inputs, slot: Slot, *, progress: Progress | None = None, track: Track | None = None
) -> tuple[Job, list[dict[str, float]]]:
    """Build a cell and train it, together with the other processes where its task is shared; with the loss curve.

    The first process builds before the others, which then find what it made of the images.
    """
    from gmail_cli.components import parallel
    from gmail_cli.components.compilation import compile_blocks
    from gmail_cli.components.loop import fit

    profile, task, steps = inputs.profile, TASKS[cell.task], steps_of(cell, inputs.profile)
    shared, first = task.shared and steps > 0, parallel.ranks().rank == 0
    if shared and not first:
        parallel.barrier()
    job = task.build(inputs, cell)
    if shared and first:
        parallel.barrier()
    if job.share:
        job.share()
    if not steps:
        return job, []
    if "compile" in task.settings and profile.train.compile:
        compile_blocks(job.module)
    curve = fit(
        job.module,
        loss=_in_precision(job.loss, profile, device=inputs.device),
        rows=job.rows,
        recipe=recipe_of(cell, profile),
        checkpoints=_checkpoints(cell, slot),
        checkpoint_seconds=profile.runtime.checkpoint_seconds,
        shared=shared,
        log=functools.partial(track, cell.name) if track else None,
        progress=progress,
    )
    return job, curve


def _checkpoints(cell: Cell, slot: Slot) -> Checkpoints:
    return slot.checkpoints(f"{cell.name}.checkpoint")


def _finished(wanted: Sequence[Cell], slot: Slot) -> set[Cell]:
    """The cells that an interrupted run has finished, as the first process sees it."""
    import torch

    from gmail_cli.components import parallel

    there = parallel.from_first({"there": torch.tensor([slot.has(f"{cell.name}/{RECORD}") for cell in wanted])})
    assert there is not None
    return {cell for cell, done in zip(wanted, there["there"].tolist(), strict=True) if done}


def _in_precision(loss: Loss, profile: Profile, *, device: torch.device) -> Loss:
    """The loss under autocast where the profile asks for bf16."""
    import torch

    def cast(rows: torch.Tensor, step: int) -> Any:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return loss(rows, step)

    return loss if profile.train.precision == "fp32" else cast
