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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gmail_cli.artifacts import Artifact, Checkpoints, Slot, StageKey, Workspace, file_sha256, folder_digest
from gmail_cli.errors import InputError, UsageError
from gmail_cli.profile import ArmName, Profile, TaskName, require_file, settings
from gmail_cli.shipped import profile_folder
from gmail_cli.stages import features as frozen
from gmail_cli.stages import sources
from gmail_cli.stages.features import Features

if TYPE_CHECKING:
    import numpy as np
    import torch

    from gmail_cli.components.arms import Arm, Material, ViewName
    from gmail_cli.components.captions import Dataset
    from gmail_cli.components.loop import Job, Loss, Recipe

CELLS = "cells.json"
RECORD = "cell.json"
METRICS = "metrics.jsonl"
CHUNK = 2048
"""Images decoded between two points to resume from."""
READ_FEATURES = frozenset({"clip-text", "long-clip", "clipcap", "ifcap", "sitta", "linear-probe"})
"""Tasks that train on embeddings."""
WHOLE_SHARE = 0.75
"""Share of the steps after which ``clip`` sees all patches, where it drops some before."""

Progress = Callable[[int, int], None]
Track = Callable[[str, Sequence[Mapping[str, float]]], None]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One thing to train."""

    task: TaskName
    arm: ArmName
    seed: int
    dual_projection: bool = False

    @property
    def name(self) -> str:
        """``<task>.<arm>.seed<k>``, with ``+dual`` appended for dual projection; also the cell's folder."""
        return f"{self.task}.{self.arm}.seed{self.seed}" + "+dual" * self.dual_projection


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the stage has to know of a task.

    Attributes:
        build: Prepares a cell for the training loop.
        arms: Arms it can be trained on.
        dual: Whether it has a head that dual projection applies to.
        image_encoder: What embeds images for the result: ``f_r``, or the model it trained itself.
        needs_clip: Whether it starts from ``model.clip``.
        fitted: Whether it is fitted in closed form when it is built, without steps.
        settings: Keys of ``train`` that matter to it and to those tasks alone that list them too; a key that no task
            lists matters to every cell.
        shared: Whether the processes of ``torchrun`` compute each step together.
    """

    build: Callable[[Inputs, Cell], Job]
    arms: frozenset[str]
    dual: bool = False
    image_encoder: Literal["f_r", "own"] = "f_r"
    needs_clip: bool = True
    fitted: bool = False
    settings: frozenset[str] = frozenset()
    shared: bool = False


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
        ("align", aligned, {c.arm for c in wanted if _reads_aligned(c)}),
    ):
        if users and given is None:
            raise InputError(
                f"train.arms: {sorted(users)[0]} needs the {needed} artifact and there is none",
                hint=f"Run `gmail {needed}` first, or leave the arm out with --set train.arms=...",
            )
    matter = {name for cell in wanted for name in _settings_of(cell, profile)} | {*_SETTINGS_OF_CELLS}
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
    others |= {name for arm, own in _SETTINGS_OF_ARMS.items() for name in own if arm != cell.arm}
    every = settings(profile.train)
    return {name: value for name, value in every.items() if name not in {*others, *_SETTINGS_OF_CELLS}}


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
    inputs = {"data": _read(profile).fingerprint}
    if generated:
        inputs["generated"] = generated
    if aligned and any(map(_reads_aligned, wanted)):
        inputs["aligned"] = aligned
    models = {}
    if "clip" in tasks and train.architecture:
        chosen["architecture"] = _architecture(train.architecture)
    if any(TASKS[task].needs_clip for task in tasks if task != "clip" or not train.architecture):
        from gmail_cli.components.encoders import model_digest

        models["clip"] = model_digest(profile.model.clip, revision=profile.model.revision)
    if "latent-diffusion" in tasks:
        from gmail_cli.components.generative import autoencoder_folder

        models["autoencoder"] = folder_digest(autoencoder_folder(train.autoencoder))
        del chosen["autoencoder"]
    if tasks & {"clipcap", "ifcap", "sitta", "llava"}:
        models["lm"] = _lm_digest(train.lm, train.lm_revision)
        del chosen["lm"], chosen["lm_revision"]
    if train.conversations and "conversations" in chosen:
        inputs["conversations"] = file_sha256(require_file(train.conversations, key="train.conversations"))
        del chosen["conversations"]
    return StageKey(stage="train", settings=chosen, inputs=inputs, models=models, seed=profile.seed)


def features(profile: Profile, *, generated: Artifact | None = None, aligned: Artifact | None = None) -> list[Features]:
    """What `run` reads of f_r and f_g: their embeddings of the images that the arms of its cells show."""
    import torch

    from gmail_cli.components.arms import SHOWN

    material = _material(profile, None, None, device=torch.device("cpu"), generated=generated, aligned=aligned)
    views: dict[ViewName, None] = {}
    for cell in cells(profile):
        if cell.task in READ_FEATURES and cell.arm != "none":
            shown = [view for view in SHOWN[cell.arm] if view != "texts"]
            views |= dict.fromkeys((*shown, "real") if cell.dual_projection else shown)
    return [_features(profile, view, material.identities(view), aligned=aligned) for view in views]


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
    with workspace.open(plan_key(profile, **given)) as slot:
        if slot.done:
            return slot.artifact
        _take_earlier(reusable(profile, workspace, **given), workspace, slot)
        device = _device(profile)
        material = _material(profile, workspace, slot, device=device, generated=generated, aligned=aligned)
        inputs = Inputs(profile=profile, material=material, device=device, scratch=slot.scratch)
        total = sum(_steps(cell, profile) for cell in wanted)
        rows: list[dict[str, Any]] = []
        finished = _finished(wanted, slot)
        for cell in wanted:
            done = sum(row["steps"] for row in rows)
            report = (lambda step, _, done=done: progress(done + step, total)) if progress else None
            if parallel.ranks().rank == 0:
                rows.append(_train(cell, inputs, slot, progress=report, track=track))
            elif TASKS[cell.task].shared and _steps(cell, profile) and cell not in finished:
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


def _steps(cell: Cell, profile: Profile) -> int:
    return 0 if cell.arm == "none" or TASKS[cell.task].fitted else profile.train.steps


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
    steps = _steps(cell, inputs.profile)
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
    from gmail_cli.components.loop import fit

    profile, task, steps = inputs.profile, TASKS[cell.task], _steps(cell, inputs.profile)
    shared, first = task.shared and steps > 0, parallel.ranks().rank == 0
    if shared and not first:
        parallel.barrier()
    job = task.build(inputs, cell)
    if shared and first:
        parallel.barrier()
    if not steps:
        return job, []
    curve = fit(
        job.module,
        loss=_in_precision(job.loss, profile, device=inputs.device),
        rows=job.rows,
        recipe=_recipe(cell, profile),
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


def _recipe(cell: Cell, profile: Profile) -> Recipe:
    from gmail_cli.components.loop import Recipe, seed_from

    train = profile.train
    first, second, in_two = train.steps, train.lr, False
    if cell.task == "llava":
        first, second, in_two = round(train.pretrain_share * train.steps), train.instruct_lr or train.lr, True
    elif cell.task == "long-clip" and train.positions == "rotary":
        first, in_two = round(train.distil_share * train.steps), True
    return Recipe(
        steps=train.steps,
        batch_size=train.batch_size,
        lr=train.lr if first else second,
        restart=first if in_two else 0,
        restart_lr=second,
        weight_decay=train.weight_decay,
        schedule=train.schedule,
        cycles=train.cycles,
        warmup=train.warmup,
        clip_norm=train.clip_norm or None,
        ema=train.ema or None,
        seed=seed_from("train", profile.seed, cell.seed),
    )


# -- what tasks are built from ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a task is built from: the profile, the data and encoders, and where to compute."""

    profile: Profile
    material: Material
    device: torch.device
    scratch: Callable[[str], Path]


def _device(profile: Profile) -> torch.device:
    import torch

    if profile.runtime.threads:
        torch.set_num_threads(profile.runtime.threads)
    name = profile.runtime.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if profile.train.precision == "bf16" and name == "cpu":
        raise UsageError("train.precision = 'bf16' is some 80 times slower on a CPU", hint="Use fp32.")
    return torch.device(name)


def _material(
    profile: Profile,
    workspace: Workspace | None,
    slot: Slot | None,
    *,
    device: torch.device,
    generated: Artifact | None,
    aligned: Artifact | None,
) -> Material:
    """What is trained on; without a workspace and a slot only to ask which images it has."""
    from gmail_cli.components.arms import Material
    from gmail_cli.components.encoders import Clip, describe_device, load_clip
    from gmail_cli.components.images import GeneratedSet

    def f_g() -> Clip:
        assert aligned is not None, "plan_key has checked it"
        return load_clip(aligned.folder("clip"), device=device)

    def kept_features(view: ViewName, identities: Sequence[str], embed: frozen.Embed) -> np.ndarray:
        assert workspace is not None
        assert slot is not None
        wanted = _features(profile, view, identities, aligned=aligned)
        return frozen.load(wanted, workspace, slot, embed=embed, device=describe_device(device))

    def kept_pixels(
        name: str, shape: tuple[int, ...], dtype: str, fill: Callable[[int, int], np.ndarray]
    ) -> np.ndarray:
        assert workspace is not None
        assert slot is not None
        first = workspace.features.open(slot.key) if workspace.features else slot
        return _cached(first, name, shape, dtype, fill)

    return Material(
        _read(profile),
        generated=GeneratedSet.load(generated.path) if generated else None,
        kinds=profile.train.kinds,
        f_r=lambda: load_clip(profile.model.clip, revision=profile.model.revision, device=device),
        f_g=f_g,
        mix_ratio=profile.train.mix_ratio,
        device=device,
        workers=profile.runtime.workers,
        cache=kept_pixels,
        features=kept_features,
    )


def _features(profile: Profile, view: ViewName, images: Sequence[str], *, aligned: Artifact | None) -> Features:
    from gmail_cli.components.encoders import model_digest

    name, what = profile.model.clip, "real images" if view == "real" else "generated images"
    if view != "aligned":
        digest = model_digest(name, revision=profile.model.revision)
    else:
        assert aligned is not None, "plan_key has checked it"
        name, digest = f"f_g of align/{aligned.digest[:12]}", model_digest(aligned.folder("clip"))
    return Features(images=tuple(images), what=what, encoder=name, encoder_digest=digest)


def _cached(
    slot: Slot, name: str, shape: tuple[int, ...], dtype: str, fill: Callable[[int, int], np.ndarray]
) -> np.ndarray:
    """An array computed in chunks of rows, in the slot's scratch; continues where an interrupted run stopped."""
    import numpy as np
    import torch

    path, marker = slot.scratch(f"{name}.npy"), slot.checkpoints(f"{name}.done")
    held = marker.load()
    done = int(held["rows"]) if held and path.exists() else 0
    array = np.lib.format.open_memmap(path, mode="r+" if done else "w+", dtype=dtype, shape=shape)
    for start in range(done, shape[0], CHUNK):
        stop = min(start + CHUNK, shape[0])
        array[start:stop] = fill(start, stop)
        array.flush()
        marker.save({"rows": torch.tensor(stop)})
    return np.load(path, mmap_mode="c", allow_pickle=False)


@functools.lru_cache(maxsize=1)
def _read(profile: Profile) -> Dataset:
    """The training set; read once for the plan and the work."""
    return sources.read(sources.source(profile, part="train"))


def _reads_aligned(cell: Cell) -> bool:
    return cell.arm == "generated-aligned" or (cell.arm == "mixed" and "generated-aligned" in TASKS[cell.task].arms)


# -- tasks -----------------------------------------------------------------------------------------------------


def _clip_text(inputs: Inputs, cell: Cell) -> Job:
    from gmail_cli.components.tasks import clip_text_job

    arm = None if cell.arm == "none" else inputs.material.embedded(cell.arm)
    return clip_text_job(inputs.material.clip, inputs.material.pairs, arm)


def _long_clip(inputs: Inputs, cell: Cell) -> Job:
    from gmail_cli.components import longtext

    train, material = inputs.profile.train, inputs.material
    if train.kinds != ("long",):
        raise UsageError(
            f"train.kinds = {list(train.kinds)}: long-clip trains on long captions",
            hint='Use --set train.kinds=["long"]; the short ones come in by themselves (train.short_texts).',
        )
    shorts = None
    if train.short_weight:
        captions: dict[str, list[str]] = {}
        for caption in material.dataset.captions_of_kind("short"):
            captions.setdefault(caption.owner, []).append(caption.text)
        shorts = longtext.short_texts(
            material.pairs, owners=material.pairs.records, captions=captions, choice=train.short_texts
        )
    rotary = train.positions == "rotary" and cell.arm != "none"
    clip = longtext.lengthened(
        material.clip,
        length=train.context_length,
        keep=train.keep_positions,
        positions="rotary" if rotary else "stretched",
    )
    return longtext.long_clip_job(
        clip,
        material.pairs,
        None if cell.arm == "none" else material.embedded(cell.arm),
        shorts=shorts,
        short_weight=train.short_weight,
        components=train.coarse_components,
        teacher=material.clip if rotary else None,
        distilled=_recipe(cell, inputs.profile).restart,
    )


def _clip(inputs: Inputs, cell: Cell) -> Job:
    from gmail_cli.components.encoders import build_clip
    from gmail_cli.components.loop import seed_from
    from gmail_cli.components.tasks import clip_job

    train = inputs.profile.train
    if not train.architecture and train.vocabulary:
        raise UsageError(
            f"train.vocabulary = {train.vocabulary} replaces the tokenizer of {inputs.profile.model.clip}",
            hint="Set train.architecture to train from random weights, or train.vocabulary to 0.",
        )
    if train.architecture:
        config = _architecture(train.architecture)
        tokenizer = None
        if train.vocabulary:
            tokenizer, config = _learned_tokenizer(inputs, config)
        seed = seed_from("clip", inputs.profile.seed, cell.seed)
        clip = build_clip(config, seed=seed, name=cell.name, tokenizer=tokenizer, device=inputs.device)
    else:
        clip = inputs.material.clip
    return clip_job(
        clip,
        inputs.material.pairs,
        inputs.material.pixels(cell.arm, clip.preprocess),
        augment=train.augment,
        patch_dropout=train.patch_dropout,
        whole_from=round(WHOLE_SHARE * train.steps),
        class_weight=train.class_weight,
    )


def _learned_tokenizer(inputs: Inputs, config: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """An open_clip tokenizer learned from the captions, and the config with its vocabulary."""
    from open_clip.tokenizer import HFTokenizer

    from gmail_cli.components.tokenizer import save_tokenizer, train_tokenizer

    folder = inputs.scratch("tokenizer/vocab.json").parent
    learned = train_tokenizer(sorted(set(inputs.material.pairs.texts)), entries=inputs.profile.train.vocabulary)
    save_tokenizer(learned, folder)
    text = {**config["model_cfg"]["text_cfg"], "vocab_size": len(learned), "hf_tokenizer_name": "tokenizer"}
    tokenizer = HFTokenizer(str(folder), text.get("context_length", 77))
    return tokenizer, {**config, "model_cfg": {**config["model_cfg"], "text_cfg": text}}


def _clipcap(inputs: Inputs, cell: Cell) -> Job:
    import torch

    from gmail_cli.components.heads import Captioner, load_lm
    from gmail_cli.components.loop import seed_from
    from gmail_cli.components.tasks import clipcap_job

    train = inputs.profile.train
    lm, tokenizer = load_lm(train.lm, revision=train.lm_revision)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_from("clipcap", inputs.profile.seed, cell.seed))
        captioner = Captioner(
            inputs.material.clip.dim,
            lm=lm,
            tokenizer=tokenizer,
            lm_name=train.lm,
            lm_revision=train.lm_revision,
            prefix_length=train.prefix_length,
            mapping=train.mapping,
            tune_lm=train.tune_lm,
            dual=cell.dual_projection,
        )
    arm = inputs.material.embedded(cell.arm)
    if cell.arm == "texts":
        captioner.memory = arm.views[0].values[: train.text_memory] if train.text_memory else None
        arm = replace(arm, noise=train.text_noise)
    return clipcap_job(
        captioner.to(inputs.device),
        inputs.material.pairs,
        arm,
        meeting=inputs.material.meeting(cell.arm) if cell.dual_projection else None,
        caption_tokens=train.caption_tokens,
    )


def _ifcap(inputs: Inputs, cell: Cell) -> Job:
    import torch

    from gmail_cli.components import ifcap
    from gmail_cli.components.heads import load_lm
    from gmail_cli.components.loop import seed_from

    train, material = inputs.profile.train, inputs.material
    lm, tokenizer = load_lm(train.lm, revision=train.lm_revision)
    captions = list(dict.fromkeys(material.pairs.texts))[: train.caption_memory or None]
    if len(captions) < 2:
        raise UsageError(f"train.caption_memory leaves {len(captions)} caption to retrieve from", hint="Keep more.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_from("ifcap", inputs.profile.seed, cell.seed))
        captioner = ifcap.RetrievalCaptioner(
            material.clip.dim,
            captions=captions,
            vectors=material.embedded("texts").views[0].values[: len(captions)].clone(),
            retrieved=train.retrieved_captions,
            filtered=train.filtered_captions,
            lm_revision=train.lm_revision,
            lm=lm,
            tokenizer=tokenizer,
            lm_name=train.lm,
            prefix_length=train.prefix_length,
            mapping=train.mapping,
            tune_lm=train.tune_lm,
        )
    arm, texts = material.embedded(cell.arm), cell.arm == "texts"
    return ifcap.ifcap_job(
        captioner.to(inputs.device),
        material.pairs,
        replace(arm, noise=train.text_noise) if texts else arm,
        caption_tokens=train.caption_tokens,
        retrieval_noise=train.retrieval_noise if texts else 0.0,
        word_drop=train.word_drop,
    )


def _sitta(inputs: Inputs, cell: Cell) -> Job:
    from gmail_cli.components import sitta
    from gmail_cli.components.heads import load_lm
    from gmail_cli.components.loop import seed_from

    train, material = inputs.profile.train, inputs.material
    lm, tokenizer = load_lm(train.lm, revision=train.lm_revision)
    about = {
        "lm": train.lm,
        "lm_revision": train.lm_revision,
        "encoder": material.clip.digest,
        "tokens": train.retrieved_tokens,
        "orders": train.token_orders,
    }
    model = sitta.LinearMap(material.clip.dim, lm=lm, tokenizer=tokenizer, about=about).to(inputs.device)
    seed = seed_from("sitta", inputs.profile.seed, cell.seed)
    return sitta.sitta_job(model, material.pairs, material.embedded(cell.arm), how=train.linear_map, seed=seed)


def _llava(inputs: Inputs, cell: Cell) -> Job:
    import torch

    from gmail_cli.components import llava
    from gmail_cli.components.conversations import read_conversations
    from gmail_cli.components.heads import load_lm
    from gmail_cli.components.loop import seed_from

    profile, train, material = inputs.profile, inputs.profile.train, inputs.material
    if train.conversations:
        read, _ = read_conversations(Path(train.conversations), on_bad=profile.data.on_bad)
        conversations = llava.covered(read, material.pairs, on_bad=profile.data.on_bad)
    else:
        conversations = llava.captions_as_conversations(material.pairs, prompt=train.prompt)

    def shown(arm: ArmName) -> Arm:
        return material.embedded(arm) if train.visual == "pooled" else material.patches(arm, grid=train.visual_grid)

    arm, recipe = shown(cell.arm), _recipe(cell, profile)
    values = arm.views[0].values
    about = {
        "lm": train.lm,
        "lm_revision": train.lm_revision,
        "image_tokens": values.shape[1] if values.ndim == 3 else 1,
        "visual": train.visual,
        "visual_grid": train.visual_grid,
        "encoder": material.clip.digest,
        "prompt": train.prompt,
        "instructed": recipe.restart < recipe.steps,
    }
    lm, tokenizer = load_lm(
        train.lm, revision=train.lm_revision, dtype=torch.bfloat16 if train.precision == "bf16" else torch.float32
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_from("llava", profile.seed, cell.seed))
        model = llava.Llava(
            values.shape[-1],
            lm=lm,
            tokenizer=tokenizer,
            about=about,
            dual=cell.dual_projection,
            lora_rank=train.lora_rank if about["instructed"] else 0,
            lora_alpha=train.lora_alpha,
        )
    return llava.llava_job(
        model.to(inputs.device).eval(),
        material.pairs,
        arm,
        real=shown("real") if cell.dual_projection else None,
        conversations=conversations,
        recipe=recipe,
        caption_tokens=train.caption_tokens,
        conversation_tokens=train.conversation_tokens,
    )


def _linear_probe(inputs: Inputs, cell: Cell) -> Job:
    from gmail_cli.components.heads import Probe, save_head
    from gmail_cli.components.loop import Job, batch_indices, seed_from
    from gmail_cli.components.tasks import few_shots, probe_job, zero_shot_probe

    if cell.arm == "none":
        zero_shot = zero_shot_probe(inputs.material.clip, inputs.material.pairs)
        return Job(
            module=zero_shot,
            loss=lambda rows, step: zero_shot.linear.weight.sum(),
            rows=0,
            export=lambda folder: save_head(zero_shot, folder),
        )
    probe = Probe(inputs.material.clip.dim, inputs.material.pairs.class_names, dual=cell.dual_projection).to(
        inputs.device
    )
    meeting = inputs.material.meeting(cell.arm) if cell.dual_projection else None
    pairs, train, rows = inputs.material.pairs, inputs.profile.train, None
    if train.shots:
        few = few_shots(pairs, train.shots, seed=seed_from("shots", inputs.profile.seed, cell.seed))
        seed = _recipe(cell, inputs.profile).seed

        def rows(step: int) -> np.ndarray:
            return few[batch_indices(len(few), train.batch_size, seed=seed, step=step)]

    return probe_job(probe, pairs, inputs.material.embedded(cell.arm), meeting=meeting, rows=rows)


def _autoencoder(inputs: Inputs, cell: Cell) -> Job:
    from gmail_cli.components.generative import autoencoder_job
    from gmail_cli.components.loop import seed_from

    train = inputs.profile.train
    return autoencoder_job(
        _squares(inputs, cell),
        rows=len(inputs.material.pairs),
        side=train.image_size,
        steps=train.steps,
        seed=seed_from(inputs.profile.seed, cell.seed),
        device=inputs.device,
    )


def _latent_diffusion(inputs: Inputs, cell: Cell) -> Job:
    from gmail_cli.components.generative import (
        encode_latents,
        latent_diffusion_job,
        load_autoencoder,
        text_encoder_of,
    )
    from gmail_cli.components.loop import seed_from

    autoencoder = load_autoencoder(inputs.profile.train.autoencoder).to(inputs.device)
    clip, arm = inputs.material.clip, _squares(inputs, cell)
    views = tuple(replace(view, values=encode_latents(autoencoder, view.values)) for view in arm.views)
    return latent_diffusion_job(
        inputs.material.pairs,
        replace(arm, views=views),
        autoencoder=autoencoder,
        text_encoder=text_encoder_of(clip.model),
        tokenizer=_hf_tokenizer(inputs, cell),
        seed=seed_from(inputs.profile.seed, cell.seed),
        device=inputs.device,
    )


def _causal_lm(inputs: Inputs, cell: Cell) -> Job:
    from gmail_cli.components.generative import causal_lm_job
    from gmail_cli.components.loop import seed_from

    return causal_lm_job(
        inputs.material.pairs,
        tokenizer=_hf_tokenizer(inputs, cell),
        seed=seed_from(inputs.profile.seed, cell.seed),
        device=inputs.device,
    )


def _squares(inputs: Inputs, cell: Cell) -> Arm:
    """The images of a cell's arm at ``train.image_size``."""
    from gmail_cli.components.images import Preprocess

    return inputs.material.pixels(cell.arm, Preprocess(size=inputs.profile.train.image_size))


def _hf_tokenizer(inputs: Inputs, cell: Cell) -> Any:
    """The transformers tokenizer of ``model.clip``."""
    tokenizer = getattr(inputs.material.clip.tokenizer, "tokenizer", None)
    if tokenizer is None:
        raise UsageError(
            f"model.clip = {inputs.profile.model.clip!r} has no transformers tokenizer, which {cell.task} saves",
            hint="Take a CLIP with its own tokenizer files, such as tiny.",
        )
    return tokenizer


_EMBEDDED = frozenset({"real", "generated-naive", "generated-aligned", "mixed"})
_PIXELS = frozenset({"real", "generated-naive", "mixed"})
_SETTINGS_OF_CELLS = ("tasks", "arms", "seeds", "dual_projection")
"""Keys of ``train`` that say which cells there are."""
_SETTINGS_OF_ARMS: Mapping[ArmName, frozenset[str]] = {
    "mixed": frozenset({"mix_ratio"}),
    "texts": frozenset({"text_noise", "text_memory", "retrieval_noise"}),
}
"""Keys of ``train`` that matter to one arm alone."""
_OF_LM = frozenset({"lm", "lm_revision"})
_OF_CAPTIONER = _OF_LM | {"caption_tokens", "tune_lm", "prefix_length", "mapping", "text_noise"}

TASKS: Mapping[TaskName, Task] = {
    "clip-text": Task(build=_clip_text, arms=_EMBEDDED | {"none"}, shared=True),
    "long-clip": Task(
        build=_long_clip,
        arms=_EMBEDDED | {"none"},
        shared=True,
        settings=frozenset(
            {"context_length", "keep_positions", "short_weight", "short_texts", "coarse_components"}
            | {"positions", "distil_share"},
        ),
    ),
    "clip": Task(
        build=_clip,
        arms=_PIXELS,
        image_encoder="own",
        shared=True,
        settings=frozenset({"architecture", "vocabulary", "augment", "patch_dropout", "class_weight"}),
    ),
    "clipcap": Task(
        build=_clipcap,
        arms=_EMBEDDED | {"texts"},
        dual=True,
        shared=True,
        settings=_OF_CAPTIONER | {"text_memory"},
    ),
    "ifcap": Task(
        build=_ifcap,
        arms=_EMBEDDED | {"texts"},
        settings=_OF_CAPTIONER
        | {"caption_memory", "retrieved_captions", "retrieval_noise", "filtered_captions", "word_drop"},
    ),
    "sitta": Task(
        build=_sitta,
        arms=_EMBEDDED,
        fitted=True,
        settings=_OF_LM | {"linear_map", "retrieved_tokens", "token_orders"},
    ),
    "llava": Task(
        build=_llava,
        arms=_EMBEDDED,
        dual=True,
        shared=True,
        settings=_OF_LM
        | {"visual", "visual_grid", "pretrain_share", "conversations", "prompt", "conversation_tokens"}
        | {"caption_tokens", "instruct_lr", "lora_rank", "lora_alpha"},
    ),
    "linear-probe": Task(build=_linear_probe, arms=_EMBEDDED | {"none"}, dual=True, settings=frozenset({"shots"})),
    "autoencoder": Task(build=_autoencoder, arms=_PIXELS, needs_clip=False, settings=frozenset({"image_size"})),
    "latent-diffusion": Task(build=_latent_diffusion, arms=_PIXELS, settings=frozenset({"image_size", "autoencoder"})),
    "causal-lm": Task(build=_causal_lm, arms=frozenset({"real"})),
}


def _architecture(ref: str) -> dict[str, Any]:
    """The open_clip config that ``train.architecture`` names."""
    if ref.endswith(".json"):
        path = Path(ref) if Path(ref).is_file() else profile_folder() / ref
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"train.architecture = {ref!r} cannot be read: {error}") from error
        if not isinstance(config, dict) or "model_cfg" not in config:
            raise InputError(f"{ref} has no model_cfg", hint="Write it like an open_clip_config.json.")
        return {"preprocess_cfg": {}, **config}
    import open_clip

    found = open_clip.get_model_config(ref)
    if found is None:
        raise UsageError(
            f"train.architecture = {ref!r} is no model that open_clip knows",
            hint="Give the path of a JSON file, or a name such as ViT-B-32.",
        )
    return {"model_cfg": found, "preprocess_cfg": {}}


def _lm_digest(ref: str, revision: str) -> str:
    from gmail_cli.components.heads import SHIPPED_LMS

    folder = SHIPPED_LMS.get(ref, Path(ref))
    if folder.is_dir():
        return folder_digest(folder)
    if not revision:
        raise UsageError(
            f"train.lm = {ref!r} is no folder, and a hub id needs train.lm_revision",
            hint="Set train.lm_revision to a commit of the model's repository.",
        )
    return f"{ref}@{revision}"
