"""``gmail generate``: one image file and one record for every (caption, k).

Images are drawn from captions (``source = "pipeline"``) or brought in from elsewhere (``source = "import"``). The plan
is cut into shards of about ``SHARD`` images. Each keeps a log of its records, appended in order after their images are
on disk, so an interrupted run continues after the last whole record and ends in the bytes of a run that was never
interrupted, and several processes (:func:`run_part`) may share the shards. At the end the logs are laid one after
another.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from gmail_cli.artifacts import (
    EXPORTED,
    Artifact,
    RowLog,
    Slot,
    StageKey,
    Waiting,
    Workspace,
    canonical_json,
    digest_of_list,
    export_files,
    file_sha256,
    folder_digest,
)
from gmail_cli.components import captions as reader
from gmail_cli.components import diffusion
from gmail_cli.errors import InputError, UsageError
from gmail_cli.profile import Generate, Profile, settings
from gmail_cli.stages import sources

if TYPE_CHECKING:
    import numpy as np

    from gmail_cli.components.captions import Caption, Dataset, Image

RECORDS = "records.jsonl"
REJECTED = "rejected.jsonl"
PER_FOLDER = 1000
"""Images in one folder."""
IMPORT_CHUNK = 64
"""Images brought in between two writes of their records."""
SHARD = 256
"""Images that one process works on, up to whole batches."""
ACROSS_DEVICES = 2.0
"""Mean absolute difference of pixels, of 255, that another kind of device may make."""
_PIPELINE_ONLY = (
    *("per_caption", "lora_scale", "dtype", "scheduler", "steps", "guidance", "prompt_template"),
    *("negative_prompt", "height", "width", "batch_size", "format", "quality"),
)
_BY_CONTENT = ("import_path", "model", "revision", "lora", "limit", "kinds", "captions_per_image")
"""Settings that enter a key through the content they choose: its inputs and models."""
_AFTERWARDS = ("score", "min_clip_score", "keep_best")
"""Settings of what is done with images once they are there: each makes another artifact, from the one without it."""
_EXTENSIONS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}

Progress = Callable[[int, int], None]
Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Planned:
    """One image to make: which caption it belongs to and what its file is called (without an extension)."""

    key: str
    stem: str
    caption_id: str
    caption: str
    owner: str
    label: str | None
    k: int


def plan_key(profile: Profile) -> StageKey:
    """What `run` would make, without loading a model; captions and images enter by content, not by path.

    Raises:
        InputError: Captions or images that are missing or corrupt.
        UsageError: A hub model without its revision.
    """
    dataset = _read(profile)
    plan = _planned(profile, dataset)
    key = _key(profile, dataset, plan)
    generate = profile.generate
    if generate.score or _filtered(generate):
        key = _scored_key(profile, key)
    return _chosen_key(profile, key) if _filtered(generate) else key


class Plan(Sequence[Planned]):
    """Every image of an artifact, in its final order: by image record, caption, k.

    Args:
        rows: A caption and its image for each caption, or for each image that is imported.
        per_caption: Images of each.
        by_image: Files are named by their image's id instead of their caption's.
    """

    def __init__(
        self, rows: Sequence[tuple[Caption | None, Image]], *, per_caption: int, by_image: bool = False
    ) -> None:
        self._rows = rows
        self._per_caption = per_caption
        self._by_image = by_image

    def __len__(self) -> int:
        """Number of images."""
        return len(self._rows) * self._per_caption

    @overload
    def __getitem__(self, index: int) -> Planned: ...

    @overload
    def __getitem__(self, index: slice) -> list[Planned]: ...

    def __getitem__(self, index: int | slice) -> Planned | list[Planned]:
        """One image, or those of a slice."""
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        row, k = divmod(range(len(self))[index], self._per_caption)
        caption, image = self._rows[row]
        key = file_key(image.id if caption is None or self._by_image else caption.id, k)
        stem = f"images/{(row * self._per_caption + k) // PER_FOLDER:03d}/{key}"
        caption_id, text = (caption.id, caption.text) if caption else ("", "")
        return Planned(key, stem, caption_id, text, image.id, image.label, k)

    @property
    def captions(self) -> int:
        """Number of captions."""
        return len({caption.id if caption else "" for caption, _ in self._rows})

    @property
    def owners(self) -> int:
        """Number of image records."""
        return len({image.id for _, image in self._rows})

    def digest(self) -> str:
        """SHA-256 over what each image is drawn from: caption id, caption, owner, label, k."""

        def items() -> Iterator[str]:
            for caption, image in self._rows:
                caption_id, text = (caption.id, caption.text) if caption else ("", "")
                head = canonical_json([caption_id, text, image.id, image.label])[:-1]
                yield ",".join([f"{head},{k}]" for k in range(self._per_caption)])

        return digest_of_list(items())


def plan(profile: Profile) -> Plan:
    """The images `run` would make, in their order; raises what `plan_key` raises."""
    return _planned(profile, _read(profile))


def run(profile: Profile, workspace: Workspace, *, progress: Progress | None = None) -> Artifact:
    """Make (or find) the images that a profile asks for.

    ``gmail generate --captions coco.json --per-caption 5 --limit 20`` takes the first 20 image records of the file;
    each has 5 captions, each caption gets 5 images: 500 in all.

    Args:
        profile: What is read of it: ``generate``, ``data``, ``runtime`` and ``seed``.
        workspace: Where the artifact goes.
        progress: Called with (images done, images in all).

    Returns:
        The artifact: ``images/<000>/<key>.<ext>`` and ``records.jsonl`` with one object per image: key, caption_id,
        caption, owner, label, k, seed, attempt, sha256, path, bytes, width, height, truncated, generator; with
        ``generate.score`` also its scores, and in ``rejected.jsonl`` those that ``min_clip_score`` or ``keep_best``
        left out.

    Raises:
        InputError: Captions or images that are missing or corrupt.
        SetupError: A model or device this machine lacks.
        UsageError: Settings that do not fit the model.
        KeyboardInterrupt: After Ctrl-C, when the batch in progress is on disk.
    """
    work = _Work(profile)
    with workspace.open(work.key) as slot:
        made = slot.artifact if slot.done else work.finish(slot, progress=progress)
    return _afterwards(profile, workspace, made, progress=progress)


def run_part(
    profile: Profile, workspace: Workspace, *, part: tuple[int, int], progress: Progress | None = None
) -> Artifact | Waiting:
    """Make one of several parts of what ``run`` makes; the process that finds all parts done makes the artifact.

    Part i of n is the i-th of n runs of neighbouring shards. The processes of all parts may run together, on machines
    that share the workspace; one that was killed is started again with the same part, or left to ``run``.

    Args:
        profile: As for ``run``; the same in every process.
        workspace: As for ``run``.
        part: (i, n): which part, counted from 1, of how many.
        progress: Called with (images done, images of the part).

    Raises:
        UsageError: As ``run``; or i is not one of 1 to n.
    """
    number, parts = part
    sources.require_part(number, parts)
    work = _Work(profile)
    with workspace.open(work.key, shared=True) as slot:
        if not slot.done:
            count = len(work.shards)
            work.fill(slot, work.shards[count * (number - 1) // parts : count * number // parts], progress=progress)
            waiting = Waiting(work.key, sum(work.log(slot, shard).is_complete() for shard in work.shards), count)
            if waiting.done < waiting.shards:
                return waiting
    with workspace.open(work.key) as slot:
        made = slot.artifact if slot.done else work.finish(slot, progress=None)
    return _afterwards(profile, workspace, made, progress=None)


def estimate(profile: Profile, *, batches: int = 0) -> Record:
    """What `run` would make, and what it would cost.

    Args:
        profile: As for `run`.
        batches: How many to draw now, after one that is not counted, to tell time and disk from; nothing is written.

    Returns:
        images, captions; with ``batches`` also seconds_per_image, seconds, bytes_per_image and bytes.

    Raises:
        UsageError: Imported images are not drawn.
    """
    import time

    work = _Work(profile)
    told: Record = {"images": len(work.plan), "captions": work.plan.captions}
    if not batches:
        return told
    if profile.generate.source == "import":
        raise UsageError("--warm-up: imported images are not drawn", hint="Leave --warm-up out.")
    generate, sampler = profile.generate, work.sampler()

    def draw(count: int) -> list[int]:
        """Bytes of each image of so many batches."""
        drawn = (each for batch in sampler.draw(work.jobs, stop=count * generate.batch_size) for each in batch)
        return [len(_encode(each.pixels, extension=generate.format, quality=generate.quality)) for each in drawn]

    draw(1)  # it also sets things up
    started = time.perf_counter()
    written = draw(min(batches, -(-len(work.plan) // generate.batch_size)))
    seconds = (time.perf_counter() - started) / len(written)
    size = sum(written) // len(written)
    return told | {
        "seconds_per_image": seconds,
        "seconds": seconds * len(work.plan),
        "bytes_per_image": size,
        "bytes": size * len(work.plan),
    }


def regenerate(profile: Profile, artifact: Artifact, *, count: int, progress: Progress | None = None) -> list[str]:
    """Draw ``count`` images of an artifact again, chosen at random, and compare.

    On the kind of device that drew them the files must be equal byte for byte; across kinds (GPU and CPU) the mean
    absolute difference of the pixels may reach ``ACROSS_DEVICES``.

    Args:
        profile: ``generate.model`` and ``generate.revision`` name the pipeline, ``runtime`` says where to draw; the
            other settings are the artifact's own.
        artifact: What `run` made with ``source = "pipeline"``.
        count: How many; no more than there are.
        progress: Called with (images drawn, images to draw).

    Returns:
        What differs, a sentence for each image; empty when all is as recorded.

    Raises:
        InputError: Imported images, another artifact, one of another version, or a pipeline that is not the one that
            drew it.
    """
    import secrets

    if artifact.stage != "generate" or artifact.manifest["key"]["settings"]["source"] != "pipeline":
        raise InputError(
            f"{artifact.path} holds no images that `gmail generate` drew", hint="Imported images cannot be drawn again."
        )
    artifact.require_version()
    key = artifact.manifest["key"]
    own = {name: value for name, value in key["settings"].items() if name not in ("name", "source", *_AFTERWARDS)}
    profile = profile.model_copy(
        update={"generate": profile.generate.model_copy(update=own | {"source": "pipeline"}), "seed": key["seed"]}
    )
    there = _models(profile.generate)
    for name, setting, what in (("generator", "model", "pipeline"), ("lora", "lora", "LoRA")):
        if there.get(name) != key["models"].get(name):
            given = getattr(profile.generate, setting)
            raise InputError(
                f"generate.{setting} = {given!r} is not the {what} that drew {artifact.path}",
                hint=f"Name it with --set generate.{setting}=... (and generate.revision, of a hub model).",
            )
    records = artifact.read_jsonl(RECORDS)
    rows = sorted(secrets.SystemRandom().sample(range(len(records)), min(count, len(records))))
    template = profile.generate.prompt_template
    chosen = [records[row] for row in rows]
    jobs = [diffusion.Job(r["caption_id"], _prompt(template, r["caption"], r["label"]), r["k"]) for r in chosen]
    sampler, device = _sampler(profile)
    alike = device.split(":")[0] == str(artifact.manifest["device"]).split(":")[0]
    drawn = (each for batch in sampler.draw(jobs) for each in batch)
    problems = []
    for done, (record, image) in enumerate(zip(chosen, drawn, strict=True)):
        content = _encode(image.pixels, extension=profile.generate.format, quality=profile.generate.quality)
        if hashlib.sha256(content).hexdigest() != record["sha256"]:
            problem = _difference(image, record, artifact, tolerated=0.0 if alike else ACROSS_DEVICES)
            problems += [f"{record['path']}: drawn again, {problem}"] if problem else []
        if progress:
            progress(done + 1, len(rows))
    return problems


def export(artifact: Artifact, target: str, *, shard_images: int = 10_000, progress: Progress | None = None) -> None:
    """Write images as WebDataset shards (``00000.tar``, ...) and a table of them all (``images.parquet``, last).

    Args:
        artifact: What `run` made.
        target: A folder that is new or empty, or an fsspec URL.
        shard_images: Images in one tar.
        progress: Called with (images written, images in all).

    Raises:
        InputError: An image is not as recorded.
        UsageError: There is something at ``target``.
    """
    from gmail_cli.components import shards
    from gmail_cli.components.images import GeneratedSet

    images = GeneratedSet.load(artifact.path)
    records = artifact.read_jsonl(RECORDS)
    about = {"model": artifact.manifest["key"]["models"].get("generator"), "settings": artifact.digest}
    tables: list[Any] = []

    def write(path: Path, rows: range) -> None:
        samples = ((row, records[row] | about, images.image_bytes(row)) for row in rows)
        tables.append(shards.table(shards.write_shard(path, samples, name=path.name)))
        if progress:
            progress(rows.stop, len(records))

    def write_table(path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.concat_tables(tables), path)

    def files() -> Iterator[tuple[str, Callable[[Path], object]]]:
        for number, first in enumerate(range(0, len(records), shard_images)):
            rows = range(first, min(first + shard_images, len(records)))
            yield f"{number:05d}.tar", partial(write, rows=rows)
        yield EXPORTED, write_table

    export_files(target, files())


def _difference(drawn: diffusion.Drawn, record: Record, artifact: Artifact, *, tolerated: float) -> str | None:
    """How an image drawn again differs from the stored one; None where its pixels are close enough."""
    import numpy as np

    from gmail_cli.components import images

    stored = np.asarray(images.decode(artifact.file(record["path"]).read_bytes(), name=record["path"]))
    if stored.shape != drawn.pixels.shape:
        return f"pixels of shape {drawn.pixels.shape} instead of {stored.shape}"
    apart = float(np.abs(stored.astype(np.int16) - drawn.pixels).mean())
    return f"pixels differ by {apart:.3g} of 255 on average" if apart > tolerated or not tolerated else None


# -- what to make ----------------------------------------------------------------------------------------------


def _read(profile: Profile) -> Dataset:
    generate, data = profile.generate, profile.data
    if generate.source == "import":
        return reader.read(generate.import_path, limit=generate.limit or None, on_bad=data.on_bad, need_images=True)
    return sources.read({**sources.source(profile, part="train"), "images": None, "limit": _limit(profile)})


def _limit(profile: Profile) -> int | None:
    return min(filter(None, (profile.generate.limit, profile.data.train_limit)), default=None)


def _planned(profile: Profile, dataset: Dataset) -> Plan:
    generate = profile.generate
    rows: list[tuple[Caption | None, Image]] = []
    for image in dataset.images:
        suitable = [each for each in dataset.captions_of(image.id) if each.kind in generate.kinds]
        if generate.source == "import":
            rows.append((suitable[0] if suitable else None, image))
        else:
            rows += [(caption, image) for caption in suitable[: generate.captions_per_image or None]]
    if not rows:
        raise InputError(
            f"{dataset.name} has no {' or '.join(generate.kinds)} caption", hint="set generate.kinds to others"
        )
    bare = next((image.id for _, image in rows if not image.label), None)
    if "{label}" in generate.prompt_template and generate.source == "pipeline" and bare is not None:
        raise InputError(
            f"generate.prompt_template has {{label}} and image {bare!r} of {dataset.name} has no class",
            hint="Take {label} out of the template, or name captions whose images have classes.",
        )
    if generate.source == "import":
        return Plan(rows, per_caption=1, by_image=True)
    return Plan(rows, per_caption=generate.per_caption)


def file_key(identity: str, k: int) -> str:
    """A file name for image ``k`` of an id: the id where it is a plain, lower-case name, else made so, and a hash."""
    plain = re.sub(r"[^a-z0-9._-]", "_", identity.lower()).lstrip(".")[:80]
    if plain != identity:
        plain += "-" + hashlib.sha256(identity.encode()).hexdigest()[:12]
    return f"{plain}-{k}"


def _key(profile: Profile, dataset: Dataset, plan: Plan) -> StageKey:
    generate = profile.generate
    chosen = {name: value for name, value in settings(generate).items() if name not in (*_BY_CONTENT, *_AFTERWARDS)}
    captions = plan.digest()
    if generate.source == "import":
        for unused in _PIPELINE_ONLY:
            del chosen[unused]
        chosen["name"] = generate.name or "import"
        inputs = {"images": dataset.fingerprint, "captions": captions}
        return StageKey(stage="generate", settings=chosen, inputs=inputs)
    if generate.format == "png":
        del chosen["quality"]
    if not generate.lora:
        del chosen["lora_scale"]
    place, folder = diffusion.locate(generate.model)
    if folder is None and not generate.revision:
        raise UsageError(
            f"generate.model = {generate.model!r} is a hub id without generate.revision",
            hint="set generate.revision to a commit of the model's repository: the artifact then names its weights",
        )
    shown = generate.model if folder is None or generate.model == "tiny" else Path(place).resolve().name
    chosen["name"] = generate.name or shown
    return StageKey(
        stage="generate",
        settings=chosen,
        inputs={"captions": captions},
        models=_models(generate),
        seed=profile.seed,
    )


def _models(generate: Generate) -> dict[str, str]:
    """What is drawn with: digests of weights, or a hub model and its revision."""
    place, folder = diffusion.locate(generate.model)
    models = {"generator": folder_digest(folder) if folder else f"{place}@{generate.revision}"}
    if generate.lora:
        models["lora"] = file_sha256(diffusion.locate_lora(generate.lora))
    return models


# -- making it -------------------------------------------------------------------------------------------------


def _sampler(profile: Profile) -> tuple[diffusion.Sampler, str]:
    """The loaded pipeline, and the device it is on, for the manifest."""
    import torch

    generate = profile.generate
    if profile.runtime.threads:
        torch.set_num_threads(profile.runtime.threads)
    device = profile.runtime.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = diffusion.load_pipeline(
        generate.model,
        revision=generate.revision,
        scheduler=generate.scheduler,
        dtype=generate.dtype,
        device=device,
        lora=generate.lora,
        lora_scale=generate.lora_scale,
    )
    sampling = diffusion.Sampling(
        steps=generate.steps,
        guidance=generate.guidance,
        negative_prompt=generate.negative_prompt,
        height=generate.height,
        width=generate.width,
        batch_size=generate.batch_size,
        seed=profile.seed,
    )
    shown = f"cuda: {torch.cuda.get_device_name()}" if device == "cuda" else device
    return diffusion.Sampler(pipeline, sampling=sampling), shown


def _describe(sampler: diffusion.Sampler) -> Record:
    """What drew the images, as far as the settings do not say it."""
    return {
        "pipeline": type(sampler.pipeline).__name__,
        "scheduler": type(sampler.pipeline.scheduler).__name__,
        "encodings_reused": sampler.reuses_encodings,
    }


Task = Callable[[], Record]
"""Writes one image and returns its record; run on a worker thread."""


class _Work:
    """What a profile asks for, and the making of it."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.dataset = _read(profile)
        self.plan = _planned(profile, self.dataset)
        self.key = _key(profile, self.dataset, self.plan)
        generate = profile.generate
        size = IMPORT_CHUNK if generate.source == "import" else generate.batch_size
        step = size * max(1, SHARD // size)
        self.shards = [range(at, min(at + step, len(self.plan))) for at in range(0, len(self.plan), step)]
        self.jobs = _Jobs(self.plan, template=generate.prompt_template)
        self._sampler: diffusion.Sampler | None = None
        self._device = "cpu"

    def log(self, slot: Slot, shard: range) -> RowLog:
        """The records of a shard."""
        return slot.log(f"records/{shard.start:09d}")

    def finish(self, slot: Slot, *, progress: Progress | None) -> Artifact:
        """Make the shards that are missing, and the artifact."""
        while True:
            self.fill(slot, self.shards, progress=progress)
            lost = [shard for shard in self.shards if not self._adopt(slot, shard)]
            if not lost:
                break
        told = {"truncated": 0, "redrawn": 0}

        def rows() -> Iterator[Record]:
            for shard in self.shards:
                for record in self.log(slot, shard).read():
                    told["truncated"] += record["truncated"]
                    told["redrawn"] += record["attempt"] > 0
                    yield record

        slot.write_jsonl(RECORDS, rows())
        summary: Record = {
            "images": len(self.plan),
            "captions": self.plan.captions,
            "owners": self.plan.owners,
            "truncated_share": told["truncated"] / len(self.plan),
            "redrawn": told["redrawn"],
            "generator": self.key.settings["name"],
        }
        if self.profile.generate.source == "pipeline":
            summary |= _describe(self.sampler())
        return slot.commit(summary=summary, device=self._device)

    def fill(self, slot: Slot, shards: Sequence[range], *, progress: Progress | None) -> None:
        """Make the images of shards that are missing and that no other process is making.

        Raises:
            KeyboardInterrupt: After Ctrl-C, when the batch in progress is on disk.
        """
        missing = [shard for shard in shards if not self.log(slot, shard).is_complete()]
        total = sum(map(len, shards))
        done = total - sum(map(len, missing))
        if progress and not missing:
            progress(done, total)
        with _deferred_interrupt() as interrupted, ThreadPoolExecutor(max(1, self.profile.runtime.workers)) as pool:
            for shard in missing:
                log = self.log(slot, shard)
                with log.claim() as mine:
                    if not mine:
                        continue
                    start = shard.start + self._whole(slot, shard, log)
                    done += start - shard.start
                    waiting: list[Future[Record]] = []
                    for chunk in self._chunks(slot, range(start, shard.stop)):
                        running = [pool.submit(task) for task in chunk]
                        done += _flush(log, waiting, progress=progress, done=done, total=total)
                        waiting = running
                        if interrupted():
                            break
                    done += _flush(log, waiting, progress=progress, done=done, total=total)
                    if interrupted():
                        raise KeyboardInterrupt
                    log.complete()

    def _whole(self, slot: Slot, shard: range, log: RowLog) -> int:
        """How many images of a shard are there, from its first; the log is cut to them."""
        records = log.read()
        count = 0
        for planned, record in zip(self.plan[shard.start : shard.stop], records, strict=False):
            path = slot.path(record["path"])
            if record["key"] != planned.key or not path.is_file() or path.stat().st_size != record["bytes"]:
                break
            count += 1
        if count < len(records):
            log.keep(count)
        return count

    def _adopt(self, slot: Slot, shard: range) -> bool:
        """Enter the images of a shard in the artifact; false where some are not there any more, to be made again."""
        log = self.log(slot, shard)
        records = log.read()
        for count, record in enumerate(records):
            if not slot.adopt(record["path"], sha256=record["sha256"], size=record["bytes"]):
                log.keep(count)
                return False
        return len(records) == len(shard)

    def _chunks(self, slot: Slot, rows: range) -> Iterator[list[Task]]:
        name = self.key.settings["name"]
        if self.profile.generate.source == "import":
            return _imported(slot, self.plan, self.dataset, name=name, rows=rows)
        return self._drawn(slot, name=name, rows=rows)

    def _drawn(self, slot: Slot, *, name: str, rows: range) -> Iterator[list[Task]]:
        extension, quality = self.profile.generate.format, self.profile.generate.quality

        def task(planned: Planned, drawn: diffusion.Drawn) -> Record:
            content = _encode(drawn.pixels, extension=extension, quality=quality)
            made = {"seed": drawn.seed, "attempt": drawn.attempt, "truncated": drawn.truncated, "generator": name}
            height, width, _ = drawn.pixels.shape
            return _write(slot, planned, content, extension=extension, width=width, height=height) | made

        position = rows.start
        for batch in self.sampler().draw(self.jobs, start=rows.start, stop=rows.stop):
            yield [partial(task, self.plan[position + row], drawn) for row, drawn in enumerate(batch)]
            position += len(batch)

    def sampler(self) -> diffusion.Sampler:
        """The pipeline, loaded when it is first needed."""
        if self._sampler is None:
            self._sampler, self._device = _sampler(self.profile)
        return self._sampler


def _flush(log: RowLog, waiting: Sequence[Future[Record]], *, progress: Progress | None, done: int, total: int) -> int:
    """Append the records of images that are being written, when they are on disk; their number."""
    log.append([future.result() for future in waiting])
    if progress:
        progress(done + len(waiting), total)
    return len(waiting)


class _Jobs(Sequence[diffusion.Job]):
    """What the pipeline is told for each image of a plan."""

    def __init__(self, plan: Plan, *, template: str) -> None:
        self._plan = plan
        self._template = template

    def __len__(self) -> int:
        return len(self._plan)

    @overload
    def __getitem__(self, index: int) -> diffusion.Job: ...

    @overload
    def __getitem__(self, index: slice) -> list[diffusion.Job]: ...

    def __getitem__(self, index: int | slice) -> diffusion.Job | list[diffusion.Job]:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        planned = self._plan[index]
        prompt = _prompt(self._template, planned.caption, planned.label)
        return diffusion.Job(planned.caption_id, prompt, planned.k)


def _prompt(template: str, caption: str, label: str | None) -> str:
    """What the pipeline is told; what stands in a caption is not taken for a place to fill."""
    filled = {"{caption}": caption, "{label}": label or ""}
    return "".join(filled.get(part, part) for part in re.split(r"(\{caption\}|\{label\})", template))


def _imported(slot: Slot, plan: Plan, dataset: Dataset, *, name: str, rows: range) -> Iterator[list[Task]]:
    def task(row: int) -> Record:
        planned, content = plan[row], dataset.image_bytes(row)
        extension, width, height = _inspect(content, name=f"image {planned.owner!r}")
        made = {"seed": None, "attempt": 0, "truncated": False, "generator": name}
        return _write(slot, planned, content, extension=extension, width=width, height=height) | made

    for first in range(rows.start, rows.stop, IMPORT_CHUNK):
        yield [partial(task, row) for row in range(first, min(first + IMPORT_CHUNK, rows.stop))]


def _write(slot: Slot, planned: Planned, content: bytes, *, extension: str, width: int, height: int) -> Record:
    path = f"{planned.stem}.{extension}"
    slot.write_loose(path, content)
    return {
        "key": planned.key,
        "caption_id": planned.caption_id,
        "caption": planned.caption,
        "owner": planned.owner,
        "label": planned.label,
        "k": planned.k,
        "sha256": hashlib.sha256(content).hexdigest(),
        "path": path,
        "bytes": len(content),
        "width": width,
        "height": height,
    }


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Hold the first Ctrl-C until it is asked for; the second one acts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = threading.Event()
    before = signal.getsignal(signal.SIGINT)

    def handler(*_: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, handler)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)


# -- what is done with images that are there -------------------------------------------------------------------


def _filtered(generate: Generate) -> bool:
    return generate.min_clip_score > 0 or generate.keep_best > 0


def _afterwards(profile: Profile, workspace: Workspace, made: Artifact, *, progress: Progress | None) -> Artifact:
    """Score and choose among the images of an artifact, as far as the profile asks for it."""
    if profile.generate.score or _filtered(profile.generate):
        made = _score(profile, workspace, made, progress=progress)
    return _choose(profile, workspace, made) if _filtered(profile.generate) else made


def _scored_key(profile: Profile, drawn: StageKey) -> StageKey:
    from gmail_cli.components.encoders import model_digest

    clip = model_digest(profile.model.clip, revision=profile.model.revision, seed=profile.seed)
    inputs = {**drawn.inputs, "drawn": drawn.digest}
    partners = _partners(profile)
    if partners is not None:
        inputs["partners"] = partners.fingerprint
    return replace(
        drawn, settings={**drawn.settings, "score": True}, inputs=inputs, models={**drawn.models, "clip": clip}
    )


def _chosen_key(profile: Profile, scored: StageKey) -> StageKey:
    chosen = {name: getattr(profile.generate, name) for name in ("min_clip_score", "keep_best")}
    return replace(scored, settings={**scored.settings, **chosen}, inputs={**scored.inputs, "scored": scored.digest})


def _key_of(artifact: Artifact) -> StageKey:
    return StageKey(**{name: value for name, value in artifact.manifest["key"].items() if name != "version"})


def _partners(profile: Profile) -> Dataset | None:
    """The real images that drawn captions describe, where they are at hand."""
    if profile.generate.source == "import":
        return None
    dataset = sources.read({**sources.source(profile, part="train"), "limit": _limit(profile)})
    return dataset if dataset.has_images else None


def _score(profile: Profile, workspace: Workspace, drawn: Artifact, *, progress: Progress | None) -> Artifact:
    from gmail_cli.components import encoders, quality
    from gmail_cli.components.images import GeneratedSet

    with workspace.open(_scored_key(profile, _key_of(drawn))) as slot:
        if slot.done:
            return slot.artifact
        images = GeneratedSet.load(drawn.path)
        captions = [each.caption for each in images.rows]
        if not all(captions):
            bare = next(each for each in images.rows if not each.caption)
            raise InputError(f"image {bare.key!r} has no caption to score it by", hint="Set generate.score = false.")
        device = encoders.pick_device(profile.runtime.device)
        real = _partners(profile)
        row_of = {image.id: row for row, image in enumerate(real.images)} if real else {}
        partners = [row_of[each.owner] for each in images.rows] if real else []
        clip: encoders.Clip | None = None
        parts = quality.chunks([f"{each.caption_id} {each.caption}" for each in images.rows])
        for part in parts:
            log = slot.log(f"scores/{part.start:09d}")
            with log.claim() as mine:
                if mine:
                    clip = clip or encoders.load_clip(
                        profile.model.clip, revision=profile.model.revision, device=device, seed=profile.seed
                    )
                    log.keep(0)
                    log.append(
                        quality.score(
                            clip,
                            part,
                            image_bytes=images.image_bytes,
                            captions=captions,
                            partner_bytes=real.image_bytes if real else None,
                            partners=partners,
                            workers=profile.runtime.workers,
                        )
                    )
                    log.complete()
            if progress:
                progress(part.stop, len(images))
        scores = [row for part in parts for row in slot.log(f"scores/{part.start:09d}").read()]
        rows = [record | row for record, row in zip(drawn.read_jsonl(RECORDS), scores, strict=True)]
        _adopt_all(slot, drawn, rows)
        slot.write_jsonl(RECORDS, rows)
        told = {
            name: quality.summarise(values)
            for name in ("clip_score", "twin_similarity", "partner_similarity")
            if (values := [row[name] for row in rows if row[name] is not None])
        }
        return slot.commit(summary={**drawn.summary, **told}, device=encoders.describe_device(device))


def _choose(profile: Profile, workspace: Workspace, scored: Artifact) -> Artifact:
    from gmail_cli.components import quality

    generate = profile.generate
    with workspace.open(_chosen_key(profile, _key_of(scored))) as slot:
        if slot.done:
            return slot.artifact
        rows = scored.read_jsonl(RECORDS)
        reasons = quality.choose(rows, minimum=generate.min_clip_score, best=generate.keep_best)
        kept = [row for row, reason in zip(rows, reasons, strict=True) if not reason]
        rejected = [row | {"reason": reason} for row, reason in zip(rows, reasons, strict=True) if reason]
        _adopt_all(slot, scored, kept)
        slot.write_jsonl(RECORDS, kept)
        slot.write_jsonl(REJECTED, rejected)
        captions = {row["caption_id"] for row in kept}
        summary = {
            **scored.summary,
            "images": len(kept),
            "captions": len(captions),
            "owners": len({row["owner"] for row in kept}),
            "truncated_share": sum(row["truncated"] for row in kept) / len(kept),
            "redrawn": sum(row["attempt"] > 0 for row in kept),
            "clip_score": quality.summarise([row["clip_score"] for row in kept]),
            "rejected": len(rejected),
            "captions_without_image": len({row["caption_id"] for row in rejected} - captions),
        }
        return slot.commit(summary=summary, device=scored.manifest["device"])


def _adopt_all(slot: Slot, origin: Artifact, records: Sequence[Record]) -> None:
    """Take over the images of another artifact, without copies where the file system can."""
    for record in records:
        name, sha256, size = record["path"], record["sha256"], record["bytes"]
        if slot.adopt(name, sha256=sha256, size=size):
            continue
        slot.link_loose(name, origin.file(name))
        if not slot.adopt(name, sha256=sha256, size=size):
            hint = "Run `gmail artifacts verify`, delete the artifact and generate again."
            raise InputError(f"{origin.path / name} is not as recorded", hint=hint)


# -- image files -----------------------------------------------------------------------------------------------


def _encode(pixels: np.ndarray, *, extension: str, quality: int) -> bytes:
    import PIL.Image

    stream = io.BytesIO()
    options = {} if extension == "png" else {"quality": quality}
    PIL.Image.fromarray(pixels).save(stream, format={"jpg": "JPEG"}.get(extension, extension.upper()), **options)
    return stream.getvalue()


def _inspect(content: bytes, *, name: str) -> tuple[str, int, int]:
    """Extension, width and height (upright) of an encoded image that can be decoded."""
    import PIL.Image

    from gmail_cli.components import images

    upright = images.decode(content, name=name)
    with PIL.Image.open(io.BytesIO(content)) as image:
        kind = str(image.format)
    if kind not in _EXTENSIONS:
        raise InputError(f"{name} is a {kind} image", hint=f"Import {', '.join(_EXTENSIONS)}.")
    return _EXTENSIONS[kind], upright.width, upright.height
