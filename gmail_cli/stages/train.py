"""``gmail train``: downstream models on real or generated images, every cell for the same steps and captions.

A cell is one (task, arm, seed). Images are embedded (or decoded) once per arm and kept beside the cells while the
stage works; a finished cell is kept when the stage is started again, an unfinished one resumes from its checkpoint.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gmail_cli.artifacts import Artifact, Slot, StageKey, Workspace, folder_digest
from gmail_cli.errors import InputError, UsageError
from gmail_cli.profile import ArmName, Data, Profile, TaskName, settings, shipped_folder

if TYPE_CHECKING:
    import numpy as np

    from gmail_cli.components.captions import Dataset
    from gmail_cli.components.encoders import Clip
    from gmail_cli.components.images import GeneratedSet, Preprocess
    from gmail_cli.components.loop import Job, Recipe
    from gmail_cli.components.pairs import Candidates, Pairs
    from gmail_cli.components.tasks import Arm, Meeting, View

VERSION = 1
CELLS = "cells.json"
RECORD = "cell.json"
METRICS = "metrics.jsonl"
CHUNK = 2048
"""Images embedded or decoded between two points to resume from."""
WHOLE_SHARE = 0.75
"""Share of the steps after which ``clip`` sees all patches, where it drops some before."""

Progress = Callable[[int, int], None]
ImageBytes = Callable[[int], bytes]


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
    """

    build: Callable[[Inputs, Cell], Job]
    arms: frozenset[str]
    dual: bool = False
    image_encoder: Literal["f_r", "own"] = "f_r"
    needs_clip: bool = True


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
            hint="Add clipcap or linear-probe, or turn it off.",
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
    tasks = {cell.task for cell in wanted}
    train = profile.train
    for needed, given, users in (
        ("generate", generated, arms & {"generated-naive", "generated-aligned", "mixed"}),
        ("align", aligned, {c.arm for c in wanted if _reads_aligned(c)}),
    ):
        if users and given is None:
            raise InputError(
                f"train.arms: {sorted(users)[0]} needs {needed} artifact and there is none".replace(
                    "needs ", "needs the "
                ),
                hint=f"Run `gmail {needed}` first, or leave the arm out with --set train.arms=...",
            )
    chosen = settings(train)
    inputs = {"data": _read(profile.data, profile.seed).fingerprint}
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
    if "clipcap" in tasks:
        models["lm"] = _lm_digest(train.lm, train.lm_revision)
        del chosen["lm"], chosen["lm_revision"]
    return StageKey(stage="train", version=VERSION, settings=chosen, inputs=inputs, models=models, seed=profile.seed)


def run(
    profile: Profile,
    workspace: Workspace,
    *,
    generated: Artifact | None = None,
    aligned: Artifact | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Train (or find) every cell a profile asks for.

    Args:
        profile: Sections used: ``train``, ``data``, ``model``, ``runtime``; and ``seed``.
        workspace: Where the artifact goes.
        generated: A generate artifact; needed by the generated arms. When given, every arm trains on the captions
            its images were drawn from.
        aligned: An align artifact (f_g); needed by ``generated-aligned`` and ``mixed``.
        progress: Called with (steps done, steps of all cells).

    Returns:
        The artifact: ``cells.json`` (a row per cell: name, task, arm, seed, dual_projection, folder, image_encoder,
        steps, captions, trained_parameters, final_loss, and the task's own metrics), and a folder per cell.

    Raises:
        InputError: Data or artifacts that are missing or do not fit; a loss that is not finite.
        SetupError: A model or device this machine lacks.
        UsageError: Settings that do not fit each other.
    """
    wanted = cells(profile)
    key = plan_key(
        profile, generated=generated.digest if generated else None, aligned=aligned.digest if aligned else None
    )
    with workspace.open(key) as slot:
        if slot.done:
            return slot.artifact
        inputs = Inputs(profile, slot, generated=generated, aligned=aligned)
        total = sum(_steps(cell, profile) for cell in wanted)
        rows: list[dict[str, Any]] = []
        for cell in wanted:
            done = sum(row["steps"] for row in rows)
            report = (lambda step, _, done=done: progress(done + step, total)) if progress else None
            rows.append(_train(cell, inputs, progress=report))
        slot.write_json(CELLS, rows)
        summary = {"cells": len(rows), "captions": len(inputs.pairs), "steps": profile.train.steps}
        return slot.commit(summary=summary, device=inputs.device_name)


def _steps(cell: Cell, profile: Profile) -> int:
    return 0 if cell.arm == "none" else profile.train.steps


def _train(cell: Cell, inputs: Inputs, *, progress: Progress | None) -> dict[str, Any]:
    """Train one cell, or take it from an interrupted run; returns its row of ``cells.json``."""
    from gmail_cli.components.loop import fit, trained_parameters

    slot, profile = inputs.slot, inputs.profile
    record = f"{cell.name}/{RECORD}"
    if slot.has(record):
        return dict(json.loads(slot.path(record).read_text(encoding="utf-8")))
    job = TASKS[cell.task].build(inputs, cell)
    steps = _steps(cell, profile)
    curve = []
    checkpoints = slot.checkpoints(f"{cell.name}.checkpoint")
    if steps:
        curve = fit(
            job.module,
            loss=inputs.in_precision(job.loss),
            rows=job.rows,
            recipe=_recipe(cell, profile),
            checkpoints=checkpoints,
            checkpoint_seconds=profile.runtime.checkpoint_seconds,
            progress=progress,
        )
    slot.write_folder(cell.name, job.export)
    slot.write_jsonl(f"{cell.name}/{METRICS}", curve)
    row = asdict(cell) | {
        "name": cell.name,
        "folder": cell.name,
        "image_encoder": TASKS[cell.task].image_encoder,
        "steps": steps,
        "captions": len(inputs.pairs),
        "trained_parameters": trained_parameters(job.module) if steps else 0,
        "final_loss": curve[-1]["loss"] if curve else None,
        "metrics": job.evaluate() if job.evaluate else {},
    }
    slot.write_json(record, row)
    checkpoints.remove()
    return row


def _recipe(cell: Cell, profile: Profile) -> Recipe:
    from gmail_cli.components.loop import Recipe, seed_from

    train = profile.train
    return Recipe(
        steps=train.steps,
        batch_size=train.batch_size,
        lr=train.lr,
        weight_decay=train.weight_decay,
        schedule=train.schedule,
        cycles=train.cycles,
        warmup=train.warmup,
        clip_norm=train.clip_norm or None,
        ema=train.ema or None,
        seed=seed_from("train", profile.seed, cell.seed),
    )


# -- what tasks are built from ---------------------------------------------------------------------------------


class Inputs:
    """Data and models of the stage, each loaded when a task asks for it and shared by all cells."""

    def __init__(self, profile: Profile, slot: Slot, *, generated: Artifact | None, aligned: Artifact | None) -> None:
        import torch

        self.profile, self.slot = profile, slot
        self._generated, self._aligned = generated, aligned
        if profile.runtime.threads:
            torch.set_num_threads(profile.runtime.threads)
        device = profile.runtime.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        self.device_name = f"cuda: {torch.cuda.get_device_name()}" if device == "cuda" else device
        if profile.train.precision == "bf16" and device == "cpu":
            raise UsageError("train.precision = 'bf16' is some 80 times slower on a CPU", hint="Use fp32.")

    def in_precision(self, loss: Callable[..., Any]) -> Callable[..., Any]:
        """The loss under autocast where the profile asks for bf16."""
        import torch

        def cast(*arguments: Any) -> Any:
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                return loss(*arguments)

        return loss if self.profile.train.precision == "fp32" else cast

    @functools.cached_property
    def dataset(self) -> Dataset:
        """The real captions and images."""
        return _read(self.profile.data, self.profile.seed)

    @functools.cached_property
    def generated(self) -> GeneratedSet | None:
        """The generated images."""
        from gmail_cli.components.images import GeneratedSet

        return GeneratedSet.load(self._generated.path) if self._generated else None

    @functools.cached_property
    def pairs(self) -> Pairs:
        """The captions that every arm trains on."""
        from gmail_cli.components.pairs import pair

        rows = self.generated.rows if self.generated else None
        return pair(self.dataset, generated=rows, kinds=self.profile.train.kinds)

    @functools.cached_property
    def clip(self) -> Clip:
        """f_r."""
        from gmail_cli.components.encoders import load_clip

        model = self.profile.model
        return load_clip(model.clip, revision=model.revision, device=self.device)

    @functools.cached_property
    def aligned_clip(self) -> Clip:
        """f_g."""
        from gmail_cli.components.encoders import load_clip

        assert self._aligned is not None, "plan_key has checked it"
        clip = load_clip(self._aligned.folder("clip"), device=self.device)
        if clip.dim != self.clip.dim:
            raise InputError(
                f"f_g of {self._aligned.path} embeds in {clip.dim} dimensions, f_r in {self.clip.dim}",
                hint="Align from the same model.clip.",
            )
        return clip

    def embedded(self, arm: ArmName) -> Arm:
        """Embeddings of an arm's images: real through f_r, naive through f_r, aligned through f_g."""
        from gmail_cli.components.tasks import Arm

        views = {
            "real": ["real"],
            "generated-naive": ["naive"],
            "generated-aligned": ["aligned"],
            "mixed": ["real", "aligned"],
        }[arm]
        return Arm(tuple(self.embedding_view(view) for view in views), share=self.profile.train.mix_ratio)

    def meeting(self, arm: ArmName) -> Meeting | None:
        """Real and generated embeddings of the same captions, for the arms without real images."""
        from gmail_cli.components.tasks import Meeting

        if arm in ("real", "mixed"):
            return None
        view = self.embedding_view("naive" if arm == "generated-naive" else "aligned")
        return Meeting.of(self.embedding_view("real"), view, self.pairs)

    @functools.lru_cache(maxsize=3)  # noqa: B019 - lives as long as the stage
    def embedding_view(self, view: Literal["real", "naive", "aligned"]) -> View:
        """Embeddings of the images that a view shows, computed once and kept in the slot's scratch."""
        import torch

        from gmail_cli.components.encoders import embed_images
        from gmail_cli.components.tasks import View

        clip = self.aligned_clip if view == "aligned" else self.clip
        image_bytes, rows, candidates = self._shown(real=view == "real")
        workers = self.profile.runtime.workers

        def fill(start: int, stop: int) -> np.ndarray:
            return embed_images(clip, lambda i: image_bytes(rows[start + i]), stop - start, workers=workers)

        values = torch.from_numpy(self._cached(f"embeddings/{view}", (len(rows), clip.dim), "float32", fill))
        return View(values.to(self.device), candidates, real=view == "real")

    def pixels(self, arm: ArmName, preprocess: Preprocess) -> Arm:
        """uint8 images of an arm (rows, size, size, 3), scaled and cropped; memory-mapped from the slot's scratch."""
        from gmail_cli.components.tasks import Arm

        flows = {"real": [True], "generated-naive": [False], "mixed": [True, False]}[arm]
        views = tuple(self._pixel_view(real, preprocess) for real in flows)
        return Arm(views, share=self.profile.train.mix_ratio)

    @functools.lru_cache(maxsize=2)  # noqa: B019 - lives as long as the stage
    def _pixel_view(self, real: bool, preprocess: Preprocess) -> View:
        import dataclasses

        import numpy as np
        import torch

        from gmail_cli.components.images import batches
        from gmail_cli.components.tasks import View

        plain = dataclasses.replace(preprocess, mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255))
        image_bytes, rows, candidates = self._shown(real=real)
        workers = self.profile.runtime.workers

        def fill(start: int, stop: int) -> np.ndarray:
            read = batches(
                lambda i: image_bytes(rows[start + i]),
                stop - start,
                preprocess=plain,
                batch_size=256,
                workers=workers,
            )
            return np.concatenate([batch.round().astype(np.uint8).transpose(0, 2, 3, 1) for batch in read])

        shape = (len(rows), plain.size, plain.size, 3)
        name = f"pixels/{'real' if real else 'generated'}-{plain.digest[:8]}"
        return View(torch.from_numpy(self._cached(name, shape, "uint8", fill)), candidates, real=real)

    def _shown(self, *, real: bool) -> tuple[ImageBytes, Sequence[int], Candidates]:
        """Images of a flow: their bytes, the rows that are shown, and the candidates counted among those."""
        source = self.dataset if real else self.generated
        candidates = self.pairs.real if real else self.pairs.generated
        if candidates is None or source is None:
            raise InputError(
                f"{self.dataset.name} lacks the real image of some caption that is trained on",
                hint="Give the images with data.train_images, or leave out the arms that need real ones.",
            )
        rows, among = candidates.used()
        return source.image_bytes, rows.tolist(), among

    def _cached(
        self, name: str, shape: tuple[int, ...], dtype: str, fill: Callable[[int, int], np.ndarray]
    ) -> np.ndarray:
        """An array computed in chunks of rows, in the slot's scratch; continues where an interrupted run stopped."""
        import numpy as np
        import torch

        path, marker = self.slot.scratch(f"{name}.npy"), self.slot.checkpoints(f"{name}.done")
        held = marker.load()
        done = int(held["rows"]) if held and path.exists() else 0
        array = np.lib.format.open_memmap(path, mode="r+" if done else "w+", dtype=dtype, shape=shape)
        for start in range(done, shape[0], CHUNK):
            stop = min(start + CHUNK, shape[0])
            array[start:stop] = fill(start, stop)
            array.flush()
            marker.save({"rows": torch.tensor(stop)})
        return np.load(path, mmap_mode="c", allow_pickle=False)


@functools.lru_cache(maxsize=2)
def _read(data: Data, seed: int) -> Dataset:
    from gmail_cli.components.captions import read

    return read(
        data.train,
        images=data.train_images or None,
        format=data.format,
        split=data.train_split or None,
        limit=data.train_limit or None,
        holdout=("train", data.holdout, seed) if data.holdout else None,
        on_bad=data.on_bad,
        scene_seed=data.scene_seed,
        scene_size=data.scene_size,
    )


def _reads_aligned(cell: Cell) -> bool:
    return cell.arm == "generated-aligned" or (cell.arm == "mixed" and "generated-aligned" in TASKS[cell.task].arms)


# -- tasks -----------------------------------------------------------------------------------------------------


def _clip_text(inputs: Inputs, cell: Cell) -> Job:
    from gmail_cli.components.tasks import clip_text_job

    arm = None if cell.arm == "none" else inputs.embedded(cell.arm)
    return clip_text_job(inputs.clip, inputs.pairs, arm)


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
        clip = inputs.clip
    return clip_job(
        clip,
        inputs.pairs,
        inputs.pixels(cell.arm, clip.preprocess),
        augment=train.augment,
        patch_dropout=train.patch_dropout,
        whole_from=round(WHOLE_SHARE * train.steps),
    )


def _learned_tokenizer(inputs: Inputs, config: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """An open_clip tokenizer learned from the captions, and the config with its vocabulary."""
    from open_clip.tokenizer import HFTokenizer

    from gmail_cli.components.tokenizer import save_tokenizer, train_tokenizer

    folder = inputs.slot.scratch("tokenizer/vocab.json").parent
    learned = train_tokenizer(sorted(set(inputs.pairs.texts)), entries=inputs.profile.train.vocabulary)
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
            inputs.clip.dim,
            lm=lm,
            tokenizer=tokenizer,
            lm_name=train.lm,
            prefix_length=train.prefix_length,
            mapping=train.mapping,
            tune_lm=train.tune_lm,
            dual=cell.dual_projection,
        )
    return clipcap_job(
        captioner.to(inputs.device),
        inputs.pairs,
        inputs.embedded(cell.arm),
        meeting=inputs.meeting(cell.arm) if cell.dual_projection else None,
        caption_tokens=train.caption_tokens,
    )


def _linear_probe(inputs: Inputs, cell: Cell) -> Job:
    from gmail_cli.components.heads import Probe, save_head
    from gmail_cli.components.loop import Job
    from gmail_cli.components.tasks import probe_job, zero_shot_probe

    if cell.arm == "none":
        zero_shot = zero_shot_probe(inputs.clip, inputs.pairs)
        return Job(
            module=zero_shot,
            loss=lambda rows, step: zero_shot.linear.weight.sum(),
            rows=0,
            export=lambda folder: save_head(zero_shot, folder),
        )
    probe = Probe(inputs.clip.dim, inputs.pairs.class_names, dual=cell.dual_projection).to(inputs.device)
    meeting = inputs.meeting(cell.arm) if cell.dual_projection else None
    return probe_job(probe, inputs.pairs, inputs.embedded(cell.arm), meeting=meeting)


_EMBEDDED = frozenset({"real", "generated-naive", "generated-aligned", "mixed"})
_PIXELS = frozenset({"real", "generated-naive", "mixed"})

TASKS: Mapping[TaskName, Task] = {
    "clip-text": Task(build=_clip_text, arms=_EMBEDDED | {"none"}),
    "clip": Task(build=_clip, arms=_PIXELS, image_encoder="own"),
    "clipcap": Task(build=_clipcap, arms=_EMBEDDED, dual=True),
    "linear-probe": Task(build=_linear_probe, arms=_EMBEDDED | {"none"}, dual=True),
}


def _architecture(ref: str) -> dict[str, Any]:
    """The open_clip config that ``train.architecture`` names."""
    if ref.endswith(".json"):
        path = Path(ref) if Path(ref).is_file() else shipped_folder() / ref
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
