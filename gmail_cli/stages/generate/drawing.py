"""Making the images: shards of the plan, each with a log of its records, by any number of processes."""

from __future__ import annotations

import contextlib
import hashlib
import io
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

from gmail_cli.artifacts import Artifact, RowLog, Slot, Waiting, Workspace
from gmail_cli.components import diffusion, pipelines
from gmail_cli.errors import InputError
from gmail_cli.profile.schema import Profile
from gmail_cli.stages.generate.planning import (
    RECORDS,
    Jobs,
    Plan,
    Planned,
    Record,
    device_of,
    key_of,
    planned_images,
    read,
    templates_of,
    weights_of,
)
from gmail_cli.stages.generate.reuse import Earlier, Found, look
from gmail_cli.stages.generate.writing import Prompts, counted, free

if TYPE_CHECKING:
    import numpy as np

    from gmail_cli.components.captions import Dataset

IMPORT_CHUNK = 64
"""Images brought in between two writes of their records."""
SHARD = 256
"""Images that one process works on, up to whole batches."""
_EXTENSIONS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}

Progress = Callable[[int, int], None]


def load_sampler(profile: Profile, *, dataset: Dataset | None = None) -> tuple[diffusion.Sampler, str]:
    """The loaded pipeline, and the device it is on, for the manifest.

    Args:
        profile: What is read of it: ``generate``, ``runtime``, ``seed``.
        dataset: Where images begin that do not begin as noise.
    """
    import torch

    generate = profile.generate
    device = device_of(profile)
    pipeline = pipelines.load_pipeline(
        generate.model,
        revision=generate.revision,
        scheduler=generate.scheduler,
        timestep_spacing=generate.timestep_spacing,
        dtype=generate.dtype,
        device=device,
        lora=generate.lora,
        lora_scale=generate.lora_scale,
        image_to_image=generate.strength > 0,
        compiled=generate.compile,
    )
    sampling = diffusion.Sampling(
        steps=generate.steps,
        guidance=generate.guidance,
        negative_prompt=generate.negative_prompt,
        height=generate.height,
        width=generate.width,
        batch_size=generate.batch_size,
        strength=generate.strength,
        prompt_windows=generate.prompt_windows,
        seed=profile.seed,
    )
    begins: Callable[[str], bytes] | None = None
    if generate.strength and dataset is not None:
        row_of = {image.id: row for row, image in enumerate(dataset.images)}
        real = dataset

        def begins(owner: str) -> bytes:
            if owner not in row_of:
                hint = "Name the set that the images were drawn for with --set data.train=PATH."
                raise InputError(f"{real.name} has no image {owner!r} to begin with", hint=hint)
            return real.image_bytes(row_of[owner])

    shown = f"cuda: {torch.cuda.get_device_name()}" if device == "cuda" else device
    return diffusion.Sampler(pipeline, sampling=sampling, begins=begins), shown


_DESCRIBED = ("pipeline", "scheduler", "encodings_reused")


def _describe(sampler: diffusion.Sampler) -> Record:
    """What drew the images, as far as the settings do not say it."""
    return {
        "pipeline": type(sampler.pipeline).__name__,
        "scheduler": type(sampler.pipeline.scheduler).__name__,
        "encodings_reused": sampler.reuses_encodings,
    }


Task = Callable[[], Record]
"""Writes one image and returns its record; run on a worker thread."""


class Work:
    """What a profile asks for, and the making of it.

    Args:
        profile: With one generator.
        dataset: Of the profile, if it has been read.
        plan: Its images, or a part of them.
    """

    def __init__(self, profile: Profile, *, dataset: Dataset | None = None, plan: Plan | None = None) -> None:
        self.profile = profile
        self.dataset = dataset or read(profile)
        self.plan = plan or planned_images(profile, self.dataset)
        self.key = key_of(profile, self.dataset, self.plan)
        generate = profile.generate
        size = IMPORT_CHUNK if generate.source == "import" else generate.batch_size
        step = size * max(1, SHARD // size)
        self.shards = [range(at, min(at + step, len(self.plan))) for at in range(0, len(self.plan), step)]
        self.jobs = Jobs(self.plan, templates=templates_of(generate))
        self.prompts = Prompts(profile, self.plan) if generate.rewrite.lm else None
        self.earlier = Earlier({})
        self._sampler: diffusion.Sampler | None = None
        self._device = "cpu"

    def log(self, slot: Slot, shard: range) -> RowLog:
        """The records of a shard."""
        return slot.log(f"records/{shard.start:09d}")

    def make(self, workspace: Workspace, *, progress: Progress | None) -> Artifact:
        """Make or find the artifact."""
        with workspace.open(self.key) as slot:
            if slot.done:
                return slot.artifact
            self.look(slot, workspace)
            return self.finish(slot, progress=progress)

    def make_part(
        self, workspace: Workspace, *, part: tuple[int, int], progress: Progress | None
    ) -> Artifact | Waiting:
        """Make the i-th of n runs of neighbouring shards; and the artifact, if that were all that was missing."""
        number, parts = part
        with workspace.open(self.key, shared=True) as slot:
            if not slot.done:
                self.look(slot, workspace)
                count = len(self.shards)
                self.fill(slot, self.shards[count * (number - 1) // parts : count * number // parts], progress=progress)
                done = sum(self.log(slot, shard).is_complete() for shard in self.shards)
                if done < count:
                    return Waiting(self.key, done, count)
        return self.make(workspace, progress=None)

    def look(self, slot: Slot, workspace: Workspace) -> None:
        """Look for images that other artifacts of the workspace hold; once, whoever resumes remembers."""
        if self.profile.generate.source == "import":
            return
        kept = slot.checkpoints("earlier")
        places = kept.load()
        if places is None:
            places = look(workspace, self.key, device=device_of(self.profile))
            kept.save(places)
            if workspace.tell and places:
                workspace.tell(f"generate: what {' and '.join(places)} hold of these images is taken over")
        self.earlier = Earlier(places)

    def at_hand(self, workspace: Workspace) -> int:
        """How many of the images finished artifacts of the workspace hold."""
        if self.profile.generate.source == "import":
            return 0
        earlier = Earlier(look(workspace, self.key, device=device_of(self.profile)))
        return sum(len(earlier.find(self.plan[shard.start : shard.stop])) for shard in self.shards) if earlier else 0

    def finish(self, slot: Slot, *, progress: Progress | None) -> Artifact:
        """Make the shards that are missing, and the artifact."""
        while True:
            self.fill(slot, self.shards, progress=progress)
            lost = [shard for shard in self.shards if not self._adopt(slot, shard)]
            if not lost:
                break
        told, reused = Counter[str](), Counter[str]()

        def rows() -> Iterator[Record]:
            for shard in self.shards:
                for record in self.log(slot, shard).read():
                    reused[record.pop("reused", "")] += 1
                    told["truncated"] += record["truncated"]
                    told["redrawn"] += record["attempt"] > 0
                    told.update(counted([record]))
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
        if self.prompts is not None:
            summary["not_rewritten"] = told["not_rewritten"]
        drawn = reused.pop("", 0)
        origins = [Artifact.load(home) for home in self.earlier.homes if home.name in reused and home.is_dir()]
        if self.profile.generate.source == "pipeline":
            described = _describe(self.sampler()) if drawn or not origins else origins[0].summary
            summary |= {name: described[name] for name in _DESCRIBED} | {"weights": weights_of(self.profile.generate)}
        if reused:
            summary["reused"] = dict(sorted(reused.items()))
        devices = {*([self._device] if drawn else []), *(str(each.manifest["device"]) for each in origins)}
        return slot.commit(summary=summary, device=", ".join(sorted(devices)) or self._device)

    def fill(self, slot: Slot, shards: Sequence[range], *, progress: Progress | None) -> None:
        """Make the prompts and images of shards that are missing and that no other process is making.

        Raises:
            KeyboardInterrupt: After Ctrl-C, when the batch in progress is on disk.
        """
        prompts = self.prompts
        missing = [shard for shard in shards if not self.log(slot, shard).is_complete()]
        total = sum(map(len, shards))
        done = total - sum(map(len, missing))
        if progress and not missing:
            progress(done, total)
        with _deferred_interrupt() as interrupted, ThreadPoolExecutor(max(1, self.profile.runtime.workers)) as pool:
            if prompts is not None and missing:
                there = (done, total)
                progress = prompts.write(slot, missing, interrupted=interrupted, progress=progress, images=there)
            for shard in missing:
                if prompts is not None and not prompts.log(slot, shard).is_complete():
                    continue
                log = self.log(slot, shard)
                with log.claim() as mine:
                    if not mine:
                        continue
                    start = shard.start + self._whole(slot, shard, log)
                    done += start - shard.start
                    waiting: list[Future[Record]] = []
                    for chunk in self._chunks(slot, shard, start):
                        running = [pool.submit(task) for task in chunk]
                        done += _flush(log, waiting, progress=progress, done=done, total=total)
                        waiting = running
                        if interrupted():
                            break
                    done += _flush(log, waiting, progress=progress, done=done, total=total)
                    if interrupted():
                        raise KeyboardInterrupt(f"{done} of {total} images are there")
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

    def _chunks(self, slot: Slot, shard: range, start: int) -> Iterator[list[Task]]:
        name = self.key.settings["name"]
        if self.profile.generate.source == "import":
            return _imported(slot, self.plan, self.dataset, name=name, rows=range(start, shard.stop))
        return self._drawn(slot, shard, name=name, start=start)

    def _drawn(self, slot: Slot, shard: range, *, name: str, start: int) -> Iterator[list[Task]]:
        extension, quality = self.profile.generate.format, self.profile.generate.quality
        jobs, written, before = self.jobs, None, 0
        if self.prompts is not None:  # those of other shards need not be there yet
            written, before = self.prompts.read(slot, shard), shard.start
            images = self.plan[shard.start : shard.stop]
            jobs = Jobs(images, templates=templates_of(self.profile.generate), written=written)

        def task(position: int, drawn: diffusion.Drawn) -> Record:
            content = encode(drawn.pixels, extension=extension, quality=quality)
            made = {"seed": drawn.seed, "attempt": drawn.attempt, "truncated": drawn.truncated, "generator": name}
            if written is not None:
                made["rewritten"] = written[position - before]
            height, width, _ = drawn.pixels.shape
            planned = self.plan[position]
            return _write(slot, planned, content, extension=extension, width=width, height=height) | made

        def there(position: int) -> Task:
            return partial(_taken_over, slot, self.plan[position], found[position])

        found = self._found(shard, written)
        if found:
            left = [position for position in shard if position not in found]
            images = [self.plan[position] for position in left]
            texts = [written[position - before] for position in left] if written is not None else None
            jobs = Jobs(images, templates=templates_of(self.profile.generate), written=texts)
            begun = sum(position < start for position in left)
            where = {"first": 0, "start": begun, "stop": len(left)}
            places = iter(left[begun:])
        else:
            where = {"first": shard.start - before, "start": start - before, "stop": shard.stop - before}
            places = iter(range(start, shard.stop))
        at = start
        for batch in self.sampler().draw(jobs, **where) if where["start"] < where["stop"] else ():
            tasks: list[Task] = []
            for drawn in batch:
                place = next(places)
                tasks += [*map(there, range(at, place)), partial(task, place, drawn)]
                at = place + 1
            yield tasks
        for first in range(at, shard.stop, IMPORT_CHUNK):
            yield [there(position) for position in range(first, min(first + IMPORT_CHUNK, shard.stop))]

    def _found(self, shard: range, written: Sequence[str | None] | None) -> dict[int, Found]:
        """Position -> image, of those of a shard that are there already."""
        found = self.earlier.find(self.plan[shard.start : shard.stop]) if self.earlier else {}
        return {
            shard.start + place: each
            for place, each in found.items()
            if (written is None or each.record["rewritten"] == written[place]) and each.is_whole()
        }

    def sampler(self) -> diffusion.Sampler:
        """The pipeline, loaded when it is first needed."""
        if self._sampler is None:
            self._sampler, self._device = load_sampler(self.profile, dataset=self.dataset)
        return self._sampler

    def unload(self) -> None:
        """Forget the pipeline."""
        self._sampler = None
        free()


def _flush(log: RowLog, waiting: Sequence[Future[Record]], *, progress: Progress | None, done: int, total: int) -> int:
    """Append the records of images that are being written, when they are on disk; their number."""
    log.append([future.result() for future in waiting])
    if progress:
        progress(done + len(waiting), total)
    return len(waiting)


def _imported(slot: Slot, plan: Plan, dataset: Dataset, *, name: str, rows: range) -> Iterator[list[Task]]:
    def task(row: int) -> Record:
        planned, content = plan[row], dataset.image_bytes(row)
        extension, width, height = _inspect(content, name=f"image {planned.owner!r}")
        made = {"seed": None, "attempt": 0, "truncated": False, "generator": name}
        return _write(slot, planned, content, extension=extension, width=width, height=height) | made

    for first in range(rows.start, rows.stop, IMPORT_CHUNK):
        yield [partial(task, row) for row in range(first, min(first + IMPORT_CHUNK, rows.stop))]


def _taken_over(slot: Slot, planned: Planned, found: Found) -> Record:
    """The record of an image that another artifact holds; its log tells which."""
    path = f"{planned.stem}{found.file.suffix}"
    slot.link_loose(path, found.file)
    return found.record | {"path": path, "reused": found.home.name}


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


def encode(pixels: np.ndarray, *, extension: str, quality: int) -> bytes:
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
